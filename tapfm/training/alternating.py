"""Two optimizers that take turns: what training on slides and on labelled tiles share.

The head's optimizer and the encoder's each step after every `steps.accumulate` turns, at rates that
warm up and fall on a cosine over the run. A resumed run goes on bit for bit.
"""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.strategies import STRATEGIES, make_optimizer, strategy_spec
from tapfm.distributed import average, unwrap
from tapfm.encoders.backbones import blocks
from tapfm.encoders.compiled import graphs_made, need_compiler, too_many_graphs
from tapfm.engine.dither import dither
from tapfm.engine.master_weights import HOST_BYTES, MasterAdamW
from tapfm.engine.memory import PhaseMeter
from tapfm.settings import SettingsError, did_you_mean, refuse
from tapfm.slide_model.model import SlideModel
from tapfm.training.optim import Steps, warmup_cosine

StrategyName = Literal[tuple(STRATEGIES)]


class AlternatingModule(L.LightningModule):
    """A model whose head and encoder are updated in turns.

    Args:
        slide_model: encoder and what stands on it.
        steps: learning rates and their kin.
        optimizer: of the encoder, see `check_precision`.
    """

    def __init__(self, slide_model: SlideModel, steps: Steps, optimizer: str):
        super().__init__()
        self.automatic_optimization = False  # two optimizers take turns
        self.slide_model, self.steps, self.optimizer = slide_model, steps, optimizer
        self.strategy = slide_model.strategy
        self.learns = any(p.requires_grad for p in slide_model.encoder.parameters())
        if optimizer != "adamw" and hasattr(self.strategy, "optimizer"):
            name = strategy_spec(self.strategy)["name"]
            raise SettingsError(
                f"model.optimizer {optimizer} is an AdamW, and {name} has an optimizer of its own. "
                "Leave model.optimizer and bf16-true out."
            )
        self.slides_seen = 0

    def head_parameters(self) -> list[dict]:
        """Return the parameter groups of the first optimizer."""
        named = self.slide_model.aggregator.named_parameters()
        return parameter_groups(named, self.steps.head_lr, self.steps.weight_decay)

    def update(self, optimizer) -> Tensor:
        """Clip, step and clear after every `accumulate` turns; return the gradient's norm."""
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

    def on_train_batch_end(self, outputs, batch, index: int) -> None:
        """Make the update that an epoch's last turn completes, where that turn was left out."""
        if outputs or not self.trainer.is_last_batch:
            return
        for optimizer in self.optimizers():
            if any(p.grad is not None for p in parameters_of(optimizer)):
                self.update(optimizer)

    def on_train_epoch_end(self) -> None:
        """Warn of blocks that are compiled again and again."""
        encoder = self.slide_model.encoder
        first = encoder.compiled and self.current_epoch == 0
        if first and (warning := too_many_graphs(blocks(encoder.vit), self.graphs)):
            rank_zero_warn(warning)

    @property
    def encoder_lr(self) -> float:
        """Peak learning rate of the encoder: the user's, or the strategy's own."""
        given = self.steps.encoder_lr
        return self.strategy.lr if given is None else given

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the encoder's optimizer takes: masters and moments."""
        learn = sum(p.numel() for p in self.slide_model.encoder.parameters() if p.requires_grad)
        return HOST_BYTES * learn if self.optimizer == "offload" else 0

    @property
    def completes_update(self) -> bool:
        """Return whether this turn is the last of `accumulate` or of the epoch."""
        full = (self.slides_seen + 1) % self.steps.accumulate == 0
        return full or self.trainer.is_last_batch

    @property
    def adapting(self) -> bool:
        """Return whether the encoder learns in this turn: not frozen, `head_first` over."""
        return self.learns and self.slides_seen >= self.steps.head_first * self.slides_in_run

    @property
    def slides_in_run(self) -> int:
        """Turns in all epochs of this run."""
        return max(1, self.trainer.num_training_batches * self.trainer.max_epochs)

    def configure_optimizers(self):
        """Return the head's optimizer and the encoder's, in the order `training_step` expects."""
        head = self.head_parameters()
        decay = 0.0 if self.steps.pull else self.steps.weight_decay
        encoder = self.strategy.parameters(self.slide_model.encoder.vit, self.encoder_lr, decay)
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
        """Refuse a trainer that cannot serve, and start the meter on the device known by now.

        Raises:
            SettingsError: the trainer's own mixed precision is on, or the run has no number of
                epochs to lay the rates over.
            CompilerError: blocks are to be compiled, and there is no compiler.
        """
        trainer = self.trainer
        refuse(
            check_trainer(
                trainer.precision, trainer.max_epochs, trainer.max_steps, trainer.fast_dev_run
            )
        )
        if self.slide_model.encoder.compiled:
            need_compiler(self.device)
            self.graphs = graphs_made()
        unwrap(self)
        self.meter = PhaseMeter(self.device)

    def on_save_checkpoint(self, checkpoint) -> None:
        """Keep the state of all that a resumed run needs; frozen weights are at their source."""
        checkpoint["slides_seen"] = self.slides_seen
        trained = {f"slide_model.{key}" for key in self.slide_model.trained_state()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            key: value
            for key, value in state.items()
            if key in trained or not key.startswith("slide_model.")
        }

    def on_load_checkpoint(self, checkpoint) -> None:
        """Put back what `on_save_checkpoint` kept."""
        self.slides_seen = checkpoint["slides_seen"]
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}


def parameters_of(optimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_trainer(
    precision: str | int | None, max_epochs: int | None, max_steps: int, fast_dev_run: bool | int
) -> list[str]:
    """Return what is wrong with the trainer's precision and length of a run."""
    faults = []
    if precision not in (None, 32, "32", "32-true"):
        faults.append(
            f"trainer.precision is {precision}: it would keep casts of weights over both passes "
            "and the update between them. Leave it out, and set model.precision: bf16."
        )
    counted = max_steps == -1 or fast_dev_run
    if (max_epochs or 0) < 1 or not counted:
        faults.append(
            "the schedule is over trainer.max_epochs: give it 1 or more (it is "
            f"{max_epochs}), and leave trainer.max_steps out (it is {max_steps})"
        )
    return faults


def check_accelerator(name: object) -> list[str]:
    """Return what is wrong with a device by name: there is no such kind, or none here."""
    kinds = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if isinstance(name, str) and name not in kinds:
        near = did_you_mean(name, kinds)
        return [f"trainer.accelerator: {name!r} is none of {', '.join(kinds)}.{near}"]
    there = torch.cuda.is_available() or (name == "gpu" and torch.backends.mps.is_available())
    if name in ("gpu", "cuda") and not there:
        return [
            f"trainer.accelerator is {name}, and PyTorch finds no GPU on this machine. Leave it "
            "out, or set cpu."
        ]
    return []


def check_parallel(strategy: object) -> list[str]:
    """Return what is wrong with how Lightning shares a model among devices."""
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", strategy))
    if not any(each in name.lower() for each in ("fsdp", "deepspeed", "modelparallel")):
        return []
    return [
        f"trainer.strategy {name}: it divides the encoder among devices and expects one backward "
        "pass of one graph; here each chunk has its own, and head and encoder are stepped in turn. "
        "Take ddp, where each device has the whole encoder; `tapfm plan` says what fits on one."
    ]


def check_drop_path(drop_path: float) -> list[str]:
    """Return what is wrong with a rate of stochastic depth."""
    good = 0 <= drop_path < 1
    return [] if good else [f"model.drop_path must be in [0, 1), got {drop_path}"]


def check_precision(precision: str | None, optimizer: str | None) -> list[str]:
    """Return what is wrong with an encoder's precision and optimizer together; None is open.

    `bf16-true` weights do not move at a fine-tuning rate, unless their exact values are kept.
    """
    if None in (precision, optimizer) or (precision == "bf16-true") == (optimizer != "adamw"):
        return []
    return [
        f"model.optimizer {optimizer} and model.precision {precision} do not go together: "
        "bfloat16 weights do not move at a fine-tuning learning rate unless their exact "
        "values are kept: bf16-true takes master, residual or offload, and these take it."
    ]
