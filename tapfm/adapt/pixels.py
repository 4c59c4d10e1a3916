"""The tile's pixels, for strategies that look at more than its tokens: colours, stains, a stem.

The patch embedding is called with the normalised tile, so a forward pre-hook there sees every tile
that the encoder sees; `Colours` undoes the normalisation. `StainMaps` separates stains by colour
deconvolution, a product of each pixel with a 3 x 3 matrix, without further files or networks. Each
tile is processed alone, so its result is the same in any chunk.

Source: Ruifrok & Johnston 2001, "Quantification of histochemical staining by color deconvolution":
    optical density, its separation, and the vectors of haematoxylin, eosin and DAB.
Differs: a map is scaled by its own 99th percentile, so that it shows where a stain is and not how
    strong the laboratory made it.

Shapes: C tiles of a chunk, S side of a tile, M stains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

STAINS = {
    "haematoxylin": (0.65, 0.70, 0.29),
    "eosin": (0.07, 0.99, 0.11),
    "dab": (0.27, 0.57, 0.78),
}
"""Optical density of red, green, blue per unit of stain."""
DARKEST = 1 / 255  # the least light that 8 bits can hold, above 0
BRIGHT = 0.01  # share of a tile's pixels above the percentile that its map is scaled by
FAINT = 0.2  # optical density: a tile with less of a stain has none, and its noise stays small
GROUPS = 8  # groups of the stem's norms


class Colours(nn.Module):
    """A module from tiles normalised for an encoder to red, green and blue in 0 to 1.

    Args:
        vit: a timm model; its `pretrained_cfg` says how its input is normalised.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        for name in ("mean", "std"):
            value = torch.tensor(vit.pretrained_cfg[name], **placed(vit)).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, tiles_C3SS: Tensor) -> Tensor:
        """Return (C, 3, S, S) in [0, 1] of normalised tiles."""
        return (tiles_C3SS * self.std + self.mean).clamp(0, 1)


class StainMaps(nn.Module):
    """A module from optical density (C, 3, S, S) to a map of each stain (C, M, S, S) in [0, 1].

    Args:
        stains: keys of `STAINS`, M of them.
        device: where the tiles will be.
        dtype: of the tiles.
    """

    def __init__(
        self,
        stains: Sequence[str],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        density_33 = torch.tensor(list(STAINS.values()), dtype=torch.float64, device="cpu")
        columns = [list(STAINS).index(stain) for stain in stains]
        amount_3M = torch.linalg.inv(density_33)[:, columns].to(device, dtype)
        self.register_buffer("amount_3M", amount_3M, persistent=False)

    def forward(self, density_C3SS: Tensor) -> Tensor:
        """Return each stain's amount divided by its 99th percentile within the tile."""
        weighed = density_C3SS[:, :, None] * self.amount_3M[:, :, None, None]
        amount_CMSS = weighed.sum(1).clamp(min=0)  # no matmul: autocast would round it to bf16
        flat_CMP = amount_CMSS.flatten(2)
        bright = flat_CMP.topk(int(BRIGHT * flat_CMP.shape[-1]) + 1).values[..., -1]
        return (amount_CMSS / bright.clamp(min=FAINT)[..., None, None]).clamp(max=1)


def optical_density(rgb_C3SS: Tensor) -> Tensor:
    """Return minus log10 of transmitted light: 0 on glass, 2.4 for the darkest pixel."""
    return -rgb_C3SS.clamp(DARKEST, 1).log10()


def stem(width: int, **kwargs: Any) -> nn.Sequential:
    """Return three strided 3 x 3 convolutions, (C, 3, S, S) to (C, width, S / 16, S / 16).

    Their norms are taken over channels and positions of one tile.
    """
    sizes = (3, width // 4, width // 2, width)
    layers: list[nn.Module] = []
    for below, above, stride in zip(sizes, sizes[1:], (4, 2, 2), strict=False):
        layers += [
            nn.Conv2d(below, above, 3, stride, 1, bias=False, **kwargs),
            nn.GroupNorm(math.gcd(GROUPS, above), above, **kwargs),
            nn.GELU(),
        ]
    return nn.Sequential(*layers)


def placed(vit: nn.Module) -> dict[str, Any]:
    """Return device and dtype of a model's weights, as keyword arguments for new modules."""
    weight = vit.patch_embed.proj.weight
    return {"device": weight.device, "dtype": weight.dtype}
