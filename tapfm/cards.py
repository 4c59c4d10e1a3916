"""The page's slides to look at: of each model a table of cases, then a card a slide.

A card has the slide's labels and probabilities, the slide with and without its tile weights, and
the tiles that weigh most. A slide that is a case of several labels has one card.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from tapfm.arms import Arm
from tapfm.heatmap import COLOURS
from tapfm.runs import Run
from tapfm.surest import (
    KINDS,
    TILE_SIDE,
    Case,
    NoPicturesError,
    Pictures,
    choose_cases,
    pictures_of,
    thresholds,
)
from tapfm.tables import Html, html, table


def case_cards(
    labels: Sequence[str],
    arms: Sequence[Arm],
    runs: Sequence[Run],
    split: str,
    slides: Sequence[Mapping[str, str]],
    facts: Mapping[str, Mapping],
) -> Iterator[str]:
    """The slides each model was surest of, with where it looked.

    Args:
        labels: K names.
        arms: the table's rows.
        runs: those that have a folder.
        split: of the slides.
        slides: of the cohort, with their paths.
        facts: of each arm, in metrics_<split>.json.
    """
    paths = {row["slide_id"]: Path(row["path"]) for row in slides if row.get("path")}
    yield (
        "<p>Of each label, the surest true positive, true negative, false positive and false "
        "negative. A tile's weight is the same for all labels. Framed and shown: the tiles of the "
        "largest weights.</p>"
    )
    yield _scale()
    for number, run in enumerate(runs):
        arm = next((arm for arm in arms if arm.title == run.title), None)
        if arm is None or not labels:
            continue
        called = thresholds(facts[arm.title], labels)
        chosen = choose_cases(labels, arm, called)
        yield f"<h3>{html(run.title)}</h3>"
        where = {slide: f"case-{number}-{n}" for n, slide in enumerate(_slides(chosen))}
        rows = []
        for label, threshold in zip(labels, called, strict=True):
            row = {case.kind: case for case in chosen if case.label == label}
            rows.append([label, threshold, *(_link(row.get(kind), where) for kind in KINDS)])
        yield table(["label", "positive from", *KINDS], rows)
        absent: dict[str, list[str]] = {}
        for slide in where:
            tile_px = (run.config.get("data") or {}).get("tiles", {}).get("tile_px", TILE_SIDE)
            try:
                found = pictures_of(run.folder, split, slide, paths.get(slide), tile_px)
            except NoPicturesError as reason:
                found = None
                absent.setdefault(str(reason), []).append(slide)
            yield _card(slide, where[slide], labels, arm, chosen, found)
        if absent:
            why = [[", ".join(names), reason] for reason, names in absent.items()]
            yield table(["no pictures", "because"], why)
            yield (
                '<p class="soft">`tapfm test` makes them, and so does `tapfm report` where the '
                "slides are.</p>"
            )


def _card(
    slide: str,
    name: str,
    labels: Sequence[str],
    arm: Arm,
    chosen: list[Case],
    found: Pictures | None,
) -> str:
    row = list(arm.slide_ids).index(slide)
    kinds = {case.label: f"surest {case.kind}" for case in chosen if case.slide_id == slide}
    lines = []
    for k, label in enumerate(labels):
        y, p = arm.y_NK[row, k], arm.p_NK[row, k]
        lines.append([label, "unknown" if np.isnan(y) else int(y), f"{p:.3f}", kinds.get(label)])
    said = table(["label", "truth", "probability", ""], lines)
    about, facts = f"case {html(arm.case_ids[row])}", found.facts if found else {}
    if found:
        about += f"; {facts['count']} tiles, {facts['effective']:.1f} effective (1 / sum w²)"
    parts = [f'<h4>{html(slide)}</h4><p class="soft">{about}</p>{said}']
    if found:
        whole = _image(found.folder / "thumbnail.jpg", slide)
        seen = _image(found.folder / "overlay.jpg", f"tile weights on {slide}")
        parts.append(f'<div class="slide">{whole}{seen}</div><div class="tiles">')
        for n, (path, tile) in enumerate(zip(found.tiles, facts["tiles"], strict=True), start=1):
            place = f"{tile['x0']}, {tile['y0']}"
            parts.append(
                f"<figure>{_image(path, f'tile {n} of {slide}, at {place}')}"
                f"<figcaption>{n}: w {tile['weight']:.3g}<br>at {place}</figcaption></figure>"
            )
        parts.append("</div>")
    return f'<article class="case" id="{name}">{"".join(parts)}</article>'


def _scale() -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = ", ".join(to_hex(colormaps[COLOURS](step / 8)) for step in range(9))
    return (f'<p class="scale">lowest tile weight <span style="background:linear-gradient'
            f'(to right, {colours})"></span> highest, by rank</p>')  # fmt: skip


def _image(path: Path, said: str) -> str:
    with Image.open(path) as picture:
        width, height = picture.size
    text = base64.b64encode(path.read_bytes()).decode()
    return (f'<img src="data:image/jpeg;base64,{text}" width="{width}" height="{height}" '
            f'alt="{escape(said)}">')  # fmt: skip


def _link(case: Case | None, where: Mapping[str, str]) -> object:
    if case is None:
        return "none"
    return Html(f'{case.prob:.3f} <a href="#{where[case.slide_id]}">{html(case.slide_id)}</a>')


def _slides(chosen: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.slide_id for case in chosen))
