"""Balanced orders give equal chances at every level, and depend only on seed and epoch.

Chances are counted over many epochs and compared with those of the tree; each bound is five
standard deviations of a binomial count.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from slides.cohort.table import SlideRow
from slides.errors import SettingsError
from slides.streaming.balance import balanced_order
from slides.streaming.order import SlideSampler
from tapfm.cli import main
from tapfm.evaluation import predicted_rows
from tapfm.frozen import warm_heads
from tapfm.recipe.best_weights import BestWeights
from tapfm.tasks import learn_task
from tapfm.training.fit import read_config
from tests.cohorts import write_cohort

EPOCHS = 400


def row(number, site, case):
    return SlideRow(case, f"s{number}", None, "train", None, "", site, ())


# site x: case a with slides 0, 1, 2 and case b with 3; site y: case c with 4; negatives: 5 to 11
ROWS = [row(0, "x", "a"), row(1, "x", "a"), row(2, "x", "a"), row(3, "x", "b"), row(4, "y", "c")]
ROWS += [row(n, "x", f"d{n}") for n in range(5, 12)]
POSITIVE, NEGATIVE = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]


def counted(families, rows=ROWS):
    order = balanced_order(rows, families, seed=1)
    return np.bincount(np.concatenate([order(e) for e in range(EPOCHS)]), minlength=len(rows))


def check(counts, chance):
    draws = counts.sum()
    for n, p in chance.items():
        assert abs(counts[n] - draws * p) < 5 * math.sqrt(draws * p * (1 - p)) + 1e-9, (n, p)


def test_every_level_is_even():
    """Half the draws are positive; half of those go to site y's only slide, an eighth to b's."""
    counts = counted([(1.0, [POSITIVE, NEGATIVE])])
    each = {0: 1 / 24, 1: 1 / 24, 2: 1 / 24, 3: 1 / 8, 4: 1 / 4}
    check(counts, each | dict.fromkeys(NEGATIVE, 1 / 14))


def test_families_have_the_chances_they_are_given():
    counts = counted([(3.0, [[0]]), (1.0, [[5], []])])
    check(counts, {0: 3 / 4, 5: 1 / 4, 1: 0, 11: 0})


def test_it_is_a_function_of_seed_and_epoch_alone():
    families = [(1.0, [POSITIVE, NEGATIVE])]
    one, other = (balanced_order(ROWS, families, seed=1) for _ in range(2))
    assert one(3).tolist() == other(3).tolist()
    assert one(3).tolist() != one(4).tolist()
    assert one(3).tolist() != balanced_order(ROWS, families, seed=2)(3).tolist()
    assert one(0).tolist() == KNOWN, "a change here changes what a given seed trains on"


KNOWN = [8, 8, 4, 4, 2, 4, 3, 4, 4, 8, 5, 11]


def test_nothing_known_is_refused():
    with pytest.raises(SettingsError, match="no slide has a known label"):
        balanced_order(ROWS, [(1.0, [[], []])], seed=0)


def test_a_resumed_epoch_is_the_rest_of_it_and_repeats_are_told_apart():
    order = balanced_order(ROWS, [(1.0, [POSITIVE, NEGATIVE])], seed=1)
    sampler = SlideSampler(len(ROWS), 1, order=order)
    whole = list(sampler)
    assert [turn.slide for turn in whole] == order(0).tolist()
    seen = [(turn.slide, turn.visit) for turn in whole]
    assert len(set(seen)) == len(seen)
    assert max(turn.visit for turn in whole) > 0
    sampler.trained(whole[4])
    again = SlideSampler(len(ROWS), 1, order=order)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == whole[5:]


def test_what_each_task_draws_from():
    y = np.array([[1, 0], [0, 1], [0, 0], [1, 0], [0, np.nan], [1, 0]], float)
    task = learn_task("multilabel", ["A", "B"], (), y)
    (chance, groups), (rarer, _) = task.strata(y)
    assert rarer / chance == pytest.approx(math.sqrt(3)), "B has one positive, A three"
    assert [group.tolist() for group in groups] == [[0, 3, 5], [1, 2, 4]]
    assert task.unweighted().loss().pos_weight_K.tolist() == [1, 1]
    kind = np.array([[0], [1], [1], [np.nan]])
    task = learn_task("multiclass", ["k"], ("a", "b"), kind)
    assert [group.tolist() for group in task.strata(kind)[0][1]] == [[0], [1, 2]]
    assert task.unweighted().loss().weight_K.tolist() == [1, 1]
    value = np.array([[5.0], [1], [np.nan], [3], [2]])
    ((_, quarters),) = learn_task("regression", ["v"], (), value).strata(value)
    assert [group.tolist() for group in quarters] == [[1], [4], [3], [0]]


def test_a_run_draws_by_it(tmp_path):
    """A slide that comes again shows other tiles; the loss has no weights in addition."""
    config = write_cohort(tmp_path, sampler="balanced", tiles_per_slide=3)
    data = read_config(["--config", str(config)]).datamodule
    data.prepare_data()
    loader, rows = data.train_dataloader(), data.rows("train")
    order = balanced_order(rows, data.task.strata(np.array([r.labels for r in rows])), data.seed)
    assert data.task.pos_weight == ()
    for epoch in range(2):
        data.sampler.set_epoch(epoch)
        bags = list(loader)
        assert [bag.turn.slide for bag in bags] == order(epoch).tolist()
        again = [bag for bag in bags if bag.turn.visit]
        assert again, "this seed has a slide come twice"
        for bag in again:
            first = next(each for each in bags if each.slide_id == bag.slide_id)
            assert not torch.equal(first.tiles, bag.tiles)


def test_frozen_rows_and_head_start_weigh_what_they_do_not_draw(tmp_path, monkeypatch):
    """They use every slide equally often, so their loss is weighted like the run's."""
    config, tasks, offered = write_cohort(tmp_path, sampler="balanced"), [], []

    def noting(fit):
        def noted(*given, **more):
            tasks.extend(each for each in given if hasattr(each, "pos_weight"))
            return fit(*given, **more)

        return noted

    monkeypatch.setattr(warm_heads, "solve_head", noting(warm_heads.solve_head))
    monkeypatch.setattr(warm_heads, "fit_attention", noting(warm_heads.fit_attention))
    rows = [(*row, noting(fit)) for *row, fit in predicted_rows.FROZEN_ROWS]
    monkeypatch.setattr(predicted_rows, "FROZEN_ROWS", rows)
    offer = BestWeights.offer
    monkeypatch.setattr(BestWeights, "offer", lambda *a, **k: offered.append(a) or offer(*a, **k))
    still = ["--model.steps.encoder_lr", "0", "--model.steps.head_lr", "1e-12"]
    start = ["--model.steps.warm_start", "true", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(config), *still, *start]) == 0
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "0"]) == 0
    assert [task.pos_weight for task in tasks] == 6 * [(4 / 3, 2.0)]
    figures = pd.read_csv(tmp_path / "runs" / "tapfm_gated" / "metrics.csv")
    assert offered[0][3] == pytest.approx(figures["val/loss"].dropna().item(), abs=1e-6)
