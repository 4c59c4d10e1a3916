"""Training on labelled tiles: each tile is its own example, and one backward takes the batch.

Encoders, strategies, optimizers, precision and checkpoints are those of a slide's run
(`training.alternating`). The step differs: no bag, no aggregator, no second pass.

    loss = cross-entropy, weighed by class  [+ prototype loss]

Maps of stains that a strategy looks at (HiAdapter's) are computed from the tile within the model,
so whatever turns or colours the tile turns and colours its maps.

Source: Liu et al. 2026 (HiAdapter, IEEE TMI) for the prototype loss beside cross-entropy and for
    dropout before a random head; their AdamW rate is the strategy's own.
    Kumar et al. 2022 (LP-FT, arXiv 2202.10054) for a head that starts as the linear probe.
Differs: one cosine over the run, where the published code starts its schedule anew each epoch;
    class weights in place of a class-balanced sampler.

Shapes: C tiles of a batch, D features, K classes, N tiles of the validation part.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.encoders.pinned import upload
from tapfm.engine.chunked import chunk_rng
from tapfm.settings import refuse
from tapfm.slide_model.aggregators import TILES
from tapfm.slide_model.model import ModelConfig, build
from tapfm.stats.bootstrap import once
from tapfm.stats.confusions import averages, confusions
from tapfm.tile_training.batch import TileBatch
from tapfm.tile_training.prototypes import PrototypeLoss
from tapfm.training.alternating import (
    AlternatingModule,
    StrategyName,
    check_drop_path,
    check_precision,
)
from tapfm.training.optim import Steps
from tapfm.training.passes import ChunkError

HEAD_DROPOUT = 0.5


class TileModule(AlternatingModule):
    """A batch of labelled tiles per step: update the head and the encoder.

    Args:
        labels: names of the classes (the data's).
        class_weight: of each class in the loss (the training part's).
        model: key of the foundation model.
        weights: a .safetensors file, a folder with one, `hub`, or None for those in the package.
        strategy: what of the encoder learns, by name, or by name and options:
            `{name: lora, rank: 16}`; the options are those of the README's table.
        loss: ce, or ppcl: HiAdapter's prototype loss beside it; None is ppcl for hiadapter and ce
            for all else.
        head: probe: the classifier starts as the linear probe of the frozen features, so the
            encoder's first gradients are of a head that knows the classes; or random, with
            dropout of one half in front of it.
        tile_px: side of a tile, in tile pixels (the data's).
        mpp: microns per tile pixel (the data's).
        recompute: keep block boundaries only, and compute the rest again for backward.
        precision: of the encoder: fp32, bf16 (autocast), or bf16-true (weights too).
        optimizer: of the encoder: adamw on the weights themselves, or, for bf16-true, where their
            exact values are kept: master, residual or offload (`engine.master_weights`).
        drop_path: stochastic depth of the encoder while training.
        steps: learning rates and their kin; a step is a batch.
    """

    def __init__(
        self,
        labels: list[str],
        class_weight: list[float],
        model: str = "demo_vit",
        weights: str | None = None,
        strategy: StrategyName | dict[str, Any] = "lora",
        loss: Literal["ce", "ppcl"] | None = None,
        head: Literal["probe", "random"] = "probe",
        tile_px: int = 224,
        mpp: float = 0.5,
        recompute: bool = False,
        precision: Literal["fp32", "bf16", "bf16-true"] = "fp32",
        optimizer: Literal["adamw", "master", "residual", "offload"] = "adamw",
        drop_path: float = 0.0,
        steps: Steps = Steps(),  # noqa: B008 (frozen)
    ):
        refuse([*check_drop_path(drop_path), *check_precision(precision, optimizer)], "model")
        task = {"name": "multiclass", "column": "label", "weight": tuple(class_weight)}
        config = ModelConfig(
            model, {"name": TILES}, tuple(labels), tile_px, mpp, precision,
            strategy_spec(make_strategy(strategy)), weights, task,
        )  # fmt: skip
        how = {"recompute": recompute, "drop_path": drop_path}
        super().__init__(build(config, **how), steps, optimizer)
        self.recompute, self.head = recompute, head
        self.chunk = None  # a batch is encoded in one
        self.validated: list[tuple[Tensor, Tensor]] = []
        if head == "random":  # a probe was fitted without, and would lose its way
            self.slide_model.aggregator.dropout.p = HEAD_DROPOUT
        self.register_buffer("class_weight_K", torch.tensor(class_weight), persistent=False)
        companion = "ppcl" if strategy_spec(self.strategy)["name"] == "hiadapter" else "ce"
        self.prototype_loss = None
        if (loss or companion) == "ppcl":
            self.prototype_loss = PrototypeLoss(len(labels), self.slide_model.encoder.dim)

    @torch.no_grad()
    def start_head(self, weight_KD: Tensor, bias_K: Tensor) -> None:
        """Set the classifier's weights to those of another."""
        self.slide_model.aggregator.head.weight.copy_(weight_KD)
        self.slide_model.aggregator.head.bias.copy_(bias_K)

    def training_step(self, batch: TileBatch, index: int) -> dict[str, Tensor]:
        """Encode and classify one batch, update head and encoder; return its figures."""
        head_optimizer, encoder_optimizer = self.optimizers()
        labels_C = upload(batch.labels_C, self.device)
        try:
            with self.meter.phase("encode"), chunk_rng(batch.seed, 0, self.device):
                with torch.set_grad_enabled(self.adapting):
                    z_CD, _ = self.slide_model.encode(batch.tiles_CP)
                logits_CK = self.slide_model.aggregator(z_CD)
            with self.meter.phase("aggregate"):
                loss = F.cross_entropy(logits_CK, labels_C, self.class_weight_K)
                total = loss
                if self.prototype_loss is not None:
                    self.prototype_loss.update(z_CD.detach(), logits_CK.detach(), labels_C)
                    total = loss + self.prototype_loss(z_CD, labels_C)
            with self.meter.phase("adapt"):
                self.manual_backward(total / self.steps.accumulate)
                head_norm = self.update(head_optimizer)
                encoder_norm = self.update(encoder_optimizer)
        except torch.OutOfMemoryError as fault:
            raise ChunkError(
                f"memory ran out with a batch of {batch.count} tiles. Give a smaller data.batch, "
                "with model.steps.accumulate for as many tiles an update; model.recompute; or "
                "model.precision: bf16."
            ) from fault
        self.slides_seen += 1
        return {
            "train/loss": loss.detach(),
            "train/ppcl": (total - loss).detach(),
            "train/head_grad_norm": head_norm,
            "train/encoder_grad_norm": encoder_norm,
        }

    @torch.no_grad()
    def classify(self, tiles_CP: Tensor) -> Tensor:
        """Return logits (C, K): the forward path of validation and prediction."""
        return self.slide_model.aggregator(self.slide_model.encode(tiles_CP)[0])

    def validation_step(self, batch: TileBatch, index: int) -> None:
        """Classify a batch that is not augmented."""
        self.validated.append((batch.labels_C.cpu(), self.classify(batch.tiles_CP).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log weighted loss, macro F1, by which the best weights are chosen, balanced accuracy."""
        labels_N, logits_NK = (torch.cat(each) for each in zip(*self.validated, strict=True))
        self.validated.clear()
        loss = F.cross_entropy(logits_NK, labels_N, self.class_weight_K.cpu())
        y_N, said_N = labels_N.numpy(), logits_NK.argmax(1).numpy()
        figures = averages(confusions(y_N, said_N, logits_NK.shape[1], once(y_N)))
        self.log("val/loss", loss)
        self.log("val/f1", float(figures["f1"][0]), prog_bar=True)
        self.log("val/balanced_accuracy", float(figures["balanced_accuracy"][0]))
