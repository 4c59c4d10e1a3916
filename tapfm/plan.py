"""What fits on a GPU, and how to train there: answered in seconds, without GPU and weights.

    tapfm plan --model h_optimus_0 --gpu 24

How: the real encoder runs forward on fake CUDA tensors, which have shapes but no memory, and what
autograd would hold is counted for two tiles and for three: the difference is a tile's activations,
the rest are the bfloat16 copies of the weights that autocast makes. Peaks follow from these.

    encode      weights and moments, the graph of the first chunk, which is kept, and for the next
                chunk the cast copies and one block's work
    aggregate   weights and moments, the graph of the first chunk, the features of a bag
    adapt       weights, gradients, moments, what the chunk's forward holds, and the cast copies and
                one block's work: together, or, where blocks are recomputed, the larger of them
    step        weights, gradients, moments

Condition: full fine-tuning with fp32 AdamW (16 bytes a parameter), attention fused, one slide an
update: accumulating slides keeps gradients, 4 bytes a parameter, through encode and aggregate.
Autocast keeps its copies until the encoder's call ends, with recomputation and without gradients
too, so the plan counts them there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tapfm.backbones import Backbone, Encoder, build, find
from tapfm.memory import saved_bytes

GIB = 2**30
WEIGHTS, GRADIENTS, MOMENTS = 4, 4, 8  # bytes a parameter: fp32, and AdamW's two averages
CONTEXT_GIB = 0.9  # CUDA context, cuBLAS workspaces, fragmentation
KEPT_BACK_GIB, KEPT_BACK = 0.25, 0.02  # of the nominal size: driver, error correction, the desktop
CHUNK_CAP = 64  # matrix products are large enough to fill a GPU well below it
GOOD_CHUNK = 8  # fewer tiles at once leave a GPU idle: recomputing blocks costs less
BAG_TILES, BAG_COPIES = 1000, 6  # a training bag; features, gate, their gradients
PHASES = ("encode", "aggregate", "adapt", "step")


class PlanError(ValueError):
    """A plan was asked for that has no answer."""


@dataclass(frozen=True)
class Cost:
    """What the encoder's forward holds under one scheme, counted."""

    tile: int
    """Bytes held for the backward of one tile."""
    casts: int
    """Bytes of the weights' bfloat16 copies at the forward's end."""
    block: int
    """Bytes one block makes of one tile: its work space, at most."""
    recompute: bool
    """Whether the cast copies are let go before the backward."""


@dataclass(frozen=True)
class Option:
    """A scheme, the largest chunk that fits with it, and its peaks."""

    precision: str
    """`bf16` (autocast) or `fp32`."""
    recompute: bool
    """Whether blocks are computed again in the backward."""
    chunk: int
    """Tiles at once; 0 if not even one (or the number asked for) fits."""
    peak_gib: Mapping[str, float]
    """By phase, at `chunk`, or at the fewest tiles asked for if that is 0."""
    good_gib: float
    """Highest peak with `GOOD_CHUNK` tiles, or the number asked for."""
    least_gib: float
    """Highest peak with one tile, or the number asked for."""
    tflop: float
    """Work of both passes, a tile."""

    @property
    def name(self) -> str:
        """As the table says it."""
        return self.precision + (", recompute" if self.recompute else "")


@dataclass(frozen=True)
class Plan:
    """What fits, and what to choose."""

    model: str
    tile_px: int
    parameters: int
    gpu_gib: float
    usable_gib: float
    options: tuple[Option, ...]
    """In order of preference."""
    choice: Option | None
    """None: nothing fits."""
    reason: str


def make_plan(
    row: Backbone, *, gpu_gib: float, tile_px: int | None = None, chunk: int | None = None
) -> Plan:
    """A plan for full fine-tuning.

    Args:
        row: which model.
        gpu_gib: nominal memory of the card, 24 for a "24 GB" one.
        tile_px: side of the tiles; None is the model's own.
        chunk: tiles at once; None is the most that fit, up to `CHUNK_CAP`.

    Raises:
        PlanError: a card or chunk of no size, or a model whose blocks differ.
        BackboneError: the tile is not a multiple of the model's patch.
    """
    if not (math.isfinite(gpu_gib) and gpu_gib > 0):
        raise PlanError(f"plan: --gpu is its memory in GiB, such as 24; got {gpu_gib:g}")
    if chunk is not None and chunk < 1:
        raise PlanError(f"plan: a chunk is 1 tile or more, got {chunk}")
    usable = max(0.0, gpu_gib - KEPT_BACK_GIB - KEPT_BACK * gpu_gib)
    if not row.prefix_tokens:
        raise PlanError(f"plan: {row.key}: only ViTs are planned, whose blocks are all alike")
    with torch.device("meta"):
        vit = build(row, tile_px)
    parameters, depth = sum(p.numel() for p in vit.parameters()), len(vit.blocks)
    work = forward_flops(row, tile_px)
    options = []
    for precision in ("bf16", "fp32"):
        bf16 = precision == "bf16"
        kept, casts = held(row, tile_px, bf16=bf16, recompute=False)
        for recompute in (False, True):
            tile = held(row, tile_px, bf16=bf16, recompute=True)[0] if recompute else kept
            cost = Cost(tile, casts, kept // depth, recompute)
            forwards = 4 + (depth - 1) / depth * recompute  # the last block is never recomputed
            flop = forwards * work
            options.append(
                _option(row, parameters, precision, recompute, cost, usable, chunk, flop)
            )
    order = {("bf16", False): 0, ("bf16", True): 1, ("fp32", True): 2, ("fp32", False): 3}
    options.sort(key=lambda option: order[option.precision, option.recompute])
    choice, reason = _choose(options, usable, chunk)
    return Plan(
        row.key, tile_px or row.tile_px, parameters, gpu_gib, usable, tuple(options), choice, reason
    )


def peaks(row: Backbone, parameters: int, cost: Cost, chunk: int) -> dict[str, float]:
    """Peak GiB of each phase with `chunk` tiles at once."""
    resting = (WEIGHTS + MOMENTS) * parameters
    learning = resting + GRADIENTS * parameters
    work, bag = chunk * cost.block, BAG_COPIES * BAG_TILES * row.dim * 4
    both = max if cost.recompute else int.__add__  # one after the other, or together
    kept = chunk * cost.tile + (0 if cost.recompute else cost.casts)  # the first chunk's graph
    total = {
        "encode": resting + kept + cost.casts + work,
        "aggregate": resting + kept + bag,
        "adapt": learning + chunk * cost.tile + both(cost.casts, work),
        "step": learning,
    }
    return {phase: total[phase] / GIB + CONTEXT_GIB for phase in PHASES}


def _option(
    row: Backbone,
    parameters: int,
    precision: str,
    recompute: bool,
    cost: Cost,
    usable: float,
    wanted: int | None,
    flop: float,
) -> Option:
    def highest(chunk: int) -> float:
        return max(peaks(row, parameters, cost, chunk).values())

    sizes = range(CHUNK_CAP, 0, -1) if wanted is None else [wanted]
    chunk = next((size for size in sizes if highest(size) <= usable), 0)
    return Option(
        precision,
        recompute,
        chunk,
        peaks(row, parameters, cost, chunk or wanted or 1),
        good_gib=highest(wanted or GOOD_CHUNK),
        least_gib=highest(wanted or 1),
        tflop=flop / 1e12,
    )


def _choose(options: list[Option], usable: float, wanted: int | None) -> tuple[Option | None, str]:
    plain, again, slow, _ = options
    good = wanted or GOOD_CHUNK
    if plain.chunk >= good:
        return plain, (
            f"bf16 without recomputation takes {plain.good_gib:.1f} GiB at chunk {good}, "
            f"{usable:.1f} are usable: nothing is computed twice that need not be."
        )
    short = (
        f"bf16 without recomputation would take {plain.good_gib:.1f} GiB at chunk {good}, "
        f"{usable:.1f} are usable"
    )
    if again.chunk:
        return again, f"{short}; recomputing blocks costs a fifth of the speed and fits."
    if slow.chunk:
        return slow, (
            f"{short}, and with recomputation {again.least_gib:.1f}; fp32 has no copies of the "
            "weights and fits, at several times the time."
        )
    least = min(options, key=lambda option: option.least_gib)
    smaller = f"smaller chunk than {wanted}, or a " if wanted and wanted > 1 else ""
    return None, (
        f"nothing fits in {usable:.1f} GiB: the least is {least.name} with {least.least_gib:.1f} "
        f"GiB at chunk {wanted or 1}. Take a {smaller}card of {_card(least.least_gib)} GiB "
        f"({_card(again.least_gib)} with {again.name}, {_card(plain.good_gib)} with {plain.name} "
        f"at chunk {good}), or a smaller model."
    )


def _card(peak: float) -> int:
    """Nominal size of the smallest card that has `peak` GiB usable."""
    return math.ceil((peak + KEPT_BACK_GIB) / (1 - KEPT_BACK))


def plan_table(plan: Plan) -> str:
    """The plan as text: a line a scheme, the choice and its reason."""
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, tiles of {plan.tile_px} px; "
        f"a {plan.gpu_gib:g} GiB card has {plan.usable_gib:.1f} GiB usable",
        "",
        f"  {'scheme':<16}{'chunk':>6}"
        + "".join(f"{phase:>11}" for phase in PHASES)
        + f"{'TFLOP/tile':>13}",
    ]
    for option in plan.options:
        mark = "*" if option is plan.choice else " "
        chunk = str(option.chunk) if option.chunk else "none"
        peak = "".join(f"{option.peak_gib[phase]:>11.1f}" for phase in PHASES)
        lines.append(f"{mark} {option.name:<16}{chunk:>6}{peak}{option.tflop:>13.3g}")
    lines += [
        "",
        "Peak GiB by phase at the largest chunk that fits (at the smallest where none does), "
        f"{CONTEXT_GIB} of it",
        "for context and workspaces. The number of tiles of a slide does not change it.",
        "",
        f"Choice: {plan.choice.name if plan.choice else 'none'}: {plan.reason}",
    ]
    if plan.choice:
        lines.append(
            f"Train with: --model.precision {plan.choice.precision} "
            f"--model.recompute {str(plan.choice.recompute).lower()} "
            f"--model.chunk {plan.choice.chunk}"
        )
    return "\n".join(lines)


def run_plan(model: str, gpu: float, tile_px: int | None) -> int:
    """`tapfm plan`: print the plan; 0 if something fits, else 1."""
    plan = make_plan(find(model), gpu_gib=gpu, tile_px=tile_px)
    print(plan_table(plan))
    return 0 if plan.choice else 1


def held(row: Backbone, tile_px: int | None, *, bf16: bool, recompute: bool) -> tuple[int, int]:
    """Bytes the encoder's forward leaves for backward: a tile's, and those that no tile adds to."""
    # not from one tile: torch sees a batch of one as contiguous and then shares what it else copies
    two, three = (_forward(row, tile_px, n, bf16=bf16, recompute=recompute) for n in (2, 3))
    return three - two, max(0, 3 * two - 2 * three)


def forward_flops(row: Backbone, tile_px: int | None) -> int:
    """Work of one tile's forward; a multiply-add is 2."""
    with FlopCounterMode(display=False) as counter:
        _forward(row, tile_px, 1, bf16=False, recompute=False)
    return counter.get_total_flops()


def _forward(row: Backbone, tile_px: int | None, tiles: int, *, bf16: bool, recompute: bool) -> int:
    """Bytes that the encoder's forward on fake CUDA tensors holds for backward."""
    with torch.device("meta"):
        vit = build(row, tile_px)
    side = tile_px or row.tile_px
    with FakeTensorMode():
        encoder = Encoder(vit, row, recompute=recompute).train()
        for module in encoder.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, device="cuda")
                    module._parameters[name] = nn.Parameter(fake)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cuda")
        pixels = torch.empty(tiles, 3, side, side, dtype=torch.uint8, device="cuda")

        def forward():
            with FusedAttention(), _autocast(bf16):
                return encoder(pixels)

        return saved_bytes(forward, but=encoder.parameters())


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
