"""Distance to the frozen features by hand, and what a run keeps of them."""

import pandas as pd
import pytest
import torch

from tapfm.cli import main
from tapfm.data.bag import Moment
from tapfm.regularisers.anchor import Anchor
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tests.bags import tile_set
from tests.cohorts import write_cohort


def test_the_distance_is_in_spreads_of_the_frozen_features():
    aggregator = make_aggregator("mean", 3, 1)
    anchor = Anchor(0.5).build(aggregator)
    z_TD = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]], requires_grad=True)
    tiles = tile_set(z_TD, torch.zeros(2))
    anchor.see_frozen(["s"], [torch.tensor([0.0, 2.0, 2.0])], torch.tensor([2.0, 1.0, 4.0]))
    value, figures = anchor(tiles, aggregator(tiles), Moment(0.5, 1, 0, "s"))
    expected = ((2 - 0) / 2) ** 2 / 3 + ((4 - 2) / 4) ** 2 / 3
    assert value.item() == pytest.approx(expected)
    assert figures["anchor_distance"].item() == pytest.approx(expected**0.5)
    value.backward()
    assert z_TD.grad[0].tolist() == pytest.approx([2 * 2 / 4 / 3 / 2, 0, 2 * 2 / 16 / 3 / 2])
    unknown, _ = anchor(tiles, aggregator(tiles), Moment(0.5, 1, 0, "another"))
    assert unknown.item() == 0
    assert anchor.weight(Moment(0.9, 1, 0)) == 0.5


def test_a_weight_below_0_is_refused():
    with pytest.raises(SettingsError, match="anchor: weight must be 0 or more, got -1"):
        Anchor(-1)


def test_a_run_holds_its_encoder_nearer_and_resumes_with_what_it_saw(tmp_path):
    config = write_cohort(tmp_path, turns=False, colour=0.0, tiles_per_slide=None)
    last = {}
    for name, weight in (("free", 0), ("held", 30)):
        fit = ["fit", "--config", str(config), "--name", name, "--model.drop_path", "0",
               "--model.regularisers", f"[{{name: anchor, weight: {weight}}}]"]  # fmt: skip
        assert main(fit) == 0
        run = tmp_path / "runs" / name
        distances = pd.read_csv(run / "metrics.csv")["train/anchor_distance"].dropna()
        assert distances.iloc[0] < 1e-3, "all tiles, as they are: the frozen encoder itself"
        last[name] = distances.iloc[-7:].mean()
        kept = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
        state = kept["objective.regularisers.anchor._extra_state"]
        assert len(state["frozen"]) == 7
    assert 0 < last["held"] < 0.8 * last["free"]
