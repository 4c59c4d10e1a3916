"""Explains why OpenSlide refuses a file, or would read it wrongly. Reads TIFF tags, never pixels.

OpenSlide reports a lost file, an unknown codec and an incomplete download with the same words, and
it opens a pyramid whose last levels are missing. The remedies differ, so the TIFF's directories are
read: how long the file should be, and whether it is tiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slides.wsi.slide_file import why_folder
from slides.wsi.tiff_tags import directories

WIDTH, HEIGHT, BITS, COMPRESSION = 256, 257, 258, 259
ORIENTATION, SAMPLES = 274, 277
AS_STORED = (7, 33003, 33005)  # JPEG, JPEG 2000: OpenSlide decodes them and turns nothing
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS = 322, 323, 324
MAX_TILE_PIXELS = 1 << 27  # half a gigabyte, a thousand times a real tile
OFFSETS_AND_COUNTS = ((273, 279), (324, 325))  # tags for strips and for tiles


@dataclass
class TiffContents:
    """Facts about a TIFF from its directories."""

    reach: int
    """End of the last byte range that it names; beyond the file's end if the file is cut short."""
    tiled: bool
    """Whether its first picture is stored in tiles, which OpenSlide needs."""
    compression: int
    """Compression of its first picture, TIFF's number."""


def tiff_contents(path: str | Path) -> TiffContents | None:
    """Return the facts in a TIFF's directories, or None if the file is not a TIFF."""
    contents = None
    for tags, reach in directories(path):
        if contents is None:
            compression = int(tags.get(COMPRESSION, [1])[0])
            contents = TiffContents(16, TILE_WIDTH in tags or not tags, compression)
        contents.reach = max(contents.reach, reach)
        for offsets, counts in OFFSETS_AND_COUNTS:
            starts, lengths = (
                np.minimum(np.asarray(tags.get(tag, ()), np.uint64), 2**62)
                for tag in (offsets, counts)
            )
            if len(starts) == len(lengths) > 0:
                contents.reach = max(contents.reach, int((starts + lengths).max()))
    return contents


def why_impossible(path: Path) -> str | None:
    """Return a sentence about a file that may not be read or has impossible tile tables, or None.

    OpenSlide allocates a tile's memory from its stated size and kills the process if there is not
    enough; and it searches for hours if tiles are not listed.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # opening it could wait forever
            return f"{path} is a pipe or a device. Give a file, or leave this slide out."
        pages = [tags for tags, _ in directories(path)] if path.is_file() else []
    except OSError as error:  # a folder may be closed, a disk lost
        return (
            f"{path} cannot be read: {error.strerror or error}. Ask its owner for permission to "
            "read it, or leave this slide out."
        )
    for tags in pages:
        if not {WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT} <= tags.keys():
            continue
        width, height, tile_width, tile_height = (
            int(tags[tag].max()) for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT)
        )
        fault = ""
        if tile_width * tile_height > MAX_TILE_PIXELS:
            fault = f"tiles of {tile_width} x {tile_height} pixels, which no slide has"
        elif tile_width and tile_height and TILE_OFFSETS in tags:
            needed = -(-width // tile_width) * -(-height // tile_height)
            if len(tags[TILE_OFFSETS]) < needed:
                fault = f"{needed} tiles and lists {len(tags[TILE_OFFSETS])}"
        if fault:
            return (
                f"{path} is damaged: its table of contents names {fault}. Copy it again from "
                f"its source, or leave this slide out."
            )
    return None


def why_pages_mislead(path: Path, size0: tuple[int, int], generic: bool) -> str | None:
    """Return a sentence about a TIFF that opens but would be read wrongly, or None.

    Args:
        path: the file.
        size0: width and height of what is taken for its level 0.
        generic: whether its first page is taken for the slide because no scanner is known.
    """
    pages = [tags for tags, _ in directories(path) if {WIDTH, HEIGHT} <= tags.keys()]
    for tags in pages:
        turned, code = (_first(tags, tag, 1) for tag in (ORIENTATION, COMPRESSION))
        if TILE_WIDTH in tags and 2 <= turned <= 8 and code not in AS_STORED:
            return (
                f"the Orientation tag of {path} is {turned}, and each of its tiles would be turned "
                "by itself. `tiffset -s 274 1` on a copy has it read as it is stored; or turn it "
                "as a whole and export it again"
            )
    sizes = [(_first(tags, WIDTH), _first(tags, HEIGHT)) for tags in pages]
    largest = max(sizes, key=lambda size: size[0] * size[1], default=size0)
    if generic and largest[0] * largest[1] > size0[0] * size0[1]:
        return (
            f"{path} begins with a picture of {size0[0]} x {size0[1]} pixels, a thumbnail perhaps, "
            f"and a larger page of {largest[0]} x {largest[1]} follows. Export it again with the "
            "largest page first"
        )
    planes = [
        tags for tags, size in zip(pages, sizes, strict=True)
        if size == size0 and _first(tags, SAMPLES, 1) == 1
    ]  # fmt: skip
    if generic and len(planes) > 1:
        return (
            f"{path} has {len(planes)} grey pages of {size0[0]} x {size0[1]} pixels: its channels "
            "lie in pages, and the first alone would be read. Export it again as RGB in one page"
        )
    return None


def bits_a_channel(path: Path) -> int:
    """Return the bits a channel of a TIFF's first tiled page; 8 of JPEG, and if there is none."""
    tiled = (tags for tags, _ in directories(path) if TILE_WIDTH in tags)
    first = next(tiled, {})
    return 8 if _first(first, COMPRESSION) in AS_STORED else _first(first, BITS, 8)


def why_refused(name: str, path: Path, error: Exception) -> str:
    """Return the error message for a file that OpenSlide cannot open, with a remedy."""
    ways = "or leave this slide out"
    again = "Copy it again from its source"
    if not path.exists():
        return f"{name}: there is no file {path}. Correct slide_path, {ways}."
    if path.is_dir():
        return f"{name}: {why_folder(path)}, {ways}."
    with open(path, "rb") as file:
        head = file.read(16)
    size, contents = path.stat().st_size, tiff_contents(path)
    if not size:
        return f"{name}: {path} is empty. {again}, {ways}."
    if contents is not None and contents.reach > size:
        return f"{name}: {truncated(path, contents.reach, size)} {again}, {ways}."
    if contents is not None:
        return (
            f"{name}: {path} is a tiled TIFF that OpenSlide refuses: {error} (compression "
            f"{contents.compression}). Export it again with JPEG tiles from a program that reads "
            f"it, {ways}."
        )
    return (
        f"{name}: {path} is in no format that OpenSlide knows (it begins with {head[:8]!r}; "
        f"OpenSlide: {error}). {again}, export it as a pyramidal TIFF, {ways}."
    )


def truncated(path: Path, reach: int, size: int) -> str:
    """Return a sentence about a TIFF that ends too early."""
    return (
        f"{path} is truncated: its table of contents reaches to byte {reach}, the file ends at "
        f"{size}."
    )


def _first(tags: dict[int, np.ndarray], tag: int, default: int = 0) -> int:
    return int(tags[tag][0]) if len(tags.get(tag, ())) else default
