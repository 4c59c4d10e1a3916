"""Writes the results of a run on labelled tiles: table, figures, confusion tables.

    predictions_<split>.csv   a row a tile: path, case_id, label, and p_<class> (<row>)
    metrics_<split>.json      every figure, with intervals, draws and counts
    report.md                 the table, a table by class and the confusion tables

Every other row is set against the linear probe on frozen features, on the same bootstrap draws.

Shapes: N tiles, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slides.cohort.labelled_tiles import TileRow
from slides.files import write_csv, write_json, write_text
from tapfm.reports.plain_table import FEW_DRAWS, aligned, markdown, span
from tapfm.tile_training.metrics import difference, evaluate_tiles

HEADER = ("model", "macro F1 [95 %]", "balanced accuracy [95 %]", "macro AUROC [95 %]",
          "F1 minus probe [95 %]")  # fmt: skip


@dataclass(frozen=True)
class TileResult:
    """One row of the table."""

    title: str
    p_NK: np.ndarray
    """Probabilities."""


def write_tile_results(
    folder: Path,
    split: str,
    classes: Sequence[str],
    tiles: Sequence[TileRow],
    arms: Sequence[TileResult],
    reference: str,
    *,
    cases_known: bool,
    draws: int = 2000,
    seed: int = 0,
) -> str:
    """Evaluate, compare, and write all files.

    Args:
        folder: where to; made.
        split: its name.
        classes: K names.
        tiles: the tiles.
        arms: the table's rows, in its order.
        reference: title of the row that the others are set against.
        cases_known: whether the tiles' cases are, or each tile counts as one.
        draws: bootstrap draws.
        seed: of the draws.

    Returns:
        The table and its notes as text.
    """
    cases = [row.case_id for row in tiles]
    y_N = np.array([list(classes).index(row.label) for row in tiles])
    figures = {
        arm.title: evaluate_tiles(classes, y_N, arm.p_NK, cases, draws, seed) for arm in arms
    }
    probe = next(arm for arm in arms if arm.title == reference)
    gains = {
        arm.title: difference(classes, y_N, arm.p_NK, probe.p_NK, cases, draws, seed)
        for arm in arms
        if arm is not probe
    }
    result = {
        "split": split,
        "tiles": len(tiles),
        "cases": len(set(cases)) if cases_known else None,
        "classes": list(classes),
        "draws": draws,
        "seed": seed,
        "reference": reference,
        "arms": {t: {**each, "difference": gains.get(t)} for t, each in figures.items()},
    }
    lines = [HEADER, *(_line(t, each, gains.get(t), draws) for t, each in figures.items())]
    notes = _notes(result, figures)
    by_class = [_by_class(arm.title, figures[arm.title], draws) for arm in arms]
    tables = [_confusion(arm.title, classes, figures[arm.title]["confusion"]) for arm in arms[1:]]
    text = [f"# Results, {split} split", markdown(lines), *notes, *by_class, *tables]
    write_text(folder / "report.md", "\n\n".join(text) + "\n")
    write_json(folder / f"metrics_{split}.json", result)
    _write_predictions(folder / f"predictions_{split}.csv", classes, tiles, arms)
    return "\n".join([*aligned(lines), "", *notes])


def _line(title: str, figures: dict, gain: dict | None, draws: int) -> tuple[str, ...]:
    """Return a row of the table: title, three figures, and the gain in F1 over the reference."""
    cells = [span(figures[name], draws) for name in ("f1", "balanced_accuracy", "auroc")]
    return title, *cells, span(gain["f1"], draws, "+") if gain else ""


def _notes(result: dict, figures: dict[str, dict]) -> list[str]:
    of_cases = f" of {result['cases']} cases" if result["cases"] else ""
    notes = [
        f"{result['split']} split: {result['tiles']} tiles{of_cases}. Intervals: 95 %, percentiles "
        f"of {result['draws']} bootstrap draws of whole cases, for AUROC symmetric on the logit "
        "scale; differences are paired."
    ]
    if not result["cases"]:
        notes.append(
            "Nothing says which case a tile is of, so each counts as its own: neighbours may be in "
            "two parts, and the intervals are too narrow."
        )
    averaged = next(iter(figures.values()))["averaged"]
    if len(averaged) < len(result["classes"]):
        lacking = [name for name in result["classes"] if name not in averaged]
        notes.append(f"No tile of {', '.join(lacking)}: macro is over the other classes.")
    fewest = min(found["f1"].draws for found in figures.values())
    if fewest < FEW_DRAWS * result["draws"]:
        notes.append(
            f"† draws that lack a class are left out: {fewest} of {result['draws']} remained, "
            "because a class is of few cases. Take that interval as a rough one."
        )
    return notes


def _by_class(title: str, found: dict, draws: int) -> str:
    lines = [("class", "tiles", "precision", "recall", "F1", "AUROC [95 %]")]
    for name, each in found["classes"].items():
        numbers = (f"{each[key]:.3f}" for key in ("precision", "recall", "f1"))
        lines.append((name, str(each["tiles"]), *numbers, span(each["auroc"], draws)))
    return f"## {title}\n\n" + markdown(lines).replace(" nan |", " |")


def _confusion(title: str, classes: Sequence[str], table_KK: list[list[int]]) -> str:
    lines = [("is \\ said", *classes)]
    lines += [(name, *map(str, row)) for name, row in zip(classes, table_KK, strict=True)]
    return f"## Confusions of {title}\n\n" + markdown(lines)


def _write_predictions(
    path: Path, classes: Sequence[str], tiles: Sequence[TileRow], arms: Sequence[TileResult]
) -> None:
    names = [f"p_{name} ({arm.title})" for arm in arms for name in classes]
    p_NX = np.concatenate([arm.p_NK for arm in arms], axis=1)
    rows = [
        [row.path, row.case_id, row.label, *(f"{p:.6f}" for p in p_X)]
        for row, p_X in zip(tiles, p_NX, strict=True)
    ]
    write_csv(path, ["path", "case_id", "label", *names], rows)
