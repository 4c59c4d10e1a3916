"""Reads the directories of a TIFF: their tags as numbers, never their pixels.

Only integers and the JPEG tables are read: where tiles lie and how they are compressed. An intact
slide of 100,000 tiles takes a few milliseconds; a damaged file ends the reading and never hangs it.

Source: TIFF 6.0, section 2; BigTIFF as libtiff documents it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
INTEGERS = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # TIFF type: numpy type
BYTES = {1: 1, 2: 1, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 17: 8}  # other types
JPEG_TABLES, SUB_IFDS = 347, 330
SIZE, TILE_SIZE, TILE_TABLES = (256, 257), (322, 323), (324, 325)  # the last: offsets, counts
MAX_DIRECTORIES = 4096  # a damaged chain can run in a circle


def directories(path: str | Path) -> Iterator[tuple[dict[int, np.ndarray], int]]:
    """Yield each directory's tags and the end of the last byte range that it names.

    Nothing is yielded if the file is not a TIFF. A directory outside the file has no tags, and its
    end is beyond the file's.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(16)
        order = MAGIC.get(head[:4])
        if order is None or len(head) < 16:
            return
        big = head[2:4] in (b"+\0", b"\0+")
        waiting = [struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]]
        seen = set()
        while waiting and len(seen) < MAX_DIRECTORIES:
            offset = waiting.pop()
            if offset in seen or not offset:
                continue
            seen.add(offset)
            tags, following, reach = _directory(file, offset, order, big, size)
            waiting += [following, *(int(o) for o in tags.get(SUB_IFDS, ()))]
            yield tags, reach


def missing_tiles(path: str | Path, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Return which tiles are listed without bytes in the directory of the given size.

    Returns:
        (rows, columns) bool, and a tile's width and height; nothing is missing if no directory, or
        more than one, has this size.
    """
    same = [
        tags
        for tags, _ in directories(path)
        if TILE_SIZE[0] in tags and tuple(int(tags.get(tag, (0,))[0]) for tag in SIZE) == size
    ]
    none = np.zeros((1, 1), bool), size
    if len(same) != 1:
        return none
    width, height = (int(same[0].get(tag, (0,))[0]) for tag in TILE_SIZE)
    if not width or not height:
        return none
    shape = -(-size[1] // height), -(-size[0] // width)
    tables = [same[0].get(tag, np.empty(0)) for tag in TILE_TABLES]
    if any(len(table) != shape[0] * shape[1] for table in tables):
        return none
    return ((tables[0] == 0) | (tables[1] == 0)).reshape(shape), (width, height)


def _directory(
    file, offset: int, order: str, big: bool, size: int
) -> tuple[dict[int, np.ndarray], int, int]:
    """Return one directory's integer tags, the next directory's offset, and its reach."""
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
        form = np.dtype(INTEGERS.get(kind, "u1")).newbyteorder(order)
        length = number * (form.itemsize if kind in INTEGERS else BYTES.get(kind, 1))
        wanted = number > 0 and (kind in INTEGERS or tag == JPEG_TABLES)
        field = (entry + 1) * entry_bytes - inline
        if length <= inline:
            if wanted:
                tags[tag] = np.frombuffer(raw[field : field + length], form)
            continue
        at = struct.unpack_from(order + word, raw, field)[0]
        reach = max(reach, at + length)
        if wanted and at + length <= size:
            file.seek(at)
            tags[tag] = np.frombuffer(file.read(length), form)
    return tags, struct.unpack(order + word, raw[-inline:])[0], reach
