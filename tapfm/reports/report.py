"""The run's result: one table, the numbers behind it, and pictures.

    predictions_<split>.csv   a row a slide: slide_id, case_id, a column a label (blank: unknown),
                              then `p_<label> (<row>)` for every label and row of the table
    metrics_<split>.json      every figure of the table, with intervals, draws and counts
    report.md                 the table, notes and pictures
    roc.png                   ROC curves, a panel a label
    reliability.png           share of positives against probability, likewise
    curves.png                training curves, where a row has a metrics.csv

Rows are compared on the slides that all of them predicted; any other slide is listed with its
reason. Each end-to-end row is set against the better frozen one, on the same bootstrap draws.
"Better" is the higher macro AUROC on the very split reported, among all rows that were not trained
end to end: that choice favours the frozen side, so the difference is, if anything, too small.

Keys of metrics_<split>.json. An INTERVAL is {value, low, high, draws}, 95 %; what is undefined is
null. LABELS stands for an entry a label, and one, `macro`: the mean of those its `labels` names.

    split, slides, cases, draws, seed, reference, skipped [{slide_id, reason}]
    task {name, labels, ...}, see `tapfm.tasks`
    arms.<title>
        end_to_end
        figures              LABELS: auroc, auprc INTERVAL; positives, known
        auroc_difference     LABELS: INTERVAL, less the reference; null for a frozen row
        delong               by label: value, se, low, high (slides of a case taken together),
                             positive_cases, negative_cases; difference, se_difference, p against
                             the reference, null for a frozen row
        operating_points     LABELS: balanced | f1 | specificity_90, each with threshold (null in
                             macro), chosen_on "val", and INTERVAL of balanced_accuracy,
                             sensitivity, specificity, f1; null without validation predictions
        calibration          LABELS: raw | temperature | platt, each with slope (1 / temperature),
                             shift, ece, brier INTERVAL and bins [{low, high, slides, predicted,
                             observed}]; macro has labels, ece and brier in each; the last two are
                             null without validation predictions
        subgroups            site | stain (where there are two), then its values, each: slides,
                             cases, and in `labels` by label positive_cases, negative_cases,
                             known, auroc INTERVAL, null with fewer than 10 cases of a class

Shapes: N slides, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from slides.files import write_csv, write_json, write_text
from tapfm.inference.heatmap import save_figure
from tapfm.reports.details import describe, sections
from tapfm.reports.figures import curves_figure, reliability_figure, roc_figure
from tapfm.reports.plain_table import FEW_DRAWS, markdown, ruled, span
from tapfm.reports.rows import ResultRow, aligned_rows
from tapfm.stats.metrics import MACRO, ONE_CLASS, evaluate, paired_difference


def write_results(
    folder: Path,
    split: str,
    labels: Sequence[str],
    arms: Sequence[ResultRow],
    skipped: Sequence[tuple[str, str]] = (),
    draws: int = 2000,
    seed: int = 0,
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Evaluate, compare, write all files of the report.

    Args:
        folder: where to; made.
        split: its name.
        labels: K names.
        arms: the table's rows, in its order.
        skipped: (slide_id, reason) of slides that were left out before.
        draws: bootstrap draws.
        seed: of the draws.
        groups: such as site: slide_id -> its own, for the tables by group.

    Returns:
        The table and its notes as text.

    Raises:
        ResultRowError: rows that cannot be set side by side, see `aligned_rows`.
    """
    labels = list(labels)
    arms, skipped = aligned_rows(arms, skipped)
    y_NK, cases = arms[0].y_NK, arms[0].case_ids
    figures = {arm.title: evaluate(labels, y_NK, arm.p_NK, cases, draws, seed) for arm in arms}
    reference = _reference(arms, figures)
    gains = {
        arm.title: paired_difference(labels, y_NK, arm.p_NK, reference.p_NK, cases, draws, seed)
        for arm in arms
        if arm.end_to_end and reference is not None
    }
    groups = {kind: [of[s] for s in arms[0].slide_ids] for kind, of in (groups or {}).items()}
    behind = {
        arm.title: describe(
            labels, y_NK, arm.p_NK, cases, validation=arm.validation, groups=groups,
            reference_NK=reference.p_NK if arm.title in gains else None, draws=draws, seed=seed,
        )
        for arm in arms
    }  # fmt: skip
    result = {
        "split": split,
        "task": {"name": "multilabel", "labels": labels},
        "slides": len(cases),
        "cases": len(set(cases)),
        "draws": draws,
        "seed": seed,
        "reference": reference.title if reference else None,
        "arms": {
            arm.title: {
                "end_to_end": arm.end_to_end,
                "figures": figures[arm.title],
                "auroc_difference": gains.get(arm.title),
                **behind[arm.title],
            }
            for arm in arms
        },
        "skipped": [{"slide_id": slide, "reason": reason} for slide, reason in skipped],
    }
    table = _table(labels, arms, figures, gains, reference, draws)
    notes = _notes(result, arms, figures, reference)
    result["notes"] = notes
    _write_predictions(folder / f"predictions_{split}.csv", labels, arms)
    write_json(folder / f"metrics_{split}.json", result)
    drawn = [
        save_figure(roc_figure(labels, arms), folder / "roc.png"),
        save_figure(reliability_figure(labels, arms), folder / "reliability.png"),
    ]
    if any(arm.metrics_csv for arm in arms):
        drawn.append(save_figure(curves_figure(arms), folder / "curves.png"))
    notes = [*notes, *_left_out(result)]
    text = results_page(split, table, notes, drawn) + "\n" + sections(labels, behind)
    write_text(folder / "report.md", text)
    wrapped = [line for note in notes for line in wrap(note, 100, subsequent_indent="  ")]
    return "\n".join([*ruled(table), "", *wrapped])


def _reference(arms: Sequence[ResultRow], figures: dict) -> ResultRow | None:
    """The row not trained end to end with the highest macro AUROC; None without one."""
    frozen = [arm for arm in arms if not arm.end_to_end]
    value = {arm.title: figures[arm.title][MACRO]["auroc"].value for arm in frozen}
    defined = [arm for arm in frozen if not math.isnan(value[arm.title])]
    return max(defined, key=lambda arm: value[arm.title]) if defined else None


def _table(labels, arms, figures, gains, reference, draws) -> list[list[str]]:
    """Header and cells: for macro and each label, a row an arm."""
    table = [["label", "positive", "model", "AUROC [95 %]", "AUPRC [95 %]", "AUROC minus *"]]
    for label in [MACRO, *labels]:
        for arm in arms:
            found, first = figures[arm.title][label], arm is arms[0]
            count = "" if label == MACRO else f"{found['positives']}/{found['known']}"
            mark = " *" if reference is not None and arm.title == reference.title else ""
            gain = gains.get(arm.title)
            table.append(
                [
                    label if first else "",
                    count if first else "",
                    arm.title + mark,
                    span(found["auroc"], draws, undefined=ONE_CLASS),
                    span(found["auprc"], draws, undefined=ONE_CLASS),
                    span(gain and gain[label], draws, "+", ONE_CLASS),
                ]
            )
    return table


def _notes(result: dict, arms, figures, reference) -> list[str]:
    """What a reader must know to read the table."""
    notes = [
        f"{result['split']} split: {result['slides']} slides of {result['cases']} cases. "
        f"Intervals: 95 %, from {result['draws']} bootstrap draws of whole cases; symmetric on "
        "the logit scale, for differences percentiles."
    ]
    averaged = figures[arms[0].title][MACRO]["labels"]
    notes.append(f"macro: mean over {', '.join(averaged) or 'no label: none has both classes'}.")
    if reference is not None:
        notes.append(
            f"* {reference.title}: the highest macro AUROC on this split of the rows not trained "
            "end to end. Chosen on the split it is reported on, which favours it; differences are "
            "paired, on the same draws."
        )
    else:
        notes.append("No row without end-to-end training to compare with: no differences.")
    intervals = [
        found[name]
        for each in figures.values()
        for found in each.values()
        for name in ("auroc", "auprc")
    ]
    fewest = min((i.draws for i in intervals if not math.isnan(i.value)), default=0)
    if fewest < FEW_DRAWS * result["draws"]:
        notes.append(
            f"† draws that lack a class are left out; as few as {fewest} of {result['draws']} "
            "remained, because cases of one class are few. Take that interval as a rough one."
        )
    if any(i.value == i.low == i.high == 1 for i in intervals):
        notes.append(
            "[1.000, 1.000] is what resampling a perfect ranking gives: too few slides to see its "
            "errors, not the absence of them."
        )
    return notes


def _left_out(result: dict) -> list[str]:
    """The slides that are in no row, each with its reason."""
    if not result["skipped"]:
        return []
    rows = [f"  {each['slide_id']}: {each['reason']}" for each in result["skipped"]]
    return [f"{len(rows)} slides left out:", *rows]


def results_page(split: str, table: list[list[str]], notes: list[str], drawn: list[Path]) -> str:
    """report.md: the table, what must be known to read it, the pictures."""
    listed = [f"- {note.strip()}" if note.startswith("  ") else f"{note}\n" for note in notes]
    pictures = [f"![{path.stem}]({path.name})" for path in drawn]
    text = "\n".join([markdown(table).replace(" * |", " \\* |"), "", *listed, "", *pictures])
    return f"# Results, {split} split\n\n" + text.replace("\n* ", "\n\\* ") + "\n"


def _write_predictions(path: Path, labels: Sequence[str], arms: Sequence[ResultRow]) -> None:
    columns = [(f"p_{label} ({arm.title})", arm.p_NK[:, k]) for arm in arms
               for k, label in enumerate(labels)]  # fmt: skip
    rows = [
        [slide, case, *("" if math.isnan(y) else int(y) for y in y_K)]
        + [f"{p_N[n]:.7g}" for _, p_N in columns]
        for n, (slide, case, y_K) in enumerate(
            zip(arms[0].slide_ids, arms[0].case_ids, arms[0].y_NK, strict=True)
        )
    ]
    write_csv(path, ["slide_id", "case_id", *labels, *(name for name, _ in columns)], rows)
