"""Two views of a slide: the second is drawn toward the first, in a step and in a run."""

import pandas as pd
import pytest
import torch

from slides.errors import SettingsError
from slides.streaming.order import repeated
from tapfm.cli import main
from tapfm.data.bag import Moment
from tapfm.regularisers.consistency import Consistency
from tapfm.slide_model.aggregators import make_aggregator
from tests.bags import tile_set
from tests.cohorts import write_cohort


def test_the_second_view_is_drawn_toward_the_first():
    aggregator = make_aggregator("mean", 3, 2)
    term = Consistency(0.5).build(aggregator)
    first, second = (tile_set(torch.randn(4, 3), torch.zeros(4)) for _ in range(2))
    moment = Moment(0.5, 1, 0, "s")
    value, figures = term(first, aggregator(first), moment)
    assert value.item() == figures["views_apart"].item() == 0
    value, figures = term(second, aggregator(second), moment)
    apart_K = aggregator(second).logits_K - aggregator(first).logits_K
    torch.testing.assert_close(value, apart_K.square().mean())
    assert figures["views_apart"].item() == pytest.approx(value.item() ** 0.5)
    value.backward()
    expected_KD = 2 * apart_K.detach()[:, None] / 2 * second.z_TD.mean(0)
    torch.testing.assert_close(
        aggregator.head.weight.grad, expected_KD, msg="the first is constant"
    )
    assert term(first, aggregator(first), moment)[0].item() == 0, "a pair is used once"


def test_a_slide_that_came_once_is_not_compared_later():
    aggregator = make_aggregator("mean", 3, 2)
    term = Consistency().build(aggregator)
    tiles = tile_set(torch.randn(4, 3), torch.zeros(4))
    for name in ("a", "b", "a"):
        assert term(tiles, aggregator(tiles), Moment(0.5, 1, 0, name))[0].item() == 0


def test_each_slide_comes_twice_in_a_row_with_other_tiles(tmp_path):
    config = write_cohort(tmp_path, views=2)
    own = ["--model.regularisers", "[{name: consistency, weight: 0.5}]"]
    assert main(["fit", "--config", str(config), *own]) == 0
    rows = pd.read_csv(next((tmp_path / "runs").iterdir()) / "metrics.csv")
    rows = rows.dropna(subset=["train/views_apart"])
    assert len(rows) == 3 * 2 * 7
    first, second = rows.iloc[::2], rows.iloc[1::2]
    assert first["slide_id"].tolist() == second["slide_id"].tolist()
    assert (first["train/views_apart"] == 0).all()
    assert (second["train/views_apart"] > 0).all()
    assert (first["train/loss"].to_numpy() != second["train/loss"].to_numpy()).all()


def test_several_processes_are_refused():
    with pytest.raises(SettingsError, match="views is 2, and 3 processes train"):
        repeated(5, None, 0, 2, 3)
    n, order = repeated(5, None, 0, 2, 1)
    assert n == 10
    assert order(0).tolist() == [each for each in order(0)[::2].tolist() for _ in range(2)]
    assert repeated(5, None, 0, 1, 3) == (5, None)
