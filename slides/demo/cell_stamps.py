"""Cells of synthetic tissue, drawn as small stamps of haematoxylin and eosin.

A cell is described in microns, drawn once in a small square, turned at random, and copied into a
painted specimen (`tissue_painter`) wherever there is a cell of its kind.

Three traits of tumour cells carry the demo cohort's labels. Both states of each are visible, and
change the tumour's mean colour by less than half of the difference between slides:

    trait      state 1                                 state 0
    nucleolus  pale nucleus, one dark nucleolus        smooth chromatin
    vacuole    a clear vacuole beside the nucleus      solid cytoplasm
    inclusion  a pale hole in the nucleus              solid nucleus

Price: about 0.5 ms a stamp.

Shapes: n side of a stamp in pixels; `_um` microns; amounts of stain have no unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

TRAITS = ("nucleolus", "vacuole", "inclusion")
PENETRANCE = 0.98  # share of tumour cells that show their label's state; the others show the other
NUCLEOLUS_UM, VACUOLE_UM, INCLUSION_UM = 1.35, 2.25, 1.45  # radii
NUCLEOLUS, INCLUSION = 1.4, 0.9  # haematoxylin added, and share of it removed, in state 1

Layer = tuple[np.ndarray, np.ndarray]
"""Opacity (n, n, 1) in [0, 1] over the layers below, and its two stains (n, n, 2)."""


@dataclass(frozen=True)
class PaintedCell:
    """Appearance of one cell."""

    nucleus_um: float
    """Radius."""
    nucleus_h: float
    """Haematoxylin of the nucleus."""
    elongation: float = 1.0
    """Length over width of the nucleus."""
    chromatin: float = 0.15
    """Unevenness of the haematoxylin, relative."""
    nucleolus: float = 0.0
    """Haematoxylin of the nucleolus above the rest."""
    inclusion: float = 0.0
    """Share of the nucleus's haematoxylin that is missing in the inclusion."""
    cell_um: float = 0.0
    """Radius of the cytoplasm; 0 draws a bare nucleus."""
    cell_h: float = 0.1
    """Haematoxylin of the cytoplasm."""
    cell_e: float = 0.4
    """Eosin of the cytoplasm."""
    vacuoles: int = 0
    """Clear holes in the cytoplasm."""
    vacuole_um: float = 2.2
    """Radius of the vacuoles."""


def fibroblast(rng: np.random.Generator) -> PaintedCell:
    """Return a stromal cell with a spindle-shaped nucleus."""
    nucleus_um, nucleus_h = rng.uniform(2.4, 3.3), rng.uniform(0.6, 0.95)
    return PaintedCell(nucleus_um, nucleus_h, elongation=rng.uniform(1.5, 2.8), chromatin=0.1)


def lymphocyte(rng: np.random.Generator) -> PaintedCell:
    """Return a lymphocyte: small, round and dark."""
    return PaintedCell(
        rng.uniform(2.7, 3.3), rng.uniform(0.95, 1.2), elongation=rng.uniform(1, 1.15)
    )


def gland_cell(rng: np.random.Generator, nucleoli: float, inclusions: float) -> PaintedCell:
    """Return a normal epithelial cell; shares of them have nucleoli or inclusions."""
    return PaintedCell(
        rng.uniform(3.0, 3.6),
        rng.uniform(0.6, 0.85),
        elongation=rng.uniform(1.0, 1.35),
        nucleolus=0.8 * float(rng.random() < nucleoli),
        inclusion=INCLUSION * float(rng.random() < inclusions),
    )


def foamy_cell(rng: np.random.Generator) -> PaintedCell:
    """Return a macrophage with none to three vacuoles."""
    return PaintedCell(
        rng.uniform(2.5, 3.1),
        rng.uniform(0.6, 0.9),
        elongation=rng.uniform(1, 1.3),
        cell_um=rng.uniform(6, 7.4),
        cell_h=0.05,
        cell_e=0.24,
        vacuoles=int(rng.integers(0, 4)),
        vacuole_um=2.0,
    )


def tumour_cell(
    rng: np.random.Generator, traits: tuple[int, ...], size_um: float, dark: float
) -> PaintedCell:
    """Return a tumour cell of a patient with this nuclear radius and haematoxylin."""
    shown = [state if rng.random() < PENETRANCE else 1 - state for state in traits]
    return PaintedCell(
        size_um * rng.uniform(0.88, 1.12),
        dark * rng.uniform(0.85, 1.15),
        elongation=rng.uniform(1.0, 1.2),
        cell_um=rng.uniform(6.6, 7.6),
        cell_h=0.12,
        cell_e=rng.uniform(0.36, 0.46),
        nucleolus=NUCLEOLUS * shown[0],
        inclusion=INCLUSION * shown[2],
        vacuoles=shown[1],
        vacuole_um=VACUOLE_UM,
    )


def smooth_noise(shape: tuple[int, int], step: float, rng: np.random.Generator) -> np.ndarray:
    """Return float32 noise of mean 0 and deviation 1 with a grain of `step` pixels."""
    coarse = [int(np.ceil(n / step)) + 2 for n in shape]
    small = Image.fromarray(rng.standard_normal(coarse).astype(np.float32))
    noise = np.asarray(small.resize(shape[::-1], Image.Resampling.BICUBIC))
    return (noise - noise.mean()) / max(float(noise.std()), 1e-6)


def stamp(cell: PaintedCell, mpp: float, rng: np.random.Generator) -> tuple[Layer, Layer]:
    """Return one cell as two layers, turned at random, in a small square.

    All bodies are drawn before all nuclei, so that no cytoplasm hides a neighbour's nucleus.

    Returns:
        body, nucleus: two `Layer`s; that of the nucleus also has the vacuoles.
    """
    reach_um = max(cell.cell_um * 1.15, cell.nucleus_um * np.sqrt(cell.elongation) * 1.3) + 1
    n = 2 * int(np.ceil(reach_um / mpp)) + 1
    soft = max(0.35, 0.6 * mpp)  # width of edges that the optics would leave
    y, x = (np.mgrid[:n, :n] - n // 2) * mpp
    turn = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    shift = rng.uniform(0.1, 0.2) * cell.cell_um if cell.cell_um else 0.0

    nucleus = _nucleus_cover(cell, u + shift, v, soft, rng)
    h = cell.nucleus_h * (1 + cell.chromatin * smooth_noise((n, n), max(1.0, 0.9 / mpp), rng))
    side, far_um = rng.uniform(0, 2 * np.pi), 0.35 * cell.nucleus_um  # on opposite sides
    off_u, off_v = far_um * np.cos(side), far_um * np.sin(side)
    if cell.inclusion:
        hole = _disc(np.hypot(u + shift + off_u, v + off_v), INCLUSION_UM, soft)
        left = 1 - cell.inclusion * hole
        h = h * left * (nucleus.sum() / (left * nucleus).sum())  # keeps the total stain
    if cell.nucleolus:
        dot = _disc(np.hypot(u + shift - off_u, v - off_v), NUCLEOLUS_UM, soft)
        taken = (dot * nucleus).sum() / nucleus.sum()  # keeps the total stain
        h = h + cell.nucleolus * (dot - taken)
    e = np.full_like(h, 0.22)

    outline = 1 + 0.08 * np.cos(2 * np.arctan2(v, u) + rng.uniform(0, 6))
    body = _disc(np.hypot(u, v) / outline, cell.cell_um, soft) if cell.cell_um else 0 * nucleus
    body_e = cell.cell_e * (1 + 0.12 * smooth_noise((n, n), max(1.0, 1.2 / mpp), rng))
    body_h = np.full_like(h, cell.cell_h)
    cover = nucleus
    if cell.vacuoles:
        hole = _vacuoles(cell, u, v, soft, rng) * (1 - nucleus)
        outside = (body * (1 - nucleus)).sum()
        kept = max(1 - (hole * body).sum() / outside, 0.5)  # keeps the total stain
        body_e, body_h = body_e / kept, body_h / kept
        cover = np.maximum(nucleus, hole)
        inside = nucleus / np.maximum(cover, 1e-6)  # a vacuole covers but has no stain
        h, e = h * inside, e * inside
    return _layer(body, body_h, body_e), _layer(cover, h, e)


def _layer(cover: np.ndarray, h: np.ndarray, e: np.ndarray) -> Layer:
    inks = np.stack([h, e], axis=-1) * cover[..., None]
    return cover[..., None].astype(np.float32), inks.astype(np.float32)


def _vacuoles(cell: PaintedCell, u: np.ndarray, v: np.ndarray, soft: float, rng) -> np.ndarray:
    """Return the cover of the vacuoles, spread over the side away from the nucleus."""
    hole = np.zeros_like(u)
    for k in range(cell.vacuoles):
        bend = (k - (cell.vacuoles - 1) / 2) * 1.3 + rng.uniform(-0.3, 0.3)
        far = np.hypot(
            u - 0.58 * cell.cell_um * np.cos(bend), v - 0.58 * cell.cell_um * np.sin(bend)
        )
        radius_um = cell.vacuole_um * rng.uniform(0.85, 1.15)
        hole = np.maximum(hole, 0.85 * _disc(far, radius_um, soft))
    return hole


def _disc(r_um: np.ndarray, radius_um: float, soft_um: float) -> np.ndarray:
    return np.clip((radius_um - r_um) / soft_um + 0.5, 0, 1)


def _nucleus_cover(cell: PaintedCell, u, v, soft: float, rng) -> np.ndarray:
    """Return the cover of the nucleus: an ellipse with an uneven edge."""
    stretch = np.sqrt(cell.elongation)
    r, angle = np.hypot(u / stretch, v * stretch), np.arctan2(v, u)
    uneven = 1 + 0.04 * np.cos(3 * angle + rng.uniform(0, 6)) + 0.03 * np.cos(5 * angle)
    return _disc(r / uneven, cell.nucleus_um, soft)
