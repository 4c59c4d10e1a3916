"""Draws the stages of indexing a slide: thumbnail, tissue, pen, blur, chosen tiles.

A folder of these pictures shows at a glance on which slides a threshold is wrong. Slides without
any tile have a picture too.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from slides.files import write_whole
from slides.tiling.choose import TileChoice
from slides.wsi.reader import Slide

PANEL = 4.6  # inches, the longer side of a slide
TISSUE, PEN, TILE = "#00a36c", "#e6007e", "#0057d9"  # differ in lightness too
FADED = 0.55  # share of white mixed into the slide below the tiles' colours


def draw_stages(choice: TileChoice, slide: Slide, path: Path) -> None:
    """Write the picture of all stages to `path`, atomically.

    Raises:
        IndexFileError: it cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    height, width = choice.mask.shape
    measured = np.isfinite(choice.blur).any()
    scale = PANEL / max(height, width)
    panels = 4 if measured else 3
    figsize = panels * max(scale * width, 2.2) + 0.6, scale * height + 0.85
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(1, panels)
    for axis in axes:
        axis.set_axis_off()
    mm2 = (choice.downsample * slide.mpp / 1000) ** 2
    plain, seen, *blurred, tiles = axes
    _show(plain, choice.thumbnail, f"{slide.width0} x {slide.height0} px, {slide.mpp:.4g} mpp")
    pen = f", pen {choice.pen.sum() * mm2:.3g} mm²" if choice.pen.any() else ", no pen"
    _show(seen, choice.thumbnail, f"tissue {choice.mask.sum() * mm2:.3g} mm²{pen}")
    for mask, colour in ((choice.mask, TISSUE), (choice.pen, PEN)):
        if mask.any():
            seen.imshow(_overlay(mask, colour), interpolation="nearest")
            _outline(seen, mask, colour)
    faded = choice.thumbnail + (255 - choice.thumbnail.astype(float)) * FADED
    if measured:
        _show(blurred[0], faded.astype(np.uint8), "blur of each tile of tissue")
        drawn = _squares(blurred[0], choice, np.isfinite(choice.blur))
        drawn.set(array=choice.blur[np.isfinite(choice.blur)], cmap="viridis_r", clim=(0, 1))
        figure.colorbar(drawn, ax=blurred[0], fraction=0.05, pad=0.02)
    _show(tiles, choice.thumbnail, f"{choice.chosen.sum()} tiles of {len(choice.chosen)}")
    _squares(tiles, choice, choice.chosen).set(facecolor="none", edgecolor=TILE, linewidth=0.7)
    figure.suptitle(slide.name, fontsize=10, parse_math=False)  # a $ in the name stays a $
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue(), slide.name)


def _show(axis, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture, interpolation="antialiased")
    axis.set_title(title, fontsize=9)


def _overlay(mask: np.ndarray, colour: str) -> np.ndarray:
    """Return the mask as a transparent colour layer, (h, w, 4)."""
    from matplotlib.colors import to_rgba

    return np.where(mask[..., None], to_rgba(colour, 0.25), 0.0)


def _outline(axis, mask: np.ndarray, colour: str) -> None:
    framed = np.pad(mask, 1)  # so that tissue at the slide's edge is outlined there as well
    x, y = np.arange(framed.shape[1]) - 1, np.arange(framed.shape[0]) - 1
    axis.contour(x, y, framed, levels=[0.5], colors=colour, linewidths=1.0)
    axis.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))


def _squares(axis, choice: TileChoice, which: np.ndarray):
    """Draw tiles on the thumbnail as one collection, and return it."""
    from matplotlib.collections import PolyCollection

    side = choice.size0 / choice.downsample
    corners = choice.coords0[which] / choice.downsample - 0.5
    square = np.array([[0, 0], [side, 0], [side, side], [0, side]])
    return axis.add_collection(PolyCollection(corners[:, None] + square))
