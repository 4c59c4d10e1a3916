"""`tapfm.engine.chunked` must give the gradient of the one-graph reference below.

The reference is plain autograd over the whole slide: read it first. Everything in the module is a
way to skip its memory, never a different answer.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tapfm.engine.chunked import adapt_bag, chunk_rng, encode_bag
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks.losses import MaskedBCE
from tests.bags import tile_set
from tests.tiny import MAKES, random_tiles, tiny_encoder

TILES, SEED = 23, 5  # 23 is prime: the last chunk is always short
CPU = torch.device("cpu")
NOISE = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1}


class Slide:
    """An encoder, a slide model, a slide: one loss, two ways to differentiate it."""

    def __init__(self, make="5 prefix", aggregator="tapfm", chunk=4, tiles=TILES, **extra):
        self.encoder = tiny_encoder(make, **extra).train()
        self.aggregator = make_aggregator(aggregator, self.encoder.dim, 3).double()
        self.loss = MaskedBCE([1.0, 2.0, 3.0])
        self.labels_K = torch.tensor([1.0, torch.nan, 0.0])
        self.chunks = random_tiles(tiles).split(chunk)
        self.encode = self.encoder.sized(self.encoder, chunk)

    def loss_of(self, z_TD, score_T):
        return self.loss(self.aggregator(tile_set(z_TD, score_T)).logits_K, self.labels_K)

    def one_graph(self):
        rows = []
        for index, chunk in enumerate(self.chunks):
            with chunk_rng(SEED, index, CPU):
                rows.append(self.encoder(chunk))
        z_CD, score_C = zip(*rows, strict=True)
        self.loss_of(torch.cat(z_CD), torch.cat(score_C)).backward()

    def two_pass(self, seed=SEED, score_weight=1.0, keep=0):
        z_TD, score_T, kept = encode_bag(self.encode, self.chunks, seed=SEED, device=CPU, keep=keep)
        self.loss_of(z_TD, score_T).backward()
        adapt_bag(
            self.encode,
            self.chunks,
            z_TD.grad,
            score_T.grad,
            seed=seed,
            device=CPU,
            kept=kept,
            score_weight=score_weight,
        )

    def gradient(self, method, **kwargs):
        self.encoder.zero_grad()
        self.aggregator.zero_grad()
        getattr(self, method)(**kwargs)
        grads = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads])


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chunk", [1, 4, 7, TILES])
@pytest.mark.parametrize("noise", [{}, NOISE], ids=["plain", "dropout"])
def test_gradient_equals_one_graph(chunk, noise):
    slide = Slide(chunk=chunk, **noise)
    expected = slide.gradient("one_graph")
    assert expected.norm() > 0
    assert difference(slide.gradient("two_pass"), expected) <= 1e-10


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("aggregator", ["tapfm", "gated", "tapfm_gated"])
def test_gradient_equals_one_graph_for_every_make(make, aggregator):
    slide = Slide(make, aggregator)
    expected = slide.gradient("one_graph")
    assert difference(slide.gradient("two_pass"), expected) <= 1e-10


@pytest.mark.parametrize("keep", [1, 3, 99])
def test_kept_graphs_change_nothing(keep):
    slide = Slide(**NOISE)
    expected = slide.gradient("two_pass")
    assert torch.equal(slide.gradient("two_pass", keep=keep), expected)


@pytest.mark.parametrize("make", ["5 prefix", "rope"])
def test_recomputing_blocks_changes_nothing(make):
    expected = Slide(make, **NOISE).gradient("one_graph")
    assert difference(Slide(make, recompute=True, **NOISE).gradient("two_pass"), expected) <= 1e-10


def test_the_parity_tests_can_fail():
    """Other noise in pass 2, or no attention term, is another gradient."""
    slide = Slide(**NOISE)
    expected = slide.gradient("one_graph")
    assert difference(slide.gradient("two_pass", seed=SEED + 1), expected) > 1e-3
    slide = Slide()
    expected = slide.gradient("one_graph")
    assert difference(slide.gradient("two_pass", score_weight=0.0), expected) > 1e-3


def saved_bytes(function):
    """Peak bytes that autograd keeps for backward while `function` runs, on any device."""
    live, peak = 0, 0

    class Held:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            live += self.size
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        function()
    return peak


def bytes_of_pass_2(slide):
    z_TD, score_T, _ = encode_bag(slide.encoder, slide.chunks, seed=0, device=CPU)
    grads = torch.ones_like(z_TD), torch.ones_like(score_T)
    return saved_bytes(lambda: adapt_bag(slide.encoder, slide.chunks, *grads, seed=0, device=CPU))


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_that_of_one_chunk_whatever_the_slide(recompute):
    """Needs no GPU: counts what autograd holds."""

    def held(tiles):
        return bytes_of_pass_2(Slide(chunk=4, tiles=tiles, recompute=recompute))

    assert held(8) == held(12) == held(52) > 0
    slide = Slide(chunk=4, tiles=52, recompute=recompute)
    assert saved_bytes(lambda: slide.gradient("one_graph")) > 10 * held(8)


def test_a_kept_graph_takes_the_place_of_the_chunk_in_work():
    """One chunk kept, then all of both passes: never is more than one chunk held."""
    slide = Slide(chunk=4)

    def step(keep):
        def run():
            same = {"seed": 0, "device": CPU}
            z_TD, _, kept = encode_bag(slide.encoder, slide.chunks, keep=keep, **same)
            ones = torch.ones_like(z_TD), torch.ones_like(z_TD[:, 0])
            adapt_bag(slide.encoder, slide.chunks, *ones, kept=kept, **same)

        return saved_bytes(run)

    assert step(keep=1) == step(keep=0)
    assert step(keep=3) == 3 * step(keep=0)


def test_pass_1_and_the_tap_hold_nothing():
    slide = Slide()
    assert saved_bytes(lambda: encode_bag(slide.encoder, slide.chunks, seed=0, device=CPU)) == 0
    tap = slide.encoder.tap
    assert tap.q is tap.k is tap.rope is tap.row is None


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_price_is_one_more_forward():
    slide = Slide()
    forward = flops(lambda: [slide.encoder(chunk) for chunk in slide.chunks])
    one_graph = flops(lambda: slide.gradient("one_graph"))
    assert flops(lambda: slide.gradient("two_pass")) == one_graph + forward


def test_what_is_kept_is_not_paid_twice():
    slide = Slide()
    one_graph = flops(lambda: slide.gradient("one_graph"))
    last_three = flops(lambda: [slide.encoder(chunk) for chunk in slide.chunks[3:]])
    assert flops(lambda: slide.gradient("two_pass", keep=3)) == one_graph + last_three
    assert flops(lambda: slide.gradient("two_pass", keep=99)) == one_graph


@pytest.mark.parametrize("rows", [TILES - 1, TILES + 1])
def test_changed_tiles_are_refused(rows):
    slide = Slide()
    grad_z = torch.zeros(rows, slide.encoder.dim, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"pass 1 had {rows}: both passes"):
        adapt_bag(slide.encoder, slide.chunks, grad_z, grad_z[:, 0], seed=0, device=CPU)


def test_a_slide_without_tiles_is_refused():
    with pytest.raises(ValueError, match="without tiles"):
        encode_bag(tiny_encoder(), [], seed=0, device=CPU)


def test_chunks_draw_different_noise_and_leave_the_callers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    noise = []
    for index in (0, 1, 0):
        with chunk_rng(SEED, index, CPU):
            noise.append(torch.rand(3))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(torch.rand(3), expected)
