"""AEM is negative entropy of the tile weights, least where they are uniform."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.data.bag import Moment
from tapfm.regularisers.aem import Aem, AttentionEntropy
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import SlideOutput

START = Moment(0.0, 0, seed=0)
PLAIN = Aem(normalise=False)


def term_of(options, logits):
    """Return R and the logged entropy of tile weights softmax(logits), (T,) or (K, T)."""
    weights_T = torch.atleast_2d(logits.softmax(-1)).mean(0)
    output = SlideOutput(torch.zeros(1), weights_T, torch.zeros(1), logits.log_softmax(-1))
    value, figures = AttentionEntropy(options)(None, output, START)
    return value, figures["attention_entropy"]


def logits_of(*shape, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=drawn, dtype=torch.float64)


def by_hand(logits, top=None):
    """Return R of the paper in numpy: mean over rows of sum a log a, of the largest `top`."""
    rows = []
    for row in np.atleast_2d(logits.numpy()):
        kept = np.exp(np.sort(row)[::-1][:top])
        a = kept / kept.sum()
        rows.append((a * np.log(a)).sum())
    return np.mean(rows)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7)])
@pytest.mark.parametrize("top", [0, 1, 4, 7, 100])
def test_the_value_by_hand(shape, top):
    logits = logits_of(*shape)
    expected = by_hand(logits, top or None)
    value, share = term_of(replace(PLAIN, top=top), logits)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert share.item() == pytest.approx(-by_hand(logits) / math.log(7), abs=1e-12)
    by_log = expected / math.log(max(min(top or 7, 7), 2))
    assert term_of(Aem(top=top), logits)[0].item() == pytest.approx(by_log, abs=1e-12)


def test_top_of_all_tiles_is_the_base_and_of_fewer_is_not():
    logits = logits_of(2, 7)
    base = term_of(PLAIN, logits)[0]
    assert torch.equal(term_of(replace(PLAIN, top=7), logits)[0], base)
    assert torch.equal(term_of(replace(PLAIN, top=8), logits)[0], base)
    assert not torch.isclose(term_of(replace(PLAIN, top=6), logits)[0], base)


@pytest.mark.parametrize("options", [Aem(), PLAIN, Aem(top=4)])
def test_uniform_attention_is_the_minimum(options):
    logits = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    least, share = term_of(options, logits)
    least.backward()
    assert logits.grad.abs().max() < 1e-12
    assert share.item() == pytest.approx(1)
    if options.normalise:
        assert least.item() == pytest.approx(-1)
    for seed in range(20):
        assert term_of(options, 0.1 * logits_of(7, seed=seed))[0] > least


def test_a_step_moves_attention_from_the_heaviest_tile_to_the_lightest():
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    term_of(PLAIN, logits)[0].backward()
    assert logits.grad[0] > 0
    assert logits.grad[2] < 0
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_60_either_way_stay_finite(dtype, top):
    logits = torch.tensor([60.0, -60.0, 60.0, -60.0, 0.0], dtype=dtype, requires_grad=True)
    value, share = term_of(Aem(top=top), logits)
    value.backward()
    assert value.item() == pytest.approx(-math.log(2) / math.log(top or 5), abs=1e-5)
    assert share.isfinite()
    assert logits.grad.isfinite().all()


def test_the_weight_falls_from_start_to_end_on_a_cosine():
    term = AttentionEntropy(Aem(weight=0.2, end=0.05, until=0.5))
    at = [term.weight(replace(START, progress=progress)) for progress in (0, 0.125, 0.25, 0.5, 1)]
    quarter = 0.05 + 0.15 * (1 + math.sqrt(0.5)) / 2
    assert at == pytest.approx([0.2, quarter, 0.125, 0.05, 0.05])
    assert AttentionEntropy(Aem(weight=0.2, until=0.0)).weight(START) == pytest.approx(0.01)
    assert AttentionEntropy(Aem(weight=0.0)).weight(START) == 0, "off is off, whatever `end` is"


def test_it_is_refused_where_weights_do_not_learn_and_with_numbers_that_cannot_be():
    with pytest.raises(SettingsError, match="aem is of tile weights that learn"):
        Aem().build(make_aggregator("transmil", 8, 1))
    with pytest.raises(SettingsError, match=r"weight must be 0 or more, got -1(.|\n)*until must"):
        Aem(weight=-1.0, until=2.0)
