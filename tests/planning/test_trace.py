"""The plan's peaks against a trace: a whole step on tensors without memory, byte for byte.

The step is the engine's own, on the meta device; every storage that it makes is counted from its
first use to its end (`tests.card.Ledger`), the caching allocator is played on the same events
(`tests.caching_allocator`). So the plan, which counts two and three blocks and adds up, meets what
torch would really be asked for.
"""

import functools
import gc
from unittest import mock

import pytest
import torch

from tapfm.adapt.strategies import make_strategy
from tapfm.encoders.backbones import Encoder, build, find
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.engine.frozen_prefix import FrozenPrefix, FrozenPrefixTokens, first_to_learn
from tapfm.engine.master_weights import MasterAdamW
from tapfm.planning.cards import RESERVED, SPARE_GIB
from tapfm.planning.footprint import CONTEXT_GIB, GIB, Footprint, Setup
from tests.caching_allocator import reserved
from tests.card import Ledger

META = torch.device("meta")
CASES = {  # model, chunk, optimizer, recompute, strategy, merged tokens
    "S": ("kaiko_s16", 24, "master", False, "full", 0),
    "S, merged": ("kaiko_s16", 24, "master", False, "full", 12),
    "L, recompute": ("uni", 16, "offload", True, "full", 0),
    "L, last": ("uni", 16, "master", False, {"name": "last_n", "n": 6}, 0),
    "g": ("h_optimus_0", 22, "offload", False, "full", 0),  # the plan of an L4
}
SHORT = 0.4  # the last chunk, of a whole one


class Autocast(torch.autocast):
    """torch's refuses the meta device, even where it is off."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


def fused(q, k, v, *_, dropout_p=0.0, scale=None, **__):
    """Attention as on a card; a mode would not be on where blocks are recomputed in backward."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, dropout_p, False, False, scale=scale)[0]


@functools.cache
def traced(case):
    """Return peak GiB by phase, and the events of a slide of two chunks and a half."""
    model, chunk, optimizer, recompute, strategy, merge = CASES[case]
    row, ledger = find(model), Ledger(everything=True)
    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", fused)
    with mock.patch("torch.autocast", Autocast), attention, META, ledger:
        vit = build(row).bfloat16()
        make_strategy(strategy).prepare(vit)
        encoder = Encoder(vit, row, recompute=recompute, merge=merge).train()
        learning = [p for p in vit.parameters() if p.requires_grad]
        scheme = MasterAdamW([{"params": learning, "lr": 1e-5}], "master")
        if optimizer == "offload":
            for kept in scheme.kept.values():
                kept.master = kept.first = kept.second = None  # they are on the host
        gc.collect()
        encode, first = encoder, first_to_learn(vit)
        sizes = [chunk, chunk, int(SHORT * chunk)]
        tiles = [torch.empty(n, 3, row.tile_px, row.tile_px, dtype=torch.uint8) for n in sizes]
        peaks = {"encode": 0, "adapt": 0}
        split = mock.Mock(side_effect=lambda _size: tiles)
        if first is not None:
            prefix = FrozenPrefix(encoder, first)
            encode, bag = prefix.encode, mock.Mock(split=split)
            tokens = FrozenPrefixTokens(prefix.tokens, bag, 0, budget_gib=0, device=META)
            split = tokens.split
        ledger.peak = ledger.live
        z, score, kept = encode_bag(encode, split(chunk), seed=0, device=META, keep=1)
        peaks["encode"], ledger.peak = ledger.peak, ledger.live
        grads = torch.empty_like(z), torch.empty_like(score)
        adapt_bag(encode, split(chunk), *grads, seed=0, device=META, kept=kept)
        peaks["adapt"] = ledger.peak
    return {phase: peak / GIB for phase, peak in peaks.items()}, list(ledger.events)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_takes(case):
    """Within 3 %, and never a hundredth less than is taken."""
    model, chunk, *how = CASES[case]
    setup = Setup("bf16-true", *how)
    footprint = Footprint(find(model))
    planned = footprint.peaks(setup, footprint.cost(setup), chunk)
    found, _ = traced(case)
    for phase, peak in found.items():
        taken = peak + CONTEXT_GIB
        assert 0.99 * taken <= planned[phase] <= 1.03 * taken, phase


@pytest.mark.parametrize("case", CASES)
def test_what_the_allocator_reserves_is_within_the_plans_share(case):
    """With growing segments; with fixed ones it is more, which is why they are set."""
    _, events = traced(case)
    most, live, sizes = 0, 0, {}
    for number, size in events:
        live += size - (0 if size else sizes.get(number, 0))
        sizes[number] = size
        most = max(most, live)
    grows, fixed = (reserved(events, growing) for growing in (True, False))
    assert most <= grows <= RESERVED * most + SPARE_GIB / 4 * GIB
    assert fixed > grows
