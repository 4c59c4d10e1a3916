"""The page's slides to look at: of each model a table of cases, then a card a slide.

A card has what is known and what was said, the slide with and without its tile weights, and the
tiles that weigh most; that of a patient whose slides are one has them of each slide. A slide that
is a case of several labels has one card.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from tapfm.inference.heatmap import COLOURS
from tapfm.reports.example_slides import Case, Choice
from tapfm.reports.html.case_pictures import TILE_SIDE, NoPicturesError, Pictures, pictures_of
from tapfm.reports.html.tables import Html, html, table
from tapfm.reports.html.task_reports import REPORTS
from tapfm.reports.rows import ResultRow
from tapfm.reports.runs import Run
from tapfm.tasks import Task


def case_cards(
    task: Task,
    arms: Sequence[ResultRow],
    runs: Sequence[Run],
    split: str,
    slides: Sequence[Mapping[str, str]],
    facts: Mapping[str, Mapping],
) -> Iterator[str]:
    """The slides each model was surest of, with where it looked.

    Args:
        task: what was predicted.
        arms: the table's rows.
        runs: those that have a folder.
        split: of the slides.
        slides: of the cohort, with their paths.
        facts: of each arm, in metrics_<split>.json.
    """
    chosen = {
        run.title: REPORTS[task.report].choose(task, arm, facts[arm.title])
        for run in runs
        for arm in arms
        if arm.title == run.title and len(arm.slide_ids)
    }
    if not chosen:
        yield '<p class="soft">No run with predictions: no slides to look at.</p>'
        return
    for about in dict.fromkeys(choice.about for choice in chosen.values()):
        yield f"<p>{html(about)} Framed and shown: the tiles of the largest weights.</p>"
    yield _scale()
    for number, run in enumerate(runs):
        if run.title not in chosen:
            continue
        choice = chosen[run.title]
        arm = next(arm for arm in arms if arm.title == run.title)
        data = run.config.get("data") or {}
        yield f"<h3>{html(run.title)}</h3>"
        where = {slide: f"case-{number}-{n}" for n, slide in enumerate(_slides(choice.cases))}
        yield _chosen(choice, where)
        absent: dict[str, list[str]] = {}
        for bag in where:
            shown = {}
            for slide, path in _files(bag, slides, data).items():
                tile_px = data.get("tiles", {}).get("tile_px", TILE_SIDE)
                try:
                    shown[slide] = pictures_of(run.folder, split, slide, path, tile_px)
                except NoPicturesError as reason:
                    absent.setdefault(str(reason), []).append(slide)
            yield _card(bag, where[bag], arm, choice, shown)
        if absent:
            why = [[", ".join(names), reason] for reason, names in absent.items()]
            yield table(["no pictures", "because"], why)
            yield (
                '<p class="soft">`tapfm test` makes them, and so does `tapfm report` where the '
                "slides are.</p>"
            )


def _chosen(choice: Choice, where: Mapping[str, str]) -> Html:
    from_where = "high from" if choice.what == "risk" else "positive from"
    header = ["label", *[from_where] * bool(choice.called), *choice.kinds]
    rows = []
    for label in choice.labels:
        row = {case.kind: case for case in choice.cases if case.label == label}
        called = [choice.called[label]] if choice.called else []
        links = [_link(row.get(kind), choice, where) for kind in choice.kinds]
        rows.append([label, *called, *links])
    return table(header, rows)


def _files(bag: str, slides: Sequence[Mapping[str, str]], data: Mapping) -> dict[str, Path | None]:
    """The slides of a row and where they lie: itself, or a case's; a slide may have its name."""
    of_cases = data.get("bags") == "case" or data.get("pool", "union") != "union"
    own = [row for row in slides if row.get("case_id" if of_cases else "slide_id") == bag]
    found = {row["slide_id"]: Path(row["path"]) if row.get("path") else None for row in own}
    return found or {bag: None}


def _card(
    bag: str, name: str, arm: ResultRow, choice: Choice, shown: Mapping[str, Pictures]
) -> str:
    row = list(arm.slide_ids).index(bag)
    kinds = {case.label: case.kind for case in choice.cases if case.slide_id == bag}
    lines = [
        [label, truth, choice.spell(said), kinds.get(label)]
        for label, truth, said in zip(
            choice.labels, choice.truth_NL[row], choice.said_NL[row], strict=True
        )
    ]
    said = table(["label", "truth", choice.what, ""], lines)
    parts = [f'<h4>{html(bag)}</h4><p class="soft">case {html(arm.case_ids[row])}</p>{said}']
    for slide, found in shown.items():
        facts = found.facts
        of = f"{html(slide)}: " if slide != bag else ""
        parts.append(
            f'<p class="soft">{of}{facts["count"]} tiles, {facts["effective"]:.1f} effective '
            "(1 / sum w²)</p>"
        )
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


def _link(case: Case | None, choice: Choice, where: Mapping[str, str]) -> object:
    if case is None:
        return "none"
    return Html(
        f'{choice.spell(case.said)} <a href="#{where[case.slide_id]}">{html(case.slide_id)}</a>'
    )


def _slides(chosen: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.slide_id for case in chosen))
