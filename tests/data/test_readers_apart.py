"""Readers beside an offloaded optimizer: its masters are not taken twice, nor counted as free."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from slides.streaming import bounded_tiles
from slides.streaming.bounded_tiles import host_budget
from slides.streaming.stream import SlideLoader
from tapfm.data.streamed import apart, host_weights, tile_budget

MIB = 2**20
SIZE = 192  # MiB that an optimizer rewrites
ROLLUP = Path("/proc/self/smaps_rollup")


class Bags(Dataset):
    """Items of its own, for a loader whose workers only have to live."""

    rows = ()

    def __len__(self):
        return 64

    def __getitem__(self, number):
        return torch.full((3,), float(getattr(number, "slide", number)))


def pss_mib():
    """Return the memory of this process and its children, shared pages divided among them."""
    here, found = os.getpid(), 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            parents = {int((process / "stat").read_text().rpartition(")")[2].split()[1])}
            grand = Path(f"/proc/{next(iter(parents))}/stat").read_text().rpartition(")")[2]
            if here in {int(process.name), *parents, int(grand.split()[1])}:
                lines = (process / "smaps_rollup").read_text().splitlines()
                found += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return found / 1024


def growth(context):
    """Return MiB that an update of the masters adds while readers live."""
    masters = torch.ones(SIZE * MIB // 4)
    bags = iter(SlideLoader(Bags(), workers=2, context=context))
    next(bags)
    before = pss_mib()
    masters.mul_(1.5)
    after = pss_mib()
    bags.close()
    return after - before


@pytest.mark.skipif(not os.access(ROLLUP, os.R_OK), reason="Linux's smaps_rollup is needed")
def test_masters_that_are_updated_beside_readers_take_their_memory_once():
    trainer = SimpleNamespace(lightning_module=SimpleNamespace(host_bytes=1))
    assert growth(None) > 0.9 * SIZE, "forked readers keep the pages of before"
    assert growth(apart(trainer, 2)) < 0.1 * SIZE


def test_only_a_run_with_masters_on_the_host_pays_for_it():
    module = SimpleNamespace(host_bytes=0)
    assert apart(SimpleNamespace(lightning_module=module), 2) is None
    assert apart(None, 2) is None
    assert apart(SimpleNamespace(lightning_module=SimpleNamespace(host_bytes=9)), 0) is None


def test_the_tiles_share_is_of_what_the_masters_leave(monkeypatch):
    monkeypatch.setattr(bounded_tiles, "machine_memory", lambda: 1000)
    trainer = SimpleNamespace(num_devices=2, lightning_module=SimpleNamespace(host_bytes=100))
    assert host_weights(trainer) == 100
    assert tile_budget(None, trainer) == 200  # half of 500 less 100
    assert tile_budget(None, None) == 500
    assert tile_budget(2e-7, trainer) == 100
    assert host_budget(None, taken=2000) == 0
