"""Which of the encoder's parameters learn: one file a strategy, one small contract.

    adaptformer.py  a bottleneck beside every MLP
    bitfit.py       biases
    dora.py         the same, and the length of their rows
    frozen.py       nothing, all else as in the others: their control
    full.py         everything
    hiadapter.py    tokens look at the tile's optical density and stains
    last_n.py       the last blocks and the final norm
    lora.py         a low-rank change of matrices
    norm_only.py    norms
    pathotune.py    prompts for the task, from a sentence, of the tile
    ssf.py          scale and shift of every operation
    vpt_deep.py     prompt tokens before every block

Adding a strategy is a file with a frozen dataclass that has the four methods of `Strategy`, and its
name here. Its fields are its options. A strategy never imports another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
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
from tapfm.adapt.strategies.pathotune import PathoTune
from tapfm.adapt.strategies.ssf import Ssf
from tapfm.adapt.strategies.vpt_deep import VptDeep
from tapfm.adapt.surgery import StrategyError

__all__ = [
    "STRATEGIES",
    "Strategy",
    "StrategyError",
    "make_optimizer",
    "make_strategy",
    "spell",
]


class Strategy(Protocol):
    """What the trainer asks of a strategy. `vit` is the bare timm model throughout."""

    lr: ClassVar[float]
    """Peak learning rate where the user gives none."""

    def prepare(self, vit: nn.Module) -> None:
        """Freeze what stays, insert what is new; the output must not change, or the file says so.

        What requires a gradient afterwards is what is trained and what a checkpoint holds. The
        model's own parameters keep their names.
        """

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups of what learns, for AdamW or what the strategy's `optimizer` makes."""

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """The adapted model as a plain timm state dict; StrategyError where there is none."""

    def describe(self, vit: nn.Module) -> str:
        """One line: what learns, and how much of the model that is."""


STRATEGIES: dict[str, type] = {
    "full": Full,
    "last_n": LastN,
    "bitfit": BitFit,
    "norm_only": NormOnly,
    "lora": Lora,
    "dora": Dora,
    "vpt_deep": VptDeep,
    "adaptformer": AdaptFormer,
    "ssf": Ssf,
    "hiadapter": HiAdapter,
    "pathotune": PathoTune,
    "frozen": Frozen,
}
_KINDS = {int: "a whole number", float: "a number", tuple: "a list", str: "text"}


def make_strategy(spec: str | Mapping[str, Any]) -> Strategy:
    """A strategy by name, or by name and options: `lora`, or `{name: lora, rank: 16}`.

    Raises:
        StrategyError: no such strategy, an option it does not have, or one of another type.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in STRATEGIES:
        raise StrategyError(f"model.strategy: name {name!r} is none of {', '.join(STRATEGIES)}")
    defaults = {each.name: each.default for each in fields(STRATEGIES[name])}
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        said = ", ".join(f"{key} ({value})" for key, value in defaults.items())
        raise StrategyError(
            f"model.strategy: {name} has no option {', '.join(unknown)}; "
            f"there {'are ' + said if said else 'is none'}"
        )
    for key, value in options.items():
        kind = type(defaults[key])
        fits = (int, float) if kind is float else (list, tuple) if kind is tuple else kind
        if not isinstance(value, fits) or isinstance(value, bool):
            raise StrategyError(
                f"model.strategy: {name}: {key} must be {_KINDS[kind]}, got {value!r}"
            )
        options[key] = kind(value)
    return STRATEGIES[name](**options)


def make_optimizer(strategy: Strategy, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, or what the strategy's own `optimizer` makes of its parameter groups."""
    if hasattr(strategy, "optimizer"):
        return strategy.optimizer(groups)
    return torch.optim.AdamW(groups, fused=True)


def spell(strategy: Strategy) -> dict[str, Any]:
    """The name and every option: what `make_strategy` makes the same strategy of."""
    name = next(name for name, kind in STRATEGIES.items() if kind is type(strategy))
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(strategy).items()}
    return {"name": name, **options}
