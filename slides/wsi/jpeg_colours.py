"""JPEG tiles whose own headers contradict the colour space of the TIFF's tag.

A JPEG with a JFIF header is YCbCr by definition, and an Adobe header says which it is. Some writers
give such tiles an RGB tag; OpenSlide trusts the tag, and pink tissue comes out grey. Scanners that
store true RGB write neither header, and their tag is right.

Source: JFIF 1.02; ITU T.871; libjpeg's `default_decompress_parms` and `jdcolor.c`, whose integer
arithmetic `ycbcr_to_rgb` repeats, so that both ways to read give the same bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slides.wsi.tiff_tags import SIZE, TILE_SIZE, TILE_TABLES, directories

VENDORS = ("aperio", "generic-tiff", "trestle")
COMPRESSION, PHOTOMETRIC, JPEG, RGB = 259, 262, 7, 2
HEAD = 4096  # bytes of a tile that hold its first headers
HALF, BITS = 1 << 15, 16
RED, BLUE, GREEN_R, GREEN_B = 91881, 116130, 46802, 22554  # 1.402, 1.772, 0.71414, 0.34414 << 16


def mislabelled(path: Path, vendor: str, level_sizes) -> tuple[bool, ...]:
    """Return for each level whether its JPEG tiles call themselves YCbCr under an RGB tag."""
    found = [False] * len(level_sizes)
    if vendor not in VENDORS:
        return tuple(found)
    for tags, _ in directories(path):
        size = tuple(int(tags[tag][0]) if len(tags.get(tag, ())) else 0 for tag in SIZE)
        code, colours = (int(tags.get(tag, (0,))[0]) for tag in (COMPRESSION, PHOTOMETRIC))
        if TILE_SIZE[0] not in tags or (code, colours) != (JPEG, RGB):
            continue
        for level, level_size in enumerate(level_sizes):
            if tuple(level_size) == size:
                found[level] |= _says_ycbcr(path, tags)
    return tuple(found)


def ycbcr_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return pixels whose first three channels are YCbCr as RGB, (h, w, 3 or 4) uint8.

    Transparent pixels stay black.
    """
    y, blue, red = (pixels[..., n].astype(np.int32) for n in range(3))
    blue, red = blue - 128, red - 128
    out = pixels.copy()
    out[..., 0] = np.clip(y + (RED * red + HALF >> BITS), 0, 255)
    out[..., 1] = np.clip(y + (-GREEN_B * blue - GREEN_R * red + HALF >> BITS), 0, 255)
    out[..., 2] = np.clip(y + (BLUE * blue + HALF >> BITS), 0, 255)
    if out.shape[2] == 4:
        out[out[..., 3] == 0] = 0
    return out


def _says_ycbcr(path: Path, tags: dict[int, np.ndarray]) -> bool:
    """Return whether the headers of a directory's first tile say YCbCr."""
    offsets, counts = (tags.get(tag, np.empty(0)) for tag in TILE_TABLES)
    there = [(int(o), int(c)) for o, c in zip(offsets, counts, strict=False) if o and c]
    if not there or there[0][0] >= path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(there[0][0])
        data = file.read(min(there[0][1], HEAD))
    at, jfif, adobe = 2, False, None
    while data[at : at + 1] == b"\xff" and len(data) >= at + 4 and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : at + 2 + length]
        jfif |= data[at + 1] == 0xE0 and content[:5] == b"JFIF\0"
        if data[at + 1] == 0xEE and content[:5] == b"Adobe" and len(content) >= 12:
            adobe = content[11]
        at += 2 + max(length, 2)
    return adobe == 1 or (jfif and adobe is None)
