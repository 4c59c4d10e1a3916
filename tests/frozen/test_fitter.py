"""The fitter is a plain training loop, bit for bit, and inside a run it gives the same numbers.

Read `plain` first: it is the loop, with neither processes, views nor protection from its caller.
"""

import math
from copy import deepcopy

import lightning as L
import pytest
import torch

from tapfm.frozen.baselines import GatedAttention, MeanPoolMLP
from tapfm.frozen.fitter import Candidate, Recipe, Schedule, SeveralSlides, fit
from tapfm.frozen.frozen_slide import FrozenSlide, feature_statistics, standardise
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks import make_task
from tapfm.training.fit import read_config
from tests.bags import places
from tests.cohorts import write_cohort

TASK = make_task({"name": "multilabel"}, ("A", "B"))
MAKE = {
    "gated": lambda: make_aggregator("gated", 7, 2),
    "tapfm": lambda: make_aggregator("tapfm", 7, 2),
    "mean-pool MLP": lambda: MeanPoolMLP(7, 2, 5),
    "attention of several slides": lambda: GatedAttention(7, 2, 5),
}
RATES, EPOCHS, SEED = (3e-2, 1e-3), 4, 3


def slides(count, seed):
    """Slides of 5 to 8 tiles, the label in the first two features, one label in seven unknown."""
    drawn, found = torch.Generator().manual_seed(seed), []
    for n in range(count):
        target_Y = torch.tensor([n % 2, n // 2 % 2], dtype=torch.float32)
        z_TD = torch.randn(5 + n % 4, 7, generator=drawn)
        z_TD[:, :2] += target_Y
        target_Y[n % 2] = target_Y[n % 2] if n % 7 else torch.nan
        score_T = torch.randn(len(z_TD), generator=drawn)
        found.append(FrozenSlide.of(f"{n}", "", z_TD, target_Y, score_T, places(len(z_TD))))
    return found


def plain(make, train, val):
    """Return the model of the lowest validation loss, its rate and its epoch."""
    best, least, loss = None, math.inf, TASK.loss()
    for lr in RATES:
        torch.manual_seed(SEED)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
        for epoch in range(EPOCHS):
            model.train()
            for batch in torch.randperm(len(train)).split(8):
                optimizer.zero_grad()
                chosen = [train[n] for n in batch]
                if isinstance(model, SeveralSlides):
                    outputs = model.outputs([each.tiles for each in chosen])
                    logits_NK = torch.stack([each.logits_K for each in outputs])
                    loss(logits_NK, torch.stack([each.target_Y for each in chosen])).backward()
                else:
                    for each in chosen:
                        (model.loss(each.tiles, each.target_Y, loss) / len(chosen)).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                logits_NK = torch.stack([model(each.tiles).logits_K for each in val])
                value = loss(logits_NK, torch.stack([each.target_Y for each in val]))
            if value < least:
                best, least = (deepcopy(model), lr, epoch), value
    return best


def fitted(name, train, val, patience=EPOCHS):
    recipe = Recipe([Candidate(lr) for lr in RATES], Schedule(EPOCHS, patience), by_loss=True)
    return fit(lambda _: MAKE[name](), train, val, TASK, recipe, SEED)


def assert_same(one, other):
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", MAKE)
def test_it_is_a_plain_loop(name):
    train, val = slides(29, 1), slides(17, 2)
    model, lr, epoch = plain(MAKE[name], train, val)
    found = fitted(name, train, val)
    assert (found.chosen.lr, found.epoch) == (lr, epoch)
    assert_same(model, found.model)
    other, *_ = plain(MAKE[name], train[:-1], val)  # the comparison can fail
    assert not torch.equal(*(list(each.parameters())[-1] for each in (model, other)))


def test_without_validation_slides_the_last_epoch_is_kept_and_trained_in_place():
    train, model, loss = slides(11, 1), MAKE["gated"](), TASK.loss()
    before = deepcopy(model.state_dict())
    recipe = Recipe([Candidate(1e-2)], Schedule(3, 1))
    found = fit(lambda _: model, train, [], TASK, recipe, loss=loss)
    assert found.model is model
    assert found.epoch == 2
    assert math.isnan(found.figure)
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_statistics_count_every_slide_the_same():
    train = slides(9, 1)
    mean_D, std_D = feature_statistics(train)
    each = [slide.z_TD.double() for slide in train]
    expected_D = sum(z_TD.mean(0) for z_TD in each) / 9
    spread_D = sum((z_TD - expected_D).square().mean(0) for z_TD in each) / 9
    torch.testing.assert_close(mean_D, expected_D.float())
    torch.testing.assert_close(std_D, spread_D.sqrt().float())
    model = standardise(MAKE["gated"](), mean_D, std_D)
    torch.testing.assert_close(model.standardised(each[0]), (each[0] - mean_D) / std_D)


class Inside(L.Callback):
    """Fits after validation and at the epoch's end, where the run may do as it likes with torch."""

    def __init__(self):
        self.found = []

    def fit(self):
        before, threads = torch.get_rng_state(), torch.get_num_threads()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            self.found.append(fitted("attention of several slides", slides(29, 1), slides(17, 2)))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_num_threads() == threads

    def on_validation_epoch_end(self, trainer, module):
        self.fit()

    def on_train_epoch_end(self, trainer, module):
        self.fit()


def test_a_fit_inside_a_run_gives_the_numbers_of_one_outside(tmp_path):
    config = write_cohort(tmp_path, workers=0)
    cli = read_config(["--config", str(config), "--trainer.max_epochs", "1"])
    inside = Inside()
    cli.trainer.callbacks.append(inside)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    alone = fitted("attention of several slides", slides(29, 1), slides(17, 2))
    assert len(inside.found) == 2
    for each in inside.found:
        assert (each.epoch, each.loss, each.chosen) == (alone.epoch, alone.loss, alone.chosen)
        assert_same(each.model, alone.model)
