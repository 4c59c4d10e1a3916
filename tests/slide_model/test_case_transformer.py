"""The case transformer against torch's own attention; slides have no order."""

import pytest
import torch

from slides.errors import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.case_transformer import CaseTransformer, Slides
from tests.bags import tile_set
from tests.transformer_layers import through

COUNTS, D, K, WIDTH, HEADS = (8, 5, 3), 7, 3, 8, 2
T = sum(COUNTS)


def made(**options):
    torch.manual_seed(1)
    spec = {"name": "case_transformer", "width": WIDTH, "heads": HEADS, **options}
    return make_aggregator(spec, D, K).double()


def tiles(rows=None, counts=COUNTS):
    z_TD = 3 * torch.randn(T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_TD = z_TD if rows is None else z_TD[rows]
    return tile_set(z_TD, torch.zeros(len(z_TD)).double(), counts)


def by_hand(a, bag):
    """Return logits and tile weights, a slide at a time, by torch's multi-head attention."""
    within = [a.gate(z).softmax(0) for z in bag.z_TD.split(COUNTS)]
    slides = [w @ z for w, z in zip(within, bag.z_TD.split(COUNTS), strict=True)]
    x = torch.stack([a.case.token_W, *(a.project(slide) for slide in slides)])[:, None]
    x, looked = through(a.case.layers, x, HEADS)
    share = looked[0, :, 0, 1:]  # of the case token, a row a head
    share = (share / share.sum(1, keepdim=True)).mean(0)
    weights = torch.cat([s * w for s, w in zip(share, within, strict=True)])
    return a.head(a.case.norm(x[0, 0])), weights


def test_the_whole_by_hand():
    output, (logits, weights) = made()(tiles()), by_hand(made(), tiles())
    torch.testing.assert_close(output.logits_K, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.weights_T, weights, rtol=0, atol=1e-10)
    far = by_hand(made(scale=1.0), tiles())[0]
    assert (far - logits).abs().max() > 1e-3, "so that the above can fail"


def test_the_order_of_slides_does_not_matter_and_their_bounds_do():
    """MOOZY gives no positions; a slide's tiles are pooled apart from the others'."""
    rows = torch.tensor([*range(13, 16), *range(8), *range(8, 13)])
    output, mixed = made()(tiles()), made()(tiles(rows, (3, 8, 5)))
    torch.testing.assert_close(mixed.logits_K, output.logits_K, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed.weights_T, output.weights_T[rows], rtol=0, atol=1e-12)
    other = made()(tiles(None, (5, 8, 3)))
    assert (other.logits_K - output.logits_K).abs().max() > 1e-5


def test_a_slides_token_depends_on_the_others():
    slides_SW = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    token_W, log_share_S = made().case(slides_SW)
    assert log_share_S.exp().sum().item() == pytest.approx(1)
    grad_SW = torch.autograd.grad(token_W[0], slides_SW)[0]
    assert grad_SW.any(1).all()


def test_the_number_of_parameters_is_the_published_one():
    """21.3 M in 3 layers of width 768; what the case token adds is in it."""
    width = 768
    options = CaseTransformer(width, layers=3, heads=12)
    count = sum(p.numel() for p in Slides(options).parameters())
    layer = 12 * width**2 + 9 * width + 4 * width + 2 * width
    assert count == 3 * layer + width + 2 * width
    assert round(count / 1e6, 1) == 21.3


def test_options_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError, match=r"multiple of heads, got 8 and 3(.|\n)*scale must be"):
        made(heads=3, scale=0.0)
