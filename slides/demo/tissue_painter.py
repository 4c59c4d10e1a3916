"""Paints synthetic H&E tissue: a specimen (numbers and a seed) becomes pixels and truth.

A specimen is described in microns and painted at any requested resolution. Two planes have the
amounts of haematoxylin and eosin; compartments (stroma, glands, lymphoid, foamy, tumour) are
thresholded smooth noise; cells are stamps (`cell_stamps`) drawn into the planes; and Beer-Lambert's
law with the site's stain vectors turns amounts into colour. Only the window with the tissue is
painted, not the glass around it.

The tumour's cells show the three traits of `cell_stamps`. Normal tissue has look-alikes of all
three, in amounts that do not depend on the labels: glands with nucleoli or inclusions, foamy
macrophages.

Price: about 0.25 s for a 0.42 mm2 specimen at 0.5 microns per pixel, 1 s at 0.25 (one core).

Shapes: h, w rows and columns of the window at the requested mpp; `_um` microns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from slides.demo import cell_stamps as cells

GLASS, TISSUE, TUMOUR, PEN = 0, 1, 2, 3
MARGIN_UM = 24.0  # glass kept around the tissue inside its window
FIELD_UM = 2.0  # step of the compartment map: finer than a cell, coarse enough to be fast
MAX_AMOUNT = 2.2  # of either stain; nothing painted exceeds it
VARIANTS = 40  # different stamps of each kind of cell in one specimen

# Compartments of the field map. Tumour is a compartment like any other to the painter.
_GLASS, _STROMA, _TUMOUR, _LYMPHOID, _GLAND, _LUMEN, _FOAMY = range(7)
COMPARTMENTS = ("glass", "stroma", "tumour", "lymphoid", "gland", "lumen", "foamy")
# Haematoxylin and eosin of each compartment before texture.
_GROUND = np.array(
    [
        [0.00, 0.00],
        [0.05, 0.42],
        [0.10, 0.34],
        [0.08, 0.26],
        [0.09, 0.32],
        [0.00, 0.03],
        [0.06, 0.24],
    ],
    np.float32,
)
_HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])  # Ruifrok and Johnston 2001, optical density
_EOSIN = np.array([0.092, 0.954, 0.283])


@dataclass(frozen=True)
class Stain:
    """Colours of one laboratory and scanner."""

    haematoxylin: tuple[float, float, float]
    """Optical density per unit of haematoxylin in red, green, blue."""
    eosin: tuple[float, float, float]
    """The same for eosin."""
    glass: tuple[int, int, int]
    """Colour of empty glass."""


@dataclass(frozen=True)
class Specimen:
    """One piece of tissue; the same numbers give the same pixels."""

    seed: int
    """Everything that is not set below is drawn from it."""
    stain: Stain
    """Colours of the site."""
    traits: tuple[int, int, int]
    """State, 0 or 1, of each of `cell_stamps.TRAITS` in the tumour."""
    tissue_mm2: float = 0.42
    """Tissue area."""
    tumour_fraction: float = 0.22
    """Share of the tissue that is tumour."""
    aspect: float = 1.15
    """Width over height of the window the tissue lies in."""


def site_stain(seed: int, site: int) -> Stain:
    """Return the stain of a site; each seed has its own laboratories."""
    rng = np.random.default_rng([seed, site, 7001])
    strength_h, strength_e = rng.uniform(1.35, 1.95), rng.uniform(0.85, 1.35)
    haematoxylin = _HAEMATOXYLIN * rng.uniform(0.86, 1.14, 3) * strength_h
    eosin = _EOSIN * rng.uniform(0.85, 1.15, 3) * strength_e
    glass = rng.integers(236, 249, 3)
    return Stain(tuple(haematoxylin.tolist()), tuple(eosin.tolist()), tuple(glass.tolist()))


def paint(specimen: Specimen, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and truth of a specimen.

    Returns:
        rgb: (h, w, 3) uint8 at `mpp`.
        truth: (h, w) uint8 at the same pixels: GLASS, TISSUE or TUMOUR.
    """
    rng = np.random.default_rng([specimen.seed, 7002])
    field = _compartments(specimen, rng)
    h, w = (round(n * FIELD_UM / mpp) for n in field.shape)
    amounts = _ground(field, (h, w), mpp, rng)
    _scatter_cells(amounts, field, specimen, mpp, rng)
    rgb = _develop(amounts, specimen.stain, mpp, rng)
    truth = np.where(field == _TUMOUR, TUMOUR, np.where(field == _GLASS, GLASS, TISSUE))
    return rgb, _enlarge_labels(truth.astype(np.uint8), (h, w))


def compartments(specimen: Specimen) -> np.ndarray:
    """Return the compartment map that `paint` uses, (h, w) uint8 at `FIELD_UM`."""
    return _compartments(specimen, np.random.default_rng([specimen.seed, 7002]))


# ---------------------------------------------------------------------------- compartments


def _compartments(specimen: Specimen, rng: np.random.Generator) -> np.ndarray:
    """Return the map of compartments, (h, w) uint8 at `FIELD_UM`."""
    area_um2 = specimen.tissue_mm2 * 1e6
    window_um2 = area_um2 * 1.7
    h_um = np.sqrt(window_um2 / specimen.aspect)
    shape = tuple(round((n + 2 * MARGIN_UM) / FIELD_UM) for n in (h_um, h_um * specimen.aspect))
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    height = 0.9 - np.hypot(x, y) + 0.14 * cells.smooth_noise(shape, 130 / FIELD_UM, rng)
    height += 0.02 * cells.smooth_noise(shape, 25 / FIELD_UM, rng)
    height -= 3 * np.clip(np.maximum(np.abs(x), np.abs(y)) - 0.85, 0, None)  # bends it inwards
    border = int(MARGIN_UM / FIELD_UM)
    height[:border], height[-border:], height[:, :border], height[:, -border:] = -9, -9, -9, -9
    tissue = _largest(height, int(area_um2 / FIELD_UM**2), np.ones(shape, bool))

    field = np.where(tissue, _STROMA, _GLASS).astype(np.uint8)
    _seed_tumour(field, specimen, rng)
    lymphoid, foamy = rng.uniform(0.03, 0.16), rng.uniform(0.02, 0.14)
    for code, share, grain_um in ((_LYMPHOID, lymphoid, 110), (_FOAMY, foamy, 90)):
        blobs = cells.smooth_noise(shape, grain_um / FIELD_UM, rng)
        field[_largest(blobs, int(share * tissue.sum()), field == _STROMA)] = code
    _add_glands(field, rng)
    return field


def _largest(height: np.ndarray, count: int, where: np.ndarray) -> np.ndarray:
    """Return a mask of the `count` largest values of `height` inside `where`."""
    values = height[where]
    count = min(count, len(values) - 1)
    if count <= 0:
        return np.zeros(height.shape, bool)
    return where & (height > np.partition(values, len(values) - count - 1)[len(values) - count - 1])


def _seed_tumour(field: np.ndarray, specimen: Specimen, rng: np.random.Generator) -> None:
    """Add one to three compact tumour nests with uneven edges, well inside the tissue."""
    tissue = field != _GLASS
    count = int(specimen.tumour_fraction * tissue.sum())
    depth = ndimage.distance_transform_edt(tissue) * FIELD_UM
    inside = np.argwhere(depth > min(60.0, 0.6 * depth.max()))
    nests = int(rng.integers(1, 4))
    y, x = np.ogrid[: field.shape[0], : field.shape[1]]
    near = np.full(field.shape, 1e9, np.float32)
    for cy, cx in inside[rng.integers(0, len(inside), nests)]:
        near = np.minimum(near, np.hypot(y - cy, x - cx) * FIELD_UM)
    height = -near + 14 * cells.smooth_noise(field.shape, 45 / FIELD_UM, rng)
    field[_largest(height, count, tissue)] = _TUMOUR


def _add_glands(field: np.ndarray, rng: np.random.Generator) -> None:
    """Add rings of epithelium round a lumen in the remaining stroma."""
    candidates = np.argwhere(field == _STROMA)
    wanted = int(rng.uniform(0.1, 0.9) * len(candidates) * FIELD_UM**2 / 9000)
    for cy, cx in candidates[rng.integers(0, len(candidates), wanted)]:
        radius = rng.uniform(20, 38) / FIELD_UM
        y0, y1 = int(max(cy - radius * 1.3, 0)), int(cy + radius * 1.3) + 1
        x0, x1 = int(max(cx - radius * 1.3, 0)), int(cx + radius * 1.3) + 1
        patch = field[y0:y1, x0:x1]
        if (patch != _STROMA).any():
            continue  # glands touch neither one another nor anything else
        dy, dx = np.mgrid[y0 - cy : y0 - cy + patch.shape[0], x0 - cx : x0 - cx + patch.shape[1]]
        angle, wobble = np.arctan2(dy, dx), rng.uniform(-0.15, 0.15, 2)
        r = np.hypot(dy, dx) / (1 + wobble[0] * np.cos(2 * angle) + wobble[1] * np.sin(3 * angle))
        patch[r < radius] = _GLAND
        patch[r < radius - 11 / FIELD_UM] = _LUMEN


def _enlarge_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(labels).resize(shape[::-1], Image.Resampling.NEAREST))


def _ground(field, shape, mpp: float, rng: np.random.Generator) -> np.ndarray:
    """Return amounts (h, w, 2) of haematoxylin and eosin before cells are drawn."""
    small = field.shape
    flow = cells.smooth_noise(small, 90 / FIELD_UM, rng) * 40
    y, x = np.mgrid[: small[0], : small[1]].astype(np.float32) * FIELD_UM
    tilt = rng.uniform(0, np.pi)
    wave = np.sin((x * np.cos(tilt) + y * np.sin(tilt) + flow) / rng.uniform(2.2, 3.4))
    fibre = 0.16 * wave + 0.16 * cells.smooth_noise(small, 6 / FIELD_UM, rng)
    fibre += rng.uniform(0.08, 0.2) * cells.smooth_noise(small, 40 / FIELD_UM, rng)
    texture = np.where(field == _STROMA, fibre, 0.45 * fibre)
    ground = _GROUND[field] * np.clip(1 + texture, 0.2, 2.2)[..., None]
    planes = [
        np.asarray(Image.fromarray(ground[..., i]).resize(shape[::-1], Image.Resampling.BILINEAR))
        for i in (0, 1)
    ]
    return np.stack(planes, axis=-1)


# ---------------------------------------------------------------------------- cells


def _scatter_cells(amounts, field, specimen: Specimen, mpp: float, rng) -> None:
    """Draw every cell of the specimen into `amounts`, compartment by compartment."""
    look = rng.uniform  # appearance of this patient's cells, independent of the labels
    size, dark = look(4.3, 5.2), look(0.72, 0.95)
    nucleoli, inclusions = look(0.0, 0.6), look(0.0, 0.4)
    kinds = {
        _STROMA: (look(15, 21), lambda: cells.fibroblast(rng)),
        _LYMPHOID: (look(7.0, 8.6), lambda: cells.lymphocyte(rng)),
        _GLAND: (look(7.2, 8.6), lambda: cells.gland_cell(rng, nucleoli, inclusions)),
        _FOAMY: (look(12.5, 15), lambda: cells.foamy_cell(rng)),
        _TUMOUR: (look(11.6, 13.6), lambda: cells.tumour_cell(rng, specimen.traits, size, dark)),
    }
    for code, (spacing_um, draw) in kinds.items():
        stamps = [cells.stamp(draw(), mpp, rng) for _ in range(VARIANTS)]
        centres = _positions(field, code, spacing_um, rng) / mpp
        picked = rng.integers(0, VARIANTS, len(centres))
        for depth in (0, 1):  # bodies, then nuclei
            for (y, x), k in zip(centres, picked, strict=True):
                _press(amounts, stamps[k][depth], y, x)


def _positions(field, code: int, spacing_um: float, rng) -> np.ndarray:
    """Return centres (n, 2) as y, x in microns: a jittered hexagonal lattice."""
    h_um, w_um = (n * FIELD_UM for n in field.shape)
    rows, columns = np.arange(0, h_um, spacing_um * 0.866), np.arange(0, w_um, spacing_um)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2)[:, None] * spacing_um / 2
    centres = np.stack([y.ravel(), x.ravel()], 1)
    centres += rng.normal(0, 0.17 * spacing_um, centres.shape)
    index = (centres / FIELD_UM).astype(int)
    inside = ((index >= 0) & (index < field.shape)).all(1)
    centres, index = centres[inside], index[inside]
    return centres[field[index[:, 0], index[:, 1]] == code]


def _press(amounts: np.ndarray, layer: cells.Layer, y: float, x: float) -> None:
    """Draw a layer over `amounts` with its centre at pixel (y, x), cropped at the border."""
    cover, inks = layer
    half = cover.shape[0] // 2
    top, left = round(y) - half, round(x) - half
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + len(cover), amounts.shape[0]), min(left + len(cover), amounts.shape[1])
    if y0 >= y1 or x0 >= x1:
        return
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    ground = amounts[y0:y1, x0:x1]
    ground *= 1 - cover[part]
    ground += inks[part]


# ---------------------------------------------------------------------------- colour


def _develop(amounts, stain: Stain, mpp: float, rng) -> np.ndarray:
    """Return uint8 RGB by Beer-Lambert's law and the scan's focus, from amounts of stain."""
    grain = rng.standard_normal((257, 263)).astype(np.float32) * 0.03
    times = [-(-a // b) for a, b in zip(amounts.shape[:2], grain.shape, strict=True)]
    amounts *= 1 + np.tile(grain, times)[: amounts.shape[0], : amounts.shape[1], None]
    # 256 steps of each stain and a table of all pairs: five times faster than an exp a pixel
    steps = np.clip(amounts * (255 / MAX_AMOUNT) + 0.5, 0, 255).astype(np.uint16)
    strength = rng.uniform(0.85, 1.15, 2)  # section thickness and staining time of this slide
    levels = np.arange(256) * (MAX_AMOUNT / 255)
    h_rgb = np.outer(levels * strength[0], stain.haematoxylin)
    e_rgb = np.outer(levels * strength[1], stain.eosin)
    table = np.exp(-h_rgb[:, None] - e_rgb[None]) * stain.glass
    rgb = table.round().astype(np.uint8).reshape(-1, 3)[steps[..., 0] * 256 + steps[..., 1]]
    blur_um = rng.uniform(0.0, 0.35)
    return np.asarray(Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(blur_um / mpp)))
