"""Figures and table of `benchmarks.tissue`, from the predictions that are kept of each fit.

results/tissue/<seed> has a file a fit, called a cell here, and one of the seed's frozen rows:

    cases, y_NK      case and targets of each test slide, in the same order in all of a seed's files
    said_NK          what the model says: logits, or probabilities of the frozen rows; AUROC needs
                     their order alone
    adapted          of a cell: the model that the run saved
    control          the same run's frozen encoder, with a slide model fitted in the same way
    best_epoch       the best epoch's model as it was trained, where the saved one has less than the
                     whole change (a < 1)

Intervals are of AUROC, or of paired differences, averaged over the seeds; cases are drawn, with
their slides of all seeds. `gain` is over the control, `over_probe` over the frozen linear probe of
the same seeds; a cohort with fewer training patients has no such probe. `best_epoch_gain` is that
of the best epoch's models: not exactly what the whole change (a = 1) gains, since there the weights
may be the mean over the run, and the slide model is fitted anew. A seed with a = 1 counts with its
saved model, and where a < 1 and no best epoch was kept, `best_epoch_gain` is absent.

Two figures say where a gain comes from. *Of one patient* is the AUROC among the slides of each test
patient, averaged: it does not see that patients differ without the trait. *Tiles found* is the
AUROC of a tile's own logit within positive slides.

Shapes: N slides, K labels, B draws.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, rewrite
from benchmarks.tissue_plants import LABELS
from slides.files import write_json
from tapfm.stats.bootstrap import percentiles, with_point
from tapfm.stats.metrics import auroc, auroc_draws

KEPT, FROZEN = RESULTS / "tissue", "frozen.json"
TRAITS = LABELS[:2]
PROBE = "frozen, linear probe"
DRAWS = 2000


def write_results(about: Mapping[str, str], order: Collection[str], fewer: Collection[str]) -> None:
    """Write the results of all fits, and the table.

    Args:
        about: machine, date and commit.
        order: the rows that are fitted, as the table has them.
        fewer: those of fewer training patients than the frozen rows have.
    """
    path = RESULTS / "tissue.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else {}
    result = {**about, "rows": merged(old, read_rows(order, fewer), order)}
    write_json(path, result)
    rewrite("tissue", markdown(result))
    print(markdown(result))


def read_rows(order: Collection[str], fewer: Collection[str]) -> dict[str, Any]:
    """Return the figures of all rows whose predictions are kept."""
    read = {path: json.loads(path.read_text()) for path in sorted(KEPT.glob("*/*.json"))}
    frozen = {int(path.parent.name): own for path, own in read.items() if path.name == FROZEN}
    cells = [own for path, own in read.items() if path.name != FROZEN]
    return summary(cells, frozen, order, fewer)


def merged(
    old: Mapping[str, Any], new: Mapping[str, Any], order: Collection[str]
) -> dict[str, Any]:
    """Return new rows, and old ones of more seeds than the new one has; frozen first."""
    rows = dict(old)
    for row, figures_of in new.items():
        if row not in old or len(old[row]["seeds"]) <= len(figures_of["seeds"]):
            rows[row] = figures_of
    return {row: rows[row] for row in [*(row for row in rows if row not in order),
                                       *filter(rows.get, order)]}  # fmt: skip


def summary(
    cells: Sequence[Mapping[str, Any]], frozen_by_seed: Mapping[int, Mapping],
    order: Collection[str], fewer: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    """Return AUROC and paired differences of every row, averaged over its seeds."""
    frozen: dict[str, dict[int, Mapping]] = defaultdict(dict)
    by_row: dict[str, list] = defaultdict(list)
    for seed, predictions in frozen_by_seed.items():
        for title, row in predictions.items():
            frozen[title][seed] = row | {"labels": LABELS}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        by_row[cell["row"]].append(labelled(cell))
    rows = {title: {"seeds": sorted(seeds), "figures": figures([*seeds.values()]),
                    "of_one": of_one_patient([*seeds.values()])}
            for title, seeds in frozen.items()}  # fmt: skip
    for row in filter(by_row.get, order):
        rows[row] = of_row(by_row[row], {} if row in fewer else frozen[PROBE])
    return rows


def labelled(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell in which each model's predictions name their labels."""
    models = (name for name in ("adapted", "control", "best_epoch") if name in cell)
    return {**cell, **{name: cell[name] | {"labels": cell["labels"]} for name in models}}


def of_row(own: Sequence[Mapping[str, Any]], probe: Mapping[int, Mapping]) -> dict[str, Any]:
    """Return a row's figures, from its cells by seed and the linear probes of the seeds."""
    adapted, control = ([cell[name] for cell in own] for name in ("adapted", "control"))
    seeds = [cell["seed"] for cell in own]
    found = {"seeds": seeds, "figures": figures(adapted), "control": figures(control),
             "gain": figures(adapted, control), "of_one": of_one_patient(adapted),
             "control_of_one": of_one_patient(control)}  # fmt: skip
    if probe.keys() >= {*seeds}:
        found["over_probe"] = figures(adapted, [probe[seed] for seed in seeds])
    if best := best_epochs(own):
        found["best_epoch_gain"] = figures(best, control)
    return found | {
        "by_seed": [*map(of_seed, own)],
        "a": [cell["interpolation"]["a"] for cell in own],
        "tile_auroc": {label: float(np.mean([each["tile_auroc"][label] for each in adapted]))
                       for label in adapted[0]["tile_auroc"] if label != "NOISE"},
        "minutes": [cell["minutes"] for cell in own if cell["minutes"]],
        "commits": sorted({cell["commit"] for cell in own}),
    }  # fmt: skip


def best_epochs(own: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what each cell's best epoch says; nothing if that of one is not known."""
    found = [cell["best_epoch"] if "best_epoch" in cell else cell["adapted"] for cell in own
             if "best_epoch" in cell or cell["interpolation"]["a"] == 1]  # fmt: skip
    return found if len(found) == len(own) else []


def of_seed(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one fit gained, and what its best epoch would have."""
    control = [cell["control"]]
    found = {"seed": cell["seed"], "gain": figures([cell["adapted"]], control),
             "of_one": of_one_patient([cell["adapted"]]),
             "control_of_one": of_one_patient(control)}  # fmt: skip
    if "best_epoch" in cell:
        best = [cell["best_epoch"]]
        found |= {"best_epoch": figures(best, control), "best_epoch_of_one": of_one_patient(best)}
    return found


def figures(own: Sequence[Mapping], minus: Sequence[Mapping] = ()) -> dict[str, list[float]]:
    """Return value, low and high of each label's AUROC, or of its difference, mean over seeds.

    Args:
        own: predictions of each seed.
        minus: of another model, the same slides in the same order; it may have more labels.

    Raises:
        ValueError: the slides are others.
    """
    found = {}
    for label in own[0]["labels"]:
        drawn = []
        for n, each in enumerate(own):
            times_BN = with_point(each["cases"], DRAWS, 0)
            value_B = auroc_draws(*of_label(each, label), times_BN)
            if minus:
                check_same_slides(each, minus[n], label)
                value_B = value_B - auroc_draws(*of_label(minus[n], label), times_BN)
            drawn.append(value_B)
        each = percentiles(np.mean(drawn, axis=0))
        found[label] = [each.value, each.low, each.high]
    return found


def of_label(own: Mapping, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a label's targets and what the model says, both (N,)."""
    k = own["labels"].index(label)
    return np.array(own["y_NK"])[:, k], np.array(own["said_NK"])[:, k]


def check_same_slides(own: Mapping, other: Mapping, label: str) -> None:
    """Raise ValueError unless cases and a label's targets are the same, in the same order."""
    y_N, other_N = (of_label(each, label)[0] for each in (own, other))
    if [*own["cases"]] != [*other["cases"]] or not np.array_equal(y_N, other_N):
        raise ValueError(
            f"{label}: the test slides of two models differ in cases, targets or order, and so "
            "their difference is not paired. Fit both anew on one planting."
        )


def of_one_patient(own: Sequence[Mapping]) -> dict[str, float]:
    """Return each label's AUROC among the slides of a patient, mean over patients and seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in own:
        cases_N = np.array(each["cases"])
        for case in np.unique(cases_N):
            for label in each["labels"]:
                y_N, said_N = (values_N[cases_N == case] for values_N in of_label(each, label))
                if 0 < y_N.mean() < 1:
                    found[label].append(auroc(y_N, said_N))
    return {label: float(np.mean(values)) for label, values in found.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """Return a row a model: AUROC, its differences, a, planted tiles found, minutes."""
    head = ["row", "seeds", *LABELS, *(f"{label} gained" for label in LABELS),
            *(f"{label} minus linear probe" for label in TRAITS), "of one patient",
            "frozen, of one", "a", "tiles found", "minutes", "commit"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, row in result["rows"].items():
        cells = [title, ", ".join(map(str, row["seeds"]))]
        cells += [spelled(row["figures"].get(label)) for label in LABELS]
        cells += [spelled(row.get("gain", {}).get(label), "+") for label in LABELS]
        cells += [spelled(row.get("over_probe", {}).get(label), "+") for label in TRAITS]
        cells += [pair(row.get("of_one", {})), pair(row.get("control_of_one", {}))]
        cells.append(", ".join(f"{a:g}" for a in row.get("a", [])))
        cells.append(pair(row.get("tile_auroc", {})))
        cells.append(", ".join(f"{each:.0f}" for each in row.get("minutes", [])))
        cells.append(", ".join(row.get("commits", [])))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\n{result['machine']}; {result['date']}, torch {result['torch']}, timm {result['timm']}; "
        f"table: commit {result['commit']}."
    )
    return "\n".join(lines)


def pair(values: Mapping[str, float]) -> str:
    """Return the figures of the two traits."""
    return ", ".join(f"{values[label]:.2f}" for label in TRAITS if label in values)


def spelled(figure: Sequence[float] | None, sign: str = "") -> str:
    """Return a figure with its interval."""
    if figure is None:
        return ""
    value, low, high = figure
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
