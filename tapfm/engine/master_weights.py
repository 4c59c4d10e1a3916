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
Differs: the residual loses nothing: weights are rounded half up in magnitude, which can be undone.
    The second moment is never rounded to 0, where the update would divide by almost nothing.

Price: one pass over the parameters per update; `offload` copies the gradient to the host and the
weight back, once an update whatever the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from slides.errors import SettingsError
from tapfm.encoders.pinned import RING

HOST_BYTES = 12  # of host memory a parameter with `offload`: master and moments
BLOCK = 256  # neighbouring values of a moment that share a scale
CODES, OCTAVES = {torch.int8: 127, torch.uint8: 255}, 18  # magnitudes from 2 ** -18 to 1
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
        for number, kept in enumerate(self.kept.values()):
            kept.number = number
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

    def __init__(self, weight: nn.Parameter):
        self.weight, self.updates = weight, 0
        rounded, self.low = split_bits(weight.detach().to(torch.float32))
        nothing = torch.zeros(weight.shape, device=weight.device)
        self.first, self.first_scale = pack(nothing, torch.int8, seed=0)
        self.root, self.root_scale = pack(nothing, torch.uint8, seed=0)
        weight.data = rounded

    def read(self) -> Fp32State:
        """Return master and moments decoded to fp32, as new tensors."""
        shape = self.weight.shape
        return (
            join_bits(self.weight, self.low),
            unpack(self.first, self.first_scale, shape),
            unpack(self.root, self.root_scale, shape).square_(),
        )

    def write(self, state: Fp32State) -> None:
        """Encode the updated values again."""
        master, first, second = state
        rounded, self.low = split_bits(master)
        self.weight.copy_(rounded)
        seed = hash((self.updates, self.number)) % 2**32  # a CPU's generator takes 32 bits
        self.first, self.first_scale = pack(first, torch.int8, seed=seed)
        self.root, self.root_scale = pack(second.sqrt(), torch.uint8, seed=seed)


SCHEMES = {"master": MasterState, "residual": PackedMasterState, "offload": HostMasterState}


def split_bits(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return an fp32 tensor's nearest bfloat16 and its low 16 bits (int16).

    Halves are rounded away from 0, not to even, so that `join_bits` can undo the rounding.
    """
    bits = master.view(torch.int32)
    rounded = (bits + 0x8000) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_bits(weight: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 tensor that `split_bits` took apart, bit for bit."""
    behind = low.to(torch.int32) & 0xFFFF
    front = weight.view(torch.int16).to(torch.int32) - (behind >= 0x8000).to(torch.int32)
    return ((front << 16) | behind).view(torch.float32)


def pack(values: Tensor, kind: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Return fp32 values as logarithmic 8-bit codes (blocks, BLOCK), and each block's maximum.

    AdamW divides one moment by the root of the other, so relative error counts: neighbouring codes
    have the same ratio everywhere, and only 0 becomes 0. A moment may change by 0.1 % a step,
    so values are rounded up or down at random, right on average. The draw depends on `seed` alone,
    so a resumed run draws the same.

    Args:
        values: fp32 tensor of any shape.
        kind: int8, with signed codes, or uint8, with twice as many codes.
        seed: seed of the rounding.
    """
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    part, codes = blocks.abs().div_(largest), CODES[kind]
    below = part.log2().mul_(codes / OCTAVES).add_(codes).floor_().clamp_(1, codes - 1)
    low, high = _magnitude(below, codes), _magnitude(below + 1, codes)
    draw = torch.Generator(values.device).manual_seed(seed)
    chance = torch.rand(blocks.shape, device=values.device, generator=draw)
    code = below + (part - low > chance * (high - low))
    return (code * blocks.sign()).to(kind), largest


def unpack(code: Tensor, largest: Tensor, shape: torch.Size) -> Tensor:
    """Decode packed values to float32; the error is at most one quantisation step."""
    magnitude = _magnitude(code.to(torch.float32).abs_(), CODES[code.dtype])
    return magnitude.mul_(code.sign()).mul_(largest).flatten()[: shape.numel()].view(shape)


def _magnitude(code: Tensor, codes: int) -> Tensor:
    """Return 0 for code 0, else a power of 2 up to 1."""
    return torch.where(code > 0, ((code - codes) * (OCTAVES / codes)).exp2_(), 0.0)
