"""Augments one slide's training tiles: orientation per tile, colour and scale per slide.

Tissue has no up or down, so each tile gets one of the eight orientations of a square. A slide is
stained and scanned once, so all its tiles get the same change of colour and scale, and differences
between tiles, which the model learns from, stay. Colour changes optical density along haematoxylin,
eosin and a third, orthogonal direction, which leaves white glass white; contrast and brightness,
the scanner's part, act on the light and change glass too. Scale stands for resolutions that are
stated wrongly and for tissue that shrank: a tile grows or shrinks about its centre, and what it
then lacks at its edges is mirrored from within.

All random numbers of a slide are drawn at once from one generator; then each tile is changed where
it is read (`AugmentedSlide`). So a tile is the same whether it is kept in memory or read again for
the second pass, with whatever other tiles and by whatever process.

Price: orientation 0.15 ms, colour 1.2 ms, scale 0.5 ms a 224 px tile on one core.

Source: Ruifrok & Johnston 2001, "Quantification of histochemical staining by color deconvolution",
table 1 (stain vectors); Tellez et al. 2018, "Whole-slide mitosis detection in H&E breast histology
using PHH3 as a reference", section III-D (jitter of the stains).
Differs: no additive term on the stains, which would tint the glass.

Shapes: T tiles, C channels, S side of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slides.errors import refuse
from slides.streaming.chunks import close

if TYPE_CHECKING:
    from slides.grid import Grid

HAEMATOXYLIN_EOSIN = ((0.644, 0.717, 0.267), (0.093, 0.954, 0.283))
"""Optical density of red, green, blue per unit of stain."""
DRAWS = 5  # colour numbers: three stains, contrast, brightness


@dataclass(frozen=True)
class Augmentation:
    """The random augmentation of a slide's tiles in one epoch."""

    turns_T: Tensor
    """Quarter turns."""
    mirror_T: Tensor
    """Whether the tile is mirrored first."""
    amount_5: Tensor | None
    """See `recolour_`; None keeps colours."""
    zoom: float = 1.0
    """See `rescale_`; above 1 the tissue grows."""

    def __call__(self, tiles_TCSS: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return augmented tiles of the same shape and type.

        Args:
            tiles_TCSS: uint8 (T, 3, S, S), the tiles of `rows`; not changed.
            rows: the rows of these tiles among the slide's.
        """
        if tiles_TCSS.dtype != torch.uint8 or tiles_TCSS.ndim != 4 or tiles_TCSS.shape[1] != 3:
            raise ValueError(
                f"tiles must be uint8 (T, 3, S, S), got {tiles_TCSS.dtype} "
                f"{tuple(tiles_TCSS.shape)}"
            )
        turns_T = self.turns_T[rows]
        if tiles_TCSS.shape[2] != tiles_TCSS.shape[3] and turns_T.any():
            raise ValueError(f"only square tiles can be rotated, got {tuple(tiles_TCSS.shape)}")
        out_TCSS = orient(tiles_TCSS, turns_T, self.mirror_T[rows])
        if self.zoom != 1.0:
            rescale_(out_TCSS, self.zoom)
        if self.amount_5 is not None:
            recolour_(out_TCSS, self.amount_5)
        return out_TCSS


class AugmentedSlide:
    """A slide whose tiles are augmented as they are read. Pickles.

    Args:
        source: the slide, or anything that reads like one.
        coords0: (T, 2), corners of the tiles that `change` was drawn for.
        change: their augmentation, in that order.
    """

    def __init__(self, source, coords0: np.ndarray, change: Augmentation):
        self.source, self.coords0, self.change, self._row_of = source, coords0, change, None

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """Return the augmented tile at (x0, y0), one of `coords0`, uint8 (S, S, 3)."""
        if self._row_of is None:
            corners = map(tuple, self.coords0.tolist())
            self._row_of = {corner: row for row, corner in enumerate(corners)}
        row = self._row_of[x0, y0]
        tile_SSC = torch.tensor(self.source.read(x0, y0, grid))
        tile_CSS = self.change(tile_SSC.permute(2, 0, 1)[None], slice(row, row + 1))[0]
        return tile_CSS.permute(1, 2, 0).numpy()

    def close(self) -> None:
        """Close the slide."""
        close(self.source)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_row_of": None}


def draw_augmentation(
    tiles: int,
    generator: torch.Generator,
    flips: bool = True,
    rotations: bool = True,
    colour: float = 0.0,
    stain: float = 0.0,
    scale: float = 0.0,
) -> Augmentation:
    """Return the random augmentation of a slide's tiles.

    Every number is drawn whether used or not, so switching one kind off does not change the others.

    Args:
        tiles: number of tiles.
        generator: a CPU generator, the only source of randomness.
        flips: mirror half of the tiles.
        rotations: turn by a multiple of 90 degrees.
        colour: 0 is off; 0.1 scales the stains, contrast and brightness by up to a tenth.
        stain: 0 is off; 0.1 scales haematoxylin and eosin, each by up to a tenth, and no more.
        scale: 0 is off; 0.1 enlarges the tissue by up to a tenth, or shrinks it by as large a
            factor.
    """
    refuse(strength_faults(colour, stain, scale), "data")
    draw_5 = torch.rand(DRAWS, generator=generator, dtype=torch.float64) * 2 - 1
    turns_T = torch.randint(0, 4, (tiles,), generator=generator)
    mirror_T = torch.randint(0, 2, (tiles,), generator=generator).bool()
    stains_2 = torch.rand(2, generator=generator, dtype=torch.float64) * 2 - 1
    exponent = float(torch.rand(1, generator=generator, dtype=torch.float64)) * 2 - 1
    amount_5 = None
    if colour or stain:
        amount_5 = colour * draw_5
        amount_5[:2] += stain * stains_2
    return Augmentation(turns_T * rotations, mirror_T & flips, amount_5, (1 + scale) ** exponent)


def strength_faults(colour: float, stain: float, scale: float = 0.0) -> list[str]:
    """Return a fault for each strength of augmentation outside [0, 1)."""
    given = {"data.colour": colour, "data.stain_jitter": stain, "data.scale_jitter": scale}
    return [
        f"{key} must be in [0, 1), got {strength}: 0 is off, 0.1 is up to a tenth"
        for key, strength in given.items()
        if not 0 <= strength < 1
    ]


def orient(tiles_TCSS: Tensor, turns_T: Tensor, mirror_T: Tensor) -> Tensor:
    """Return tiles mirrored left to right by `mirror_T`, then turned `turns_T` times by 90 degrees.

    Turning is counter-clockwise, as `torch.rot90`. The result is a contiguous copy.
    """
    out_TCSS = torch.empty_like(tiles_TCSS, memory_format=torch.contiguous_format)
    for index, (turns, mirror) in enumerate(zip(turns_T.tolist(), mirror_T.tolist(), strict=True)):
        tile_CSS = tiles_TCSS[index]
        if mirror:
            tile_CSS = tile_CSS.flip(-1)
        out_TCSS[index] = tile_CSS.rot90(turns, (-2, -1))
    return out_TCSS


def rescale_(tiles_TCSS: Tensor, zoom: float) -> None:
    """Enlarge the tissue of all tiles by `zoom` about their centres, in place.

    Bilinear; pixels beyond the edge are those mirrored at it.

    Args:
        tiles_TCSS: uint8 (T, 3, S, S).
        zoom: above 1 tissue grows, below it shrinks.
    """
    theta_123 = torch.tensor([[[1 / zoom, 0, 0], [0, 1 / zoom, 0]]])
    where_1SS2 = F.affine_grid(theta_123, [1, *tiles_TCSS.shape[1:]], align_corners=False)
    how = {"mode": "bilinear", "padding_mode": "reflection", "align_corners": False}
    for tile_CSS in tiles_TCSS:  # one at a time: a tile is the same in any company
        tile_CSS.copy_(F.grid_sample(tile_CSS[None].float(), where_1SS2, **how)[0].round_())


def recolour_(tiles_TCSS: Tensor, amount_5: Tensor) -> None:
    """Change the colour of all tiles alike, in place.

    Args:
        tiles_TCSS: uint8 (T, 3, S, S).
        amount_5: relative change of haematoxylin, eosin and the third direction, of contrast
            (about middle grey) and of brightness (a factor on light); zeros change nothing.
    """
    stains_33 = torch.tensor(HAEMATOXYLIN_EOSIN, dtype=torch.float64)
    stains_33 = torch.cat([stains_33, torch.linalg.cross(*stains_33)[None]])
    stains_33 = stains_33 / stains_33.norm(dim=1, keepdim=True)
    scale_33 = torch.diag(1 + amount_5[:3].to(torch.float64))
    mix_33 = (torch.linalg.inv(stains_33) @ scale_33 @ stains_33).T.float()  # acts on RGB columns
    contrast, brightness = (1 + amount_5[3:].to(torch.float64)).tolist()

    # Optical density of each byte. Byte 0 counts as 0.5, since its density would be infinite.
    density_256 = -(torch.arange(256.0).clamp_min(0.5) / 255).log()
    for tiles in tiles_TCSS.split(1):  # views, so in place; one tile at a time bounds the floats
        density_CP = density_256[tiles.transpose(0, 1).reshape(3, -1).int()]
        light_CP = (mix_33 @ density_CP).neg_().exp_().mul_(255 * brightness)
        light_CP.sub_(127.5).mul_(contrast).add_(127.5).round_().clamp_(0, 255)
        shape = (3, len(tiles), *tiles.shape[2:])
        tiles.copy_(light_CP.view(shape).transpose(0, 1))
