"""The pixels of a slide's levels, decoded by OpenSlide or directly.

The file is opened on first use in each process: OpenSlide handles can neither be pickled nor
safely used after a fork, so `Levels` carries only its path and the facts it has read.

OpenSlide is the reference. `slides.wsi.jpeg_tiles` decodes JPEG tiles directly where its pixels are
checked to be the same; `direct=False` switches it off. Transparent and outside pixels are white.

A level is used if its size is explained by one downsample and its pixels show what level 0 shows
(`slides.wsi.pyramid`); others are left out with a warning, and finer levels are read instead.

Condition: OpenSlide places reads by whole level-0 pixels, so at a level whose downsample is not a
whole number its pixels are interpolated, shifted by up to half a level-0 pixel.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import openslide

from slides.errors import NotASlideError, UnreadableRegionError
from slides.wsi.diagnose import tiff_contents, why_impossible, why_refused
from slides.wsi.facts import SlideFacts, read_facts, why_misread
from slides.wsi.jpeg_colours import ycbcr_to_rgb
from slides.wsi.jpeg_stream import DamagedTileError, NotDirectError
from slides.wsi.jpeg_tiles import JpegDecoder
from slides.wsi.plain_image import PlainImage, is_plain
from slides.wsi.pyramid import DROPPED, VENDORS, same_picture
from slides.wsi.tiff_image import TiffImage

CACHE_BYTES = 64 << 20  # for all handles of a process; OpenSlide's default is 32 MiB for each
CHECKED = 512  # pixels: side of the first region of each level, which is read both ways
COUNTED = 20_000  # tiles of a level that are decoded, in seconds, to count the damaged ones
UNTOLD = 8  # flat squares of a level that agree with level 0 before it is believed
_inherited = []  # handles from before a fork: closing them here could stop the parent's


class Levels:
    """A slide file that is opened on first use; can be pickled and used after a fork.

    Args:
        path: The slide's file, or a plain picture of tissue (`slides.wsi.plain_image`).
        name: What to call it in errors.
        direct: Decode JPEG tiles without OpenSlide where the pixels are proven the same.
    """

    def __init__(self, path: Path, name: str, direct: bool = True):
        self.path, self.name, self._want_direct = path, name, direct
        self._direct = None
        self._proven = set()
        self._untold: dict[int, int] = {}  # level -> flat squares seen; UNTOLD once believed
        self._said_slow = False
        self._counted: dict[int, int] = {}  # level -> damaged tiles
        self._handle = None
        self._pid = None
        self._facts = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None, "_pid": None, "_direct": None, "_proven": set()}

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        elif self._handle is not None:
            _inherited.append(self._handle)
        self._handle = None
        if self._direct is not None:
            self._direct.close()
            self._direct = None

    @property
    def facts(self) -> SlideFacts:
        """Sizes, levels and properties of the slide.

        Raises:
            NotASlideError: OpenSlide refuses the file, or would read it wrongly.
        """
        if self._facts is None:
            facts = read_facts(self.path, self._open())
            try:
                fault = why_misread(self.path, self._open(), facts)
            except openslide.OpenSlideError:  # damaged: reported when it is read
                fault = None
                self.close()
            if fault:
                raise NotASlideError(f"{self.name}: {fault}, or leave this slide out.")
            self._facts = facts
            shape = f"{facts.width0} x {facts.height0}"
            for level, ds in enumerate(facts.level_downsamples):
                if ds == DROPPED:
                    self._say_dropped(level, f"its proportions are not those of {shape}")
            if any(facts.mislabelled):
                self._warn(
                    "its JPEG tiles say that they are YCbCr, its tag says RGB: read as YCbCr, or "
                    "its colours would be wrong"
                )
        return self._facts

    @property
    def decoders(self) -> tuple[str, ...]:
        """Decoder of each level: "direct", or "OpenSlide: " and the reason."""
        why = self._directly().why_not if self._want_direct else {}
        return tuple(
            f"OpenSlide: {why.get(level, 'requested')}" if level in why or not self._want_direct
            else "direct"
            for level in range(len(self.facts.level_downsamples))
        )  # fmt: skip

    def believed(self, level: int) -> bool:
        """Return whether a level needs no comparison with level 0: compared, or not a TIFF's."""
        plain = level == 0 or self.facts.vendor not in VENDORS
        return plain or self._untold.get(level, 0) >= UNTOLD

    def compare(self, level: int, squares: list[tuple[int, int, int, np.ndarray | None]]) -> bool:
        """Compare squares of a level with level 0; return False if it is now left out.

        Args:
            level: the level.
            squares: x0, y0, side in level-0 pixels, and its pixels if they are at hand.
        """
        pairs, ds = [], self.facts.level_downsamples[level]
        for x0, y0, side0, rgb in squares:
            side_r = max(1, round(side0 / ds))
            with contextlib.suppress(UnreadableRegionError):  # reported when it is read
                base = self._whole(x0, y0, side0)
                if base is not None:
                    mine = self.pixels(x0, y0, level, side_r, side_r) if rgb is None else rgb
                    pairs.append((mine, base))
        same = same_picture(pairs)
        if same is False:
            changed = list(self.facts.level_downsamples)
            changed[level] = DROPPED
            self._facts = replace(self.facts, level_downsamples=tuple(changed))
            self._say_dropped(level, "it shows another picture than level 0, as a label would")
            return False
        self._untold[level] = UNTOLD if same else self._untold.get(level, 0) + 1
        return True

    def pixels(self, x0: int, y0: int, level: int, width_r: int, height_r: int) -> np.ndarray:
        """Return a region of a level, (height_r, width_r, 3) uint8 RGB.

        Raises:
            UnreadableRegionError: it cannot be decoded.
        """
        if not level and 0 in self._proven and self._direct is not None:  # nearly every tile
            with contextlib.suppress(NotDirectError, DamagedTileError):  # said below
                return self._direct.pixels(0, x0, y0, width_r, height_r)
        rgb = self._pixels(x0, y0, level, width_r, height_r)
        ds = self.facts.level_downsamples[level] if level else 1.0
        if level and ds != self.facts.stated_downsamples[level]:  # beyond the slide is padding
            right, below = (
                max(0, round(side0 / ds) - round(corner0 / ds))
                for side0, corner0 in ((self.facts.width0, x0), (self.facts.height0, y0))
            )
            if right < width_r or below < height_r:
                rgb = rgb.copy()
                rgb[:, right:] = rgb[below:] = 255
        return rgb

    def _pixels(self, x0: int, y0: int, level: int, width_r: int, height_r: int) -> np.ndarray:
        if not self._want_direct:
            return self._reference(x0, y0, level, width_r, height_r)
        direct, fault, ds = self._directly(), "", self.facts.level_downsamples[level]
        x_r, y_r = x0 / ds, y0 / ds  # between pixels OpenSlide interpolates; we do not
        if direct.levels[level] is None or not (x_r.is_integer() and y_r.is_integer()):
            return self._reference(x0, y0, level, width_r, height_r)
        try:
            rgb = direct.pixels(level, int(x_r), int(y_r), width_r, height_r)
        except DamagedTileError as error:
            raise self._damaged(level, x0, y0, str(error)) from error
        except NotDirectError as error:
            fault = str(error)
        if not fault and level not in self._proven:
            part = min(CHECKED, height_r), min(CHECKED, width_r)
            shown = rgb[: part[0], : part[1]]
            if ds != self.facts.stated_downsamples[level]:  # OpenSlide is exact at the corner only
                x0 = y0 = 0
                try:
                    shown = direct.pixels(level, 0, 0, *part[::-1])
                except DamagedTileError as error:
                    raise self._damaged(level, 0, 0, str(error)) from error
            if np.array_equal(shown, self._reference(x0, y0, level, *part[::-1])):
                self._proven.add(level)
            else:
                fault = f"level {level} decodes to other pixels here"
                direct.drop(level, fault)
        if fault:
            rgb = self._reference(x0, y0, level, width_r, height_r)
            self._say_slow(fault)  # only now: if OpenSlide fails too, its error says more
        return rgb

    def _damaged(self, level: int, x0: int, y0: int, why: str) -> UnreadableRegionError:
        """Return the error for a JPEG tile that is damaged, with the number of others."""
        tiles = len(self._direct.levels[level].offsets)
        many = "a JPEG tile"
        if level not in self._counted and tiles <= COUNTED:  # once, since all are decoded
            self._counted[level] = self._direct.damaged(level)
        if level in self._counted:
            many = f"{self._counted[level]} of the {tiles} JPEG tiles"
        return UnreadableRegionError(
            f"{self.name}: {many} of level {level} can be decoded in part only, one of them near "
            f"level-0 ({x0}, {y0}): {why}. Its pixels would be guessed. The file is damaged: copy "
            f"it again from its source, or leave this slide out. ({self.path})"
        )

    def _open(self) -> openslide.OpenSlide:
        if self._handle is None or self._pid != os.getpid():
            self.close()
            if fault := why_impossible(self.path):
                raise NotASlideError(f"{self.name}: {fault}")
            try:
                self._handle = openslide.OpenSlide(self.path)
                self._handle.set_cache(_process_cache(os.getpid()))
            except (openslide.OpenSlideError, OSError) as error:
                self._handle = None
                self._handle = self._picture(error)
            self._pid = os.getpid()
        return self._handle

    def _picture(self, error: Exception) -> TiffImage | PlainImage:
        """Return the handle of an undamaged picture that OpenSlide cannot open.

        Raises:
            NotASlideError: it is none, and why OpenSlide refuses it.
        """
        contents = tiff_contents(self.path) if self.path.is_file() else None
        plain = self.path.is_file() and is_plain(self.path)
        if contents is not None and contents.reach <= self.path.stat().st_size:
            with contextlib.suppress(openslide.OpenSlideError):
                return TiffImage(self.path)
            plain = not contents.tiled
        if not plain:
            raise NotASlideError(why_refused(self.name, self.path, error)) from error
        return PlainImage(self.path, self.name)

    def _directly(self) -> JpegDecoder:
        if self._direct is None:
            facts = self.facts
            self._direct = JpegDecoder(
                self.path, facts.vendor, facts.level_sizes, facts.mislabelled
            )
            if self._direct.odd:
                self._say_slow("; ".join(sorted(set(self._direct.why_not.values()))))
        return self._direct

    def _say_dropped(self, level: int, why: str) -> None:
        width, height = self.facts.level_sizes[level]
        self._warn(
            f"level {level} ({width} x {height} pixels) is left out: {why}. Finer levels are read "
            "in its place"
        )

    def _say_slow(self, why: str) -> None:
        """Warn once per slide and process that OpenSlide reads it, which is slower."""
        if not self._said_slow:
            self._said_slow = True
            self._warn(f"read through OpenSlide, which is slower: {why}")

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.name}: {what}. ({self.path})", stacklevel=3)

    def _reference(self, x0: int, y0: int, level: int, width_r: int, height_r: int) -> np.ndarray:
        """Return the region as OpenSlide reads it, blended over white."""
        rgba = self._rgba(x0, y0, level, width_r, height_r)
        alpha = rgba[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        over = rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
        return ((over + 127) // 255).astype(np.uint8)

    def _whole(self, x0: int, y0: int, side0: int) -> np.ndarray | None:
        """Return a square of level 0, or None where it lies outside or has no pixels."""
        if not (0 <= x0 <= self.facts.width0 - side0 and 0 <= y0 <= self.facts.height0 - side0):
            return None
        if self._want_direct and self._directly().levels[0] is not None:
            return self._pixels(x0, y0, 0, side0, side0)
        rgba = self._rgba(x0, y0, 0, side0, side0)
        return np.ascontiguousarray(rgba[..., :3]) if rgba[..., 3].min() == 255 else None

    def _rgba(self, x0: int, y0: int, level: int, width_r: int, height_r: int) -> np.ndarray:
        """Return the region as OpenSlide reads it, with transparency."""
        if level:  # OpenSlide places reads by the downsample that it states
            ours = self.facts.level_downsamples[level]
            stated = self.facts.stated_downsamples[level]
            if ours not in (stated, DROPPED):
                x0, y0 = round(x0 / ours * stated), round(y0 / ours * stated)
        try:
            rgba = np.asarray(self._open().read_region((x0, y0), level, (width_r, height_r)))
            return ycbcr_to_rgb(rgba) if self.facts.mislabelled[level] else rgba
        except openslide.OpenSlideError as error:
            self.close()  # OpenSlide refuses every read on a handle that failed once
            raise UnreadableRegionError(
                f"{self.name}: {width_r} x {height_r} pixels of level {level} at level-0 "
                f"({x0}, {y0}) cannot be decoded: {error}. The file is damaged or truncated: copy "
                f"it again from its source, or leave this slide out. ({self.path})"
            ) from error


@cache
def _process_cache(pid: int) -> openslide.OpenSlideCache:
    """Return this process's OpenSlide tile cache; a forked child gets its own."""
    return openslide.OpenSlideCache(CACHE_BYTES)
