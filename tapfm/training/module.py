"""The training step, as the paper's algorithm box.

`training_step` is the whole method; its three phases carry the names that the memory meter and the
benchmark tables report under.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184): two graphs, alternating optimizer steps.
Differs: any number of tiles at one chunk's memory; unknown labels are masked; warm-up and clipping.

Shapes: T tiles of a slide, D features, K labels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.strategies import STRATEGIES, make_optimizer, make_strategy, spell
from tapfm.data.bag import Bag, SkippedBag, too_late_to_skip
from tapfm.distributed import average, gather, unwrap
from tapfm.encoders import backbones
from tapfm.encoders.compiled import need_compiler
from tapfm.engine.dither import dither
from tapfm.engine.master_weights import MasterAdamW
from tapfm.engine.memory import PhaseMeter
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators import effective_tiles
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.tasks import watched
from tapfm.training.optim import Steps, warmup_cosine
from tapfm.training.passes import Passes


class ValidationError(ValueError):
    """No slide of the val split can be read."""


class DivergedError(ValueError):
    """What is learned is not finite any more."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}: training has diverged, and would again from the last resume point. The best "
            "weights so far are kept. Take lower rates (model.steps.encoder_lr, head_lr), a longer "
            "warm-up, or more slides an update, and another run directory."
        )


StrategyName = Literal[tuple(STRATEGIES)]


class SlideModule(L.LightningModule):
    """One slide per step: update the slide model, then the encoder.

    Args:
        labels: names of the logits (the task's).
        task: what is predicted, and what the training split says of it (the data's).
        model: key of the foundation model.
        weights: a .safetensors file, a folder with one, `hub`, or None for those in the package.
        aggregator: tapfm, gated or tapfm_gated; of cases (`data.bags`) also hierarchical.
        strategy: what of the encoder learns, by name, or by name and options:
            `{name: lora, rank: 16}`; the options are those of the README's table.
        tile_px: side of a tile, in tile pixels (the data's).
        mpp: microns per tile pixel (the data's).
        chunk: tiles in memory at once; it changes the memory and nothing else.
        keep_chunks: chunks of a slide whose graphs are kept from pass 1, at the memory of as many
            chunks: they are encoded once, not twice. `tapfm plan` says how many fit.
        recompute: keep block boundaries only, and compute the rest again for backward.
        compile: blocks by torch.compile (`encoders.compiled`): faster, after a wait at the start.
        precision: of the encoder: fp32, bf16 (autocast), or bf16-true (weights too).
        optimizer: of the encoder: adamw on the weights themselves, or, for bf16-true, where their
            exact values are kept: master, residual or offload (`engine.master_weights`).
        temperature: of the CLS score's softmax; None is the aggregator's own.
        drop_path: stochastic depth of the encoder while training.
        backward_tiles: tiles of a slide that pass 2 takes, drawn by the size of their gradients, so
            that the encoder's is right on average (`engine.sampling`); None is all: exact.
        cosine_every: after so many slides, measure how near the gradient of `backward_tiles` is to
            that of all tiles, as train/sampling_cosine; it costs pass 2 of all, and two gradients'
            memory. None is never.
        steps: learning rates and their kin.
    """

    def __init__(
        self,
        labels: list[str],
        task: dict[str, Any],
        model: str = "demo_vit",
        weights: str | None = None,
        aggregator: Literal["tapfm", "gated", "tapfm_gated", "hierarchical"] = "tapfm_gated",
        strategy: StrategyName | dict[str, Any] = "full",
        tile_px: int = 224,
        mpp: float = 0.5,
        chunk: int = 16,
        keep_chunks: int = 1,
        recompute: bool = False,
        compile: bool = False,
        precision: Literal["fp32", "bf16", "bf16-true"] = "fp32",
        optimizer: Literal["adamw", "master", "residual", "offload"] = "adamw",
        temperature: float | None = None,
        drop_path: float = 0.0,
        backward_tiles: int | None = None,
        cosine_every: int | None = None,
        steps: Steps = Steps(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        if chunk < 1:
            raise SettingsError(f"model.chunk must be 1 or more, got {chunk}")
        if keep_chunks < 0:
            raise SettingsError(f"model.keep_chunks must be 0 or more, got {keep_chunks}")
        if backward_tiles is not None and backward_tiles < 1:
            raise SettingsError(f"model.backward_tiles must be 1 or more, got {backward_tiles}")
        if cosine_every is not None and (cosine_every < 1 or backward_tiles is None):
            raise SettingsError(
                f"model.cosine_every must be 1 or more, and takes model.backward_tiles, whose "
                f"gradient it is of; got {cosine_every} with backward_tiles {backward_tiles}"
            )
        if (precision == "bf16-true") != (optimizer != "adamw"):
            raise SettingsError(
                f"model.optimizer {optimizer} and model.precision {precision} do not go together: "
                "bfloat16 weights do not move at a fine-tuning learning rate unless their exact "
                "values are kept: bf16-true takes master, residual or offload, and these take it."
            )
        self.automatic_optimization = False  # two optimizers take turns, see training_step
        if weights not in (None, "hub", "random"):
            weights = str(Path(weights).resolve())  # to be found again from anywhere
        model_config = ModelConfig(
            model, aggregator, tuple(labels), tile_px, mpp, temperature, precision,
            spell(make_strategy(strategy)), weights, task,
        )  # fmt: skip
        encoder = backbones.load(
            model, weights, tile_px=tile_px, recompute=recompute, compiled=compile,
            drop_path=drop_path,
        )  # fmt: skip
        self.slide_model = SlideModel(model_config, encoder)
        self.strategy = self.slide_model.strategy
        self.learns = any(p.requires_grad for p in self.slide_model.encoder.parameters())
        if optimizer != "adamw" and hasattr(self.strategy, "optimizer"):
            name = spell(self.strategy)["name"]
            raise SettingsError(
                f"model.optimizer {optimizer} is an AdamW, and {name} has an optimizer of its own. "
                "Leave model.optimizer and bf16-true out."
            )
        self.task = self.slide_model.task
        self.loss = self.task.loss()
        self.passes = Passes(self.slide_model, chunk, keep_chunks, backward_tiles)
        self.steps, self.cosine_every = steps, cosine_every
        self.recompute, self.optimizer = recompute, optimizer
        self.slides_seen = 0
        self.validated: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, bag: Bag, index: int) -> dict[str, Tensor] | None:
        """One slide: encode, update the slide model, adapt the encoder chunk by chunk."""
        head_optimizer, encoder_optimizer = self.optimizers()

        try:
            with self.meter.phase("encode"):
                seen = self.passes.encode(bag, adapting=self.adapting)
        except SkippedBag:
            return None  # nothing has learned from it

        with self.meter.phase("aggregate"):
            logits_K, weights_T = self.slide_model.aggregator(seen.z_TD, seen.score_T, bag.counts)
            loss = self.loss(logits_K, bag.labels_K.to(self.device))
            self.manual_backward(loss / self.steps.accumulate)
            head_norm = self.update(head_optimizer)

        measured = {}
        with self.meter.phase("adapt"), too_late_to_skip():
            if self.adapting and self.compares:
                learns = parameters_of(encoder_optimizer)
                measured["train/sampling_cosine"] = self.passes.compare(seen, learns)
            elif self.adapting:
                self.passes.adapt(seen)
            encoder_norm = self.update(encoder_optimizer)

        self.slides_seen += 1
        return {
            "train/loss": loss.detach(),
            "train/effective_tiles": effective_tiles(weights_T.detach()),
            "train/head_grad_norm": head_norm,
            "train/encoder_grad_norm": encoder_norm,
            **measured,
        }

    def on_train_batch_end(self, outputs, bag: Bag | None, index: int) -> None:
        """The update that an epoch's last slide completes, where that slide was left out."""
        if outputs or not self.trainer.is_last_batch:
            return
        for optimizer in self.optimizers():
            if any(p.grad is not None for p in parameters_of(optimizer)):
                self.update(optimizer)

    def update(self, optimizer) -> Tensor:
        """After every `accumulate` slides: clip, step, clear. Returns the gradient's norm."""
        parameters = parameters_of(optimizer)
        if self.completes_update:
            average(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.completes_update:
            if self.steps.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.steps.clip, norm)
            done = (self.slides_seen + 1) / self.slides_in_run
            for group in optimizer.param_groups:
                share = (done - group["begins"]) / (1 - group["begins"])
                group["lr"] = group["peak_lr"] * warmup_cosine(max(share, 0), self.steps.warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def chunk(self) -> int:
        """Tiles in memory at once: what was asked for, or as many as proved to fit."""
        return self.passes.chunk

    @property
    def compares(self) -> bool:
        """Whether the slide under way is one of those that `cosine_every` asks for."""
        return bool(self.cosine_every) and (self.slides_seen + 1) % self.cosine_every == 0

    @property
    def encoder_lr(self) -> float:
        """Peak learning rate of the encoder: the user's, or the strategy's own."""
        given = self.steps.encoder_lr
        return self.strategy.lr if given is None else given

    @property
    def completes_update(self) -> bool:
        """Whether the slide under way is the last of `accumulate`, or of the epoch."""
        full = (self.slides_seen + 1) % self.steps.accumulate == 0
        return full or self.trainer.is_last_batch

    @property
    def adapting(self) -> bool:
        """Whether the encoder learns from this slide: not while the head goes first, nor frozen."""
        return self.learns and self.slides_seen >= self.steps.head_first * self.slides_in_run

    @property
    def slides_in_run(self) -> int:
        """Slides in all epochs of this run."""
        return max(1, self.trainer.num_training_batches * self.trainer.max_epochs)

    def configure_optimizers(self):
        """The slide model first: `training_step` unpacks them in this order."""
        head = parameter_groups(
            self.slide_model.aggregator.named_parameters(),
            self.steps.head_lr,
            self.steps.weight_decay,
        )
        encoder = self.strategy.parameters(
            self.slide_model.encoder.vit, self.encoder_lr, self.steps.weight_decay
        )
        if self.slide_model.model_config.precision != "fp32":
            dither(p for group in encoder for p in group["params"])
        for group in head + encoder:
            group["peak_lr"], group["lr"], group["begins"] = group["lr"], 0.0, 0.0
        for group in encoder:
            group["begins"] = self.steps.head_first
        optimizers = [torch.optim.AdamW(head, fused=True)]
        if self.optimizer == "adamw":
            optimizers.append(make_optimizer(self.strategy, encoder))
        else:
            optimizers.append(MasterAdamW(encoder, self.optimizer))
        self.slide_model.round_weights()
        return optimizers

    def on_fit_start(self) -> None:
        """The meter needs the device, which is known by now.

        Raises:
            SettingsError: the trainer's own mixed precision is on, the run has no number of epochs
                to lay the rates over, or tiles are to be drawn from an encoder with noise.
            CompilerError: blocks are to be compiled, and there is no compiler.
        """
        if self.trainer.precision != "32-true":
            raise SettingsError(
                f"trainer.precision is {self.trainer.precision}: it would keep casts of weights "
                "over both passes and the update between them. Leave it out, and set "
                "model.precision: bf16."
            )
        counted = self.trainer.max_steps == -1 or self.trainer.fast_dev_run
        if (self.trainer.max_epochs or 0) < 1 or not counted:
            raise SettingsError(
                "the schedule is over trainer.max_epochs: give it 1 or more (it is "
                f"{self.trainer.max_epochs}), and leave trainer.max_steps out (it is "
                f"{self.trainer.max_steps})"
            )
        if self.passes.few is not None and self.passes.noisy:
            raise SettingsError(
                "model.backward_tiles needs an encoder without noise: dropout and drop-path belong "
                "to the chunks of pass 1. Leave drop_path and the strategy's dropout at 0."
            )
        if self.slide_model.encoder.compiled:
            need_compiler(self.device)
        unwrap(self)
        self.passes.find_frozen_prefix()
        self.meter = PhaseMeter(self.device)

    def validation_step(self, bag: Bag, index: int) -> None:
        """All tiles, the same forward path as training."""
        try:
            logits_K, _ = self.slide_model(bag.tiles, self.chunk, bag.counts)
        except SkippedBag:
            return
        labels_K = bag.labels_K.to(self.device)
        loss = self.loss(logits_K, labels_K)
        self.validated.append((labels_K.cpu(), logits_K.cpu(), loss.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Mean loss, and the task's figures: the first is what the best weights are chosen by.

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
        figures |= watched(self.task, labels_NK.numpy(), said_NP.numpy())
        for name, value in figures.items():
            if not math.isnan(value):
                shown = name == self.task.selects
                self.log(f"val/{name}", value, prog_bar=shown, sync_dist=True)

    def on_save_checkpoint(self, checkpoint) -> None:
        """What resuming needs beside optimizers and loops; frozen weights are at their source."""
        checkpoint["slides_seen"], checkpoint["chunk"] = self.slides_seen, self.chunk
        trained = {f"slide_model.{key}" for key in self.slide_model.trained_state()}
        trained |= {f"loss.{key}" for key in self.loss.state_dict()}  # what it remembers
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: state[key] for key in state if key in trained}

    def on_load_checkpoint(self, checkpoint) -> None:
        """See `on_save_checkpoint`."""
        self.slides_seen = checkpoint["slides_seen"]
        self.passes.chunk = min(self.chunk, checkpoint["chunk"])
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}


def parameters_of(optimizer) -> list[nn.Parameter]:
    """All that it steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]
