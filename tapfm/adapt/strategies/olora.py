"""O-LoRA: LoRA whose change is orthogonal to those of earlier runs, so that these are kept.

    W = W0 + sum_i (alpha_i / r_i) B_i A_i + (alpha / r) B A (I - Q Q'),   Q spans the rows of A_i

What an earlier run's change reads of a token, this one does not read: on inputs in the span of the
A_i it changes nothing. No slide of the earlier cohort is needed (`tapfm fit --continue-from RUN`,
with this strategy on slides): RUN's changes are in the weights that the new run starts from, and Q
is taken from RUN, which was trained with `lora` or `olora`. Without an earlier run it is LoRA.

Price: LoRA's, and A Q, a product of r x I x E numbers a layer and chunk; Q is saved with the model.
Source: CoMEL (2025), orthogonal low-rank changes without rehearsal; Wang et al. 2023
    (O-LoRA, arXiv 2310.14152).
Differs: A is projected, so that orthogonality is exact and there is no weight to choose; theirs
    adds lambda |A_i A'|^2 to the loss. No weights on single components.

Shapes: I in features, E columns of Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tapfm.adapt.lowrank import LowRank, adapted, insert, keep_apart
from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.surgery import StrategyError


@dataclass(frozen=True)
class OLora(LowRank):
    """Trains a low-rank change that leaves alone what earlier ones read."""

    room: int = 64
    """Directions of a layer that earlier changes may span together, E."""
    name: ClassVar[str] = "O-LoRA"
    magnitude: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.room < 1:
            raise StrategyError(f"model.strategy: olora: room must be 1 or more, got {self.room}")

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; give the chosen layers A, B and room for earlier directions.

        Raises:
            StrategyError: the model has no such layers.
        """
        options = self.rank, self.alpha, self.dropout, self.targets, self.last
        insert(vit, "olora", *options, magnitude=False, room=self.room)

    def follow(self, vit: nn.Module, earlier: Mapping[str, Tensor]) -> None:
        """Keep away from the changes of an earlier model.

        Args:
            vit: that this strategy has prepared.
            earlier: the earlier model's tensors, by the names of its vit.

        Raises:
            StrategyError: it has no low-rank change, or they span more than there is room for.
        """
        if not any(name.endswith("lora_A.weight") for name in earlier):
            raise StrategyError(
                "model.strategy: olora goes on from a run of lora or olora, and that run has no "
                "low-rank change. Take another run, or strategy lora."
            )
        for name, linear in adapted(vit):
            a_RI = earlier.get(f"{name}.lora_A.weight")
            if a_RI is None:
                continue
            q_IE = earlier.get(f"{name}.lora_apart", a_RI.new_zeros(a_RI.shape[1], 0))
            keep_apart(linear, torch.cat([q_IE.T.double(), a_RI.double()]))

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of all A and B."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)
