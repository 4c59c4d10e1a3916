"""Training augmentation of one slide's tiles: orientation per tile, colour per slide.

Tissue has no up or down, so each tile takes one of the eight orientations of a square. A slide is
stained and scanned once, so its colour is changed once: the same draw for all its tiles, and the
differences between tiles, which the model is to learn from, stay. Colour works on optical density,
along haematoxylin, eosin and a third direction orthogonal to both, which leaves white glass white;
contrast and brightness, the scanner's part, act on the light and move glass too.

The tiles are changed once, where they are read, and kept as bytes: both passes over a slide see the
same pixels because they see the same tensor. Everything is a function of the generator alone.

Price: orientation 0.15 ms, colour 2 ms a 224 px tile on one core.

Source: Ruifrok & Johnston 2001, "Quantification of histochemical staining by color deconvolution",
table 1 (stain vectors); Tellez et al. 2018, "Whole-slide mitosis detection in H&E breast histology
using PHH3 as a reference", section III-D (jitter of the stains).
Differs: no additive term on the stains, which would tint the glass.

Shapes: T tiles, S side of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

HAEMATOXYLIN_EOSIN = ((0.644, 0.717, 0.267), (0.093, 0.954, 0.283))
"""Optical density of red, green, blue per unit of stain."""
GROUP = 16  # tiles turned to floats at once: bounds memory whatever the slide
DRAWS = 5  # colour numbers: three stains, contrast, brightness


def augment(
    tiles_TCSS: Tensor,
    generator: torch.Generator,
    flips: bool = True,
    rotations: bool = True,
    colour: float = 0.0,
    stain: float = 0.0,
) -> Tensor:
    """New tiles of the same shape and type, oriented and coloured at random.

    Every number is drawn whether it is used or not, so turning one kind off leaves the others as
    they were.

    Args:
        tiles_TCSS: uint8 (T, 3, S, S), left untouched.
        generator: a CPU generator; its state decides everything.
        flips: mirror half of the tiles.
        rotations: turn by a multiple of 90 degrees.
        colour: 0 is off; 0.1 scales the stains, contrast and brightness by up to a tenth.
        stain: 0 is off; 0.1 scales haematoxylin and eosin, each by up to a tenth, and no more.
    """
    if tiles_TCSS.dtype != torch.uint8 or tiles_TCSS.ndim != 4 or tiles_TCSS.shape[1] != 3:
        raise ValueError(
            f"tiles must be uint8 (T, 3, S, S), got {tiles_TCSS.dtype} {tuple(tiles_TCSS.shape)}"
        )
    for name, strength in (("colour", colour), ("stain", stain)):
        if not 0 <= strength < 1:
            raise ValueError(f"{name} must be in [0, 1), got {strength}")
    draw_5 = torch.rand(DRAWS, generator=generator, dtype=torch.float64) * 2 - 1
    turns_T = torch.randint(0, 4, (len(tiles_TCSS),), generator=generator)
    mirror_T = torch.randint(0, 2, (len(tiles_TCSS),), generator=generator).bool()
    stains_2 = torch.rand(2, generator=generator, dtype=torch.float64) * 2 - 1

    if tiles_TCSS.shape[2] != tiles_TCSS.shape[3] and rotations:
        raise ValueError(f"only square tiles can be rotated, got {tuple(tiles_TCSS.shape)}")
    out_TCSS = orient(tiles_TCSS, turns_T * rotations, mirror_T & flips)
    if colour or stain:
        amount_5 = colour * draw_5
        amount_5[:2] += stain * stains_2
        recolour_(out_TCSS, amount_5)
    return out_TCSS


def orient(tiles_TCSS: Tensor, turns_T: Tensor, mirror_T: Tensor) -> Tensor:
    """Each tile mirrored left to right where `mirror_T`, then turned `turns_T` times by 90 degrees.

    Turning is counter-clockwise, as `torch.rot90`. The result is a contiguous copy.
    """
    out_TCSS = torch.empty_like(tiles_TCSS, memory_format=torch.contiguous_format)
    for index, (turns, mirror) in enumerate(zip(turns_T.tolist(), mirror_T.tolist(), strict=True)):
        tile_CSS = tiles_TCSS[index]
        if mirror:
            tile_CSS = tile_CSS.flip(-1)
        out_TCSS[index] = tile_CSS.rot90(turns, (-2, -1))
    return out_TCSS


def recolour_(tiles_TCSS: Tensor, amount_5: Tensor) -> None:
    """Change the colour of all tiles alike, in place.

    Args:
        tiles_TCSS: uint8 (T, 3, S, S).
        amount_5: relative change of haematoxylin, eosin and the rest, then of contrast (about
            middle grey) and of brightness (a factor on light); zeros change nothing.
    """
    stains_33 = torch.tensor(HAEMATOXYLIN_EOSIN, dtype=torch.float64)
    stains_33 = torch.cat([stains_33, torch.linalg.cross(*stains_33)[None]])
    stains_33 = stains_33 / stains_33.norm(dim=1, keepdim=True)
    scale_33 = torch.diag(1 + amount_5[:3].to(torch.float64))
    mix_33 = (torch.linalg.inv(stains_33) @ scale_33 @ stains_33).T.float()  # acts on RGB columns
    contrast, brightness = (1 + amount_5[3:].to(torch.float64)).tolist()

    # Optical density of each byte. Byte 0 is taken as a half: its density would be infinite.
    density_256 = -(torch.arange(256.0).clamp_min(0.5) / 255).log()
    for tiles in tiles_TCSS.split(GROUP):  # split gives views: writing to them is in place
        density_CP = density_256[tiles.transpose(0, 1).reshape(3, -1).int()]
        light_CP = (mix_33 @ density_CP).neg_().exp_().mul_(255 * brightness)
        light_CP.sub_(127.5).mul_(contrast).add_(127.5).round_().clamp_(0, 255)
        shape = (3, len(tiles), *tiles.shape[2:])
        tiles.copy_(light_CP.view(shape).transpose(0, 1))
