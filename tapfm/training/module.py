"""The training step, as the paper's algorithm box.

`training_step` is the whole method; its three phases carry the names that the memory meter and the
benchmark tables report under. `training.alternating` has the two optimizers and their updates.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184): two graphs, alternating optimizer steps.
Differs: any number of tiles at one chunk's memory; unknown labels are masked; warm-up and clipping;
    bag transforms and regularisers between the passes.

Shapes: T tiles of a slide, D features, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tapfm.adapt.interpolation import learned
from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.strategies import make_strategy, scaled_parts, strategy_spec
from tapfm.data.bag import Bag, Moment, SkippedBag, too_late_to_skip
from tapfm.distributed import gather
from tapfm.encoders.pinned import upload
from tapfm.planning.gpu_defaults import ON_CPU, on_cpu
from tapfm.settings import SettingsError, refuse
from tapfm.slide_model.aggregators import AGGREGATORS, with_temperature
from tapfm.slide_model.feature_encoder import MODEL, check_features
from tapfm.slide_model.layers.attention import effective_tiles
from tapfm.slide_model.model import ModelConfig, build
from tapfm.slide_model.start import start_from as start_from_run
from tapfm.tasks import validation_figures
from tapfm.training.alternating import (
    AlternatingModule,
    StrategyName,
    check_drop_path,
    check_precision,
    parameters_of,
)
from tapfm.training.objective import make_objective
from tapfm.training.optim import Steps
from tapfm.training.passes import Passes, check_counts


class ValidationError(ValueError):
    """No slide of the val split can be read."""


class DivergedError(ValueError):
    """A loss, gradient or logit is nan or inf."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}: training has diverged, and would again from the last resume point. The best "
            "weights so far are kept. Take lower rates (model.steps.encoder_lr, head_lr), a longer "
            "warm-up, or more slides an update, and another run directory."
        )


AggregatorName = Literal[tuple(AGGREGATORS)]
Options = dict[str, Any]


class SlideModule(AlternatingModule):
    """One slide per step: update the slide model, then the encoder.

    Args:
        labels: names of the logits (the task's).
        task: what is predicted, and what the training split says of it (the data's).
        model: key of the foundation model.
        weights: a .safetensors file, a folder with one, `hub`, or None for those in the package.
        aggregator: from tiles to a slide, by name, or by name and options:
            `{name: tapfm, temperature: 0.3}`; hierarchical is of cases (`data.bags`).
        start_from: folder of another run, whose aggregator is the start of this one's; its head
            too, where the logits have the same names (`slide_model.start`).
        strategy: what of the encoder learns, by name, or by name and options:
            `{name: lora, rank: 16}`; the options are those of the README's table.
        regularisers: terms beside the task's loss, each by name, or by name and options.
        bag_transforms: what is done to a bag's tiles in front of the aggregator, in order, each by
            name, or by name and options.
        tile_px: side of a tile, in tile pixels (the data's).
        mpp: microns per tile pixel (the data's).
        chunk: tiles in memory at once; it changes the memory and nothing else. None, here and of
            the three below: `tapfm fit` follows the plan on a GPU (`planning.gpu_defaults`); else
            16, fp32, adamw, false.
        keep_chunks: chunks of a slide whose graphs are kept from pass 1, at the memory of as many
            chunks: they are encoded once, not twice. `tapfm plan` says how many fit.
        recompute: keep block boundaries only, and compute the rest again for backward.
        compile: blocks by torch.compile (`encoders.compiled`): faster, after a wait at the start.
        precision: of the encoder: fp32, bf16 (autocast), or bf16-true (weights too).
        optimizer: of the encoder: adamw on the weights themselves, or, for bf16-true, where their
            exact values are kept: master, residual or offload (`engine.master_weights`).
        temperature: old name of the aggregator's option of that name.
        drop_path: stochastic depth of the encoder while training.
        merge_tokens: patch tokens that each block of the encoder merges (`encoders.merging`):
            faster, of other features; 0 merges none.
        backward_tiles: tiles of a slide that pass 2 takes, drawn by the size of their gradients, so
            that the encoder's is right on average (`engine.sampling`); None is all: exact.
        cosine_every: after so many slides, measure how near the gradient of `backward_tiles` is to
            that of all tiles, as train/sampling_cosine; it costs pass 2 of all, and two gradients'
            memory. None is never.
        pack_chunks: let small slides of an update share a chunk, as many as fit into one: the same
            gradient from fuller chunks. Needs steps.accumulate, and an encoder without noise.
        steps: learning rates and their kin.
        features: width and kind of the features that stand in the encoder's place (the data's).
    """

    def __init__(
        self,
        labels: list[str],
        task: dict[str, Any],
        model: str = "demo_vit",
        weights: str | None = None,
        aggregator: AggregatorName | Options = "tapfm_gated",
        start_from: str | None = None,
        strategy: StrategyName | Options = "full",
        regularisers: list[str | Options] | None = None,
        bag_transforms: list[str | Options] | None = None,
        tile_px: int = 224,
        mpp: float = 0.5,
        chunk: int | None = None,
        keep_chunks: int = 1,
        recompute: bool | None = None,
        compile: bool = False,
        precision: Literal["fp32", "bf16", "bf16-true"] | None = None,
        optimizer: Literal["adamw", "master", "residual", "offload"] | None = None,
        temperature: float | None = None,
        drop_path: float = 0.0,
        merge_tokens: int = 0,
        backward_tiles: int | None = None,
        cosine_every: int | None = None,
        pack_chunks: bool = False,
        steps: Steps = Steps(),  # noqa: B008 (frozen)
        features: dict[str, Any] | None = None,
    ):
        strategy = strategy_spec(make_strategy(strategy))
        chunk, recompute = ON_CPU["chunk"] if chunk is None else chunk, bool(recompute)
        beside = on_cpu(precision, optimizer)
        precision, optimizer = precision or beside["precision"], optimizer or beside["optimizer"]
        how = {"recompute": recompute, "compiled": compile, "drop_path": drop_path}
        given = {"recompute": recompute, "compile": compile, "drop_path": drop_path,
                 "weights": weights, "precision": precision != "fp32", "pack_chunks": pack_chunks,
                 "backward_tiles": backward_tiles, "merge_tokens": merge_tokens}  # fmt: skip
        faults = check_counts(chunk, keep_chunks, backward_tiles, cosine_every, pack_chunks)
        faults += check_drop_path(drop_path) + check_precision(precision, optimizer)
        faults += check_steps(steps, optimizer, strategy, start_from)
        refuse([*faults, *check_features(features, strategy["name"], **given)], "model")
        config = ModelConfig(
            MODEL if features else model, with_temperature(aggregator, temperature), tuple(labels),
            tile_px, mpp, precision, strategy, weights, task, features, merge_tokens,
        )  # fmt: skip
        super().__init__(build(config, **how), steps, optimizer)
        if start_from:
            new = start_from_run(self.slide_model, Path(start_from))
            print(f"aggregator from {start_from}; new: {', '.join(new) or 'nothing'}", flush=True)
        self.task = self.slide_model.task
        frozen = features["encoder"] if features else model
        self.objective = make_objective(
            self.task.loss(), self.slide_model.aggregator, bag_transforms, regularisers,
            task=self.task, encoder=None if self.learns else frozen,
        )  # fmt: skip
        much = chunk, keep_chunks, backward_tiles
        self.passes = Passes(self.slide_model, *much, skip=bool(bag_transforms))
        self.cosine_every, self.recompute, self.pack_chunks = cosine_every, recompute, pack_chunks
        kept = steps.interpolate or steps.pull
        self.start = learned(self.slide_model.encoder.vit) if kept else {}
        self.validated: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, bag: Bag, index: int) -> dict[str, Tensor] | None:
        """One slide: encode, update the slide model, adapt the encoder chunk by chunk."""
        head_optimizer, encoder_optimizer = self.optimizers()

        try:
            with self.meter.phase("encode"):
                encoded = self.passes.encode(
                    bag, adapting=self.adapting, behind=self.same_update(bag.behind)
                )
        except SkippedBag:
            return None  # nothing has learned from it

        with self.meter.phase("aggregate"):
            target_Y = upload(bag.labels_K, self.device)
            outcome = self.objective(
                self.slide_model.aggregator, encoded.tiles, target_Y, self.moment(bag)
            )
            self.manual_backward(outcome.loss / self.steps.accumulate)
            head_norm = self.update(head_optimizer)

        measured = {}
        with self.meter.phase("adapt"), too_late_to_skip():
            if self.adapting and self.compares:
                learns = parameters_of(encoder_optimizer)
                measured["train/sampling_cosine"] = self.passes.compare(encoded, learns)
            elif self.adapting:
                self.passes.adapt(encoded)
            encoder_norm = self.update(encoder_optimizer)

        self.slides_seen += 1
        if self.passes.skip:
            measured["train/skipped_tiles"] = torch.tensor(float(encoded.skipped))
        return {
            **outcome.figures,
            "train/effective_tiles": effective_tiles(outcome.output.weights_T.detach()),
            "train/head_grad_norm": head_norm,
            "train/encoder_grad_norm": encoder_norm,
            **measured,
        }

    def moment(self, bag: Bag) -> Moment:
        """Return how far the run is, for schedules and random numbers of the objective."""
        progress = self.slides_seen / self.slides_in_run
        return Moment(progress, self.current_epoch, bag.seed, bag.slide_id)

    def same_update(self, behind: Sequence[Bag]) -> Sequence[Bag]:
        """Return those of the next bags that learn with this one, before the weights change."""
        if not self.adapting:
            return ()
        world, last = self.trainer.world_size, self.trainer.num_training_batches
        turns = self.steps.accumulate - 1 - self.slides_seen % self.steps.accumulate
        return [bag for bag in behind if bag.turn[1] // world < last][:turns]

    @property
    def columns(self) -> list[str]:
        """Columns of metrics.csv that a step fills beside those of every run."""
        own = self.objective.columns(self.slide_model.aggregator)
        own += ["train/sampling_cosine"] if self.cosine_every else []
        return own + (["train/skipped_tiles"] if self.passes.skip else [])

    @property
    def chooses(self) -> bool:
        """Return whether the share of the change that is saved is chosen after the last epoch."""
        return self.learns and bool(self.steps.interpolate)

    @property
    def chunk(self) -> int:
        """Tiles in memory at once: what was asked for, or as many as proved to fit."""
        return self.passes.chunk

    @property
    def shared_chunk(self) -> int:
        """Tiles of the chunk that small slides share; 0 where they do not."""
        return self.chunk if self.pack_chunks and self.learns else 0

    @property
    def compares(self) -> bool:
        """Return whether `cosine_every` asks for a comparison on this slide."""
        return bool(self.cosine_every) and (self.slides_seen + 1) % self.cosine_every == 0

    def head_parameters(self) -> list[dict]:
        """Return the groups of the slide model, and of what regularisers and transforms learn."""
        return super().head_parameters() + parameter_groups(
            self.objective.named_parameters(), self.steps.head_lr, self.steps.weight_decay
        )

    def configure_optimizers(self):
        """Return both optimizers; the objective follows the head's updates."""
        optimizers = super().configure_optimizers()
        optimizers[0].register_step_post_hook(lambda *_: self.objective.after_update())
        return optimizers

    def on_fit_start(self) -> None:
        """Find the encoder's frozen prefix; see `AlternatingModule`.

        Raises:
            SettingsError: tiles are to be drawn, or chunks shared, with an encoder with noise.
        """
        super().on_fit_start()
        asked = {"backward_tiles": self.passes.few is not None, "pack_chunks": self.shared_chunk}
        if (keys := [key for key in asked if asked[key]]) and self.passes.noisy:
            raise SettingsError(
                f"model.{keys[0]} needs an encoder without noise: dropout, drop-path and batch "
                "statistics belong to the chunks of pass 1. Leave drop_path and the strategy's "
                f"dropout at 0, or leave {keys[0]} out."
            )
        if self.learns:
            self.passes.find_frozen_prefix()

    def validation_step(self, bag: Bag, index: int) -> None:
        """Note a bag's logits and loss, from all tiles."""
        try:
            logits_K = self.slide_model(bag, self.chunk).logits_K
        except SkippedBag:
            return
        labels_K = bag.labels_K.to(self.device)
        loss = self.objective.task_loss(logits_K, labels_K)
        self.validated.append((labels_K.cpu(), logits_K.cpu(), loss.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss and the task's figures; by the first the best weights are chosen.

        Raises:
            ValidationError: every slide was skipped.
            DivergedError: a logit is not finite.
        """
        validated = [slide for share in gather(self.validated) for slide in share]
        self.validated.clear()
        if not validated:
            why = "".join(f"\n  {fault}" for fault in self.trainer.datamodule.skipped.values())
            raise ValidationError(f"no slide of the val split could be read; left out:{why}")
        labels_NK, logits_NK, loss_N = (torch.stack(each) for each in zip(*validated, strict=True))
        if not logits_NK.isfinite().all():
            raise DivergedError("a logit of the val split is not finite")
        said_NP = self.task.predict(logits_NK.double())
        figures = {"loss": float(loss_N.mean())}
        figures |= validation_figures(self.task, labels_NK.numpy(), said_NP.numpy())
        for name, value in figures.items():
            if not math.isnan(value):
                shown = name == self.task.monitor
                self.log(f"val/{name}", value, prog_bar=shown, sync_dist=True)

    def on_save_checkpoint(self, checkpoint) -> None:
        """Keep the chunk that proved to fit, too; see `AlternatingModule`."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["chunk"] = self.chunk

    def on_load_checkpoint(self, checkpoint) -> None:
        """Put back what was kept; of a run of version 0.1 the loss had another name."""
        self.passes.chunk = min(self.chunk, checkpoint["chunk"])
        checkpoint["state_dict"] = {
            f"objective.task_{key}" if key.startswith("loss.") else key: value
            for key, value in checkpoint["state_dict"].items()
        }
        super().on_load_checkpoint(checkpoint)


def check_steps(
    steps: Steps, optimizer: str, strategy: Mapping[str, Any], start_from: str | None
) -> list[str]:
    """Return what is wrong with two starts of the aggregator, and with L2-SP and what learns."""
    faults, pull = [], f"model.steps.pull {steps.pull}"
    if start_from and steps.warm_start:
        faults.append(
            f"model.start_from {start_from} and model.steps.warm_start both say how the aggregator "
            "starts, and the second would undo the first: leave one out"
        )
    if steps.pull and optimizer != "adamw":
        faults.append(
            f"{pull} draws weights themselves, and model.optimizer {optimizer} keeps their exact "
            "values elsewhere: take adamw, or leave pull out"
        )
    if steps.pull and strategy["name"] != "frozen" and not scaled_parts(make_strategy(strategy)):
        faults.append(
            f"{pull} draws a change toward none, and that of model.strategy {strategy['name']} has "
            "no scale: leave pull out"
        )
    return faults
