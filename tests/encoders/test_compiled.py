"""Compiled blocks and filled-up chunks give the numbers of plain ones.

torch's `aot_eager` takes the same way as `inductor`, up to the code it makes: graphs of forward and
backward, traced, with the strategies' hooks in them. It needs no compiler.
"""

import copy

import pandas as pd
import pytest
import torch
from timm.layers import DropPath
from torch._dynamo.testing import CompileCounterWithBackend

from tapfm.cli import main
from tapfm.encoders import compiled
from tapfm.encoders.compiled import CompilerError, need_compiler, pad_chunks
from tests.adapt.test_adapt import adapted, move
from tests.cohorts import write_cohort
from tests.engine.test_chunked import CPU, Slide, difference
from tests.tiny import random_tiles, tiny_encoder

# "lora, q v" is in some of the blocks only: what was compiled without must not serve those with
HOOKED = ["lora", "lora, q v", "dora", "vpt_deep", "adaptformer", "ssf", "hiadapter", "pathotune"]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", ["5 prefix", "rope"])
def test_gradient_is_the_plain_one(make, recompute, backend):
    expected = Slide(make).gradient("one_graph")
    slide = Slide(make, recompute=recompute, compiled=True)
    assert difference(slide.gradient("two_pass", keep=1), expected) <= 1e-12
    assert backend.frame_count == 2


def test_all_blocks_and_chunks_share_what_was_compiled(backend):
    """23 tiles in chunks of 4: once without a graph, once with one, whatever the depth."""
    for _ in range(2):
        Slide(depth=6, compiled=True).gradient("two_pass")
        assert backend.frame_count == 2


@pytest.mark.parametrize("case", HOOKED)
def test_strategies_are_compiled_in(case):
    (plain, _), (ours, _) = (adapted(case, compiled=each) for each in (False, True))
    tiles, grads = random_tiles(5), []
    for encoder in (plain.eval(), ours.eval()):
        z, score = encoder.sized(encoder, 7)(tiles)
        (z.sin().sum() + score.sum()).backward()
        named = encoder.named_parameters()
        grads.append(torch.cat([p.grad.flatten() for _, p in named if p.grad is not None]))
    assert difference(*grads) <= 1e-12


def test_drop_path_is_drawn_anew_and_alike_in_both_passes():
    slide = Slide(compiled=True, drop_path_rate=0.5)
    first = slide.gradient("two_pass")
    assert torch.equal(slide.gradient("two_pass"), first)
    assert torch.equal(slide.gradient("two_pass", keep=3), first)
    assert not torch.equal(*(slide.encoder(random_tiles(4))[0] for _ in range(2)))


def test_blocks_share_what_was_compiled_whatever_their_rate_of_drop_path(backend):
    """Two graphs a block they were; the first has a rate of 0, and so no drop-path at all."""
    slide = Slide(depth=7, compiled=True, drop_path_rate=0.5)
    slide.gradient("two_pass")
    assert backend.frame_count <= 5
    made, blocks = compiled.graphs_made(), slide.encoder.vit.blocks
    assert not compiled.too_many_graphs(blocks, made - 5)
    said = compiled.too_many_graphs(blocks, made - 99)
    assert "99 graphs were compiled for 7 blocks" in said


def test_drop_path_at_a_rate_keeps_as_many_tiles_and_the_mean():
    """Rates of 0 and a half; as timm's, what is kept is scaled up."""
    x = torch.ones(20_000, 1, 1, dtype=torch.float64)
    torch.manual_seed(0)
    for rate in (0.0, 0.5):
        path = DropPath(rate)
        compiled.rate_as_data(path)
        kept = path(x).flatten()
        assert set(kept.tolist()) == {1.0} if rate == 0 else {0.0, 2.0}
        assert kept.mean() == pytest.approx(1, abs=0.03)
        assert torch.equal(path.eval()(x), x)


def test_a_copy_computes_with_its_own_weights():
    encoder = tiny_encoder(compiled=True)
    tiles = random_tiles(3)
    before = encoder(tiles)[0]
    other = copy.deepcopy(encoder)
    move(other)
    assert torch.equal(encoder(tiles)[0], before)
    plain = tiny_encoder()
    plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(tiles)[0], plain(tiles)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", [1, 4, 6])
def test_chunks_are_filled_up_and_cut_again(tiles):
    seen = []

    def encode(tiles_CP):
        seen.append(tiles_CP)
        return tiles_CP.flatten(1).double(), tiles_CP.double().mean((1, 2, 3))

    given = random_tiles(tiles)
    z, score = pad_chunks(encode, 4)(given)
    assert len(seen[0]) == max(4, tiles)
    assert torch.equal(z, given.flatten(1).double())
    assert len(score) == tiles


def test_plain_encoders_are_not_filled_up():
    encoder = tiny_encoder()
    assert encoder.sized(encoder, 9) is encoder


def test_a_run_with_compiled_blocks_is_the_run_without(tmp_path):
    config = write_cohort(tmp_path)
    arguments = ["--trainer.max_epochs", "1", "--model.drop_path", "0"]
    for name, more in (("plain", []), ("fast", ["--model.compile", "true"])):
        assert main(["fit", "--config", str(config), "--name", name, *arguments, *more]) == 0
    plain, fast = (pd.read_csv(tmp_path / "runs" / r / "metrics.csv") for r in ("plain", "fast"))
    pd.testing.assert_frame_equal(plain, fast, rtol=1e-3)


def test_without_a_compiler_it_is_said_before_the_first_slide(monkeypatch, tmp_path, capsys):
    def none(_graph, _inputs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(compiled, "BACKEND", none)
    with pytest.raises(CompilerError, match=r"cannot compile for cpu here: .*leave model.compile"):
        need_compiler(CPU)
    fit = ["fit", "--config", str(write_cohort(tmp_path)), "--model.compile", "true"]
    assert main(fit) == 2
    assert "It needs a C++ compiler" in capsys.readouterr().err
