"""What `tapfm pathpt` leaves behind: table, calls, losses, and pictures of tile classes.

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
from tapfm.pathpt.scores import difference, evaluate
from tapfm.pathpt.tiles import EncodedSlide
from tapfm.reports.plain_table import markdown, span


def draw_classes(
    folder: Path,
    slide: Slide,
    index: TileIndex,
    names: Sequence[str],
    p_NK: np.ndarray,
    called: int,
    said: str = "",
) -> None:
    """Probability of the called subtype on the thumbnail; of all classes as QuPath objects.

    Args:
        folder: for `<slide>.png` and `<slide>.geojson`.
        slide: open.
        index: its tiles.
        names: of the K classes.
        p_NK: their probabilities.
        called: the slide's subtype, 0 to C - 1.
        said: what the title says behind it.
    """
    name, where = names[called + 1], (index.coords0, index.size0)
    thumbnail, downsample = slide.thumbnail(max_side=1600)
    overlay_png(
        thumbnail, downsample, *where, p_NK[:, called + 1], folder / f"{slide.name}.png",
        scale="linear", label=f"p({name})", title=f"{slide.name}: called {name}{said}",
    )  # fmt: skip
    measured = {f"p({n})": p_NK[:, k] for k, n in enumerate(names)}
    write_geojson(folder / f"{slide.name}.geojson", *where, measured, index.bounds0, slide.name)


def write_calls(
    path: Path, question: Question, test: Sequence[EncodedSlide], answer: Mapping[str, list[int]]
) -> None:
    """A row a test slide: what it is and what each arm calls it."""
    names = question.names[1:]
    rows = [
        [each.row.slide_id, each.row.case_id, names[each.subtype]]
        + [names[calls_S[s]] for calls_S in answer.values()]
        for s, each in enumerate(test)
    ]
    write_csv(path, ["slide_id", "case_id", "subtype", *answer], rows)


def write_losses(path: Path, losses: Sequence[float]) -> None:
    """A row an epoch."""
    write_csv(path, ["epoch", "loss"], ((n, f"{loss:.6f}") for n, loss in enumerate(losses)))


def write_report(
    out: Path,
    question: Question,
    test: Sequence[EncodedSlide],
    called: Mapping[int, Mapping[str, list[list[int]]]],
    frozen: Collection[str],
    seed: int,
) -> str:
    """`report.md` and `scores.json`; returns the table.

    Args:
        out: folder.
        question: what was asked.
        test: S slides.
        called: by shots and model, each draw's calls.
        frozen: the models that are baselines.
        seed: of the bootstrap.
    """
    truth_S = np.array([each.subtype for each in test])
    cases_S = [each.row.case_id for each in test]
    lines = [["shots", "model", "balanced accuracy [95 %]", "weighted F1 [95 %]",
              "minus best frozen [95 %]"]]  # fmt: skip
    scores: dict = {
        "subtypes": {n: int((truth_S == s).sum()) for s, n in enumerate(question.names[1:])},
        "slides": len(test), "cases": len(set(cases_S)), "draws": question.draws, "shots": {},
    }  # fmt: skip
    for shots, arms in called.items():
        found = {
            arm: evaluate(truth_S, np.array(calls), cases_S, seed) for arm, calls in arms.items()
        }
        best = max(frozen, key=lambda arm: found[arm]["balanced_accuracy"].value)
        told = scores["shots"][str(shots)] = {}
        for arm, figures in found.items():
            told[arm] = dict(figures)
            gain = None
            if arm not in frozen:
                gains = difference(
                    truth_S, np.array(arms[arm]), np.array(arms[best]), cases_S, seed
                )
                told[arm]["minus_best_frozen"] = gains
                gain = gains["balanced_accuracy"]
            title = arm + (" (best frozen)" if arm == best else "")
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
