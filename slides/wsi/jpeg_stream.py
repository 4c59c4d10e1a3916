"""A TIFF tile's bytes as a whole JPEG stream: the TIFF's tables and colour space put in.

Source: TIFF 6.0, technical note 2 (JPEG tables); ITU T.81, annex B (markers).
"""

from __future__ import annotations

ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # then 0 for RGB, 1 for YCbCr
SOI, SOS, DQT, DHT = 0xD8, 0xDA, 0xDB, 0xC4
COLOUR_MARKERS = (0xE0, 0xEE)  # JFIF and Adobe, replaced by what `jpeg_colours` decided
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


class NotDirectError(Exception):
    """A level or tile cannot be decoded here; the message is the reason."""


class DamagedTileError(Exception):
    """A tile's JPEG can be decoded in part only; the message says how it is damaged."""


def tables(data: bytes) -> bytes:
    """Return the segments of a tables-only JPEG stream."""
    kept, at = [], 2
    while data[at : at + 2] != b"\xff\xd9":
        marker, end = _segment(data, at)
        if marker not in (DQT, DHT):
            raise NotDirectError(f"its JPEG tables hold a marker {marker:#x}")
        kept.append(data[at:end])
        at = end
    return b"".join(kept)


def whole_stream(head: bytes, data: bytes, width: int, height: int) -> tuple[bytes, int]:
    """Return a tile's JPEG stream with tables and colour space, and the length of its headers."""
    if data[:2] != b"\xff\xd8":
        raise NotDirectError("a tile is no JPEG")
    parts, at, kept = [head], 2, 2
    while True:
        marker, end = _segment(data, at)
        if marker in COLOUR_MARKERS:
            parts.append(data[kept:at])
            kept = end
        elif marker in FRAMES:
            size = int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
            if size != (width, height) or data[at + 9 : at + 10] != b"\x03":
                raise NotDirectError(f"a tile's JPEG is {size[0]} x {size[1]}")
        elif marker == SOS:
            return b"".join([*parts, data[kept:]]), at
        at = end


def _segment(data: bytes, at: int) -> tuple[int, int]:
    """Return the JPEG marker at `at` and the position where its segment ends."""
    if data[at : at + 1] != b"\xff" or len(data) < at + 4:
        raise NotDirectError("its JPEG headers are damaged")
    length = int.from_bytes(data[at + 2 : at + 4])
    if length < 2 or at + 2 + length > len(data) or data[at + 1] in (0x00, 0xFF, SOI, 0xD9):
        raise NotDirectError("its JPEG headers are damaged")
    return data[at + 1], at + 2 + length
