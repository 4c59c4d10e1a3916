"""The low-rank change of a linear layer, W + (alpha / r) B A, that LoRA and DoRA share.

A and B are children of the layer they adapt, under the peft library's names, so trained weights are
already in peft's layout. In a fused qkv, any of q, k and v can be chosen: they share one A, as in
peft, and B has the rows of those chosen.

A may be kept apart from earlier changes (`room`): what counts is then A (I - Q Q'), where the
columns of Q span the rows of their A; with nothing earlier Q is 0.

Price: two thin products a layer; DoRA forms W + BA once a chunk for its norm, without a graph.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1; Liu et al. 2024 (DoRA, arXiv
    2402.09353), sections 4.1 and 4.3 (the norm is a constant of the backward pass).

Shapes: I and O in and out features, R rank, E columns of Q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.adapt.surgery import (
    StrategyError,
    last_blocks,
    mlp_linears,
    qkv_linears,
    share,
    timm_state,
)
from tapfm.autocast import without_autocast

PARTS = ("q", "k", "v", "proj", "mlp")


@dataclass(frozen=True)
class LowRank:
    """Base of LoRA and DoRA; `magnitude` is True for DoRA."""

    rank: int = 8
    """Rows of A, columns of B."""
    alpha: float = 16.0
    """The change is alpha / rank times B A."""
    dropout: float = 0.0
    """Dropout rate on the input of A, while training."""
    targets: tuple[str, ...] = ("q", "k", "v")
    """Which layers of a block: some of q, k, v, proj, mlp."""
    last: int = 0
    """Number of blocks to adapt, counted from the last; 0 is all."""
    lr: ClassVar[float] = 2e-4
    scaled: ClassVar[tuple[str, ...]] = ("lora_B.weight", "lora_magnitude_vector")
    name: ClassVar[str]
    magnitude: ClassVar[bool]
    """Whether the length of the rows learns as well."""

    def __post_init__(self):
        check(self.name.lower(), self.rank, self.alpha, self.dropout, self.targets, self.last)

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; give the chosen layers A and B, and for DoRA a magnitude.

        Raises:
            StrategyError: the model has no such layers.
        """
        options = self.rank, self.alpha, self.dropout, self.targets, self.last
        insert(vit, self.name.lower(), *options, magnitude=self.magnitude)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict with the changes added to the weights."""
        return merged_state(vit, timm_state(vit, "lora_"))

    def describe(self, vit: nn.Module) -> str:
        """Return rank, adapted layers and number of trained parameters as text."""
        where = f"{len(list(adapted(vit)))} layers ({', '.join(self.targets)})"
        return f"{self.name} of rank {self.rank} in {where}: {share(vit)}"


def check(name: str, rank: int, alpha: float, dropout: float, targets: tuple, last: int) -> None:
    """Raise one error that lists all faults of the options.

    Raises:
        StrategyError: at least one fault.
    """
    unknown = [t for t in targets if t not in PARTS]
    faults = [
        fault
        for fault, bad in (
            (f"rank must be 1 or more, got {rank}", rank < 1),
            (f"alpha must be above 0, got {alpha}", alpha <= 0),
            (f"dropout must be in [0, 1), got {dropout}", not 0 <= dropout < 1),
            (f"last must be 0 (all blocks) or more, got {last}", last < 0),
            (f"targets must be some of {', '.join(PARTS)}, got {list(targets)}",
             bool(unknown) or not targets),
        )
        if bad
    ]  # fmt: skip
    if faults:
        raise StrategyError(f"model.strategy: {name}: " + "; ".join(faults))


def insert(
    vit: nn.Module,
    name: str,
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...],
    last: int,
    magnitude: bool,
    room: int = 0,
) -> None:
    """Freeze the model and give the chosen layers A and B (and a magnitude); BA is 0 at first.

    `room` is the number of columns of Q, which are 0 until `keep_apart`; 0 has no Q.
    """
    vit.requires_grad_(False)
    for block in last_blocks(vit, last, name):
        for linear, parts in _chosen(block, name, targets):
            rows = sum(size for size, learns in parts if learns)
            like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            linear.lora_A = nn.Linear(linear.in_features, rank, bias=False, **like)
            linear.lora_B = nn.Linear(rank, rows, bias=False, **like)
            nn.init.kaiming_uniform_(linear.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(linear.lora_B.weight)
            linear.lora_parts, linear.lora_scaling = parts, alpha / rank
            linear.lora_dropout = nn.Dropout(dropout)
            if room:
                like = {"device": linear.weight.device}
                linear.register_buffer("lora_apart", torch.zeros(linear.in_features, room, **like))
            if magnitude:
                norm_O = torch.linalg.vector_norm(linear.weight.detach(), dim=1)
                linear.lora_magnitude_vector = nn.Parameter(select_rows(linear, norm_O))
            linear.register_forward_hook(_dora if magnitude else _lora)


def adapted(vit: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and layer of each linear layer that has an A and a B."""
    return ((name, m) for name, m in vit.named_modules() if hasattr(m, "lora_A"))


def rows_a(linear: nn.Linear) -> Tensor:
    """Return A (R, I), less what lies in the span of earlier changes."""
    a_RI, q_IE = linear.lora_A.weight, getattr(linear, "lora_apart", None)
    if q_IE is None:
        return a_RI
    with without_autocast(a_RI.device):
        wide_RI = a_RI.to(torch.promote_types(a_RI.dtype, q_IE.dtype))
        q_IE = q_IE.to(wide_RI.dtype)
        return (wide_RI - (wide_RI @ q_IE) @ q_IE.T).to(a_RI.dtype)


@torch.no_grad()
def keep_apart(linear: nn.Linear, earlier_EI: Tensor) -> None:
    """Span Q by the rows of earlier changes' A; rows of 0 span nothing.

    Raises:
        StrategyError: there are more than Q has room for.
    """
    _, size_E, turn_EI = torch.linalg.svd(earlier_EI.double(), full_matrices=False)
    basis_EI = turn_EI[size_E > 1e-6 * size_E.max()] if len(size_E) else turn_EI
    if len(basis_EI) > linear.lora_apart.shape[1]:
        raise StrategyError(
            f"model.strategy: earlier changes span {len(basis_EI)} directions of a layer, and room "
            f"is {linear.lora_apart.shape[1]}. Give room: {len(basis_EI)} or more."
        )
    linear.lora_apart.zero_()
    linear.lora_apart[:, : len(basis_EI)] = basis_EI.T


def select_rows(linear: nn.Linear, rows: Tensor) -> Tensor:
    """Return the chosen rows of all O rows."""
    parts = zip(rows.split([size for size, _ in linear.lora_parts]), linear.lora_parts, strict=True)
    return torch.cat([each for each, (_, learns) in parts if learns])


def scatter_rows(linear: nn.Linear, rows: Tensor) -> Tensor:
    """Return all O rows: the chosen ones at their places, 0 elsewhere."""
    if all(learns for _, learns in linear.lora_parts):
        return rows
    given = iter(rows.split([size for size, learns in linear.lora_parts if learns]))
    return torch.cat([
        next(given) if learns else rows.new_zeros(size, *rows.shape[1:])
        for size, learns in linear.lora_parts
    ])  # fmt: skip


def merged(linear: nn.Linear) -> Tensor:
    """Return the one weight (O, I) that computes the same."""
    weight_OI = linear.weight + _change(linear)
    if hasattr(linear, "lora_magnitude_vector"):
        weight_OI = weight_OI * _stretch(linear)[:, None]
    return weight_OI.detach()


def merged_state(vit: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with each adapted layer's weight replaced by the merged one."""
    return {**state, **{f"{name}.weight": merged(linear) for name, linear in adapted(vit)}}


def _chosen(
    block: nn.Module, name: str, targets: tuple[str, ...]
) -> Iterator[tuple[nn.Linear, tuple[tuple[int, bool], ...]]]:
    """Yield each layer to adapt with its row groups: number of rows, and whether chosen."""
    if set("qkv") & set(targets):
        linears = qkv_linears(block, name)
        if len(linears) == 3:  # q, k and v are separate layers
            yield from ((m, ((m.out_features, True),)) for m, p in zip(linears, "qkv", strict=True)
                        if p in targets)  # fmt: skip
        else:
            heads = block.attn.num_heads
            q = heads * getattr(block.attn, "head_dim", linears[0].out_features // (3 * heads))
            kv = (linears[0].out_features - q) // 2  # fewer than q where k and v share heads
            sizes = zip((q, kv, kv), "qkv", strict=True)
            yield linears[0], tuple((size, part in targets) for size, part in sizes)
    if "proj" in targets:
        yield block.attn.proj, ((block.attn.proj.out_features, True),)
    if "mlp" in targets:
        yield from ((m, ((m.out_features, True),)) for m in mlp_linears(block))


def _change(linear: nn.Linear) -> Tensor:
    """Return the change (alpha / r) B A, (O, I)."""
    with without_autocast(linear.weight.device):
        b_OR = scatter_rows(linear, linear.lora_B.weight)
        return linear.lora_scaling * (b_OR @ rows_a(linear))


def _stretch(linear: nn.Linear) -> Tensor:
    """Return magnitude / norm of W + (alpha / r) B A for each row (O,); exactly 1 at the start."""
    with torch.no_grad():
        norm_O = torch.linalg.vector_norm(linear.weight + _change(linear), dim=1)
    stretch = linear.lora_magnitude_vector / select_rows(linear, norm_O)
    return 1 + scatter_rows(linear, stretch - 1)  # rows that were not chosen stay


def _lora(linear: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    h_R = F.linear(linear.lora_dropout(args[0]), rows_a(linear)) * linear.lora_scaling
    return out + F.linear(h_R, scatter_rows(linear, linear.lora_B.weight))


def _dora(linear: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    stretch_O = _stretch(linear)
    product = out if linear.bias is None else out - linear.bias
    h_R = linear.lora_A(linear.lora_dropout(args[0])) * linear.lora_scaling
    change = F.linear(h_R, scatter_rows(linear, linear.lora_B.weight))
    return out + ((stretch_O - 1) * product + stretch_O * change).to(out.dtype)
