"""Stain normalisation: one colour transform for all tiles of a slide.

    Macenko     maps a slide's two stain directions and their strengths, in optical density, to
                those of a reference: one 3 x 3 matrix
    Reinhard    maps mean and deviation of its tissue, in the opponent space l alpha beta, to
                those of a reference: an affine map

It is estimated once a slide, from the stained pixels of `TILES` of its tiles, evenly spread. The
estimate depends only on the slide and its index, and `StainedSlide` applies it wherever tiles are
read: training, validation, prediction and features see the same pixels.

Off by default, since most foundation models were trained without it.

Price: `TILES` more tiles a slide each time it is opened (0.1 to 0.4 s), and about 1 ms a 224 px
tile on one core.
Condition: haematoxylin and eosin. Macenko keeps glass white; Reinhard changes every colour and may
tint glass.
Source: Macenko et al. 2009, "A method for normalizing histology slides for quantitative analysis";
Reinhard et al. 2001, "Color transfer between images". The reference of Macenko is the usual one.
Differs: fitted to the slide, not to each tile; a failed fit is a SlideError, not the identity; a
pixel counts as stained by the mean of its channels, so that eosin, which passes red, is included.

Shapes: P pixels, T tiles, S side of a tile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from slides.errors import CohortError, StainError
from slides.grid import Grid

METHODS = ("macenko", "reinhard")
TILES = 32  # tiles of a slide for its estimate: 1.6 M pixels of 224 px tiles
LIGHT = 240.0  # brightness of glass that the reference below assumes
STAINED = 0.15  # least optical density of a stained pixel, mean of its channels
FEWEST = 1000  # stained pixels needed for an estimate
EXTREME = 1.0  # percent of the directions that are left out at either end
STRONG = 99.0  # percentile of a stain's amount that defines its strength
H_AND_E = frozenset({"he", "hande", "haematoxylinandeosin", "hematoxylinandeosin",
                     "haematoxylineosin", "hematoxylineosin"})  # fmt: skip

REFERENCE_STAINS = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
"""Optical density of red, green, blue (rows) per unit of haematoxylin and eosin (columns)."""
REFERENCE_STRENGTH = np.array([1.9705, 1.0308])

LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
"""From red, green, blue light to that of the eye's cones."""
OPPONENT = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
"""From the cones' logarithms to lightness, yellow-blue and red-green."""
REFERENCE_MOMENTS = np.array([[8.7014, -0.1283, 0.0242], [0.3919, 0.0700, 0.0088]])
"""Mean and deviation, by this module: means of the three H&E slides of the Pathology Atlas (Serdar
Balci, doi 10.5281/zenodo.6382734) that the tests read."""


@dataclass(frozen=True, eq=False)
class ColourTransform:
    """A colour transform on each pixel: `space`^-1 exp(`matrix` log(`space` rgb) + `shift`)."""

    space: np.ndarray
    """(3, 3): from RGB to the light whose logarithm is taken."""
    matrix: np.ndarray
    """(3, 3)."""
    shift: np.ndarray
    """(3,)."""

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Return pixels (..., 3) transformed: uint8 stays uint8, floats become float32."""
        exact = self.space, np.linalg.inv(self.space), self.matrix, self.shift
        space, back, matrix, shift = (each.astype(np.float32) for each in exact)
        light_P3 = np.maximum(rgb.reshape(-1, 3).astype(np.float32), 1) @ space.T
        out_P3 = np.exp(np.log(light_P3) @ matrix.T + shift) @ back.T
        out = out_P3.clip(0, 255).reshape(rgb.shape)
        return np.rint(out).astype(np.uint8) if rgb.dtype == np.uint8 else out


def macenko(rgb: np.ndarray, name: str = "slide") -> ColourTransform:
    """Return the transform that maps these pixels' stains to the reference's.

    Args:
        rgb: (P, 3) uint8, pixels of one slide, with or without glass.
        name: the slide's name, for the error.

    Raises:
        StainError: too few pixels are stained, or all have one colour.
    """
    stains_32, strength_2 = macenko_stains(rgb, name)
    scale_22 = np.diag(REFERENCE_STRENGTH / strength_2)
    matrix = REFERENCE_STAINS @ scale_22 @ np.linalg.pinv(stains_32)
    # density is log(LIGHT) - log(light): linear in the logarithm, so glass of LIGHT stays
    shift = np.log(LIGHT) * (np.ones(3) - matrix.sum(1))
    return ColourTransform(np.eye(3), matrix, shift)


def macenko_stains(rgb: np.ndarray, name: str = "slide") -> tuple[np.ndarray, np.ndarray]:
    """Return stain directions (3, 2), haematoxylin first, and strengths (2,)."""
    density_P3 = _stained_density(rgb, name)
    _, vectors = np.linalg.eigh(np.cov(density_P3.T))
    plane_32 = vectors[:, 1:] * np.where(vectors[:, 1:].sum(0) < 0, -1, 1)
    along_P2 = density_P3 @ plane_32
    angle_P = np.arctan2(along_P2[:, 0], along_P2[:, 1])
    ends = np.percentile(angle_P, [EXTREME, 100 - EXTREME])
    stains_32 = plane_32 @ np.array([np.sin(ends), np.cos(ends)])
    if stains_32[0, 0] < stains_32[0, 1]:  # haematoxylin absorbs more red than eosin does
        stains_32 = stains_32[:, ::-1]
    if np.linalg.cond(stains_32) > 1e3:
        raise StainError(
            f"{name}: its stained pixels are all of one colour, and two stains cannot be "
            f"separated. Leave stain normalisation off, use reinhard, or leave this slide out."
        )
    amounts_2P = np.linalg.pinv(stains_32) @ density_P3.T
    return stains_32, np.percentile(amounts_2P, STRONG, axis=1)


def reinhard_moments(rgb: np.ndarray, name: str = "slide") -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation, (3,) each, of the stained pixels in l alpha beta."""
    density_P3 = _stained_density(rgb, name)
    light_P3 = LIGHT * np.exp(-density_P3)
    opponent_P3 = np.log(light_P3 @ LMS.T) @ OPPONENT.T
    return opponent_P3.mean(0), opponent_P3.std(0)


def reinhard(rgb: np.ndarray, name: str = "slide") -> ColourTransform:
    """Return the transform that maps these pixels' moments to the reference's.

    Raises:
        StainError: too few pixels are stained, or all have one colour.
    """
    mean_3, deviation_3 = reinhard_moments(rgb, name)
    if deviation_3.min() < 1e-4:
        raise StainError(
            f"{name}: its stained pixels are all of one colour, and their spread cannot be scaled. "
            f"Leave stain normalisation off, or leave this slide out."
        )
    inverse = np.linalg.inv(OPPONENT)
    scale = np.diag(REFERENCE_MOMENTS[1] / deviation_3)
    matrix = inverse @ scale @ OPPONENT
    shift = inverse @ (REFERENCE_MOMENTS[0] - scale @ mean_3)
    return ColourTransform(LMS, matrix, shift)


class StainedSlide:
    """A slide whose tiles are stain-normalised as they are read. Pickles.

    Args:
        source: the slide, or its cache.
        index: its tiles; `TILES` of them are read now.
        method: one of `METHODS`.

    Raises:
        StainError: the slide's stains cannot be estimated.
        SlideError: those tiles cannot be read.
    """

    def __init__(self, source, index, method: str):
        self.source = source
        count = min(TILES, len(index.coords0))
        rows = np.linspace(0, len(index.coords0) - 1, count).round().astype(int)
        tiles = [source.read(x0, y0, index.grid) for x0, y0 in index.coords0[rows].tolist()]
        pixels = np.concatenate([tile.reshape(-1, 3) for tile in tiles])
        self.transform = {"macenko": macenko, "reinhard": reinhard}[method](pixels, index.slide_id)

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """Return the normalised tile at (x0, y0), uint8 (S, S, 3)."""
        return self.transform(self.source.read(x0, y0, grid))

    def close(self) -> None:
        """Close the slide."""
        self.source.close()

    def __enter__(self) -> StainedSlide:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def refuse_other_stains(rows: Iterable, option: str) -> None:
    """Check that the table calls no slide anything but H&E; a blank passes.

    Raises:
        CohortError: some slides have another stain; the message lists them.
    """
    others = [f"{row.slide_id} ({row.stain})" for row in rows if not _may_be_h_and_e(row.stain)]
    if others:
        raise CohortError(
            f"{option} is for haematoxylin and eosin, but the table gives another stain for "
            f"{len(others)} slides: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}. "
            f"Switch it off, or leave those slides out."
        )


def _may_be_h_and_e(stain: str) -> bool:
    return re.sub(r"[^a-z]", "", stain.lower().replace("&", "and")) in {"", *H_AND_E}


def _stained_density(rgb: np.ndarray, name: str) -> np.ndarray:
    """Return the optical density of the stained pixels, (P, 3) float64.

    Raises:
        StainError: there are fewer than `FEWEST`.
    """
    density_P3 = np.log(LIGHT) - np.log(np.maximum(rgb.reshape(-1, 3).astype(np.float64), 1))
    density_P3 = density_P3[density_P3.mean(1) > STAINED]
    if len(density_P3) < FEWEST:
        raise StainError(
            f"{name}: only {len(density_P3)} pixels of its tiles are stained, too few to estimate "
            f"its stains from. Leave stain normalisation off, or leave this slide out."
        )
    return density_P3
