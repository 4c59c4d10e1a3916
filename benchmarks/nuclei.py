"""Finds nuclei in H&E tissue, and changes them: enlarged, turned or cleared, colour held.

All are functions on arrays. Coordinates are (y, x) in pixels of about .5 microns; colours are
floats from 0 to 1 unless uint8 is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from slides.streaming.stain import REFERENCE_STAINS

REACH = 2.0  # radii of a nucleus at which a warp has faded
FADE = 6.0  # pixels before a tile's border in which warps fade
COARSE = 3.0  # pixels, deviation of the blur that parts tissue from its grain
STAINS_32 = REFERENCE_STAINS / np.linalg.norm(REFERENCE_STAINS, axis=0)
"""Optical density of unit haematoxylin and eosin (columns)."""


@dataclass(frozen=True)
class Nuclei:
    """Ellipses fitted to nuclei, N of them."""

    centre_N2: np.ndarray
    """(y, x) in pixels."""
    shape_N22: np.ndarray
    """`d @ shape @ d` is 1 for an offset d (y, x) from the centre to the border."""
    radius_N: np.ndarray
    """Half of the long axis, in pixels."""

    def __len__(self) -> int:
        return len(self.radius_N)

    def inside(self, corner: Sequence[int], side: int) -> Nuclei:
        """Return those with centres in a square, relative to its corner (y, x)."""
        centre_N2 = self.centre_N2 - np.asarray(corner)
        own = ((centre_N2 >= 0) & (centre_N2 < side)).all(1)
        return Nuclei(centre_N2[own], self.shape_N22[own], self.radius_N[own])


def find_nuclei(rgb: np.ndarray) -> Nuclei:
    """Return the nuclei of tissue, (h, w, 3) uint8, at about .5 microns a pixel.

    Red light is what haematoxylin absorbs and eosin does not. Darker than the surroundings is
    nucleus; pixels of touching nuclei go to the nearest peak of depth and darkness.
    """
    dark = ndimage.gaussian_filter(density(rgb[..., 0] / np.float32(255)), 1.0)
    level = otsu(dark)
    dark = np.minimum(dark, 2 * level)
    tissue = (dark > 0.4 * level).astype(np.float32)
    held = np.maximum(ndimage.gaussian_filter(tissue, 14.0), 1e-3)
    mean = ndimage.gaussian_filter(dark * tissue, 14.0) / held
    spread = ndimage.gaussian_filter(dark**2 * tissue, 14.0) / held - mean**2
    spread = np.sqrt(np.maximum(spread, 0))
    mask = dark > np.maximum(0.75 * level, mean + 0.25 * spread)
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(mask))
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
    blob = -ndimage.gaussian_laplace(np.where(mask, dark, mean - spread), 3.0) * 9 / level
    height = blob + 0.1 * depth
    peaks = (height == ndimage.maximum_filter(height, 9)) & mask & (depth > 1.2)
    markers, count = ndimage.label(peaks, np.ones((3, 3)))
    at = ndimage.distance_transform_edt(markers == 0, return_distances=False, return_indices=True)
    return ellipses(np.where(mask, markers[tuple(at)], 0), count)


def ellipses(label: np.ndarray, count: int) -> Nuclei:
    """Return ellipses of the same moments as regions 1 to `count`, of those like nuclei."""
    y, x = np.nonzero(label)
    of = label[y, x] - 1
    area = np.bincount(of, minlength=count).astype(float)
    pixels = np.maximum(area, 1)
    centre = np.stack([np.bincount(of, v, count) / pixels for v in (y, x)], 1)
    dy, dx = y - centre[of, 0], x - centre[of, 1]
    moments = [np.bincount(of, v, count) / pixels for v in (dy * dy, dy * dx, dx * dx)]
    spread = np.stack([moments[0], moments[1], moments[1], moments[2]], 1).reshape(-1, 2, 2)
    spread = spread + np.eye(2) / 12  # a pixel's own
    short, long = (2 * np.sqrt(np.linalg.eigvalsh(spread))).T
    solid = area / (np.pi * short * long)
    like = (area > 30) & (long < 14) & (short > 2.2) & (long < 2.8 * short) & (solid > 0.85)
    return Nuclei(centre[like], np.linalg.inv(4 * spread[like]), long[like])


def otsu(values: np.ndarray) -> float:
    """Return the threshold between two classes of least spread."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(centres[np.nanargmax(between[:-1])])


def density(rgb: np.ndarray) -> np.ndarray:
    """Return optical density of colours from 0 to 1."""
    return -np.log(np.maximum(rgb, 1 / 255))


def haematoxylin(density_hw3: np.ndarray) -> np.ndarray:
    """Return the amount of haematoxylin, (h, w)."""
    return density_hw3 @ np.linalg.pinv(STAINS_32)[0].astype(np.float32)


def warp(nuclei: Nuclei, change_N22: np.ndarray, flat: float, side: int) -> np.ndarray:
    """Return the offset (2, side, side) from each pixel to where its colour comes from.

    Args:
        nuclei: ellipses in this square.
        change_N22: the offset at `d` from a nucleus' centre is `change @ d` in and around it; it
            fades to 0 at `REACH` radii.
        flat: radii at which the fading begins, those of an enlarged nucleus' border.
        side: pixels. Offsets also fade toward the border, where they are 0.
    """
    total, weight = np.zeros((2, side, side)), np.zeros((side, side))
    for centre, shape, radius, change in zip(
        nuclei.centre_N2, nuclei.shape_N22, nuclei.radius_N, change_N22, strict=True
    ):
        box, offset, rho = around(centre, shape, REACH * radius, side)
        own = fade(rho, flat + 0.05, REACH)
        total[(slice(None), *box)] += own * np.tensordot(change, offset, 1)
        weight[box] += own
    edge = np.minimum(np.arange(side), np.arange(side)[::-1])
    inner = 1 - fade(edge, 0, FADE)
    return total / np.maximum(weight, 1) * inner[:, None] * inner


def around(
    centre: np.ndarray, shape: np.ndarray, reach: float, side: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Return a box around a nucleus, offsets (2, h, w) from its centre, and radii (h, w)."""
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, side).astype(int)
    box = slice(low[0], high[0]), slice(low[1], high[1])
    offset = np.mgrid[box] - centre[:, None, None]
    rho = np.sqrt(np.einsum("iyx,ij,jyx->yx", offset, shape, offset))
    return box, offset, rho


def fade(value: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return 1 up to `start`, 0 from `end`, smooth between."""
    t = np.clip((value - start) / (end - start), 0, 1)
    return 1 - t**3 * (10 - 15 * t + 6 * t * t)


def changes(enlarged: np.ndarray, turn: np.ndarray, by: float) -> np.ndarray:
    """Return `warp`'s matrices (N, 2, 2): enlargement, or a turn that moves pixels equally far.

    Args:
        enlarged: which nuclei grow (N,); the others turn.
        turn: 1 or -1, the way that each would turn (N,).
        by: ratio of the diameters.
    """
    inward = 1 / by - 1
    angle = 2 * np.arcsin(-inward / 2) * turn
    turned = np.stack([np.cos(angle) - 1, -np.sin(angle), np.sin(angle), np.cos(angle) - 1], 1)
    return np.where(enlarged[:, None, None], inward * np.eye(2), turned.reshape(-1, 2, 2))


def clear(
    rgb: np.ndarray, nuclei: Nuclei, strength_N: np.ndarray, size_N: np.ndarray
) -> np.ndarray:
    """Return colours (side, side, 3) with less haematoxylin in the centres of nuclei.

    Args:
        rgb: colours from 0 to 1.
        nuclei: ellipses in this square.
        strength_N: share of the haematoxylin that a centre loses.
        size_N: the nuclei's enlargement.
    """
    side, share = len(rgb), np.zeros(rgb.shape[:2])
    for k in np.flatnonzero(strength_N):
        centre, shape, reach = nuclei.centre_N2[k], nuclei.shape_N22[k], nuclei.radius_N[k]
        box, _, rho = around(centre, shape, size_N[k] * reach, side)
        share[box] = np.maximum(share[box], strength_N[k] * fade(rho / size_N[k], 0.3, 0.85))
    if not share.any():
        return rgb
    dense = density(rgb)
    lost = share * np.maximum(haematoxylin(dense), 0)
    return np.exp(lost[..., None] * STAINS_32[:, 0] - dense)


def hold(rgb: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return colours with the mean and the deviation that another tile's channels have.

    Only what is coarser than a nucleus is scaled: the fine grain, which a change of contrast would
    give away, stays.
    """
    own = rgb - rgb.mean((0, 1))
    coarse = ndimage.gaussian_filter(own, (COARSE, COARSE, 0))
    coarse -= coarse.mean((0, 1))
    # deviation of own + gain * coarse: a quadratic in gain
    a, b = np.maximum((coarse**2).mean((0, 1)), 1e-9), (own * coarse).mean((0, 1))
    c = (own**2).mean((0, 1)) - like.var((0, 1))
    gain = (np.sqrt(np.maximum(b * b - a * c, 0)) - b) / a
    return own + gain * coarse + like.mean((0, 1))
