"""What `tapfm pathpt` leaves behind: table, calls, losses, and pictures of tile classes.

Shapes: N tiles, K classes of a tile, S test slides, R draws.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from slides.reader import Slide
from tapfm.bootstrap import Interval
from tapfm.data import Opener
from tapfm.files import replacing
from tapfm.heatmap import overlay_png, write_geojson
from tapfm.pathpt.question import Question
from tapfm.pathpt.scores import difference, evaluate
from tapfm.pathpt.tiles import EncodedSlide


def draw_classes(
    folder: Path,
    question: Question,
    opener: Opener,
    each: EncodedSlide,
    logits_NK: Tensor,
    called: int,
) -> None:
    """Probability of the called subtype on the thumbnail; of all classes as QuPath objects."""
    p_NK, row, index = logits_NK.softmax(1).cpu().numpy(), each.row, opener.index(each.row)
    name = question.names[called + 1]
    with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
        thumbnail, downsample = slide.thumbnail(max_side=1600)
    overlay_png(
        thumbnail, downsample, index.coords0, index.size0, p_NK[:, called + 1],
        folder / f"{row.slide_id}.png", scale="linear", label=f"p({name})",
        title=f"{row.slide_id}: called {name}, is {question.names[each.subtype + 1]}",
    )  # fmt: skip
    measured = {f"p({n})": p_NK[:, k] for k, n in enumerate(question.names)}
    path = folder / f"{row.slide_id}.geojson"
    write_geojson(path, index.coords0, index.size0, measured, index.bounds0, row.slide_id)


def write_calls(
    path: Path, question: Question, test: Sequence[EncodedSlide], answer: Mapping[str, list[int]]
) -> None:
    """A row a test slide: what it is and what each arm calls it."""
    names = question.names[1:]
    with replacing(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["slide_id", "case_id", "subtype", *answer])
        for s, each in enumerate(test):
            calls = [names[calls_S[s]] for calls_S in answer.values()]
            rows.writerow([each.row.slide_id, each.row.case_id, names[each.subtype], *calls])


def write_losses(path: Path, losses: Sequence[float]) -> None:
    """A row an epoch."""
    with replacing(path) as partial:
        lines = [f"{epoch},{loss:.6f}" for epoch, loss in enumerate(losses)]
        partial.write_text("\n".join(["epoch,loss", *lines]) + "\n")


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
    titles = "shots", "model", "balanced accuracy [95 %]", "weighted F1 [95 %]", "minus best frozen"
    lines = [f"| {' | '.join(titles)} [95 %] |", "|---" * len(titles) + "|"]
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
            told[arm] = {m: asdict(figure) for m, figure in figures.items()}
            gain = ""
            if arm not in frozen:
                gains = difference(
                    truth_S, np.array(arms[arm]), np.array(arms[best]), cases_S, seed
                )
                told[arm]["minus_best_frozen"] = {m: asdict(g) for m, g in gains.items()}
                gain = _said(gains["balanced_accuracy"], "+")
            title = arm + (" (best frozen)" if arm == best else "")
            cells = [_said(figures[m]) for m in ("balanced_accuracy", "weighted_f1")]
            lines.append("| " + " | ".join([str(shots), title, *cells, gain]) + " |")
    counts = ", ".join(f"{count} {name}" for name, count in scores["subtypes"].items())
    lines += [
        "",
        f"{len(test)} test slides of {scores['cases']} cases: {counts}. Figures are means over "
        f"{question.draws} draws of the training slides; intervals by case.",
    ]
    table = "\n".join(lines) + "\n"
    for name, text in (("report.md", table), ("scores.json", json.dumps(scores, indent=1) + "\n")):
        with replacing(out / name) as partial:
            partial.write_text(text)
    return table


def _said(figure: Interval, sign: str = "") -> str:
    value, low, high = (format(n, f"{sign}.3f") for n in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"
