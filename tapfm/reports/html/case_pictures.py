"""Pictures of a slide for the page: thumbnail, tile weights, tiles with the largest weights.

    <run>/<name>/cases_<split>/<slide>/thumbnail.jpg    the slide, small, with a scale bar
                                       overlay.jpg      tile weights on it: rank as colour, weight
                                                        as opacity
                                       tile_1.jpg ...   the tiles of the largest weights
                                       case.json        positions and weights of those tiles

They are drawn if the slide can be opened, kept beside the run, and reused until the slide's tile
weights change.

Shapes: T tiles of a slide.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slides.errors import SlideError
from slides.files import replacing, write_json
from slides.hdf5 import open_h5
from slides.wsi.reader import Slide
from tapfm.inference.heatmap import (
    COLOURS,
    effective_tiles,
    rank_percentile,
    scale_bar,
    tile_map,
    weight_opacity,
)

TILES = 8
SIDE = 640  # px, the longer side of the pictures of a slide
TILE_SIDE = 224  # px at most
LEGIBLE = 15  # px of a tile on the thumbnail from which its number fits
QUALITY = 80  # 60 slides of real tissue make a page of 12 MB; at 88 of 15
DRAWN = b"2"  # changes whenever pictures of the same weights do


@dataclass(frozen=True)
class Pictures:
    """Paths of the pictures of one slide: thumbnail, overlay, top tiles; and facts of its tiles."""

    folder: Path
    facts: dict
    """`count` and `effective` tiles, `tiles`: x0, y0 and weight of each, the largest first."""

    @property
    def tiles(self) -> list[Path]:
        """Return the pictures of the tiles, the largest weight first."""
        return [self.folder / f"tile_{n + 1}.jpg" for n in range(len(self.facts["tiles"]))]


class NoPicturesError(ValueError):
    """A slide cannot be shown; the message says why."""


def pictures_of(run: Path, split: str, slide_id: str, path: Path | None, tile_px: int) -> Pictures:
    """Return a slide's pictures, drawn if missing or if its tile weights have changed.

    Args:
        run: folder of one run.
        split: split of the slide.
        slide_id: its name.
        path: its file; None if unknown.
        tile_px: side of a tile.

    Raises:
        NoPicturesError: there are no pictures, and they cannot be drawn.
    """
    weights, folder = run / f"weights_{split}" / f"{slide_id}.h5", run / f"cases_{split}" / slide_id
    facts = _read_facts(folder)
    try:
        with open_h5(weights) as file:
            weights_T, coords0 = file["weights"][:], file["coords"][:]
            size0 = int(file["coords"].attrs["patch_size_level0"])
    except (OSError, KeyError) as error:
        if facts:
            return Pictures(folder, facts)
        raise NoPicturesError(f"{weights} cannot be read ({error})") from error
    digest = hashlib.sha256(DRAWN + weights_T.tobytes()).hexdigest()
    if facts and facts["weights_sha256"] == digest:
        return Pictures(folder, facts)
    if path is None or not path.is_file():
        where = f"{path} is missing" if path else "its path is unknown, since the index is missing"
        raise NoPicturesError(f"{slide_id} cannot be opened: {where}")
    try:
        with Slide(path, name=slide_id) as slide:
            facts = _draw(folder, slide, weights_T, coords0, size0, min(tile_px, TILE_SIDE))
    except SlideError as error:
        raise NoPicturesError(str(error)) from error
    facts["weights_sha256"] = digest
    write_json(folder / "case.json", facts)  # last: it marks complete pictures
    return Pictures(folder, facts)


def _read_facts(folder: Path) -> dict | None:
    """Return the facts of a folder whose pictures are complete, else None."""
    try:
        facts = json.loads((folder / "case.json").read_text())
    except (OSError, ValueError):
        return None
    there = [folder / "thumbnail.jpg", folder / "overlay.jpg", *Pictures(folder, facts).tiles]
    return facts if all(path.is_file() for path in there) else None


def _draw(folder, slide, weights_T, coords0, size0, size) -> dict:
    """Write all pictures of an open slide; return their facts."""
    (folder / "case.json").unlink(missing_ok=True)
    thumbnail, downsample = slide.thumbnail(max_side=SIDE)
    top = np.argsort(-weights_T, kind="stable")[:TILES]
    plain = Image.fromarray(thumbnail)
    _bar(plain, slide.mpp * downsample)
    _save(folder / "thumbnail.jpg", plain)
    overlay = _overlay(thumbnail, downsample, coords0, size0, weights_T)
    _frames(overlay, coords0[top] / downsample, size0 / downsample)
    _save(folder / "overlay.jpg", overlay)
    for number, (x0, y0) in enumerate(coords0[top].tolist(), start=1):
        tile = slide.region(x0, y0, size0, min(size, size0))
        _save(folder / f"tile_{number}.jpg", Image.fromarray(tile))
    return {
        "count": len(weights_T),
        "effective": effective_tiles(weights_T),
        "tiles": [
            {"x0": int(x0), "y0": int(y0), "weight": float(weights_T[n])}
            for n, (x0, y0) in zip(top, coords0[top], strict=True)
        ],
    }


def _overlay(thumbnail, downsample, coords0, size0, weights_T) -> Image.Image:
    """Return ranks as colours and weights as opacity over the thumbnail, as `overlay_png` does."""
    from matplotlib import colormaps

    where = thumbnail.shape[:2], downsample, coords0, size0
    painted = tile_map(*where, rank_percentile(weights_T))
    seen = tile_map(*where, 0.9 * weight_opacity(weights_T))
    veil = colormaps[COLOURS](np.nan_to_num(painted) / 100)[..., :3] * 255
    opacity = np.nan_to_num(seen)[..., None]
    return Image.fromarray((thumbnail * (1 - opacity) + veil * opacity).round().astype(np.uint8))


def _bar(picture: Image.Image, mpp: float) -> None:
    """Draw a scale bar at the lower left."""
    from matplotlib import get_data_path  # its font has a µ, Pillow's own has none

    length, text = scale_bar(picture.width, mpp)
    draw, (x, y) = ImageDraw.Draw(picture), (8, picture.height - 10)
    draw.rectangle([x - 1, y - 2, x + round(length) + 1, y + 2], fill="white")
    draw.rectangle([x, y - 1, x + round(length), y + 1], fill="black")
    how = {"stroke_width": 2, "stroke_fill": "white"}
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)
    draw.text((x, y - 4), text, "black", font, "lb", **how)


def _frames(picture: Image.Image, corners: np.ndarray, side: float) -> None:
    """Draw white frames around the top tiles, with their numbers if these fit."""
    draw, number_px = ImageDraw.Draw(picture), min(side * 0.7, 16)
    for number, (x, y) in reversed(list(enumerate(corners.tolist(), start=1))):
        box = [round(x), round(y), round(x + side) - 1, round(y + side) - 1]
        box[2:] = max(box[2], box[0] + 4), max(box[3], box[1] + 4)
        draw.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline="black", width=3)
        draw.rectangle(box, outline="white", width=1)
        if side >= LEGIBLE:
            font = ImageFont.load_default(number_px)
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            draw.text(middle, str(number), "white", font, "mm", stroke_width=2, stroke_fill="black")


def _save(path: Path, picture: Image.Image) -> None:
    with replacing(path) as partial:
        picture.save(partial, format="JPEG", quality=QUALITY)
