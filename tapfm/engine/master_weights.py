"""AdamW for weights in bfloat16, whose exact fp32 values ("masters") are kept elsewhere.

A foundation model is tuned at a learning rate of 1e-6, and bfloat16 has 8 bits: an update is
smaller than half the gap to the next number, so weights that are rounded after each step do not
move at all. Here the update is made in fp32 and the weight is its rounded copy. The scheme says
where the fp32 values and AdamW's moments are kept:

    scheme     beside the weight                             bytes a parameter, gradient included
    master     fp32 master and moments, same device          18
    residual   the 16 bits that rounding cut off, and        10.1
               moments in 8 bits; fp32 for an instant
    offload    fp32 master and moments in host memory         6, and 12 on the host

Pass 2 adds a gradient per chunk, so gradients are summed in fp32 as well: a hook moves each
chunk's bfloat16 gradient into the sum and frees it. The sums are the `.grad` of stand-ins: fp32
parameters of the weights' shapes that use no memory. `param_groups` holds the stand-ins, so
clipping, averaging over processes and learning rates work on them as on any parameter.

Source: Micikevicius et al. 2018 (arXiv 1710.03740), fp32 master weights. Loshchilov and Hutter 2019
    (arXiv 1711.05101), AdamW. Dettmers et al. 2022 (arXiv 2110.02861), moments in 8 bits by blocks.
    Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840), the update on the host.

Price: one pass over the parameters per update, of `residual` several (`engine.packed`, which
compiles them); `offload` copies the gradient to the host and the weight back, once an update
whatever the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from slides.errors import SettingsError
from tapfm.encoders.pinned import RING
from tapfm.engine.packed import EAGER, chances, make_coder, pack, split_bits

HOST_BYTES = 12  # of host memory a parameter with `offload`: master and moments
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults

Fp32State = tuple[Tensor, Tensor, Tensor]
"""Master, first and second moment, fp32."""


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on the fp32 values behind weights of low precision.

    The masters start at the values the weights come with; the weights are then rounded in place.

    Args:
        groups: AdamW parameter groups (`params`, `lr`, `weight_decay`).
        scheme: one of `SCHEMES`.

    Raises:
        SettingsError: no such scheme.
    """

    def __init__(self, groups: list[dict[str, Any]], scheme: str):
        if scheme not in SCHEMES:
            raise SettingsError(
                f"model.optimizer: {scheme!r} is none of adamw, {', '.join(SCHEMES)}"
            )
        kind = SCHEMES[scheme]
        pairs = [[(_stand_in(weight), weight) for weight in group["params"]] for group in groups]
        super().__init__(
            [
                {**group, "params": [p for p, _ in each]}
                for group, each in zip(groups, pairs, strict=True)
            ],
            {"lr": 1e-3, "weight_decay": 0.0},
        )
        self.kept = {p: kind(weight) for each in pairs for p, weight in each}
        if kind is PackedMasterState:
            coder = make_coder([kept.weight for kept in self.kept.values()])
            for number, kept in enumerate(self.kept.values()):
                kept.number, kept.coder = number, coder
        for each in pairs:
            for stand_in, weight in each:
                weight.register_post_accumulate_grad_hook(_summing_into(stand_in))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient."""
        with torch.enable_grad():
            found = closure() if closure else None
        due = [
            (self.kept[p], p.grad, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for kept, grad, group in _received(due):
            state = master, first, second = kept.read()
            steps = torch.full((), float(kept.updates), device=master.device)
            adamw(
                [master], [grad], [first], [second], [], [steps], fused=True, amsgrad=False,
                maximize=False, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, lr=group["lr"],
                weight_decay=group["weight_decay"],
            )  # fmt: skip
            kept.updates += 1
            kept.write(state)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and each weight's master and moments in the groups' order."""
        return {**super().state_dict(), "kept": [kept.state() for kept in self.kept.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, after the model's own weights."""
        groups = {key: value for key, value in state_dict.items() if key != "kept"}
        super().load_state_dict(groups)
        for kept, saved in zip(self.kept.values(), state_dict["kept"], strict=True):
            kept.load(saved)


def _stand_in(weight: Tensor) -> nn.Parameter:
    """Return an fp32 parameter of the weight's shape and device that uses memory for one number."""
    return nn.Parameter(torch.zeros((), device=weight.device).expand(weight.shape))


def _summing_into(stand_in: nn.Parameter) -> Callable[[Tensor], None]:
    """Return a hook that moves a weight's gradient into the stand-in's."""

    def collect(weight: Tensor) -> None:
        grad, weight.grad = weight.grad, None  # if memory runs out now, it was not received
        if stand_in.grad is None:
            stand_in.grad = grad.to(torch.float32)
        else:
            stand_in.grad.add_(grad)

    return collect


def _received(
    due: list[tuple[MasterState, Tensor, dict]],
) -> Iterator[tuple[MasterState, Tensor, dict]]:
    """Yield each gradient on the device of its update, while the next is being copied."""
    sent = ((kept, kept.send(grad), group) for kept, grad, group in due)
    for (kept, receive, group), _next in pairwise(chain(sent, [None])):
        yield kept, receive(), group


class MasterState:
    """Master and moments of one weight, uncompressed, on the weight's device."""

    names = ("master", "first", "second")

    def __init__(self, weight: nn.Parameter):
        self.weight, self.updates = weight, 0
        self.master = self.home(weight.detach().to(torch.float32, copy=True))
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        weight.data = weight.data.to(torch.bfloat16)

    def home(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device where the fp32 values are kept."""
        return tensor

    def send(self, grad: Tensor) -> Callable[[], Tensor]:
        """Start copying a gradient there; return a function that waits for it and returns it."""
        return lambda: grad

    def read(self) -> Fp32State:
        """Return master and moments, to be changed in place."""
        return self.master, self.first, self.second

    def write(self, state: Fp32State) -> None:
        """Store the updated values and round the weight."""
        self.weight.copy_(state[0])

    def state(self) -> dict[str, Any]:
        """Return what resuming needs beside the weight."""
        return {"updates": self.updates, **{name: getattr(self, name) for name in self.names}}

    def load(self, saved: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.updates = saved["updates"]
        for name in self.names:
            getattr(self, name).copy_(saved[name])


class HostMasterState(MasterState):
    """Master and moments in host memory; copies go through pinned memory and do not wait."""

    def home(self, tensor: Tensor) -> Tensor:
        """Return the tensor in host memory."""
        return tensor.cpu()

    def send(self, grad: Tensor) -> Callable[[], Tensor]:
        """Copy the gradient to the host while the previous update is computed."""
        if not grad.is_cuda:
            return lambda: grad
        there = RING.take(grad.shape, grad.dtype)
        there.copy_(grad, non_blocking=True)
        arrived = RING.copied(grad.device)

        def receive() -> Tensor:
            arrived.synchronize()
            return there

        return receive

    def write(self, state: Fp32State) -> None:
        """Round on the host, then copy half the bytes."""
        weight = self.weight
        if not weight.is_cuda:
            return super().write(state)
        rounded = RING.take(weight.shape, weight.dtype).copy_(state[0])
        weight.copy_(rounded, non_blocking=True)
        RING.copied(weight.device)


class PackedMasterState(MasterState):
    """The master's bits that the weight lacks, and 8-bit moments; fp32 only while in use."""

    names = ("low", "first", "first_scale", "root", "root_scale")
    number = 0
    """Number of the weight; it seeds rounding, so that no two weights round alike."""

    coder = EAGER
    """Packs and unpacks it, compiled or not."""

    def __init__(self, weight: nn.Parameter):
        self.weight, self.updates = weight, 0
        rounded, self.low = split_bits(weight.detach().to(torch.float32))
        nothing = torch.zeros(weight.shape, device=weight.device)
        chance = chances(nothing, 0)
        self.first, self.first_scale = pack(nothing, torch.int8, chance)
        self.root, self.root_scale = pack(nothing, torch.uint8, chance)
        weight.data = rounded

    def read(self) -> Fp32State:
        """Return master and moments decoded to fp32, as new tensors."""
        moments = self.first, self.first_scale, self.root, self.root_scale
        flat = self.weight.flatten(), self.low.flatten()
        master, first, root = self.coder.decode(*flat, *moments)
        shape = self.weight.shape
        return master.view(shape), first.view(shape), root.square_().view(shape)

    def write(self, state: Fp32State) -> None:
        """Encode the updated values again."""
        master, first, second = (each.flatten() for each in state)
        seed = hash((self.updates, self.number)) % 2**32  # a CPU's generator takes 32 bits
        chance = chances(first, seed)
        rounded, low, *moments = self.coder.encode(master, first, second.sqrt(), chance)
        self.weight.copy_(rounded.view(self.weight.shape))
        self.low = low.view(self.weight.shape)
        self.first, self.first_scale, self.root, self.root_scale = moments


SCHEMES = {"master": MasterState, "residual": PackedMasterState, "offload": HostMasterState}
