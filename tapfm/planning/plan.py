"""`tapfm plan`: which training setups fit a GPU, found in seconds without a GPU or weights.

    tapfm plan --model h_optimus_0 --gpu L4

`planning.footprint` counts the memory of each setup; here the largest chunk that fits is found for
each, and the first setup that fits is chosen in this order: exact before approximate, without
recomputation before with it, all parameters before some. `tapfm fit` on a GPU prints the same
forecast for its own settings, and at the end the measured peaks beside it.

Condition: tiles/s are the counted work over an assumed rate, not a measured one (`cards`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from slides.errors import SettingsError
from tapfm.encoders.backbones import Backbone, find
from tapfm.engine.master_weights import HOST_BYTES
from tapfm.planning.cards import card_for, card_memory, usable
from tapfm.planning.footprint import BAG_TILES, CONTEXT_GIB, GIB, PHASES, Cost, Footprint, Setup
from tapfm.planning.speed import speed_lines

CHUNK_CAP = 64  # matrix products are large enough to fill a GPU well below it
GOOD_CHUNK = 8  # fewer tiles at once leave a GPU idle: recomputing blocks costs less
LAST = 4  # last-n is shown for a quarter of the blocks
SCHEMES = {
    "adamw": "fp32 weights and autocast",
    "master": "bf16 weights with fp32 masters on the card",
    "offload": "bf16 weights, exact AdamW in host memory",
    "residual": "bf16 weights with 16-bit residuals, moments in 8 bits",
}
ORDER = ("master", "offload", "residual", "adamw")  # adamw equals master, and is slower


class PlanError(SettingsError):
    """A plan was asked for that cannot be made."""


@dataclass(frozen=True)
class Option:
    """A setup, the largest chunk that fits with it, and its peaks."""

    setup: Setup
    cost: Cost
    chunk: int
    """Tiles at once; 0 if not even one (or the number asked for) fits."""
    keep: int
    """Number of chunks whose graphs fit at once, from 1 to the chunks of a bag."""
    peak_gib: Mapping[str, float]
    """Peak of each phase at `chunk`, or at the smallest allowed chunk if nothing fits."""
    good_gib: float
    """Highest peak with `GOOD_CHUNK` tiles, or the number asked for."""
    least_gib: float
    """Highest peak with one tile, or the number asked for."""

    @property
    def name(self) -> str:
        """Return its name in the table."""
        strategy = self.setup.strategy
        if isinstance(strategy, Mapping):
            strategy = f"last {strategy['n']}" if "n" in strategy else strategy["name"]
        return f"{strategy}, {self.setup.optimizer}" + (", recompute" * self.setup.recompute)

    @property
    def full(self) -> bool:
        """Return whether every parameter learns."""
        return self.setup.strategy == "full"


@dataclass(frozen=True)
class Plan:
    """All options for a model and a GPU, and the chosen one."""

    model: str
    tile_px: int
    parameters: int
    card: str
    """Which card."""
    gpu_gib: float
    """What the driver reports of it."""
    usable_gib: float
    """The highest peak that fits."""
    options: tuple[Option, ...]
    """In order of preference."""
    choice: Option | None
    """None: nothing fits."""
    reason: str


def setups(depth: int) -> list[Setup]:
    """Return the compared setups, in order of preference."""
    last = {"name": "last_n", "n": max(1, depth // LAST)}
    listed = []
    for strategy, optimizers in (("full", ORDER), ("lora", ("master",)), (last, ("master",))):
        for recompute in (False, True):
            for optimizer in optimizers:
                precision = "bf16" if optimizer == "adamw" else "bf16-true"
                listed.append(Setup(precision, optimizer, recompute, strategy))
    return listed


def make_plan(
    row: Backbone,
    *,
    gpu: str | float | None,
    tile_px: int | None = None,
    chunk: int | None = None,
) -> Plan:
    """Return a plan for one GPU.

    Args:
        row: which model.
        gpu: name of a card, or nominal memory in GiB; None is this machine's (`cards`).
        tile_px: side of the tiles; None is the model's own.
        chunk: tiles at once; None is the most that fit, up to `CHUNK_CAP`.

    Raises:
        PlanError: a GPU or chunk of impossible size, or a model whose blocks differ.
        BackboneError: the tile is not a multiple of the model's patch.
    """
    if chunk is not None and chunk < 1:
        raise PlanError(f"plan: a chunk is 1 tile or more, got {chunk}")
    if not row.prefix_tokens:
        raise PlanError(f"plan: {row.key}: its blocks differ; only ViTs can be planned, choose one")
    card, total = card_memory(gpu)
    most = usable(total)
    footprint = Footprint(row, tile_px)
    options = [_option(footprint, setup, most, chunk) for setup in setups(footprint.depth)]
    choice, reason = _choose(options, most, chunk)
    parameters = sum(p.numel() for p in footprint.vit.parameters())
    return Plan(
        row.key, footprint.side, parameters, card, total, most, tuple(options), choice, reason
    )


def fitting(
    row: Backbone,
    tile_px: int,
    strategy: Mapping[str, Any],
    fixed: Mapping[str, Any],
    gpu: str | float | None = None,
) -> tuple[Option, str]:
    """Return the first setup of one strategy that fits a GPU, and the reason.

    Args:
        row: which model.
        tile_px: side of the tiles.
        strategy: name and options.
        fixed: settings that are not open: some of `precision`, `optimizer`, `recompute`, `chunk`;
            and `merge_tokens`, which is 0 if it is not there.
        gpu: which; None is this machine's.

    Raises:
        PlanError: none fits.
    """
    card, total = card_memory(gpu)
    most, footprint = usable(total), Footprint(row, tile_px)
    fixed = dict(fixed)
    chunk, merge, options = fixed.pop("chunk", None), fixed.pop("merge_tokens", 0), []
    for recompute, optimizer in product((False, True), ORDER):
        autocast = fixed.get("precision", "bf16") if optimizer == "adamw" else "bf16-true"
        setup = Setup(autocast, optimizer, recompute, strategy, merge)
        if all(getattr(setup, key) == value for key, value in fixed.items()):
            options.append(_option(footprint, setup, most, chunk))
    large = [option for option in options if option.chunk >= (chunk or GOOD_CHUNK)]
    choice = next(iter(large or [option for option in options if option.chunk]), None)
    if choice is None:
        least = min(options, key=lambda option: option.least_gib)
        must_fit(row, tile_px, least.least_gib, gpu)  # raises, with what would fit
    peak = max(choice.peak_gib.values())
    return choice, (
        f"{SCHEMES[choice.setup.optimizer].capitalize()}: {peak:.1f} GiB at its peak of "
        f"{most:.1f} usable on {card}."
    )


def _option(footprint: Footprint, setup: Setup, most: float, wanted: int | None) -> Option:
    cost = footprint.cost(setup)

    def highest(chunk: int, keep: int = 1) -> float:
        return max(footprint.peaks(setup, cost, chunk, keep).values())

    sizes = range(CHUNK_CAP, 0, -1) if wanted is None else [wanted]
    chunk = next((size for size in sizes if highest(size) <= most), 0)
    keeps = range(math.ceil(BAG_TILES / chunk), 1, -1) if chunk else ()
    return Option(
        setup,
        cost,
        chunk,
        next((keep for keep in keeps if highest(chunk, keep) <= most), 1),
        footprint.peaks(setup, cost, chunk or wanted or 1),
        good_gib=highest(wanted or GOOD_CHUNK),
        least_gib=highest(wanted or 1),
    )


def _choose(options: list[Option], most: float, wanted: int | None) -> tuple[Option | None, str]:
    good = wanted or GOOD_CHUNK
    fitting = [option for option in options if option.chunk]
    full = [option for option in fitting if option.full]
    large = [option for option in full or fitting if option.chunk >= good]
    first = next(o for o in options if o.full)
    if not fitting:
        least = min(options, key=lambda option: option.least_gib)
        whole = min((o for o in options if o.full), key=lambda option: option.least_gib)
        smaller = f"smaller chunk than {wanted}, or a " if wanted and wanted > 1 else ""
        return None, (
            f"nothing fits in {most:.1f} GiB: the least is {least.name} with "
            f"{least.least_gib:.1f} GiB at chunk {wanted or 1}. Take a {smaller}card of "
            f"{card_for(least.least_gib)}; {card_for(whole.least_gib)} with {whole.name}; "
            f"{card_for(first.good_gib)} with {first.name} at chunk {good}; or a smaller model."
        )
    choice = (large or full or fitting)[0]
    setup = choice.setup
    peak = max(choice.peak_gib.values())
    reason = f"{SCHEMES[setup.optimizer]}: {peak:.1f} GiB at chunk {choice.chunk}, "
    reason += f"{most:.1f} are usable"
    if not choice.full:
        return choice, f"training every parameter does not fit; {choice.name} does. {reason}."
    if setup.optimizer != first.setup.optimizer or setup.recompute:
        reason += f"; {first.name} would take {first.good_gib:.1f} at chunk {good}"
    reason += (
        "; blocks are computed once more in the backward, a fifth of the speed."
        if setup.recompute
        else "; nothing is computed twice that need not be."
    )
    if setup.optimizer == "offload":
        host = HOST_BYTES * choice.cost.trained / GIB
        reason += f" It takes {host:.0f} GiB of host memory, and a copy each way per update."
    return choice, reason


def plan_table(plan: Plan) -> str:
    """Return the plan as text: a line for each setup, the choice and its reason."""
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, tiles of {plan.tile_px} px; "
        f"{plan.card} has {plan.gpu_gib:.2f} GiB, of which {plan.usable_gib:.1f} are usable",
        "",
        f"  {'trained, optimizer':<26}{'chunk':>6}"
        + "".join(f"{phase:>11}" for phase in PHASES)
        + f"{'TFLOP/tile':>12}",
    ]
    for option in plan.options:
        mark = "*" if option is plan.choice else " "
        chunk = str(option.chunk) if option.chunk else "none"
        peak = "".join(f"{option.peak_gib[phase]:>11.1f}" for phase in PHASES)
        work = option.cost.flop / 1e12
        lines.append(f"{mark} {option.name:<26}{chunk:>6}{peak}{work:>12.3g}")
    lines += [
        "",
        "Peak GiB by phase at the largest chunk that fits (at the smallest where none does), "
        f"{CONTEXT_GIB} of it",
        "for context and workspaces. The number of tiles of a slide does not change it.",
        "",
        f"Choice: {plan.choice.name if plan.choice else 'none'}: {plan.reason}",
    ]
    if plan.choice:
        chunk, keep = plan.choice.chunk, plan.choice.keep
        kept = f" --model.keep_chunks {keep}" if keep > 1 else ""
        lines += [
            f"Train with: {plan.choice.setup.flags} --model.chunk {chunk}{kept}",
            "With --model.compile true the blocks are compiled: the numbers stay the same, the "
            "first slide waits a minute or so.",
            *speed_lines(plan.choice.setup, plan.choice.cost),
        ]
        if kept:
            lines.append(f"The first {keep * chunk} tiles of a slide are encoded once, not twice.")
    return "\n".join(lines)


def run_plan(model: str, gpu: str | None, tile_px: int | None) -> int:
    """Print the plan; return 0 if something fits, else 1."""
    plan = make_plan(find(model), gpu=gpu, tile_px=tile_px)
    print(plan_table(plan))
    return 0 if plan.choice else 1


def forecast(
    row: Backbone, tile_px: int, setup: Setup, chunk: int, keep: int = 1
) -> dict[str, float]:
    """Return peak GiB of each phase under a run's settings, as torch counts (no context)."""
    footprint = Footprint(row, tile_px)
    peak = footprint.peaks(setup, footprint.cost(setup), chunk, keep)
    return {phase: value - CONTEXT_GIB for phase, value in peak.items()}


def must_fit(row: Backbone, tile_px: int, peak: float, gpu: str | float | None = None) -> None:
    """Refuse a run that would run out of GPU memory, and say what would fit.

    Args:
        row: which model.
        tile_px: side of the tiles.
        peak: of the run, context included, in GiB.
        gpu: which; None is this machine's.

    Raises:
        PlanError: the peak is above what the card has usable.
    """
    card, total = card_memory(gpu)
    if peak <= (most := usable(total)):
        return
    choice = make_plan(row, gpu=gpu, tile_px=tile_px).choice
    what = "Nothing fits: take a smaller model or a larger card."
    if choice:
        what = f"What fits: {choice.setup.flags} --model.chunk {choice.chunk}"
    raise PlanError(
        f"model: this run would take {peak:.1f} GiB of GPU memory at its peak, and {card} has "
        f"{most:.1f} of {total:.1f} GiB usable. {what}"
    )


def compare(predicted: Mapping[str, float], memory: Path) -> str:
    """Return the forecast beside the largest figures of a run's memory.csv, as text.

    A run measures `step` within `adapt`.
    """
    with memory.open() as file:
        rows = list(csv.DictReader(file))
    lines = ["peak GiB    predicted  measured"]
    for phase in PHASES[:3]:
        here = max(predicted[phase], predicted["step"] if phase == "adapt" else 0.0)
        found = max((float(row[f"{phase}_allocated_gib"] or 0) for row in rows), default=0.0)
        lines.append(f"{phase:<12}{here:>9.2f}{found:>10.2f}  {found / here - 1:+.0%}")
    return "\n".join(lines)
