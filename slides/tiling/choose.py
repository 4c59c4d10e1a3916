"""From an open slide to its tiles, stage by stage: thumbnail, tissue, pen, blur, choice.

`choose_tiles` keeps every stage, for `slides.tiling.stage_picture` to draw; `index_slide` keeps the
tiles.

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

LOST_FRACTION = 0.02  # of a missing tile that is tissue: the mask is smooth and strays a little
MASK_PIXELS_PER_TILE = 8  # across: with fewer, a tile's tissue fraction is a guess


@dataclass(frozen=True, eq=False)
class TileChoice:
    """What was seen of a slide on the way to its tiles. N tiles of its whole lattice."""

    thumbnail: np.ndarray
    """(h, w, 3) uint8."""
    downsample: float
    """Level-0 pixels per thumbnail pixel."""
    mask: np.ndarray
    """(h, w) bool: tissue."""
    pen: np.ndarray
    """(h, w) bool: marker strokes and their halo; none where they are not looked for."""
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
    """(N,) bool: tissue whose pixels the file does not have, and which is not chosen for that."""


def choose_tiles(slide: Slide, grid: Grid, tissue: Tissue) -> TileChoice:
    """Look at a slide and choose its tiles, perhaps none.

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
        path = mask_path(tissue.masks, slide.name)
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
    """Tiles of which the file has lost a part: (N,) bool.

    A TIFF may list tiles without bytes; OpenSlide gives them transparent, and here that is white.
    In formats that leave out what was not scanned (MIRAX, Philips and others) it should be. An
    Aperio scanner writes all it scans: what is missing is lost, and at coarser levels OpenSlide
    does not show it either. In a generic TIFF it may be glass that was left out: it is lost where
    the thumbnail, from a coarser level, shows tissue.
    """
    lost = np.zeros(len(coords0), bool)
    levels = {"aperio": range(level + 1), "generic-tiff": [level]}.get(slide.vendor, ())
    for each in levels:
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
    """Whether each tile overlaps a marked cell; (rows, columns) of cells `sides0` wide and high."""
    above = np.pad(marked.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    most = np.array(marked.shape[::-1])
    left, top = np.minimum(coords0 // sides0, most).astype(int).T
    right, bottom = np.minimum(np.ceil((coords0 + size0) / sides0), most).astype(int).T
    return above[bottom, right] - above[top, right] - above[bottom, left] + above[top, left] > 0


def index_slide(slide: Slide, grid: Grid, tissue: Tissue) -> TileIndex:
    """Choose the tiles of a slide that hold tissue.

    Raises:
        NoTissueError: none does; the message names the threshold that failed.
        SlideError: what `slides.wsi.reader`, `slides.grid` and `slides.tiling.masks` raise for a
        slide they
            cannot use.
    """
    return to_index(choose_tiles(slide, grid, tissue), slide, grid, tissue)


def to_index(choice: TileChoice, slide: Slide, grid: Grid, tissue: Tissue) -> TileIndex:
    """The chosen tiles, the one with most tissue read to see that the slide's pixels are there.

    Raises:
        NoTissueError: none is chosen.
        UnreadableRegionError: that tile cannot be decoded.
    """
    chosen = choice.chosen
    if not chosen.any():
        raise NoTissueError(f"{slide.name}: {_why_none(choice, slide, grid, tissue)}")
    fullest = np.where(chosen, choice.tissue_fraction, -1).argmax()
    slide.read(*choice.coords0[fullest].tolist(), grid)  # a thumbnail can outlive level 0
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
        pen_fraction=choice.pen_fraction[chosen],
        blur=choice.blur[chosen],
    )


def _why_none(choice: TileChoice, slide: Slide, grid: Grid, tissue: Tissue) -> str:
    """What left no tile, and the way out."""
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
