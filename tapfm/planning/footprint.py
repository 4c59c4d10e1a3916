"""GPU memory and work of one training step, counted without a GPU and without weights.

How: the model runs on tensors that have shapes but no memory (of the meta device; for autocast fake
ones of CUDA, which are slower), and the bytes autograd would hold are counted for two tiles and for
three: the difference is a tile's activations, the rest are the bfloat16 copies of the weights that
autocast makes. A model's blocks are alike, so two and three blocks are counted and the others
extrapolated; the last, which computes only the CLS token (`encoders.tail`), is in both. The peaks
of each phase follow:

    encode      resting memory, the graphs of the first chunks that are kept, and for the next
                chunk the cast copies and one block's work
    aggregate   resting memory, the kept graphs, the features of a bag
    adapt       resting memory, the gradient, the other kept graphs, the chunk's own graph, and the
                cast copies and one block's work: both, or, with recomputation, the larger one
    step        resting memory, the gradient, and temporary tensors of the update

Resting memory is the weights and what the optimizer keeps for those that learn
(`engine.master_weights`).

Where tokens are merged (`encoders.merging`) blocks differ, and all are counted; the work space is
that of a block without.

Condition: fused attention, under a mask too; one slide an update: accumulating slides keeps the
gradient, 4 bytes a parameter, through encode and aggregate. Autocast keeps its copies until the
encoder's call ends, with recomputation and without gradients too, so they are counted there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.encoders.backbones import Backbone, Encoder, build
from tapfm.encoders.tail import unfit
from tapfm.engine.frozen_prefix import FrozenPrefix, first_to_learn
from tapfm.engine.memory import saved_bytes as autograd_bytes

GIB = 2**30
CONTEXT_GIB = 0.9  # CUDA context, cuBLAS workspaces
GRADIENT = 4  # bytes a parameter that learns: summed in fp32
KEPT = {"adamw": 8, "master": 12, "residual": 4.03, "offload": 0}  # likewise, by the optimizer
AT_ONCE = {"adamw": 0, "master": 0, "residual": 40, "offload": 0}  # a number of the largest tensor
BAG_TILES, BAG_COPIES = 1000, 6  # a training bag; features, gate, their gradients
PHASES = ("encode", "aggregate", "adapt", "step")


@dataclass(frozen=True)
class Setup:
    """The settings of a run that its memory depends on; names and values are `SlideModule`'s."""

    precision: str = "bf16"
    optimizer: str = "adamw"
    recompute: bool = False
    strategy: str | Mapping[str, Any] = "full"
    merge_tokens: int = 0

    @property
    def flags(self) -> str:
        """Return the settings as flags of `tapfm fit`."""
        options = {
            "strategy": self.strategy,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "recompute": str(self.recompute).lower(),
            **({"merge_tokens": self.merge_tokens} if self.merge_tokens else {}),
        }
        return " ".join(
            f"--model.{key} '{value}'" if isinstance(value, Mapping) else f"--model.{key} {value}"
            for key, value in options.items()
        )


@dataclass(frozen=True)
class Cost:
    """Counted parameters, bytes and work of a step."""

    parameters: int
    trained: int
    largest: int
    """Size of the largest tensor that learns, in numbers."""
    tile: int
    """Bytes held for the backward of one tile."""
    casts: int
    """Bytes of the weights' bfloat16 copies at the forward's end."""
    block: int
    """Most bytes of work space that one block needs for one tile."""
    flop: float
    """Floating-point operations of both passes, per tile."""
    forward_flop: float
    """Floating-point operations of pass 1, per tile."""


Count = Callable[[int, Any], tuple[int, ...]]
"""Counts figures of a model with that many blocks under a strategy."""


class Footprint:
    """A counter of what training one model costs under different setups.

    Args:
        row: a model whose blocks are all alike.
        tile_px: side of the tiles; None is the model's own.
        tail: compute the last block for the CLS token alone, as training does (`encoders.tail`).
    """

    def __init__(self, row: Backbone, tile_px: int | None = None, *, tail: bool = True):
        self.row, self.side = row, tile_px or row.tile_px
        with torch.device("meta"):
            self.vit = build(row, tile_px)
        self.depth = len(self.vit.blocks)
        self.tail = tail and row.feature == "cls" and not unfit(self.vit)
        self._counted: dict[tuple, tuple[int, ...]] = {}

    def cost(self, setup: Setup) -> Cost:
        """Return the cost of a setup; a new one takes a second or so."""
        parameters, trained, largest = self.sizes(setup.strategy)
        block, casts = self.saved_bytes(Setup(setup.precision))
        flop, forward_flop = self.flops(setup)
        return Cost(
            parameters=parameters,
            trained=trained,
            largest=largest,
            tile=self.saved_bytes(setup)[0],
            casts=casts,
            block=block // max(1, self.depth - self.tail),
            flop=flop,
            forward_flop=forward_flop,
        )

    def peaks(self, setup: Setup, cost: Cost, chunk: int, keep: int = 1) -> dict[str, float]:
        """Return peak GiB of each phase with `chunk` tiles at once and `keep` kept graphs."""
        weight = 2 if setup.precision == "bf16-true" else 4
        resting = weight * cost.parameters + KEPT[setup.optimizer] * cost.trained
        learning = resting + GRADIENT * cost.trained
        work, bag = chunk * cost.block, BAG_COPIES * BAG_TILES * self.row.dim * 4
        both = max if setup.recompute else int.__add__  # the larger of the two, or both together
        graph = chunk * cost.tile + (0 if setup.recompute else cost.casts)
        kept, others = keep * graph, max(0, keep - 1) * graph  # kept graphs but the current one
        total = {
            "encode": resting + kept + cost.casts + work,
            "aggregate": resting + kept + bag,
            "adapt": learning + others + chunk * cost.tile + both(cost.casts, work),
            "step": learning + AT_ONCE[setup.optimizer] * cost.largest,
        }
        return {phase: total[phase] / GIB + CONTEXT_GIB for phase in PHASES}

    def sizes(self, strategy: Any) -> tuple[int, ...]:
        """Return parameters, those that learn, and the size of the largest tensor that learns."""

        def count(depth: int, strategy: Any) -> tuple[int, int, int]:
            every = list(self._first_blocks(depth, strategy).parameters())
            learn = [p.numel() for p in every if p.requires_grad]
            return sum(p.numel() for p in every), sum(learn), max(learn)

        return self._over_depth(("sizes",), Setup(strategy=strategy), count)

    def saved_bytes(self, setup: Setup) -> tuple[int, int]:
        """Return bytes held for backward: per tile, and those independent of tiles."""

        def count(depth: int, strategy: Any) -> tuple[int, int]:
            # two and three, not one: torch treats a batch of one as contiguous and copies less
            two, three = self._saved(setup, depth, strategy, (2, 3))
            return three - two, max(0, 3 * two - 2 * three)

        return self._over_depth(("held", setup.precision, setup.recompute), setup, count)

    def flops(self, setup: Setup) -> tuple[int, int]:
        """Return the work of one tile in both passes, and in pass 1; a multiply-add is 2."""

        def count(depth: int, strategy: Any) -> tuple[int, int]:
            vit = self._first_blocks(depth, strategy)
            with FusedAttention(), FlopCounterMode(display=False) as counter:
                encoder, pixels = self._fake(vit, "meta", torch.float32, setup, tiles=1)
                encode, first = encoder, first_to_learn(vit)
                if (
                    first is not None and not setup.merge_tokens
                ):  # frozen blocks in front are computed in pass 1 only
                    prefix = FrozenPrefix(encoder, first)
                    encode, pixels = prefix.encode, prefix.tokens(pixels)
                before = counter.get_total_flops()
                z_CD, score_C = encode(pixels)  # what pass 1 computes, and pass 2 again
                forward = counter.get_total_flops()
                # from an edge: a tensor's backward() is without the mode, which recomputing needs
                torch.autograd.backward(get_gradient_edge(z_CD.sum() + score_C.sum()))
            return counter.get_total_flops() + forward - before, forward

        return self._over_depth(("flops", setup.recompute), setup, count)

    def _over_depth(self, key: tuple, setup: Setup, count: Count) -> tuple[int, ...]:
        """Return `count(depth, strategy)` of the whole model, extrapolated from 2 and 3 blocks.

        A strategy that treats blocks differently is counted at full depth, which is slower; so are
        blocks with fewer tokens than the ones before.
        """
        spec = strategy_spec(make_strategy(setup.strategy))
        key = (*key, repr(spec), setup.merge_tokens)
        if key not in self._counted:
            depth, n = self.depth, spec.get("n", 0)
            alike = spec["name"] in ("full", "last_n", "lora") and not setup.merge_tokens
            if not alike or depth < 4 or n == depth:
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

    def _saved(self, setup: Setup, depth: int, strategy: Any, counts: tuple[int, ...]) -> list[int]:
        vit = self._first_blocks(depth, strategy)
        dtype = torch.bfloat16 if setup.precision == "bf16-true" else torch.float32
        cast = setup.precision == "bf16"  # by the kind of device, which the meta device has not
        held = []
        with FakeTensorMode() if cast else nullcontext(), FusedAttention():
            encoder, pixels = self._fake(vit, "cuda" if cast else "meta", dtype, setup, max(counts))
            for tiles in counts:
                with _autocast(cast):
                    encode = partial(encoder, pixels[:tiles])
                    held.append(autograd_bytes(encode, but=encoder.parameters()))
        return held

    def _fake(
        self, vit: nn.Module, device: str, dtype: torch.dtype, setup: Setup, tiles: int
    ) -> tuple[Encoder, Tensor]:
        """Return an encoder and tiles, without memory: on meta, or inside a FakeTensorMode."""
        how = {"recompute": setup.recompute, "merge": setup.merge_tokens, "tail": self.tail}
        encoder = Encoder(vit, self.row, **how).train()
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
        """Return the model on the meta device with its first blocks, prepared by a strategy."""
        blocks = self.vit.blocks
        self.vit.blocks = blocks[:depth]
        vit = copy.deepcopy(self.vit)
        self.vit.blocks = blocks
        make_strategy(strategy).prepare(vit)
        return vit


class FusedAttention(TorchFunctionMode):
    """A torch mode that uses the fused kernel, which torch chooses only where there is a GPU.

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
    """Apply `torch.autocast("cuda", bfloat16)`, which torch itself refuses without a GPU."""
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
