"""The strategies: which of the encoder's parameters learn, one file each, one small contract.

    adaptformer.py  a bottleneck beside every MLP
    bitfit.py       biases
    dora.py         LoRA, and the length of the weights' rows
    frozen.py       nothing; the control of all other strategies
    full.py         everything
    hiadapter.py    tokens attend to the tile's optical density and stain maps
    last_n.py       the last blocks and the final norm
    lora.py         a low-rank change of weight matrices
    norm_only.py    norms
    olora.py        LoRA that leaves alone what earlier runs' LoRA reads
    pathotune.py    prompts: free ones, from a sentence, and from the tile
    ssf.py          scale and shift of every operation
    vpt_deep.py     prompt tokens before every block

Adding a strategy is a file with a frozen dataclass that has the four methods of `Strategy`, and its
name here. Its fields are its options. A strategy never imports another.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tapfm.adapt.strategies.adaptformer import AdaptFormer
from tapfm.adapt.strategies.bitfit import BitFit
from tapfm.adapt.strategies.dora import Dora
from tapfm.adapt.strategies.frozen import Frozen
from tapfm.adapt.strategies.full import Full
from tapfm.adapt.strategies.hiadapter import HiAdapter
from tapfm.adapt.strategies.last_n import LastN
from tapfm.adapt.strategies.lora import Lora
from tapfm.adapt.strategies.norm_only import NormOnly
from tapfm.adapt.strategies.olora import OLora
from tapfm.adapt.strategies.pathotune import PathoTune
from tapfm.adapt.strategies.ssf import Ssf
from tapfm.adapt.strategies.vpt_deep import VptDeep
from tapfm.adapt.surgery import StrategyError
from tapfm.settings import Spec, choose, spec_of

__all__ = [
    "STRATEGIES",
    "Strategy",
    "StrategyError",
    "make_optimizer",
    "make_strategy",
    "scaled_parts",
    "strategy_spec",
]


class Strategy(Protocol):
    """The methods that the trainer calls; `vit` is the bare timm model throughout."""

    lr: ClassVar[float]
    """Peak learning rate if the user gives none."""
    scaled: ClassVar[tuple[str, ...]]
    """Endings of the names of the parameters with which the change of the model shrinks to nothing
    (`adapt.interpolation`). Optional: all that learn. None of them: the change has no scale."""

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the rest, insert new modules; the output must not change, or the file says so.

        Parameters that require a gradient afterwards are trained and saved in checkpoints. The
        model's own parameters keep their names.
        """

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups of what learns, for AdamW or the strategy's `optimizer`."""

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the adapted model as a plain timm state dict, or raise StrategyError."""

    def describe(self, vit: nn.Module) -> str:
        """Return one line: what learns, and what share of the model that is."""

    # optional: follow(vit, earlier), told of the tensors of the run that a new one starts from


STRATEGIES: dict[str, type] = {
    "full": Full,
    "last_n": LastN,
    "bitfit": BitFit,
    "norm_only": NormOnly,
    "lora": Lora,
    "dora": Dora,
    "olora": OLora,
    "vpt_deep": VptDeep,
    "adaptformer": AdaptFormer,
    "ssf": Ssf,
    "hiadapter": HiAdapter,
    "pathotune": PathoTune,
    "frozen": Frozen,
}


def make_strategy(spec: Spec) -> Strategy:
    """Return a strategy from a name, or name and options: `lora`, `{name: lora, rank: 16}`.

    Raises:
        StrategyError: no such strategy, an option it does not have, or one of another type.
    """
    return choose(STRATEGIES, spec, "model.strategy", StrategyError)


def make_optimizer(strategy: Strategy, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW over the groups, or what the strategy's own `optimizer` makes of them."""
    if hasattr(strategy, "optimizer"):
        return strategy.optimizer(groups)
    return torch.optim.AdamW(groups, fused=True)


def strategy_spec(strategy: Strategy) -> dict[str, Any]:
    """Return name and all options, from which `make_strategy` makes the same strategy."""
    return spec_of(STRATEGIES, strategy)


def scaled_parts(strategy: Strategy) -> tuple[str, ...]:
    """Return the endings of the names of the parameters that scale the change; () has no scale."""
    return getattr(strategy, "scaled", ("",))
