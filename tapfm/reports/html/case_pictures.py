"""Pictures of a slide for the page: what it looks like, and where the model looked.

    <run>/<name>/cases_<split>/<slide>/thumbnail.jpg    the slide, small
                                       overlay.jpg      tile weights on it, by rank
                                       tile_1.jpg ...   the tiles of the largest weights
                                       case.json        where those are, what they weigh

They are made where the slide can be opened, kept beside the run, and shown from there afterwards.
They are drawn anew when the slide's tile weights are no longer those they were made of.

Shapes: T tiles of a slide.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slides.errors import SlideError
from slides.files import replacing, write_json
from slides.wsi.reader import Slide
from tapfm.inference.heatmap import COLOURS, OPACITY, effective_tiles, rank_percentile, tile_map

TILES = 8
SIDE = 640  # px, the longer side of the pictures of a slide
TILE_SIDE = 224  # px at most
LEGIBLE = 15  # px of a tile on the thumbnail, from which its number fits into it
QUALITY = 88


@dataclass(frozen=True)
class Pictures:
    """Of one slide, on disk."""

    folder: Path
    facts: dict
    """`count` and `effective` tiles, `tiles`: x0, y0 and weight of each, the largest first."""

    @property
    def tiles(self) -> list[Path]:
        """Pictures of the tiles, the largest weight first."""
        return [self.folder / f"tile_{n + 1}.jpg" for n in range(len(self.facts["tiles"]))]


class NoPicturesError(ValueError):
    """Why a slide cannot be shown."""


def pictures_of(run: Path, split: str, slide_id: str, path: Path | None, tile_px: int) -> Pictures:
    """The pictures of a slide, made if they are not there or not of these weights.

    Args:
        run: folder of one run.
        split: of the slide.
        slide_id: its name.
        path: its file; None where that is not known.
        tile_px: side of a tile.

    Raises:
        NoPicturesError: there are none, and they cannot be made.
    """
    weights, folder = run / f"weights_{split}" / f"{slide_id}.h5", run / f"cases_{split}" / slide_id
    facts = _read_facts(folder)
    try:
        with h5py.File(weights) as file:
            weights_T, coords0 = file["weights"][:], file["coords"][:]
            size0 = int(file["coords"].attrs["patch_size_level0"])
    except (OSError, KeyError) as error:
        if facts:
            return Pictures(folder, facts)
        raise NoPicturesError(f"{weights} cannot be read ({error})") from error
    digest = hashlib.sha256(weights_T.tobytes()).hexdigest()
    if facts and facts["weights_sha256"] == digest:
        return Pictures(folder, facts)
    if path is None or not path.is_file():
        where = f"{path} is not there" if path else "the index is not there to say where it lies"
        raise NoPicturesError(f"{slide_id} cannot be opened: {where}")
    try:
        with Slide(path, name=slide_id) as slide:
            facts = _draw(folder, slide, weights_T, coords0, size0, min(tile_px, TILE_SIDE))
    except SlideError as error:
        raise NoPicturesError(str(error)) from error
    facts["weights_sha256"] = digest
    write_json(folder / "case.json", facts)  # last: pictures that have it are whole
    return Pictures(folder, facts)


def _read_facts(folder: Path) -> dict | None:
    """Those of pictures that are all there."""
    try:
        facts = json.loads((folder / "case.json").read_text())
    except (OSError, ValueError):
        return None
    there = [folder / "thumbnail.jpg", folder / "overlay.jpg", *Pictures(folder, facts).tiles]
    return facts if all(path.is_file() for path in there) else None


def _draw(folder, slide, weights_T, coords0, size0, size) -> dict:
    """All pictures of an open slide; the facts of them."""
    (folder / "case.json").unlink(missing_ok=True)
    thumbnail, downsample = slide.thumbnail(max_side=SIDE)
    top = np.argsort(-weights_T, kind="stable")[:TILES]
    _save(folder / "thumbnail.jpg", Image.fromarray(thumbnail))
    overlay = _overlay(thumbnail, downsample, coords0, size0, rank_percentile(weights_T))
    _frames(overlay, coords0[top] / downsample, size0 / downsample)
    _save(folder / "overlay.jpg", overlay)
    for number, (x0, y0) in enumerate(coords0[top].tolist(), start=1):
        tile = slide.region(x0, y0, size0, min(size, size0))
        _save(folder / f"tile_{number}.jpg", Image.fromarray(tile))
    return {
        "count": len(weights_T),
        "effective": effective_tiles(weights_T),
        "tiles": [
            {
                "x0": int(coords0[row, 0]),
                "y0": int(coords0[row, 1]),
                "weight": float(weights_T[row]),
            }
            for row in top
        ],
    }


def _overlay(thumbnail, downsample, coords0, size0, ranks_T) -> Image.Image:
    """Ranks as colours over the thumbnail, as `overlay_png` draws them."""
    from matplotlib import colormaps

    painted = tile_map(thumbnail.shape[:2], downsample, coords0, size0, ranks_T)
    veil = colormaps[COLOURS](np.nan_to_num(painted) / 100)[..., :3] * 255
    opacity = np.where(np.isnan(painted), 0, OPACITY)[..., None]
    return Image.fromarray((thumbnail * (1 - opacity) + veil * opacity).round().astype(np.uint8))


def _frames(picture: Image.Image, corners: np.ndarray, side: float) -> None:
    """The top tiles framed in white on black, with their numbers where they fit in."""
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
