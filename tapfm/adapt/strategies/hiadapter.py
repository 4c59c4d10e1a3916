"""HiAdapter: tokens attend to the tile's optical density, and get maps of where stains are.

Two parts beside a frozen model; `parts` chooses among them.

    stain        in front of the first block, once, for all tokens X: with E the optical density of
                 the tile through a small convolutional stem and A = norm(attention(X, E, E)),
                 X + (1 - g) c A; g is one gate a tile, c one a token and channel
    morphology   in front of `stages` blocks, on the patch tokens: a map of each stain, cut into the
                 model's patches, through a bottleneck; a small linear layer for each stage and
                 stain, and one projection up for all stages

No token is added, so prefix tokens and the score's columns do not change. Identity at the start:
the last layer of each part is 0. No plain timm model computes the same: there is no `export`, only
the small checkpoint.

Price: at the paper's size 11.75 M parameters on a ViT-L, all but 0.07 M in the stain part, and 5 %
more work a tile; `width: 256` leaves 2.28 M and 1 %. The graph goes through all blocks.
Condition: a ViT with a CLS token; blocks recomputed by `Encoder(recompute=True)`, if at all, since
timm's own checkpointing would need the tile after it was freed.

Source: Liu et al. 2026 (HiAdapter, IEEE TMI) in the form of its authors' published code: the stain
    part's residual form, the stages, all sizes.
Differs: optical density is that of the tile, not of the normalised input; norms are over groups
    of channels within a tile, not over tiles, so no tile depends on its neighbours and the two
    passes agree; registers are prefix tokens too; both parts start at 0. The authors cut their two
    maps (nuclei, all else) offline by a network and thresholds; here colour deconvolution makes a
    haematoxylin and an eosin map of the tile itself. Layers that the code makes and never uses
    (0.04 M on a ViT-L) are left out. The prototype loss needs labels of tiles: it is
    `tile_training.prototypes`, and comes with this strategy in `tapfm fit-tiles`.

Shapes: C tiles of a chunk, N tokens (n patches), D width, E places of the stem's output, W width of
    the stain part, M stains, R bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.adapt.pixels import STAINS, Colours, StainMaps, optical_density, placed, stem
from tapfm.adapt.surgery import Inserted, StrategyError, need_vit, share
from tapfm.settings import unmet

PARTS = ("stain", "morphology")
HEADS = 8  # heads of the cross-attention
GATE = 256  # hidden width of the tile's gate


class CrossAttention(nn.Module):
    """Multi-head attention of queries (C, N, W) over (C, E, W), giving (C, N, W)."""

    def __init__(self, width: int, dropout: float, like: dict[str, Any]):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, **like) for _ in range(4))
        self.dropout = nn.Dropout(dropout)  # a module, so that code that looks for dropout finds it

    def forward(self, x_CNW: Tensor, seen_CEW: Tensor) -> Tensor:
        """Return the attention output (C, N, W)."""
        q, k, v = (
            linear(each).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for linear, each in ((self.q, x_CNW), (self.k, seen_CEW), (self.v, seen_CEW))
        )
        noise = self.dropout.p if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=noise)
        return self.out(found.transpose(1, 2).flatten(2))


class StainAdapter(nn.Module):
    """The stain part: all tokens attend to the tile's optical density, gated."""

    def __init__(self, vit: nn.Module, width: int, dropout: float):
        super().__init__()
        dim, like = vit.embed_dim, placed(vit)
        self.colours, self.stem = Colours(vit), stem(width, **like)
        self.stem_norm = nn.LayerNorm(width, **like)
        self.narrow, self.widen = nn.Identity(), nn.Identity()
        if width != dim:
            self.narrow, self.widen = nn.Linear(dim, width, **like), nn.Linear(width, dim, **like)
        self.attend = CrossAttention(width, dropout, like)
        self.norm = nn.LayerNorm(dim, **like)
        self.tile_gate = _gate(2 * dim, GATE, 1, like)
        self.channel_gate = _gate(dim, min(width, dim // 2), dim, like)
        nn.init.zeros_(self.norm.weight)  # A is 0 at the start; its bias is 0 anyway
        self.seen_CEW: Tensor | None = None
        vit.patch_embed.register_forward_pre_hook(self._see)
        vit.blocks[0].register_forward_pre_hook(self._add)

    def forward(self, x_CND: Tensor, seen_CEW: Tensor) -> Tensor:
        """Return (1 - g) c A, what is added to the tokens, from them and the output of `look`."""
        a_CND = self.norm(self.widen(self.attend(self.narrow(x_CND), seen_CEW)))
        g_C11 = self.tile_gate(torch.cat([a_CND.amax(1), x_CND.mean(1)], dim=1))[:, None]
        return (1 - g_C11) * self.channel_gate(a_CND) * a_CND

    def look(self, tiles_CP: Tensor) -> Tensor:
        """Return the optical density of normalised tiles as (C, E, W)."""
        density_CP = optical_density(self.colours(tiles_CP)).to(self.stem[0].weight.dtype)
        return self.stem_norm(self.stem(density_CP).flatten(2).transpose(1, 2))

    def _see(self, _embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen_CEW = self.look(args[0])

    def _add(self, _block: nn.Module, args: tuple) -> tuple:
        x_CND, *rest = args
        seen_CEW, self.seen_CEW = self.seen_CEW, None  # free it with its graph
        return x_CND + self(x_CND, seen_CEW).to(x_CND.dtype), *rest


class MorphologyAdapter(nn.Module):
    """The morphology part: adds maps of the stains to the patch tokens."""

    def __init__(self, vit: nn.Module, stages: int, reduction: int, stains: tuple[str, ...]):
        super().__init__()
        dim, like, patch = vit.embed_dim, placed(vit), vit.patch_embed.patch_size
        narrow, depth = max(1, dim // reduction), len(vit.blocks)
        self.prefix = vit.num_prefix_tokens
        self.colours, self.maps = Colours(vit), StainMaps(stains, **like)
        self.embed = nn.Conv2d(3, narrow, patch, stride=patch, **like)
        self.tune = nn.ModuleList(
            nn.ModuleList(nn.Linear(narrow, narrow, **like) for _ in stains) for _ in range(stages)
        )
        self.up = nn.Linear(narrow, dim, **like)
        nn.init.kaiming_normal_(self.embed.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.embed.bias)
        for stage in self.tune:
            for linear in stage:
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.seen_MCnR: tuple[Tensor, ...] = ()
        vit.patch_embed.register_forward_pre_hook(self._see)
        for stage in range(stages):
            add = partial(self._add, stage)
            vit.blocks[stage * depth // stages].register_forward_pre_hook(add)

    def forward(self, seen_MCnR: tuple[Tensor, ...], stage: int) -> Tensor:
        """Return what is added to the patch tokens, (C, n, D), from the output of `look`."""
        every = zip(self.tune[stage], seen_MCnR, strict=True)
        return self.up(sum(F.gelu(linear(seen_CnR)) for linear, seen_CnR in every))

    def look(self, tiles_CP: Tensor) -> tuple[Tensor, ...]:
        """Return (C, n, R) of normalised tiles for each stain."""
        maps_CMSS = self.maps(optical_density(self.colours(tiles_CP))).to(self.up.weight.dtype)
        # three equal channels, as the authors' maps have
        return tuple(
            self.embed(map_CSS[:, None].expand(-1, 3, -1, -1)).flatten(2).transpose(1, 2)
            for map_CSS in maps_CMSS.unbind(1)
        )

    def _see(self, _embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen_MCnR = self.look(args[0])

    def _add(self, stage: int, _block: nn.Module, args: tuple) -> tuple:
        x_CND, *rest = args
        added_CnD = self(self.seen_MCnR, stage).to(x_CND.dtype)
        if stage == len(self.tune) - 1:
            self.seen_MCnR = ()  # free it with its graph
        patches_CnD = x_CND[:, self.prefix :] + added_CnD
        return torch.cat([x_CND[:, : self.prefix], patches_CnD], dim=1), *rest


@dataclass(frozen=True)
class HiAdapter(Inserted):
    """Trains a stain part and a morphology part beside the frozen model."""

    parts: tuple[str, ...] = PARTS
    """Some of stain, morphology."""
    width: int = 0
    """Width of the stain part, a multiple of 8; 0 is the model's, as in the paper; 256 is lean."""
    dropout: float = 0.1
    """Dropout rate of the stain part's attention, while training."""
    stages: int = 4
    """Blocks that the morphology part stands in front of, evenly from the first."""
    reduction: int = 32
    """The model's width divided by that of the morphology part's bottleneck."""
    stains: tuple[str, ...] = ("haematoxylin", "eosin")
    """Maps of the morphology part: some of haematoxylin, eosin, dab."""
    lr: ClassVar[float] = 5e-4
    scaled: ClassVar[tuple[str, ...]] = (".norm.weight", ".norm.bias", "up.weight", "up.bias")
    name: ClassVar[str] = "hiadapter"
    adds: ClassVar[str] = "parts that look at the tile"

    def __post_init__(self):
        faults = unmet(
            ("parts", list(self.parts), f"some of {', '.join(PARTS)}",
             _some(self.parts, PARTS)),
            ("width", self.width, f"0 (the model's) or a multiple of {HEADS}",
             self.width >= 0 and self.width % HEADS == 0),
            ("dropout", self.dropout, "in [0, 1)", 0 <= self.dropout < 1),
            ("stages", self.stages, "1 or more", self.stages >= 1),
            ("reduction", self.reduction, "1 or more", self.reduction >= 1),
            ("stains", list(self.stains), f"some of {', '.join(STAINS)}",
             _some(self.stains, STAINS)),
        )  # fmt: skip
        if faults:
            raise StrategyError("model.strategy: hiadapter: " + "; ".join(faults))

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; insert the parts.

        Raises:
            StrategyError: not a ViT with a CLS token, fewer blocks than stages, or a width that
                cannot be split into heads.
        """
        need_vit(vit, "hiadapter")
        if self.stages > len(vit.blocks):
            raise StrategyError(
                f"model.strategy: hiadapter was asked for {self.stages} stages and the model has "
                f"{len(vit.blocks)} blocks. Give {len(vit.blocks)} or fewer."
            )
        width = self.width or vit.embed_dim
        if "stain" in self.parts and width % HEADS:
            raise StrategyError(
                f"model.strategy: hiadapter: the model's width {width} cannot be split into "
                f"{HEADS} heads. Give a width that is a multiple of {HEADS}, such as 256."
            )
        vit.requires_grad_(False)
        if "stain" in self.parts:  # inserted first, so that its hook on the first block runs first
            vit.stain_adapter = StainAdapter(vit, width, self.dropout)
        if "morphology" in self.parts:
            vit.morphology_adapter = MorphologyAdapter(
                vit, self.stages, self.reduction, self.stains
            )

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"HiAdapter ({', '.join(self.parts)}): {share(vit)}"


def _some(chosen: tuple[str, ...], there_are: Any) -> bool:
    return bool(chosen) and set(chosen) <= set(there_are) and len(set(chosen)) == len(chosen)


def _gate(dim: int, hidden: int, out: int, like: dict[str, Any]) -> nn.Sequential:
    """Return a small network with outputs between 0 and 1."""
    return nn.Sequential(
        nn.Linear(dim, hidden, **like), nn.ReLU(), nn.Linear(hidden, out, **like), nn.Sigmoid()
    )
