"""Example slides on the page: for each model a table of them, then a card a slide.

A card has targets and predictions, the slide with and without its tile weights, and the tiles of
the largest weights; the card of a patient whose slides are one bag has them for each slide. A slide
that is an example of several labels has one card.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from tapfm.inference.heatmap import COLOURS, FLAT
from tapfm.reports.example_slides import Examples, ExampleSlide
from tapfm.reports.html.case_pictures import TILE_SIDE, NoPicturesError, Pictures, pictures_of
from tapfm.reports.html.tables import Html, html, table
from tapfm.reports.html.task_reports import REPORTS
from tapfm.reports.rows import ResultRow
from tapfm.reports.runs import Run
from tapfm.tasks import Task


def slide_cards(
    task: Task,
    rows: Sequence[ResultRow],
    runs: Sequence[Run],
    split: str,
    slides: Sequence[Mapping[str, str]],
    facts: Mapping[str, Mapping],
) -> Iterator[str]:
    """Yield HTML of the example slides of each model, with the tiles it weighs most.

    Args:
        task: what was predicted.
        rows: the table's rows.
        runs: runs with a folder.
        split: split of the slides.
        slides: the cohort's slide table, with paths.
        facts: title to its entry in metrics_<split>.json.
    """
    chosen = {
        run.title: REPORTS[task.report].choose(task, row, facts[row.title])
        for run in runs
        for row in rows
        if row.title == run.title and len(row.slide_ids)
    }
    if not chosen:
        yield '<p class="soft">No run with predictions: no slides to look at.</p>'
        return
    for about in dict.fromkeys(each.about for each in chosen.values()):
        yield f"<p>{html(about)} Framed and shown: the tiles with the largest weights.</p>"
    yield _scale()
    for number, run in enumerate(runs):
        if run.title not in chosen:
            continue
        examples = chosen[run.title]
        row = next(row for row in rows if row.title == run.title)
        data = run.config.get("data") or {}
        yield f"<h3>{html(run.title)}</h3>"
        where = {slide: f"case-{number}-{n}" for n, slide in enumerate(_slides(examples.slides))}
        yield _chosen(examples, where)
        absent: dict[str, list[str]] = {}
        for bag in where:
            shown = {}
            for slide, path in _files(bag, slides, data).items():
                tile_px = data.get("tiles", {}).get("tile_px", TILE_SIDE)
                try:
                    shown[slide] = pictures_of(run.folder, split, slide, path, tile_px)
                except NoPicturesError as reason:
                    absent.setdefault(str(reason), []).append(slide)
            yield _card(bag, where[bag], row, examples, shown)
        if absent:
            why = [[", ".join(names), reason] for reason, names in absent.items()]
            yield table(["no pictures", "because"], why)
            yield (
                '<p class="soft">`tapfm test` makes them, and so does `tapfm report` where the '
                "slides are.</p>"
            )


def _chosen(examples: Examples, where: Mapping[str, str]) -> Html:
    from_where = "high from" if examples.quantity == "risk" else "positive from"
    header = ["label", *[from_where] * bool(examples.thresholds), *examples.kinds]
    rows = []
    for label in examples.labels:
        by_kind = {each.kind: each for each in examples.slides if each.label == label}
        threshold = [examples.thresholds[label]] if examples.thresholds else []
        links = [_link(by_kind.get(kind), examples, where) for kind in examples.kinds]
        rows.append([label, *threshold, *links])
    return table(header, rows)


def _files(bag: str, slides: Sequence[Mapping[str, str]], data: Mapping) -> dict[str, Path | None]:
    """Return slide ids and files of a bag: the slide itself, or all slides of a case."""
    of_cases = data.get("bags") == "case" or data.get("pool", "union") != "union"
    own = [row for row in slides if row.get("case_id" if of_cases else "slide_id") == bag]
    found = {row["slide_id"]: Path(row["path"]) if row.get("path") else None for row in own}
    return found or {bag: None}


def _card(
    bag: str, name: str, row: ResultRow, examples: Examples, shown: Mapping[str, Pictures]
) -> str:
    n = list(row.slide_ids).index(bag)
    kinds = {each.label: each.kind for each in examples.slides if each.slide_id == bag}
    lines = [
        [label, target, examples.format_value(value), kinds.get(label)]
        for label, target, value in zip(
            examples.labels, examples.targets_NL[n], examples.predicted_NL[n], strict=True
        )
    ]
    values = table(["label", "truth", examples.quantity, ""], lines)
    parts = [f'<h4>{html(bag)}</h4><p class="soft">case {html(row.case_ids[n])}</p>{values}']
    for slide, found in shown.items():
        facts = found.facts
        of = f"{html(slide)}: " if slide != bag else ""
        parts.append(
            f'<p class="soft">{of}{facts["count"]} tiles, {facts["effective"]:.1f} effective '
            f"(1 / sum w²); by {html(row.title)}</p>"
        )
        if facts["effective"] > FLAT * facts["count"]:
            parts.append(
                "<p><strong>Attention is flat here</strong>: all tiles weigh nearly the same, and "
                "their order tells little.</p>"
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
            f'(to right, {colours})"></span> highest, by rank; paler: less weight</p>')  # fmt: skip


def _image(path: Path, alt: str) -> str:
    with Image.open(path) as picture:
        width, height = picture.size
    text = base64.b64encode(path.read_bytes()).decode()
    return (f'<img src="data:image/jpeg;base64,{text}" width="{width}" height="{height}" '
            f'alt="{escape(alt)}">')  # fmt: skip


def _link(example: ExampleSlide | None, examples: Examples, where: Mapping[str, str]) -> object:
    if example is None:
        return "none"
    slide = example.slide_id
    return Html(
        f'{examples.format_value(example.value)} <a href="#{where[slide]}">{html(slide)}</a>'
    )


def _slides(chosen: Sequence[ExampleSlide]) -> list[str]:
    return list(dict.fromkeys(each.slide_id for each in chosen))
