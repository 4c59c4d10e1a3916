"""Groups of parameters for AdamW: which decay, and learning rates that fall layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

TOKENS = ("cls_token", "reg_token", "pos_embed", "prompts")


def layerwise(blocks: int, decay: float) -> Callable[[str], float]:
    """Return a function from a timm parameter's name to its share of the learning rate.

    Each block gets `decay` times the share of the one above it: layers behind the blocks 1, the
    last block `decay`; patch embedding and tokens, below the first block, the least.
    """

    def share(name: str) -> float:
        parts = name.split(".")
        if parts[0] == "blocks":
            return decay ** (blocks - int(parts[1]))
        below = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")
        return decay ** (blocks + 1) if parts[0] in below else 1.0

    return share


def parameter_groups(
    named: Iterable[tuple[str, Tensor]],
    lr: float,
    weight_decay: float,
    share: Callable[[str], float] = lambda _name: 1.0,
) -> list[dict[str, Any]]:
    """Return trainable parameters as AdamW groups: matrices, which decay, and the rest.

    Args:
        named: parameters by name.
        lr: peak learning rate.
        weight_decay: for matrices; tokens, prompts, biases, norms and scales do not decay.
        share: returns the share of `lr` for a parameter's name.

    Returns:
        Two groups for each distinct share, the largest share first.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in TOKENS
            groups.setdefault((share(name), decays), []).append(parameter)
    return [
        {"params": each, "lr": lr * part, "weight_decay": weight_decay if decays else 0.0}
        for (part, decays), each in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
