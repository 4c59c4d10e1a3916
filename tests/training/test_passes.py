"""`Passes` where memory runs out: what is given up is what was held."""

import torch

from tapfm.data.bag import Bag, Places
from tapfm.encoders import backbones
from tapfm.slide_model import model as models
from tapfm.training import passes
from tests.tiny import random_tiles


def test_graphs_that_are_not_kept_now_are_kept_later(monkeypatch, capsys):
    """While the head learns alone no graph is held, and fewer of them would be no way out."""
    model_config = models.ModelConfig("demo_vit", "gated", ("A",), 32, 0.5)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=32))
    ours, real = passes.Passes(model, chunk=6, keep=2), passes.encode_bag

    def small(encode, chunks, **how):
        chunks = list(chunks)
        if len(chunks[0]) > 3:
            raise torch.OutOfMemoryError("no room for six")
        return real(encode, chunks, **how)

    monkeypatch.setattr(passes, "encode_bag", small)
    bag = Bag("s", "c", random_tiles(7), Places.unknown(7), torch.ones(1), seed=0)
    assert ours.encode(bag, adapting=False).kept == []
    assert (ours.chunk, ours.keep) == (3, 2)
    assert "graphs kept" not in capsys.readouterr().out
    assert len(ours.encode(bag).kept) == 2
