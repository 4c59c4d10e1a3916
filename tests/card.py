"""A pretend CUDA card: computes on the CPU, and behaves to the program as a card would.

    with PretendCard() as card:
        module.to("cuda")            labelled; mixing with tensors that are not raises, as on a card
        card.waits                   what made the host wait for the card, one word each
        card.live, card.peak         bytes of storages on the card
        card.events                  allocations in order: (number, bytes); 0 bytes when freed

How: tensors stay CPU tensors. Which storages are "on the card" is noted beside them; a function
mode answers `.device` and moves between the two, a dispatch mode labels what an operation returns,
refuses operands of both kinds, and draws random numbers from a generator of the card's own. So all
of autograd works, and everything that asks for `cuda` runs.

Condition: kernels are the CPU's, so times and last digits are; autocast is the CPU's with its own
list of operations. Only waits that torch's CUDA code makes are known: reading a value, copies to
and from memory that is not pinned, shapes that depend on values.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
GIB = 2**30
GROUPED = torch.utils._foreach_utils._group_tensors_by_device_and_dtype
SHAPED_BY_VALUES = {
    "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal",
    "is_nonzero", "_local_scalar_dense", "repeat_interleave",
}  # fmt: skip
MIXES = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "set_", "detach"}


def is_cuda(device) -> bool:
    """Return whether a device, by name or not, is the card."""
    if isinstance(device, int):
        return True
    return device is not None and torch.device(device).type == "cuda"


class Ledger(TorchDispatchMode):
    """Counts storages that are made while it is on, and labels those on the card."""

    def __init__(self, everything: bool = False):
        super().__init__()
        self.everything = everything
        self.there: dict[int, weakref.ref] = {}
        self.events: list[tuple[int, int]] = []
        self.live = self.peak = 0
        self.waits: list[str] = []
        self.making = 0
        self.pinned: dict[int, weakref.ref] = {}
        self.random: Tensor | None = None

    def holds(self, tensor) -> bool:
        """Return whether a tensor's storage is on the card."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return False
        while functorch.is_batchedtensor(tensor):  # of torch.vmap
            tensor = functorch.get_unwrapped(tensor)
        return tensor.untyped_storage()._cdata in self.there

    def is_pinned(self, tensor) -> bool:
        """Return whether a tensor lies in page-locked memory."""
        return tensor.untyped_storage()._cdata in self.pinned

    def pin(self, tensor) -> None:
        """Note a tensor's storage as page-locked, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.pinned[key] = weakref.ref(storage, lambda _: self.pinned.pop(key, None))

    def put(self, tensor) -> None:
        """Note a tensor's storage as one on the card, until it is freed."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.there:
            return
        number = len(self.events)
        self.events.append((number, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        self.there[key] = weakref.ref(storage, lambda _: self._freed(key, number, size))

    def _freed(self, key: int, number: int, size: int) -> None:
        self.there.pop(key, None)
        self.live -= size
        self.events.append((number, 0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on = [each for each in given if self.holds(each)]
        name = func.overloadpacket.__name__
        if on or self.making:
            self._check(name, given, args, kwargs)
        with self._own_random(func, bool(on) or bool(self.making)):
            out = func(*args, **kwargs)
        if on or self.making or self.everything:
            before = {each.untyped_storage()._cdata for each in given}
            for each in tree_leaves(out):
                if isinstance(each, Tensor) and each.untyped_storage()._cdata not in before:
                    self.put(each)
        return out

    def _check(self, name, given, args, kwargs) -> None:
        if name == "copy_":
            target, source = args[0], args[1]
            if self.holds(target) != self.holds(source) and source.dim() + target.dim():
                pinned = any(self.is_pinned(each) for each in given)
                blocking = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
                if blocking or not pinned:
                    self.waits.append("copy")
            return
        here = [each for each in given if not self.holds(each) and each.dim()]
        if here and not self.making and name not in MIXES:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu"
            )
        masks = [each for each in tree_leaves(args[1:]) if isinstance(each, Tensor)]
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            each.dtype in (torch.bool, torch.uint8) for each in masks
        )
        if name in SHAPED_BY_VALUES or by_mask:
            self.waits.append(name)

    @contextmanager
    def _own_random(self, func, on: bool):
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not (on and drawn) or self.random is None:
            yield
            return
        host = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(host)


class _Generator(torch.Generator):
    """A generator that remembers on which device it draws."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_card = is_cuda(device)
        return made


class PretendCard(TorchFunctionMode):
    """Makes this process believe that it has one CUDA card.

    Args:
        gib: memory that the driver reports; nothing runs out of it by itself.
    """

    def __init__(self, gib: float = 22.03):
        super().__init__()
        self.total, self.ledger, self.stack = int(gib * GIB), Ledger(), ExitStack()
        self.locked = 0
        """Bytes of memory that were page-locked."""

    def __getattr__(self, name: str):
        return getattr(self.__dict__["ledger"], name)

    def __enter__(self) -> PretendCard:
        self.ledger.random = torch.Generator().manual_seed(1).get_state()
        for where, fakes in self._fakes().items():
            for name, fake in fakes.items():
                self.stack.enter_context(mock.patch(f"{where}.{name}", fake))
        self.stack.enter_context(self.ledger)
        super().__enter__()
        return self

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.stack.close()

    def wait(self, why: str) -> None:
        """Note that the host waited for the card."""
        self.ledger.waits.append(why)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if name == "__get__" and isinstance(first, Tensor):
            owner = getattr(func, "__self__", None)
            if owner is Tensor.device:
                return CUDA if self.holds(first) else first.device
            if owner is Tensor.is_cuda:
                return self.holds(first)
            return func(*args, **kwargs)
        if isinstance(first, Tensor) and name in ("to", "cuda", "cpu", "type_as"):
            return self._to(name, *args, **kwargs)
        drawn = kwargs.get("generator")  # here, since torch gives modes of dispatch another object
        on_card = self.holds(first) or is_cuda(kwargs.get("device"))
        if drawn is not None and on_card and not getattr(drawn, "on_card", False):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if self.holds(first):
            if name in ("tolist", "__format__", "__repr__"):
                self.wait(name)
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name.startswith("new_") and "device" not in kwargs:
                kwargs["device"] = CUDA
        if name == "pin_memory":
            raise AssertionError("whole tensors are not pinned: torch never gives them back")
        pinned = kwargs.pop("pin_memory", False)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor", "new_tensor"):
                self.wait("tensor")
            self.ledger.making += 1
            try:
                out = func(*args, **kwargs)
            finally:
                self.ledger.making -= 1
            self.ledger.put(out)
            return out
        out = func(*args, **kwargs)
        if pinned:
            self.ledger.pin(out)
            self.locked += out.untyped_storage().nbytes()
        return out

    def _to(self, name, tensor, *args, **kwargs):
        there, wanted = self.holds(tensor), None
        if name == "cuda":
            wanted, args = True, ()
            kwargs.pop("device", None)
        elif name == "cpu":
            wanted = False
        elif name == "type_as":
            wanted, args = self.holds(args[0]), (args[0].dtype,)
        else:
            first = kwargs.get("device", args[0] if args else None)
            if isinstance(first, Tensor):
                wanted, args = self.holds(first), (first.dtype, *args[1:])
            elif isinstance(first, str | torch.device | int) and not isinstance(first, bool):
                wanted = is_cuda(first)
                if "device" in kwargs:
                    kwargs.pop("device")
                else:
                    args = args[1:]
            elif "device" in kwargs:
                kwargs.pop("device")
        quiet = kwargs.pop("non_blocking", False)
        quiet = quiet or any(each is True for each in args)
        args = tuple(each for each in args if not isinstance(each, bool))
        if wanted is None or wanted == there:
            return tensor.to(*args, **kwargs) if args or kwargs else tensor
        if wanted and quiet:
            if not self.is_pinned(tensor):
                self.wait("staged")  # pageable memory: the driver copies it first
        else:
            self.wait("copy in" if wanted else "copy out")
        kwargs["copy"] = True
        if wanted:
            self.ledger.making += 1
        try:
            with _unlabelled(self.ledger, wanted):
                moved = tensor.to(args[0] if args else kwargs.pop("dtype", tensor.dtype), **kwargs)
        finally:
            if wanted:
                self.ledger.making -= 1
        if wanted:
            self.ledger.put(moved)
        return moved

    def _grouped(self, lists, with_indices=False):
        """Return torch's groups of tensors, on the device that they pretend to be on."""
        found = GROUPED(lists, with_indices)
        return {(self._place(each), dtype): each for (_, dtype), each in found.items()}

    def _place(self, group):
        return CUDA if self.holds(group[0][0][0]) else torch.device("cpu")

    def _fakes(self) -> dict[str, dict]:
        ledger = self.ledger
        event = SimpleNamespace
        real_autocast, real_seed = torch.autocast, torch.cuda.manual_seed

        class Event:
            def __init__(self, **_):
                pass

            def record(self, *_):
                pass

            def synchronize(self):
                ledger.waits.append("event")

            def elapsed_time(self, _):
                return 1.0

            def query(self):
                return True

        stream = event(record_event=Event, synchronize=lambda: ledger.waits.append("stream"),
                       wait_stream=lambda _: None, wait_event=lambda _: None,
                       is_capturing=lambda: False)  # fmt: skip

        class Autocast(real_autocast):
            def __init__(self, device_type, *args, **kwargs):
                super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        def seed(number):
            ledger.random = torch._C.Generator("cpu").manual_seed(number).get_state()

        def set_state(state, *_):
            ledger.random = state.clone()

        def limit(share, device=None):
            if not 0 <= share <= 1 or (device is not None and torch.device(device).index is None):
                raise ValueError(f"torch takes a share of 0 to 1 and a card's number: {device}")

        del real_seed
        properties = event(name="Pretend", total_memory=self.total, major=8, minor=9,
                           multi_processor_count=58)  # fmt: skip
        nothing = mock.MagicMock(return_value=None)
        return {
            "torch.nn.utils.clip_grad": {"_group_tensors_by_device_and_dtype": self._grouped},
            "torch": {"autocast": Autocast, "Generator": _Generator},
            "torch.accelerator": {"current_stream": lambda *_: stream},
            "torch.cuda": {
                "is_available": lambda: True, "device_count": lambda: 1, "init": nothing,
                "_lazy_init": nothing, "is_initialized": lambda: True,
                "current_device": lambda: 0, "set_device": nothing, "empty_cache": nothing,
                "get_device_name": lambda *_: "Pretend", "is_bf16_supported": lambda *_: True,
                "get_device_properties": lambda *_: properties,
                "get_device_capability": lambda *_: (8, 9),
                "mem_get_info": lambda *_: (self.total - ledger.live, self.total),
                "current_stream": lambda *_: stream, "Event": Event,
                "synchronize": lambda *_: ledger.waits.append("synchronize"),
                "reset_peak_memory_stats": lambda *_: setattr(ledger, "peak", ledger.live),
                "max_memory_allocated": lambda *_: ledger.peak,
                "max_memory_reserved": lambda *_: ledger.peak,
                "memory_allocated": lambda *_: ledger.live,
                "set_per_process_memory_fraction": limit,
                "memory_stats": lambda *_: {"num_alloc_retries": 0},
                "manual_seed": seed, "manual_seed_all": seed,
                "get_rng_state": lambda *_: ledger.random.clone(),
                "get_rng_state_all": lambda: [ledger.random.clone()],
                "set_rng_state": set_state,
                "set_rng_state_all": lambda states: set_state(states[0]),
            },
        }  # fmt: skip


@contextmanager
def _unlabelled(ledger: Ledger, wanted: bool):
    """Hide what is on the card, so that a copy from there is not labelled."""
    if wanted:
        yield
        return
    hidden, ledger.there = ledger.there, _Hidden(ledger.there)
    try:
        yield
    finally:
        ledger.there = hidden


class _Hidden(dict):
    """Contains nothing; what is freed meanwhile is freed behind it."""

    def __init__(self, behind):
        super().__init__()
        self.behind = behind

    def pop(self, key, default=None):
        return self.behind.pop(key, default)


def moved(value, device):
    """Return nested tensors on a device."""
    return tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, value)
