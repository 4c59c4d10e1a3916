"""What is wrong with a file that OpenSlide refuses or that breaks off. Reads tags, never pixels.

OpenSlide says "Unsupported or missing image file" of a lost file, a plain photograph, an untiled
TIFF and a download that stopped half-way; and it opens a pyramid whose last levels are missing.
The way out differs, so the file's own table of contents is walked: how far it should reach, whether
it is tiled. A sound slide of 100,000 tiles costs a few milliseconds.

Source: TIFF 6.0, section 2; BigTIFF as libtiff documents it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TIFF_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u8", 6: "i1", 7: "u1", 8: "i2", 9: "i4",
         10: "i8", 11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}  # fmt: skip
COMPRESSION, TILE_WIDTH, SUB_IFDS = 259, 322, 330
OFFSETS_AND_COUNTS = ((273, 279), (324, 325))  # of strips, of tiles
MAX_DIRECTORIES = 4096  # a damaged chain can run in a circle


@dataclass
class TiffContents:
    """What the table of contents of a TIFF promises."""

    reach: int
    """The byte behind the last thing it names; beyond the file's end if the file breaks off."""
    tiled: bool
    """Whether its first picture is stored in tiles, which OpenSlide needs."""
    compression: int
    """Of its first picture, as TIFF numbers them."""


def tiff_contents(path: str | Path) -> TiffContents | None:
    """Walk a TIFF's directories; None where the file is no TIFF."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(16)
        order = TIFF_MAGIC.get(head[:4])
        if order is None or len(head) < 16:
            return None
        big = head[2:4] in (b"+\0", b"\0+")
        first = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
        contents, waiting, seen = TiffContents(16, True, 0), [first], set()
        while waiting and len(seen) < MAX_DIRECTORIES:
            offset = waiting.pop()
            if offset in seen or not offset:
                continue
            tags, following, reach = _directory(file, offset, order, big, size)
            contents.reach = max(contents.reach, reach)
            if not seen and tags:
                contents.tiled = TILE_WIDTH in tags
                contents.compression = int(tags.get(COMPRESSION, [1])[0])
            seen.add(offset)
            waiting += [following, *(int(o) for o in tags.get(SUB_IFDS, ()))]
            for offsets, counts in OFFSETS_AND_COUNTS:
                if len(tags.get(offsets, ())) and len(tags.get(counts, ())):
                    ends = tags[offsets].astype(np.int64) + tags[counts].astype(np.int64)
                    contents.reach = max(contents.reach, int(ends.max()))
    return contents


def why_refused(name: str, path: Path, error: Exception) -> str:
    """What a file is that OpenSlide will not open, and the way out."""
    ways = "or leave this slide out"
    again = "Copy it again from its source"
    if not path.exists():
        return f"{name}: there is no file {path}. Mend slide_path, {ways}."
    if path.is_dir():
        return f"{name}: {path} is a folder. Name the slide's file inside it, {ways}."
    with open(path, "rb") as file:
        head = file.read(16)
    size, contents = path.stat().st_size, tiff_contents(path)
    if not size:
        return f"{name}: {path} is empty. {again}, {ways}."
    if contents is not None and contents.reach > size:
        return f"{name}: {truncated(path, contents.reach, size)} {again}, {ways}."
    if contents is not None and not contents.tiled:
        return (
            f"{name}: {path} is a plain TIFF whose picture is not stored in tiles (OpenSlide: "
            f"{error}). Convert it with `vips tiffsave {path.name} {path.stem}_pyramid.tif --tile "
            f"--pyramid`, and give its mpp, {ways}."
        )
    if contents is not None:
        return (
            f"{name}: {path} is a tiled TIFF that OpenSlide refuses: {error} (compression "
            f"{contents.compression}). Export it again with JPEG tiles from a program that reads "
            f"it, {ways}."
        )
    kinds = {b"\x89PNG": "PNG", b"\xff\xd8\xff\xe0": "JPEG", b"\xff\xd8\xff\xe1": "JPEG"}
    if head[:4] in kinds:
        return (
            f"{name}: {path} is a plain {kinds[head[:4]]} image, no slide. Convert it with "
            f"`vips tiffsave {path.name} {path.stem}_pyramid.tif --tile --pyramid --compression "
            f"jpeg`, and give its mpp, {ways}."
        )
    return (
        f"{name}: {path} is in no format that OpenSlide knows (it begins with {head[:8]!r}; "
        f"OpenSlide: {error}). {again}, export it as a pyramidal TIFF, {ways}."
    )


def truncated(path: Path, reach: int, size: int) -> str:
    """The sentence about a TIFF that ends too early."""
    return (
        f"{path} is truncated: its table of contents reaches to byte {reach}, the file ends at "
        f"{size}."
    )


def _directory(
    file, offset: int, order: str, big: bool, size: int
) -> tuple[dict[int, np.ndarray], int, int]:
    """One directory's integer tags, the offset of the next one, and how far it reaches."""
    count_bytes, entry_bytes, inline = (8, 20, 8) if big else (2, 12, 4)
    word = "Q" if big else "I"
    file.seek(min(offset, size))
    raw = file.read(count_bytes)
    if len(raw) < count_bytes:
        return {}, 0, offset + count_bytes
    count = struct.unpack(order + ("Q" if big else "H"), raw)[0]
    end = offset + count_bytes + count * entry_bytes + inline
    if end > size:
        return {}, 0, end
    raw = file.read(count * entry_bytes + inline)
    tags, reach = {}, end
    for entry in range(count):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", raw, entry * entry_bytes)
        dtype = np.dtype(TYPES.get(kind, "u1")).newbyteorder(order)
        length, field = number * dtype.itemsize, (entry + 1) * entry_bytes - inline
        if length <= inline:
            tags[tag] = np.frombuffer(raw[field : field + length], dtype)
            continue
        at = struct.unpack_from(order + word, raw, field)[0]
        reach = max(reach, at + length)
        if at + length <= size and kind in (3, 4, 13, 16, 18):
            file.seek(at)
            tags[tag] = np.frombuffer(file.read(length), dtype)
    return tags, struct.unpack(order + word, raw[-inline:])[0], reach
