"""Memory runs out in the middle of a chunk, forward or backward: the gradient stays the same."""

from weakref import WeakSet

import pandas as pd
import pytest
import torch

from tapfm.cli import main
from tapfm.encoders.backbones import Encoder
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.training.oom_retry import OomRetry
from tests.cohorts import write_cohort
from tests.tiny import random_tiles, tiny_encoder

CPU = torch.device("cpu")


class Mark:
    """Alive as long as the graph that has it."""


class Full(torch.autograd.Function):
    """Passes a block's input through; runs out of memory in the backward of too many tiles."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if len(grad) > ctx.most:
            raise torch.OutOfMemoryError(f"{len(grad)} tiles")
        return grad, None


def small_memory(encoder, forward=99, backward=99, block=1):
    """The encoder on a device where so many tiles fit; backward fails below `block`."""

    def before(_module, args):
        if torch.is_grad_enabled() and len(args[0]) > forward:
            raise torch.OutOfMemoryError(f"{len(args[0])} tiles")
        return (Full.apply(args[0], backward), *args[1:])

    encoder.vit.blocks[block].register_forward_pre_hook(before)
    return encoder


def gradient(encoder, chunk, before=False, keep=0, score=True):
    """Of a slide of 11 tiles through `OomRetry`; `before`: on top of another slide's."""
    encoder.zero_grad()
    tiles, same = random_tiles(11), {"seed": 0, "device": CPU}
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    if before:
        for p in parameters:
            p.grad = torch.ones_like(p)
    z_TD, score_T, kept = encode_bag(encoder, tiles.split(chunk), keep=keep, **same)
    grad_z = torch.sin(torch.arange(z_TD.numel()).double()).reshape(z_TD.shape)
    grad_s = torch.cos(torch.arange(len(score_T)).double()) if score else None
    with OomRetry(parameters) as retry:
        adapt_bag(encoder, tiles.split(chunk), grad_z, grad_s, kept=kept, backward=retry, **same)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), retry.fits


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("before", [False, True], ids=["first", "accumulated"])
def test_backward_that_fails_half_way_gives_every_parameter_every_tile_once(block, most, before):
    expected, _ = gradient(tiny_encoder(), 8, before)
    found, fits = gradient(small_memory(tiny_encoder(), backward=most, block=block), 8, before)
    assert fits <= most
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_no_kept_graph_is_alive_while_halves_are_tried(keep):
    encoder, tiles, alive, found = tiny_encoder(), random_tiles(9), WeakSet(), []

    class Graph(torch.autograd.Function):
        """Marks the graph of a chunk; backward of a whole one runs out of memory."""

        @staticmethod
        def forward(context, z_CD):
            context.mark = Mark()
            alive.add(context.mark)
            context.count = len(z_CD)
            return z_CD.clone()

        @staticmethod
        def backward(context, grad):
            if context.count == 3:
                raise torch.OutOfMemoryError("no room")
            return grad

    def encode(chunk):
        found.append(len(alive))
        z_CD, score_C = encoder(chunk)
        return (Graph.apply(z_CD) if torch.is_grad_enabled() else z_CD), score_C

    same = {"seed": 0, "device": CPU}
    z_TD, score_T, kept = encode_bag(encode, tiles.split(3), keep=keep, **same)
    assert found == [min(n, keep) for n in range(3)]
    found.clear()
    grads = torch.ones_like(z_TD), torch.ones_like(score_T)
    with OomRetry(encoder.parameters()) as retry:
        adapt_bag(encode, tiles.split(3), *grads, kept=kept, backward=retry, **same)
    assert retry.fits == 2
    assert set(found) == {0}, "nothing but the chunk that is tried"


@pytest.mark.parametrize("keep", [0, 1, 9])
@pytest.mark.parametrize("score", [True, False])
def test_forward_that_fails_and_kept_graphs(keep, score):
    expected, none = gradient(tiny_encoder(), 4, score=score)
    assert none is None
    encoder = small_memory(tiny_encoder(), forward=5, backward=2)
    found, fits = gradient(encoder, 4, keep=keep, score=score)
    assert fits == 2
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


def test_parity_needs_the_notes():
    """The partner: giving the halves to every parameter would count some tiles twice."""
    expected, _ = gradient(tiny_encoder(), 8)
    encoder = small_memory(tiny_encoder(), backward=4)
    rescue_note = OomRetry._note
    try:
        OomRetry._note = lambda self, parameter: None
        found, _ = gradient(encoder, 8)
    finally:
        OomRetry._note = rescue_note
    assert ((found - expected).norm() / expected.norm()).item() > 1e-3


def test_one_tile_that_does_not_fit_is_the_end():
    with pytest.raises(torch.OutOfMemoryError, match="1 tiles"):
        gradient(small_memory(tiny_encoder(), backward=0), 4)


@pytest.fixture
def limited(monkeypatch):
    """Memory for so many tiles with a graph, in every encoder."""

    def limit(most):
        forward = Encoder.forward

        def small(self, tiles):
            if torch.is_grad_enabled() and len(tiles) > most:
                raise torch.OutOfMemoryError(f"{len(tiles)} tiles")
            return forward(self, tiles)

        monkeypatch.setattr(Encoder, "forward", small)

    return limit


def test_a_run_goes_on_with_what_fits(limited, tmp_path, capsys):
    config = write_cohort(tmp_path)
    arguments = ["--trainer.max_epochs", "1", "--model.drop_path", "0"]
    assert main(["fit", "--config", str(config), "--name", "roomy", *arguments]) == 0
    limited(3)
    assert main(["fit", "--config", str(config), "--name", "tight", *arguments]) == 0
    assert "with 5 tiles at once: going on with 4" in capsys.readouterr().out
    roomy, tight = (pd.read_csv(tmp_path / "runs" / r / "metrics.csv") for r in ("roomy", "tight"))
    pd.testing.assert_frame_equal(roomy, tight, rtol=1e-3)
    assert set(pd.read_csv(tmp_path / "runs" / "tight" / "memory.csv")["chunk"]) == {3}


def test_when_nothing_fits_the_error_says_what_would(limited, tmp_path, capsys):
    config = write_cohort(tmp_path)
    limited(0)
    arguments = ["--trainer.max_epochs", "1", "--model.drop_path", "0"]
    assert main(["fit", "--config", str(config), *arguments]) == 2
    said = capsys.readouterr().err
    assert "memory ran out with 1 tiles at once" in said
    assert "model.recompute" in said
    assert "tapfm plan --model demo_vit" in said
