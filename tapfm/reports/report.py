"""Results of a multi-label run: the table, the numbers behind it, and figures.

    predictions_<split>.csv   a row a slide: slide_id, case_id, a column a label (blank: unknown),
                              then `p_<label> (<row>)` for every label and row of the table
    metrics_<split>.json      every figure of the table, with intervals, draws and counts
    report.md                 the table, notes and pictures
    roc.png                   ROC curves, a panel a label
    reliability.png           share of positives against probability, a panel a label
    curves.png                training curves, where a row has a metrics.csv

Rows are compared on the slides that all of them predicted; any other slide is listed with its
reason. Each end-to-end row is compared with the best frozen one, on the same bootstrap draws.
"Best" is the highest macro AUROC on the reported split itself, among all rows that were not trained
end to end: that choice favours the frozen side, so the difference is, if anything, too small.

Keys of metrics_<split>.json. An INTERVAL is {value, low, high, draws}, 95 %; what is undefined is
null. LABELS stands for an entry a label, and `macro`: the mean of those that its `labels` names.

    split, slides, cases, draws, seed, reference, skipped [{slide_id, reason}]
    verdicts [{run, row, control, figure, outcome, difference INTERVAL, choice, robustness,
        sites {run, control, more INTERVAL; chance, slides, sites}, sentence}], one for each
        adapted run, see `verdict`
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

from slides.files import write_csv, write_json, write_text
from tapfm.inference.heatmap import save_figure
from tapfm.reports.details import row_details, sections
from tapfm.reports.figures import curves_figure, reliability_figure, roc_figure
from tapfm.reports.plain_table import FEW_DRAWS, as_text, markdown, span
from tapfm.reports.rows import ResultRow, aligned_rows
from tapfm.reports.verdict import verdicts
from tapfm.stats.bootstrap import Interval
from tapfm.stats.metrics import MACRO, ONE_CLASS, evaluate, paired_difference
from tapfm.tasks.multilabel import Multilabel


def write_results(
    folder: Path,
    split: str,
    labels: Sequence[str],
    rows: Sequence[ResultRow],
    skipped: Sequence[tuple[str, str]] = (),
    draws: int = 2000,
    seed: int = 0,
    groups: Mapping[str, Mapping[str, str]] | None = None,
    slides_of: Mapping[str, int] | None = None,
) -> str:
    """Evaluate and compare rows, write all files of the report.

    Args:
        folder: created if missing.
        split: name of the split.
        labels: K names.
        rows: the table's rows, in its order.
        skipped: (slide_id, reason) of slides left out earlier.
        draws: bootstrap draws.
        seed: seed of the draws.
        groups: kind, such as site, to slide_id to group, for the tables by group.
        slides_of: slides of each row's bag, where bags are cases; None is one a bag.

    Returns:
        The table and its notes as text.

    Raises:
        ResultRowError: rows that cannot be compared, as in `aligned_rows`.
    """
    labels, (rows, skipped) = list(labels), aligned_rows(rows, skipped)
    y_NK, cases = rows[0].y_NK, rows[0].case_ids
    figures = {row.title: evaluate(labels, y_NK, row.p_NK, cases, draws, seed) for row in rows}
    reference = _reference(rows, figures)
    gains = {
        row.title: paired_difference(labels, y_NK, row.p_NK, reference.p_NK, cases, draws, seed)
        for row in rows if row.end_to_end and reference is not None
    }  # fmt: skip
    details = _details(labels, rows, reference, groups or {}, draws, seed)
    found = _verdicts(labels, rows, draws, seed)
    result = {
        "split": split, "task": {"name": "multilabel", "labels": labels},
        "slides": count_slides(rows[0], slides_of), "cases": len(set(cases)),
        "draws": draws, "seed": seed, "verdicts": found,
        "reference": reference.title if reference else None,
        "arms": {
            row.title: {"end_to_end": row.end_to_end, "figures": figures[row.title],
                        "auroc_difference": gains.get(row.title), **details[row.title]}
            for row in rows
        },
        "skipped": [{"slide_id": slide, "reason": reason} for slide, reason in skipped],
    }  # fmt: skip
    table = _table(labels, rows, figures, gains, reference, draws)
    notes = result["notes"] = _notes(result, rows, figures, reference)
    _write_predictions(folder / f"predictions_{split}.csv", labels, rows)
    write_json(folder / f"metrics_{split}.json", result)
    notes, said = [*notes, *left_out(result)], [each["sentence"] for each in found]
    page = results_page(split, table, notes, _save_figures(folder, labels, rows), said)
    write_text(folder / "report.md", page + "\n" + sections(labels, details))
    return as_text(table, notes, said)


def _verdicts(labels, rows, draws, seed) -> list[dict]:
    """Return the verdicts, from macro AUROC on the draws of the table."""

    def difference(row: ResultRow, control: ResultRow) -> Interval:
        of = row.y_NK, row.p_NK, control.p_NK, row.case_ids
        return paired_difference(labels, *of, draws, seed)[MACRO]

    return verdicts(Multilabel(tuple(labels)), rows, difference, draws)


def _details(labels, rows, reference, groups, draws, seed) -> dict[str, dict]:
    """Return `row_details` of every row; end-to-end ones are compared with the reference."""
    of_slide = {kind: [of[s] for s in rows[0].slide_ids] for kind, of in groups.items()}
    return {
        row.title: row_details(
            labels, row.y_NK, row.p_NK, row.case_ids, validation=row.validation, groups=of_slide,
            reference_NK=reference.p_NK if row.end_to_end and reference is not None else None,
            draws=draws, seed=seed,
        )
        for row in rows
    }  # fmt: skip


def _save_figures(folder: Path, labels: Sequence[str], rows: Sequence[ResultRow]) -> list[Path]:
    """Write all figures; return their paths."""
    figures = {"roc.png": roc_figure, "reliability.png": reliability_figure}
    saved = [save_figure(draw(labels, rows), folder / name) for name, draw in figures.items()]
    if any(row.metrics_csv for row in rows):
        saved.append(save_figure(curves_figure(rows), folder / "curves.png"))
    return saved


def _reference(rows: Sequence[ResultRow], figures: dict) -> ResultRow | None:
    """Return the row not trained end to end with the highest macro AUROC; None without one."""
    frozen = [row for row in rows if not row.end_to_end]
    value = {row.title: figures[row.title][MACRO]["auroc"].value for row in frozen}
    defined = [row for row in frozen if not math.isnan(value[row.title])]
    return max(defined, key=lambda row: value[row.title]) if defined else None


def _table(labels, rows, figures, gains, reference, draws) -> list[list[str]]:
    """Return header and cells: for macro and each label, a line for each row."""
    table = [["label", "positive", "model", "AUROC [95 %]", "AUPRC [95 %]", "AUROC minus *"]]
    for label in [MACRO, *labels]:
        for row in rows:
            found, first = figures[row.title][label], row is rows[0]
            count = "" if label == MACRO else f"{found['positives']}/{found['known']}"
            mark = " *" if reference is not None and row.title == reference.title else ""
            gain = gains.get(row.title)
            table.append([
                label if first else "",
                count if first else "",
                row.title + mark,
                span(found["auroc"], draws, undefined=ONE_CLASS),
                span(found["auprc"], draws, undefined=ONE_CLASS),
                span(gain and gain[label], draws, "+", ONE_CLASS),
            ])  # fmt: skip
    return table


def _notes(result: dict, rows, figures, reference) -> list[str]:
    """Return the notes needed to read the table."""
    notes = [
        f"{result['split']} split: {result['slides']} slides of {result['cases']} cases. "
        f"Intervals: 95 %, from {result['draws']} bootstrap draws of whole cases; symmetric on "
        "the logit scale, for differences percentiles."
    ]
    averaged = figures[rows[0].title][MACRO]["labels"]
    notes.append(f"macro: mean over {', '.join(averaged) or 'no label: none has both classes'}.")
    if reference is not None:
        notes.append(
            f"* {reference.title}: the highest macro AUROC on this split of the rows not trained "
            "end to end. Chosen on the split it is reported on, which favours it; differences are "
            "paired, on the same draws."
        )
    else:
        notes.append("No row without end-to-end training to compare with: no differences.")
    found = [each for groups in figures.values() for each in groups.values()]
    intervals = [each[name] for each in found for name in ("auroc", "auprc")]
    fewest = min((i.draws for i in intervals if not math.isnan(i.value)), default=0)
    if fewest < FEW_DRAWS * result["draws"]:
        notes.append(
            f"† draws that lack a class are left out; as few as {fewest} of {result['draws']} "
            "remained, because cases of one class are few. That interval is only approximate."
        )
    if any(i.value == i.low == i.high == 1 for i in intervals):
        notes.append(
            "[1.000, 1.000] is what resampling a perfect ranking gives: there are too few slides "
            "to see errors, which does not mean that there are none."
        )
    return notes


def count_slides(row: ResultRow, slides_of: Mapping[str, int] | None) -> int:
    """Return the number of slides of a row's bags."""
    return sum((slides_of or {}).get(name, 1) for name in row.slide_ids)


def left_out(result: dict) -> list[str]:
    """Return the slides that are in no row, each with its reason."""
    if not result["skipped"]:
        return []
    slides = [f"  {each['slide_id']}: {each['reason']}" for each in result["skipped"]]
    return [f"{len(slides)} slides left out:", *slides]


def results_page(
    split: str, table: list[list[str]], notes: list[str], drawn: list[Path], above: Sequence[str]
) -> str:
    """Return report.md: the verdicts `above`, the table, its notes, the figures."""
    listed = [f"- {note.strip()}" if note.startswith("  ") else f"{note}\n" for note in notes]
    pictures = [f"![{path.stem}]({path.name})" for path in drawn]
    said = [f"**{each}**\n" for each in above]
    shown = markdown(table).replace(" * |", " \\* |")
    text = "\n".join([*said, shown, "", *listed, "", *pictures])
    return f"# Results, {split} split\n\n" + text.replace("\n* ", "\n\\* ") + "\n"


def _write_predictions(path: Path, labels: Sequence[str], rows: Sequence[ResultRow]) -> None:
    columns = [(f"p_{label} ({row.title})", row.p_NK[:, k]) for row in rows
               for k, label in enumerate(labels)]  # fmt: skip
    lines = [
        [slide, case, *("" if math.isnan(y) else int(y) for y in y_K)]
        + [f"{p_N[n]:.7g}" for _, p_N in columns]
        for n, (slide, case, y_K) in enumerate(
            zip(rows[0].slide_ids, rows[0].case_ids, rows[0].y_NK, strict=True)
        )
    ]
    write_csv(path, ["slide_id", "case_id", *labels, *(name for name, _ in columns)], lines)
