"""Files that `tapfm pathpt` writes: table, predictions, losses, and pictures of tile classes.

Shapes: N tiles, K classes of a tile, S test slides, R draws.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from slides.files import write_csv, write_json, write_text
from slides.tiling.index_file import TileIndex
from slides.wsi.reader import Slide
from tapfm.inference.heatmap import overlay_png, write_geojson
from tapfm.pathpt.question import Question
from tapfm.pathpt.scores import score_difference, score_subtypes
from tapfm.pathpt.tiles import EncodedSlide
from tapfm.reports.plain_table import markdown, span


def draw_classes(
    folder: Path,
    slide: Slide,
    index: TileIndex,
    names: Sequence[str],
    p_NK: np.ndarray,
    called: int,
    suffix: str = "",
) -> None:
    """Draw the called subtype's probability on the thumbnail; write all classes for QuPath.

    Args:
        folder: for `<slide>.png` and `<slide>.geojson`.
        slide: an open slide.
        index: its tiles.
        names: names of the K classes.
        p_NK: their probabilities.
        called: the slide's predicted subtype, 0 to C - 1.
        suffix: end of the title.
    """
    name, where = names[called + 1], (index.coords0, index.size0)
    thumbnail, downsample = slide.thumbnail(max_side=1600)
    overlay_png(
        thumbnail, downsample, *where, p_NK[:, called + 1], folder / f"{slide.name}.png",
        scale="linear", label=f"p({name})", title=f"{slide.name}: called {name}{suffix}",
    )  # fmt: skip
    measured = {f"p({n})": p_NK[:, k] for k, n in enumerate(names)}
    write_geojson(folder / f"{slide.name}.geojson", *where, measured, index.bounds0, slide.name)


def write_calls(
    path: Path, question: Question, test: Sequence[EncodedSlide], answer: Mapping[str, list[int]]
) -> None:
    """Write a row a test slide: its subtype and each model's prediction."""
    names = question.names[1:]
    rows = [
        [each.row.slide_id, each.row.case_id, names[each.subtype]]
        + [names[calls_S[s]] for calls_S in answer.values()]
        for s, each in enumerate(test)
    ]
    write_csv(path, ["slide_id", "case_id", "subtype", *answer], rows)


def write_losses(path: Path, losses: Sequence[float]) -> None:
    """Write the loss of each epoch."""
    write_csv(path, ["epoch", "loss"], ((n, f"{loss:.6f}") for n, loss in enumerate(losses)))


def write_report(
    out: Path,
    question: Question,
    test: Sequence[EncodedSlide],
    called: Mapping[int, Mapping[str, list[list[int]]]],
    frozen: Collection[str],
    seed: int,
) -> str:
    """Write `report.md` and `scores.json`; return the table.

    Args:
        out: folder.
        question: classes and settings.
        test: S slides.
        called: predictions of each draw, by shots and model.
        frozen: names of the baselines.
        seed: seed of the bootstrap.
    """
    subtype_S = np.array([each.subtype for each in test])
    cases_S = [each.row.case_id for each in test]
    lines = [["shots", "model", "balanced accuracy [95 %]", "weighted F1 [95 %]",
              "minus best frozen [95 %]"]]  # fmt: skip
    scores: dict = {
        "subtypes": {n: int((subtype_S == s).sum()) for s, n in enumerate(question.names[1:])},
        "slides": len(test), "cases": len(set(cases_S)), "draws": question.draws, "shots": {},
    }  # fmt: skip
    for shots, calls_of in called.items():
        found = {
            model: score_subtypes(subtype_S, np.array(calls), cases_S, seed)
            for model, calls in calls_of.items()
        }
        best = max(frozen, key=lambda model: found[model]["balanced_accuracy"].value)
        models = scores["shots"][str(shots)] = {}
        for model, figures in found.items():
            models[model] = dict(figures)
            gain = None
            if model not in frozen:
                gains = score_difference(
                    subtype_S, np.array(calls_of[model]), np.array(calls_of[best]), cases_S, seed
                )
                models[model]["minus_best_frozen"] = gains
                gain = gains["balanced_accuracy"]
            title = model + (" (best frozen)" if model == best else "")
            cells = [span(figures[m]) for m in ("balanced_accuracy", "weighted_f1")]
            lines.append([str(shots), title, *cells, span(gain, sign="+")])
    counts = ", ".join(f"{count} {name}" for name, count in scores["subtypes"].items())
    table = (
        f"{markdown(lines)}\n\n{len(test)} test slides of {scores['cases']} cases: {counts}. "
        f"Figures are means over {question.draws} draws of the training slides; intervals by "
        "case.\n"
    )
    write_text(out / "report.md", table)
    write_json(out / "scores.json", scores)
    return table
