"""Chooses the tiles of an open slide in stages: thumbnail, tissue, pen, blur, choice.

`choose_tiles` returns every stage, which `slides.tiling.stage_picture` draws; `index_slide` returns
the index alone.

Price: about 0.5 s for a slide of 11,000 x 11,000 px, nearly all of it thumbnail and mask; with
`tissue.max_blur` 0.5 to 1.5 ms more for each tile of tissue of a 20x scan.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from slides.errors import NoTissueError
from slides.files import file_fingerprint
from slides.grid import Grid
from slides.tiling.focus import BLUR_MPP, blur
from slides.tiling.index_file import TileIndex
from slides.tiling.masks import mask_path, read_mask
from slides.tiling.tissue import Tissue, tile_fraction, tissue_and_pen, why_empty
from slides.wsi.reader import Slide
from slides.wsi.tiff_tags import missing_tiles

LOST_FRACTION = 0.02  # tissue share of a missing tile; not 0, since the mask's edge is smoothed
MASK_PIXELS_PER_TILE = 8  # along a side: with fewer, the tissue fraction is too coarse


@dataclass(frozen=True, eq=False)
class TileChoice:
    """All stages of choosing a slide's tiles. N tiles of its whole lattice."""

    thumbnail: np.ndarray
    """(h, w, 3) uint8."""
    downsample: float
    """Level-0 pixels per thumbnail pixel."""
    mask: np.ndarray
    """(h, w) bool: tissue."""
    pen: np.ndarray
    """(h, w) bool: marker strokes and their halo; all False if `tissue.pen` is off."""
    coords0: np.ndarray
    """(N, 2) int64: x0, y0."""
    size0: int
    tissue_fraction: np.ndarray
    """(N,) float32: the share of each tile that is tissue."""
    pen_fraction: np.ndarray
    """(N,) float32."""
    blur: np.ndarray
    """(N,) float32, see `slides.tiling.focus`; nan where it was not measured."""
    chosen: np.ndarray
    """(N,) bool."""
    lost: np.ndarray
    """(N,) bool: tiles of tissue left out because the file lacks their pixels."""


def choose_tiles(slide: Slide, grid: Grid, tissue: Tissue) -> TileChoice:
    """Return all stages of choosing a slide's tiles; the choice may be empty.

    Raises:
        SlideError: the slide, or a mask of its own, cannot be used.
    """
    size0 = grid.size0(slide.mpp, slide.name)
    slide.check_complete()
    finest = grid.size * grid.mpp / MASK_PIXELS_PER_TILE
    rgb, downsample = slide.thumbnail(min(tissue.mpp, finest))
    coords0 = grid.coords(slide.width0, slide.height0, slide.mpp, slide.name)
    mask, pen = tissue_and_pen(rgb, tissue, downsample * slide.mpp)
    if tissue.masks is not None:
        path = mask_path(tissue.masks, slide.name, slide.path)
        mask = read_mask(path, slide, rgb.shape[:2], downsample)
    fraction, pen_fraction = (
        tile_fraction(each, coords0, size0, downsample).astype(np.float32) for each in (mask, pen)
    )
    chosen = fraction >= max(tissue.min_fraction, np.finfo(np.float32).tiny)
    level = slide.level_for(size0, grid.size)
    lost = chosen & without_pixels(slide, mask, downsample, coords0, size0, level)
    chosen &= ~lost
    blurs = np.full(len(coords0), np.nan, np.float32)
    if tissue.max_blur is not None:
        size = max(1, min(size0, round(size0 * slide.mpp / BLUR_MPP)))
        tiles = (slide.region(x0, y0, size0, size) for x0, y0 in coords0[chosen].tolist())
        blurs[chosen] = [blur(tile) for tile in tiles]
        chosen[chosen] = blurs[chosen] <= tissue.max_blur
    return TileChoice(
        rgb, downsample, mask, pen, coords0, size0, fraction, pen_fraction, blurs, chosen, lost
    )  # fmt: skip


def without_pixels(
    slide: Slide, mask: np.ndarray, downsample: float, coords0: np.ndarray, size0: int, level: int
) -> np.ndarray:
    """Return which tiles lie where the file has lost pixels, (N,) bool.

    A TIFF may list tiles without bytes; OpenSlide returns them transparent, and the reader makes
    them white. That is right in formats that omit unscanned areas (MIRAX, Philips and others). An
    Aperio scanner writes everything: a missing tile is lost, also at coarser levels. In a generic
    TIFF a missing tile may be glass: it counts as lost if the thumbnail, from a coarser level,
    shows tissue there.
    """
    lost = np.zeros(len(coords0), bool)
    levels = {"aperio": range(level + 1), "generic-tiff": [level]}.get(slide.vendor, ())
    for each in levels:
        if np.isinf(slide.level_downsamples[each]):  # left out, never read
            continue
        missing, sides_r = missing_tiles(slide.path, slide.facts.level_sizes[each])
        sides0 = np.multiply(sides_r, slide.level_downsamples[each])
        if missing.any() and slide.vendor == "generic-tiff":
            row, column = np.nonzero(missing)
            corners0 = np.stack([column, row], -1) * sides0
            fraction = tile_fraction(mask, corners0, sides0.max(), downsample)
            missing[row, column] = fraction > LOST_FRACTION
        lost |= _touch(missing, sides0, coords0, size0)
    return lost


def _touch(marked: np.ndarray, sides0: np.ndarray, coords0: np.ndarray, size0: int) -> np.ndarray:
    """Return which tiles overlap a marked cell, (N,) bool; cells are `sides0` wide and high."""
    above = np.pad(marked.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    most = np.array(marked.shape[::-1])
    left, top = np.minimum(coords0 // sides0, most).astype(int).T
    right, bottom = np.minimum(np.ceil((coords0 + size0) / sides0), most).astype(int).T
    return above[bottom, right] - above[top, right] - above[bottom, left] + above[top, left] > 0


def index_slide(slide: Slide, grid: Grid, tissue: Tissue) -> TileIndex:
    """Return the index of a slide: its tiles that have tissue. See `to_index` for errors."""
    return to_index(choose_tiles(slide, grid, tissue), slide, grid, tissue)


def to_index(choice: TileChoice, slide: Slide, grid: Grid, tissue: Tissue) -> TileIndex:
    """Return the index of the chosen tiles, after reading the one with most tissue as a check.

    Raises:
        NoTissueError: none is chosen; the message names the threshold that failed.
        UnreadableRegionError: that tile cannot be decoded.
    """
    chosen = choice.chosen
    if not chosen.any():
        raise NoTissueError(f"{slide.name}: {_why_none(choice, slide, grid, tissue)}")
    fullest = np.where(chosen, choice.tissue_fraction, -1).argmax()
    slide.read(*choice.coords0[fullest].tolist(), grid)  # level 0 may be damaged, thumbnail intact
    mask_mpp = choice.downsample * slide.mpp
    return TileIndex(
        slide_id=slide.name,
        coords0=choice.coords0[chosen],
        tissue_fraction=choice.tissue_fraction[chosen],
        grid=grid,
        size0=choice.size0,
        width0=slide.width0,
        height0=slide.height0,
        slide_mpp=slide.mpp,
        mpp_source=slide.mpp_source,
        bounds0=slide.bounds0,
        level=slide.level_for(choice.size0, grid.size),
        tissue_mm2=float(choice.mask.sum()) * mask_mpp**2 / 1e6,
        mask_sha256=hashlib.sha256(np.packbits(choice.mask).tobytes()).hexdigest(),
        fingerprint=file_fingerprint(slide.path),
        file_name=slide.path.name,
        pen_fraction=choice.pen_fraction[chosen],
        blur=choice.blur[chosen],
    )


def _why_none(choice: TileChoice, slide: Slide, grid: Grid, tissue: Tissue) -> str:
    """Return why no tile was chosen, and a remedy."""
    size0, fraction = choice.size0, choice.tissue_fraction
    if not len(choice.coords0):
        return (
            f"the slide has {slide.width0} x {slide.height0} pixels, less than one "
            f"tile ({size0} x {size0}). Ask for smaller or finer tiles, or leave this slide out."
        )
    if not choice.mask.any():
        why = why_empty(choice.thumbnail, tissue, choice.downsample * slide.mpp)
        return f"no tissue found: {why}. Lower that threshold, or leave this slide out."
    if choice.lost.any():
        return (
            f"all its {choice.lost.sum()} tiles of tissue lie where the file lists tiles without "
            f"bytes. Copy it again from its source, or leave this slide out."
        )
    if np.isfinite(choice.blur).any():
        return (
            f"all {np.isfinite(choice.blur).sum()} tiles of tissue are more blurred than "
            f"{tissue.max_blur:g}; the sharpest has {np.nanmin(choice.blur):.2f}. Raise "
            f"tissue.max_blur, or leave this slide out."
        )
    of = f" of its mask in {tissue.masks}" if tissue.masks else ""
    return (
        f"none of its {len(choice.coords0)} tiles is tissue{of} for at least "
        f"{tissue.min_fraction:.0%} of its area; the best has {fraction.max():.1%}. Lower "
        f"tissue.min_fraction, ask for smaller tiles, or leave this slide out."
    )
