"""What one training step holds in GPU memory and computes, counted without a GPU and weights.

How: the model runs on fake CUDA tensors, which have shapes but no memory, and what autograd would
hold is counted for two tiles and for three: the difference is a tile's activations, the rest are
the bfloat16 copies of the weights that autocast makes. A model's blocks are alike, so this is done
with two and three blocks and the others are added; the last, of which only the CLS token is
computed (`encoders.tail`), is in both. Peaks follow from these.

    encode      what rests, the graph of the first chunk, which is kept (or of the first few), and
                for the next chunk the cast copies and one block's work
    aggregate   what rests, what is kept, the features of a bag
    adapt       what rests, the gradient, what else is kept, what the chunk's forward holds, and
                the cast copies and one block's work: together, or, where blocks are recomputed,
                the larger of them
    step        what rests, the gradient, and what the update makes for an instant

What rests are the weights and what the optimizer keeps of those that learn
(`engine.master_weights`).

Condition: attention fused; one slide an update: accumulating slides keeps the gradient, 4 bytes a
parameter, through encode and aggregate. Autocast keeps its copies until the encoder's call ends,
with recomputation and without gradients too, so they are counted there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tapfm.adapt.strategies import make_strategy, spell
from tapfm.encoders.backbones import Backbone, Encoder, build
from tapfm.encoders.tail import unfit
from tapfm.engine.frozen_prefix import FrozenPrefix, first_to_learn
from tapfm.engine.memory import saved_bytes

GIB = 2**30
CONTEXT_GIB = 0.9  # CUDA context, cuBLAS workspaces, fragmentation
GRADIENT = 4  # bytes a parameter that learns: summed in fp32
KEPT = {"adamw": 8, "master": 12, "residual": 4.03, "offload": 0}  # by the optimizer, likewise
AT_ONCE = {"adamw": 0, "master": 0, "residual": 40, "offload": 0}  # an update's, largest tensor's
BAG_TILES, BAG_COPIES = 1000, 6  # a training bag; features, gate, their gradients
PHASES = ("encode", "aggregate", "adapt", "step")


@dataclass(frozen=True)
class Setup:
    """The settings of a run that its memory depends on; names and values are `SlideModule`'s."""

    precision: str = "bf16"
    optimizer: str = "adamw"
    recompute: bool = False
    strategy: str | Mapping[str, Any] = "full"

    @property
    def flags(self) -> str:
        """For `tapfm fit`."""
        options = {
            "strategy": self.strategy,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "recompute": str(self.recompute).lower(),
        }
        return " ".join(
            f"--model.{key} '{value}'" if isinstance(value, Mapping) else f"--model.{key} {value}"
            for key, value in options.items()
        )


@dataclass(frozen=True)
class Cost:
    """What a step holds and computes, counted."""

    parameters: int
    trained: int
    largest: int
    """Numbers of the largest tensor that learns."""
    tile: int
    """Bytes held for the backward of one tile."""
    casts: int
    """Bytes of the weights' bfloat16 copies at the forward's end."""
    block: int
    """Bytes one block makes of one tile: its work space, at most."""
    flop: float
    """Work of both passes, a tile."""


Count = Callable[[int, Any], tuple[int, ...]]
"""Figures of a model of so many blocks under a strategy."""


class Footprint:
    """Counts what training a model costs under one setup after another.

    Args:
        row: which model; one whose blocks are all alike.
        tile_px: side of the tiles; None is the model's own.
        tail: as training does it, the last block for the CLS token alone (`encoders.tail`).
    """

    def __init__(self, row: Backbone, tile_px: int | None = None, *, tail: bool = True):
        self.row, self.side = row, tile_px or row.tile_px
        with torch.device("meta"):
            self.vit = build(row, tile_px)
        self.depth = len(self.vit.blocks)
        self.tail = tail and row.feature == "cls" and not unfit(self.vit)
        self._counted: dict[tuple, tuple[int, ...]] = {}

    def cost(self, setup: Setup) -> Cost:
        """Count it; a second or so for each scheme."""
        parameters, trained, largest = self.sizes(setup.strategy)
        block, casts = self.held(Setup(setup.precision))
        return Cost(
            parameters=parameters,
            trained=trained,
            largest=largest,
            tile=self.held(setup)[0],
            casts=casts,
            block=block // max(1, self.depth - self.tail),
            flop=self.flops(setup),
        )

    def peaks(self, setup: Setup, cost: Cost, chunk: int, keep: int = 1) -> dict[str, float]:
        """Peak GiB of each phase with `chunk` tiles at once, and graphs of `keep` chunks kept."""
        weight = 2 if setup.precision == "bf16-true" else 4
        resting = weight * cost.parameters + KEPT[setup.optimizer] * cost.trained
        learning = resting + GRADIENT * cost.trained
        work, bag = chunk * cost.block, BAG_COPIES * BAG_TILES * self.row.dim * 4
        both = max if setup.recompute else int.__add__  # one after the other, or together
        graph = chunk * cost.tile + (0 if setup.recompute else cost.casts)
        kept, others = keep * graph, max(0, keep - 1) * graph  # others than the one in work
        total = {
            "encode": resting + kept + cost.casts + work,
            "aggregate": resting + kept + bag,
            "adapt": learning + others + chunk * cost.tile + both(cost.casts, work),
            "step": learning + AT_ONCE[setup.optimizer] * cost.largest,
        }
        return {phase: total[phase] / GIB + CONTEXT_GIB for phase in PHASES}

    def sizes(self, strategy: Any) -> tuple[int, ...]:
        """Parameters, those that learn, and the numbers of the largest tensor that does."""
        key = "sizes", repr(spell(make_strategy(strategy)))
        if key not in self._counted:
            every = list(self._first_blocks(self.depth, strategy).parameters())
            learn = [p.numel() for p in every if p.requires_grad]
            self._counted[key] = sum(p.numel() for p in every), sum(learn), max(learn)
        return self._counted[key]

    def held(self, setup: Setup) -> tuple[int, int]:
        """Bytes the forward leaves for backward: a tile's, and those that no tile adds to."""

        def count(depth: int, strategy: Any) -> tuple[int, int]:
            # not of one tile: torch sees a batch of one as contiguous, and shares what it copies
            two, three = (self._saved(setup, depth, strategy, tiles) for tiles in (2, 3))
            return three - two, max(0, 3 * two - 2 * three)

        return self._over_depth(("held", setup.precision, setup.recompute), setup, count)

    def flops(self, setup: Setup) -> int:
        """Work of one tile in both passes; a multiply-add is 2."""

        def count(depth: int, strategy: Any) -> tuple[int]:
            vit = self._first_blocks(depth, strategy)
            with FakeTensorMode(), FlopCounterMode(display=False) as counter:
                # on the CPU, since without a GPU autograd cannot run backward for one
                encoder, pixels = self._fake(vit, "cpu", torch.float32, setup, tiles=1)
                encode, first = encoder, first_to_learn(vit)
                if first is not None:  # what is frozen in front is computed in pass 1 only
                    boundary = FrozenPrefix(encoder, first)
                    encode, pixels = boundary.encode, boundary.tokens(pixels)
                encode(pixels)
                z_CD, score_C = encode(pixels)
                (z_CD.sum() + score_C.sum()).backward()
            return (counter.get_total_flops(),)

        return self._over_depth(("flops", setup.recompute), setup, count)[0]

    def _over_depth(self, key: tuple, setup: Setup, count: Count) -> tuple[int, ...]:
        """`count(depth, strategy)` for the whole model, from models of two and three blocks.

        A strategy that treats blocks each in its own way is counted at full depth: that is slower.
        """
        spec = spell(make_strategy(setup.strategy))
        key = (*key, repr(spec))
        if key not in self._counted:
            depth, n = self.depth, spec.get("n", 0)
            if spec["name"] not in ("full", "last_n", "lora") or depth < 4 or n == depth:
                found = count(depth, spec)
            elif spec["name"] != "last_n":
                two, three = count(2, spec), count(3, spec)
                found = tuple(a + (depth - 2) * (b - a) for a, b in zip(two, three, strict=True))
            else:
                base, frozen, learns = (
                    count(blocks, {**spec, "n": last}) for blocks, last in ((2, 1), (3, 1), (3, 2))
                )
                found = tuple(
                    a + (depth - 2) * (b - a) + (n - 1) * (c - b)
                    for a, b, c in zip(base, frozen, learns, strict=True)
                )
            self._counted[key] = found
        return self._counted[key]

    def _saved(self, setup: Setup, depth: int, strategy: Any, tiles: int) -> int:
        vit = self._first_blocks(depth, strategy)
        dtype = torch.bfloat16 if setup.precision == "bf16-true" else torch.float32
        with FakeTensorMode(), FusedAttention(), _autocast(setup.precision == "bf16"):
            encoder, pixels = self._fake(vit, "cuda", dtype, setup, tiles)
            return saved_bytes(lambda: encoder(pixels), but=encoder.parameters())

    def _fake(
        self, vit: nn.Module, device: str, dtype: torch.dtype, setup: Setup, tiles: int
    ) -> tuple[Encoder, Tensor]:
        """An encoder without memory, and tiles for it, inside a FakeTensorMode."""
        encoder = Encoder(vit, self.row, recompute=setup.recompute, tail=self.tail).train()
        for module in encoder.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, device=device, dtype=dtype)
                    module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    fake = torch.empty(buffer.shape, device=device, dtype=buffer.dtype)
                    module._buffers[name] = fake
        shape = tiles, 3, self.side, self.side
        return encoder, torch.empty(shape, dtype=torch.uint8, device=device)

    def _first_blocks(self, depth: int, strategy: Any) -> nn.Module:
        """The model on the meta device with its first blocks only, made ready by a strategy."""
        blocks = self.vit.blocks
        self.vit.blocks = blocks[:depth]
        vit = copy.deepcopy(self.vit)
        self.vit.blocks = blocks
        make_strategy(strategy).prepare(vit)
        return vit


class FusedAttention(TorchFunctionMode):
    """Takes the fused kernel, which torch would choose on a GPU but not where there is none.

    For float32 a GPU has another fused kernel, which holds the same tensors.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (each.to(torch.bfloat16) for each in (q, k, v))  # as autocast does for sdpa
        scale = kwargs.get("scale")
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, kwargs.get("dropout_p", 0.0), False, False, scale=scale)[0]


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """`torch.autocast("cuda", bfloat16)`, which refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
