"""Tissue masks by a segmentation network that is installed: SlideSegmenter.

    write_masks(slides, Path("index/masks_slidesegmenter"), "slidesegmenter")   <slide_id>.png each

They are files that `tissue.masks` reads, so that an index states what it was made from, and a mask
can be looked at and mended. Pen strokes are taken out of the tissue. Masks that are there are kept.

Price: a pass of the network over a thumbnail of 8 microns per pixel, a few seconds on a CPU.
Condition: the package and its weights, which no package registry has: `pip install
    git+https://github.com/RTLucassen/slidesegmenter` (Apache-2.0).
Source: Lucassen et al. 2024 (arXiv 2401.13511): images of 1.25x with numbers from 0 to 1, channels
    last; it returns tissue and pen markings, (h, w, 1) each. AtlasPatch writes tiles, not masks:
    `tissue.coords` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np

from slides.errors import SettingsError, SlideError
from slides.files import replacing
from slides.progress import progress_bar
from slides.wsi.reader import Slide

MPP = 8.0  # 1.25x
Segment = Callable[[np.ndarray], np.ndarray]
"""Takes a thumbnail (h, w, 3) uint8 and returns its tissue (h, w) bool."""


def slide_segmenter() -> Segment:
    """Return SlideSegmenter's tissue without pen markings, on the CPU.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        network = import_module("slidesegmenter").SlideSegmenter(
            device="cpu", separate_cross_sections=False
        )
    except ImportError as error:
        raise SettingsError(
            f"index: --segmenter slidesegmenter is a package that cannot be imported ({error}). "
            "Run `pip install git+https://github.com/RTLucassen/slidesegmenter`, or leave it out."
        ) from error

    def segment(rgb: np.ndarray) -> np.ndarray:
        tissue, pen = network.segment(rgb.astype(np.float32) / 255)
        return (tissue[..., 0] > 0) & ~(pen[..., 0] > 0)

    return segment


SEGMENTERS: dict[str, Callable[[], Segment]] = {"slidesegmenter": slide_segmenter}


def write_masks(slides: Sequence[tuple[str, Path, float | None]], folder: Path, name: str) -> None:
    """Write a mask for each slide that has none in a folder.

    A slide that cannot be read gets none: whoever indexes it says why.

    Args:
        slides: name, path and microns per level-0 pixel of each; None is the file's own.
        folder: of `<slide_id>.png`.
        name: of `SEGMENTERS`.

    Raises:
        SettingsError: the segmenter is not installed.
    """
    from PIL import Image

    wanted = [each for each in slides if not (folder / f"{each[0]}.png").is_file()]
    segment = SEGMENTERS[name]() if wanted else None
    for slide_id, path, mpp in progress_bar(wanted, name, unit=" slides", disable=None):
        with suppress(SlideError):
            with Slide(path, mpp, slide_id) as slide:
                rgb, _ = slide.thumbnail(MPP)
            mask = segment(rgb)
            with replacing(folder / f"{slide_id}.png") as unfinished:
                Image.fromarray(mask.astype(np.uint8) * 255).save(unfinished, format="PNG")
