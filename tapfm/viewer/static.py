"""The page of `tapfm view` as files, to be sent and opened without a server.

    index.html, page/, run.js               as the server gives them
    slides/N/*.js, slides/N/zoom/...        each slide, up to a longest side
    slides/N/tile/T.jpg                     its heaviest tiles, as they were read

Price: 2 to 5 MB a slide at 4096 pixels.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import numpy as np
from openslide import OpenSlideError

from slides.errors import SettingsError, SlideError
from slides.files import WriteError, replacing, write_text
from slides.progress import progress_bar
from tapfm.viewer.contents import Contents, as_script, tiles_of
from tapfm.viewer.pyramid import Pyramid, open_slide

TOP = 12  # tiles whose own pictures are written; as many as the page shows
MARK = "tapfm view"  # in index.html, by which an earlier page is known


def write_page(contents: Contents, out: Path, side: int) -> Path:
    """Write the page of a run; return its index.html.

    Args:
        contents: of the run.
        out: a folder, empty or with an earlier page.
        side: longest side of a slide's picture, pixels.

    Raises:
        WriteError: the folder holds something else.
    """
    index = out / "index.html"
    known = index.is_file() and MARK in index.read_text(errors="replace")
    if out.exists() and any(out.iterdir()) and not known:
        raise WriteError(f"{out}: is not empty, and holds no page of tapfm view. Give another.")
    page = files("tapfm.viewer").joinpath("page")
    for each in page.iterdir():
        with replacing(out / "page" / each.name) as partial:
            partial.write_bytes(each.read_bytes())
    shutil.rmtree(out / "slides", ignore_errors=True)  # of an earlier page
    for number in progress_bar(range(len(contents.slides)), unit="slide"):
        _write_slide(contents, number, out / "slides" / str(number), side)
    write_text(out / "run.js", as_script("view.start", contents.page()))
    write_text(index, page.joinpath("index.html").read_text(encoding="utf-8"))
    return index


def _write_slide(contents: Contents, number: int, folder: Path, side: int) -> None:
    try:
        pyramid = open_slide(contents, number)
        tiles = tiles_of(contents.slides[number], contents.predictions)
        level = pyramid.level_within(side)
        _write_pictures(pyramid, tiles, level, folder)
        write_text(folder / "tiles.js", as_script("view.tiles", number, tiles))
        found = asdict(pyramid.facts(level))
    except (SlideError, SettingsError, OpenSlideError) as error:
        found = {"fault": str(error)}
    write_text(folder / "slide.js", as_script("view.receive", number, found))


def _write_pictures(pyramid: Pyramid, tiles: dict, level: int, folder: Path) -> None:
    for deep in range(level + 1):
        columns, rows = pyramid.zoom.level_tiles[deep]
        for row in range(rows):
            for column in range(columns):
                path = folder / "zoom" / str(deep) / f"{column}_{row}.jpg"
                with replacing(path) as partial:
                    partial.write_bytes(pyramid.tile(deep, column, row))
    top = np.argsort(-np.asarray(tiles["weights"]), kind="stable")[:TOP]
    for number in top.tolist():
        with replacing(folder / "tile" / f"{number}.jpg") as partial:
            place = tiles["x"][number], tiles["y"][number], tiles["side"]
            partial.write_bytes(pyramid.single(*place))
