"""`tapfm probe`: how strongly a cohort's labels act on each block, and how far tuning moves it.

    1. head        the slide model alone, on frozen features of a few dozen training slides
    2. gradient    each slide's exact gradient by two passes: per block, norm over the weights' norm
    3. drift       `tapfm fit` in small, full fine-tuning at the config's learning rates on those
                   slides and on others; then 1 - linear CKA between a block's CLS tokens before
                   and after, on tiles of the val split

The rule for `last_n`: the fewest last blocks that together have `SHARE` of the gradient over
weight, summed over all blocks. Drift is not used by the rule; it accumulates from the first block
to the last and shows whether the learning rate moves anything at all.

No file of the user is changed; the probe's own weights are discarded.

Price: the slides are read once for the head, once for the gradient, and once an epoch of the fit.
Condition: a ViT with a CLS token.

Shapes: N tiles, D features, T tiles of a slide, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, fields, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from slides.errors import SettingsError
from slides.files import write_csv
from slides.streaming.order import epoch_order
from slides.streaming.stream import BagDataset
from tapfm.adapt.surgery import need_vit
from tapfm.data.bag import Bag
from tapfm.data.datamodule import SlideData
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.evaluation.drift import cls_by_block, linear_cka
from tapfm.evaluation.probe_figure import EncoderPart, probe_figure
from tapfm.frozen.fitter import Candidate, Recipe, Schedule, fit
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.inference.heatmap import save_figure
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.training.fit import read_config
from tapfm.training.module import SlideModule

SHARE = 0.8  # share of gradient over weight that the suggested blocks have


def _streamed(names: Sequence[str], seed: int) -> Iterator[list[list[int]]]:
    """Yield each epoch's slides one by one, in the order in which a run would stream them."""
    for epoch in range(HEAD.schedule.epochs):
        yield [[number] for number in epoch_order(len(names), seed, epoch)]


HEAD = Recipe((Candidate(1e-3),), Schedule(20, 20), order=_streamed)  # on frozen features: seconds
DRIFT_TILES = 512  # CKA of fewer than a few hundred tiles is biased high


class BlockProbeError(SettingsError):
    """A cohort cannot be probed as asked."""


def run_probe(configs: Sequence[Path], out: Path, slides: int, epochs: int) -> int:
    """Probe a cohort; write probe.csv and probe.png to `out`; return 0.

    Raises:
        BlockProbeError: no slide to train on or to compare.
        StrategyError: an encoder without a sequence of blocks and a CLS token.
    """
    if slides < 1 or epochs < 1:
        raise BlockProbeError(
            f"probe: slides and epochs must be 1 or more, got {slides} and {epochs}"
        )
    each = [argument for config in configs for argument in ("--config", str(config))]
    cli = read_config(
        [*each, "--model.strategy", "full", "--model.steps.head_first", "0",
         "--trainer.max_epochs", str(epochs), "--trainer.limit_train_batches", str(slides),
         "--trainer.limit_val_batches", "0", "--trainer.devices", "1"]
    )  # fmt: skip
    module: SlideModule = cli.model
    data: SlideData = cli.datamodule
    if data.features:
        raise BlockProbeError(
            "tapfm probe: it looks at the blocks of an encoder, and with data.features_dir there "
            "is none. Leave features_dir out."
        )
    model = module.slide_model.to(cli.trainer.strategy.root_device)
    need_vit(model.encoder.vit, "last_n")
    model.round_weights()  # before the comparison, so that rounding does not count as drift
    data.prepare_data()
    tiles = drift_tiles(data)
    count = min(slides, len(data.training_rows))
    before, after = fit_head(module, training_bags(data, count), data.seed)
    print(f"head: loss {before:.3f} to {after:.3f} on frozen features of {count} slides")
    gradients = slide_gradients(module, training_bags(data, count))
    cls = cls_by_block(model, tiles, module.chunk)
    cli.trainer.fit(module.train(), datamodule=data)
    model.to(cli.trainer.strategy.root_device)  # Lightning takes it back to the CPU
    drift = [
        1 - linear_cka(*pair)
        for pair in zip(cls, cls_by_block(model, tiles, module.chunk), strict=True)
    ]
    found = with_drift(gradients, drift)
    rows = [["" if v != v else f"{v:.6g}" if isinstance(v, float) else v for v in astuple(part)]
            for part in found]  # fmt: skip
    write_csv(out / "probe.csv", [each.name for each in fields(EncoderPart)], rows)
    n = suggest([part.relative for part in found if part.name.startswith("block")])
    save_figure(probe_figure(found, n), out / "probe.png")
    caption = (
        f"Gradient: mean over {count} slides. Drift: 1 - linear CKA of CLS on {len(tiles)} tiles "
        f"of the val split, after full fine-tuning at {module.encoder_lr:g} for {epochs} x {count} "
        "slides."
    )
    print(probe_table(found, n, caption))
    print(f"{out}: probe.csv, probe.png")
    return 0


def training_bags(data: SlideData, count: int) -> Iterator[Bag]:
    """Yield the slides that training would take first, unaugmented, one by one."""
    rows = data.training_rows
    order = epoch_order(len(rows), data.seed, 0)[:count]
    return _bags(data, [rows[number] for number in order], data.tiles_per_slide)


def drift_tiles(data: SlideData) -> Tensor:
    """Return about `DRIFT_TILES` tiles of the val split, equally many from each slide.

    Raises:
        BlockProbeError: the val split has no readable slide.
    """
    rows = data.rows("val")[:DRIFT_TILES]
    bags = _bags(data, rows, math.ceil(DRIFT_TILES / max(1, len(rows))))
    tiles = [bag.tiles for bag in bags]
    if not tiles:
        raise BlockProbeError(
            "probe: the val split has no slide to measure the drift on. Add a val split to the "
            "table: `tapfm split` makes one."
        )
    return torch.cat(tiles)


def _bags(data: SlideData, rows: Sequence, budget: int | None) -> Iterator[Bag]:
    read = BagDataset(rows, data.tile_source, budget, data.seed, on_error=data.on_error)
    for number in range(len(rows)):
        bag = data.on_before_batch_transfer(read[number], 0)
        if bag is not None:  # else it is skipped and noted
            yield bag


def fit_head(module: SlideModule, bags: Iterable[Bag], seed: int) -> tuple[float, float]:
    """Fit the slide model on frozen features; return its mean loss before and after.

    Raises:
        BlockProbeError: no slide could be read.
    """
    model = module.slide_model.eval()
    device, aggregator = model.device, model.aggregator
    loss = module.objective.task_loss.to(device)
    frozen = []
    for bag in bags:
        z_TD, score_T, _ = encode_bag(
            model.encode, bag.tiles.split(module.chunk), seed=bag.seed, device=device
        )
        slide = bag.slide_id, bag.case_id, z_TD.detach(), bag.labels_K.to(device)
        frozen.append(FrozenSlide.of(*slide, score_T.detach(), bag.places))
    if not frozen:
        raise BlockProbeError("probe: no slide of the train split could be read; see the ledger")

    @torch.no_grad()
    def mean() -> float:
        each_N = [aggregator.loss(slide.tiles, slide.target_Y, loss) for slide in frozen]
        return torch.stack(each_N).mean().item()

    before = mean()
    fit(lambda _: aggregator, frozen, [], module.task, HEAD, seed, loss=loss, device=device)
    aggregator.zero_grad(set_to_none=True)
    return before, mean()


def parts_of(vit: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each block, and of the layers in front of and behind them."""
    parts: dict[str, list[nn.Parameter]] = {"front": []}
    parts |= {f"block {number}": [] for number in range(len(vit.blocks))} | {"norm": []}
    for name, parameter in vit.named_parameters():
        first, *rest = name.split(".")
        behind = first in ("norm", "fc_norm", "head")
        part = f"block {rest[0]}" if first == "blocks" else "norm" if behind else "front"
        parts[part].append(parameter)
    return parts


def slide_gradients(module: SlideModule, bags: Iterable[Bag]) -> list[EncoderPart]:
    """Return each part's gradient of the slide loss, by the engine that trains."""
    model = module.slide_model.eval()
    parts = parts_of(model.encoder.vit)
    weight = {name: _norm(each) for name, each in parts.items()}
    total, count = dict.fromkeys(parts, 0.0), 0
    for bag in bags:
        same = {"seed": bag.seed, "device": model.device}
        z_TD, score_T, _ = encode_bag(model.encode, bag.tiles.split(module.chunk), **same)
        tiles = TileSet.of(bag.places, z_TD, score_T)
        loss = module.objective.task_loss
        model.aggregator.loss(tiles, bag.labels_K.to(model.device), loss).backward()
        adapt_bag(model.encode, bag.tiles.split(module.chunk), z_TD.grad, score_T.grad, **same)
        for name, each in parts.items():
            total[name] += _norm([p.grad for p in each if p.grad is not None])
        model.zero_grad(set_to_none=True)
        count += 1
    return [
        EncoderPart(
            name,
            sum(p.numel() for p in each),
            weight[name],
            total[name] / count,
            total[name] / count / weight[name] if weight[name] else math.nan,
            math.nan,
        )
        for name, each in parts.items()
    ]


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(t.detach().float().square().sum().item() for t in tensors))


def suggest(relative: Sequence[float], share: float = SHARE) -> int:
    """Return the fewest last blocks that have `share` of the sum."""
    wanted = share * math.fsum(relative)
    sums = accumulate(reversed(relative))
    return next((n for n, total in enumerate(sums, 1) if total >= wanted), len(relative))


def with_drift(gradients: Sequence[EncoderPart], drift: Sequence[float]) -> list[EncoderPart]:
    """Return the parts with the drift of the blocks filled in."""
    of = {f"block {number}": value for number, value in enumerate(drift)}
    return [replace(part, drift=of.get(part.name, math.nan)) for part in gradients]


def probe_table(found: Sequence[EncoderPart], n: int, caption: str) -> str:
    """Return the table, the rule and its result as text."""
    lines = [f"{'':9}{'parameters':>13}  {'gradient / weight':>17}  {'drift of CLS':>12}"]
    for part in found:
        drift = "" if math.isnan(part.drift) else f"{part.drift:.2e}"
        lines.append(f"{part.name:9}{part.parameters:>13,}  {part.relative:>17.2e}  {drift:>12}")
    blocks = len(found) - 2
    lines += ["", caption, f"last_n: n = {n} of {blocks}, the fewest last blocks that have "
              f"{SHARE:.0%} of gradient / weight summed over the blocks."]  # fmt: skip
    if n == blocks:
        lines.append("That is all of them: full, or lora, rather than last_n.")
    else:
        lines.append(f"Train with: --model.strategy.name last_n --model.strategy.n {n}")
    return "\n".join(lines)
