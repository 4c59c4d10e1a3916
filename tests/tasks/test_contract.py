"""What every task keeps: it learns, predicts, is measured, is written down and gets a report.

A new task inherits these tests by its row in `TASKS`, and its targets by its row in `COLUMNS`.
`Counts` is such a task: nothing else of the program knows it, and it trains and is reported.
"""

import json
import math
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from slides.cohort.targets import (
    COLUMNS,
    Cells,
    Classes,
    Labels,
    Numbers,
    Times,
    make_columns,
    named_columns,
)
from tapfm.cli import main
from tapfm.reports.html.task_reports import REPORTS
from tapfm.reports.rows import ResultRow
from tapfm.slide_model import model as models
from tapfm.stats.outcomes import spearman, spread
from tapfm.tasks import TASKS, TaskError, learn_task, make_task, task_config, validation_figures
from tapfm.tasks.columns import ColumnTask
from tests.cohorts import write_cohort

NAN = math.nan
TABLES = {  # by kind of columns, as a cohort's table has them; the fourth slide is unknown
    Labels: {"A": ["1", "0", "1", "", "0", "1", "0", "0", "1", "0", "1", "0"],
             "B": ["0", "0", "1", "", "1", "0", "0", "0", "0", "1", "1", "0"]},
    Classes: {"kind": ["a", "b", "c", "", "b", "a", "c", "a", "a", "b", "c", "b"]},
    Numbers: {"x": ["1.5", "0", "2", "", "7", "3", "0.25", "5", "4", "9", "1", "8"],
              "y": ["3", "1", "12", "", "2", "6", "5", "0", "8", "10", "4", "7"]},
    Times: {"months": ["5", "10", "15", "", "25", "30", "35", "40", "12.5", "3", "8", "21"],
            "dead": ["1", "1", "0", "", "1", "0", "1", "1", "1", "1", "1", "0"]},
}  # fmt: skip
N, B = 12, 3


class PoissonLoss(nn.Module):
    def forward(self, logits_K, y_K):
        known_K = ~y_K.isnan()
        each_K = logits_K.exp() - y_K.nan_to_num(0.0).to(logits_K.dtype) * logits_K
        return (each_K * known_K).sum() / known_K.sum().clamp(min=1)


@dataclass(frozen=True)
class Counts(ColumnTask):
    """Counts, such as of mitoses: logits are logarithms of Poisson rates."""

    labels: tuple[str, ...]
    largest: float

    monitor: ClassVar = "spearman"
    title: ClassVar = "Spearman correlation"
    report: ClassVar = "values"
    chance: ClassVar = 0.0
    figures: ClassVar = {"spearman": spearman}
    weight_in_fold: ClassVar = spread

    @classmethod
    def learn(cls, names, classes, target_NY, *, largest=None):
        return cls(names, float(np.nanmax(target_NY)) if largest is None else largest)

    @property
    def predictions(self):
        return tuple(f"rate_{name}" for name in self.labels)

    def loss(self):
        return PoissonLoss()

    def predict(self, logits_NK):
        return logits_NK.exp()

    def format_target(self, target_Y):
        return ["" if np.isnan(value) else f"{value:g}" for value in target_Y]

    def strata(self, target_NY):
        return [(1.0, [np.flatnonzero(y_N == 0), np.flatnonzero(y_N > 0)]) for y_N in target_NY.T]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The two rows of a new task."""
    monkeypatch.setitem(TASKS, "counts", Counts)
    monkeypatch.setitem(COLUMNS, "counts", Numbers)


VARIANTS = {name: (name, {}) for name in (*TASKS, "counts")} | {
    "cox": ("survival", {"loss": "cox"}), "two bins": ("survival", {"bins": 2}),
    "cumulative": ("ordinal", {"loss": "cumulative"}),
    "ordered": ("ordinal", {"order": ["c", "a", "b"]}), "log": ("expression", {"log": True}),
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def known(request):
    """A task, the targets (N, Y) that it has learned from, and their cells in the table."""
    name, options = VARIANTS[request.param]
    table = TABLES[COLUMNS[name]]
    spec = {"name": name, **dict(zip(named_columns(name), table, strict=False)), **options}
    cells = [list(row) for row in zip(*table.values(), strict=True)]
    texts = Cells(list(table), dict(enumerate(cells)), dict.fromkeys(range(N), "train"))
    values = make_columns(spec).read(texts, ["train"])
    assert values.faults == []
    target_NY = np.array([values.rows[n] for n in range(N)])
    return learn_task(spec, list(table), values.classes, target_NY), target_NY, cells


def logits_of(task, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, len(task.labels), generator=generator, dtype=torch.float64)


def test_every_task_has_columns():
    assert TASKS.keys() == COLUMNS.keys()


def test_its_loss_is_finite_and_its_gradient_right(known):
    task, target_NY, _ = known
    loss, y_NY = task.loss().double().eval(), torch.tensor(target_NY)
    leaf = logits_of(task).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits_NK: loss(logits_NK, y_NY), leaf)
    (slope_NK,) = torch.autograd.grad(loss(leaf, y_NY), leaf)
    assert slope_NK.abs().sum() > 0
    assert slope_NK[3].abs().sum() == 0, "the unknown slide"
    for scale in (-60.0, 60.0):
        assert loss(torch.full_like(leaf, scale), y_NY).isfinite()
    assert loss(leaf[0], y_NY[0]).shape == loss(leaf, y_NY).shape == ()


def test_a_loss_with_memory_says_so(known):
    task, target_NY, _ = known
    loss, y_NY, logits = task.loss().train(), torch.tensor(target_NY).float(), logits_of(task)
    first = loss(logits[:6].float(), y_NY[:6])
    loss(logits[6:].float(), y_NY[6:])
    assert (loss(logits[:6].float(), y_NY[:6]) != first) == task.loss_has_memory


def test_of_the_unknown_nothing_is_learned(known):
    task, *_ = known
    leaf = logits_of(task)[0].float().requires_grad_()
    value = task.loss()(leaf, torch.full((task.width,), NAN))
    value.backward()
    assert value == 0
    assert leaf.grad.abs().sum() == 0


def test_less_loss_is_a_better_figure(known):
    """Free logits of each slide, moved down the loss, are ranked as the targets are."""
    task, target_NY, _ = known
    loss, y_NY = task.loss().double().eval(), torch.tensor(target_NY)
    leaf = logits_of(task).requires_grad_()

    def figure():
        return validation_figures(task, target_NY, task.predict(leaf).detach().numpy())[
            task.monitor
        ]

    before, optimizer = figure(), torch.optim.Adam([leaf], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(leaf, y_NY).backward()
        optimizer.step()
    assert before < 0.9 < figure()


def test_predictions_are_as_many_as_their_names(known):
    task, *_ = known
    logits = logits_of(task)
    said = task.predict(logits)
    assert said.shape == (N, len(task.predictions))
    assert len(set(task.predictions)) == len(task.predictions)
    assert said.isfinite().all()
    torch.testing.assert_close(task.predict(logits[0]), said[0])
    assert not set(task.predictions) & set(task.targets), "they share a file"


def test_a_target_is_written_as_the_table_has_it_and_read_back(known):
    task, target_NY, cells = known
    for target_Y, texts in zip(target_NY, cells, strict=True):
        assert task.format_target(target_Y) == texts
        assert len(texts) == len(task.targets)
        again = np.array(task.parse(texts))
        assert again.shape == (task.width,)
        np.testing.assert_array_equal(again[: len(texts)], target_Y[: len(texts)])
        assert task.format_target(again) == texts
    assert np.isnan(task.parse([""] * len(task.targets))).all()


def test_it_is_measured_by_group_and_draw(known):
    task, target_NY, _ = known
    said_NP = task.predict(logits_of(task)).numpy()
    times_BN = np.random.default_rng(0).integers(0, 3, (B, N)).astype(float)
    found = task.measure(target_NY, said_NP, times_BN)
    assert all(task.monitor in figures for figures in found.values())
    shapes = {value_B.shape for figures in found.values() for value_B in figures.values()}
    assert shapes == {(B,)}
    first, *others = found
    weights = task.fold_weights(target_NY, times_BN)
    assert list(weights) == (others or [first])
    for weight_B in weights.values():
        assert weight_B.shape == (B,)
        assert (weight_B >= 0).all()
    if others:
        each = np.array([found[group][task.monitor] for group in others])
        np.testing.assert_allclose(found[first][task.monitor], np.nanmean(each, 0), atol=1e-12)


def test_without_slides_its_figures_have_names_and_are_undefined(known):
    task, *_ = known
    figures = validation_figures(task)
    assert task.monitor in figures
    assert all(math.isnan(value) for value in figures.values())


@pytest.mark.parametrize("strange", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_has_no_figures(known, strange):
    """A nan would be ranked by its place in the table."""
    task, target_NY, _ = known
    said_NP = np.linspace(0.1, 0.9, N * len(task.predictions)).reshape(N, -1)
    assert not math.isnan(validation_figures(task, target_NY, said_NP)[task.monitor])
    said_NP[2, -1] = strange
    figures = validation_figures(task, target_NY, said_NP)
    assert figures.keys() == validation_figures(task).keys()
    assert all(math.isnan(value) for value in figures.values())


def test_strata_are_groups_of_slides_that_do_not_overlap(known):
    task, target_NY, _ = known
    families = task.strata(target_NY)
    assert families
    for weight, groups in families:
        assert weight > 0
        for one, other in combinations(map(set, groups), 2):
            assert not one & other
        inside = np.concatenate(groups)
        assert set(inside) <= set(range(N)) - {3}, "the unknown slide is in no group"
        assert len(inside) > N / 2


def test_a_saved_model_keeps_it(known):
    task, *_ = known
    kept = json.loads(json.dumps(task_config(task)))
    assert make_task(kept, list(task.labels)) == task


def test_without_weights_it_predicts_the_same(known):
    task, target_NY, _ = known
    plain = task.unweighted()
    assert (type(plain), plain.labels, plain.targets) == (type(task), task.labels, task.targets)
    assert plain.unweighted() == plain
    torch.testing.assert_close(plain.predict(logits_of(task)), task.predict(logits_of(task)))
    assert plain.loss()(logits_of(task), torch.tensor(target_NY)).isfinite()


def test_an_option_that_it_does_not_have_is_refused(known):
    task, target_NY, _ = known
    name = task_config(task)["name"]
    with pytest.raises(TaskError, match=rf"(?s)data\.task {name}: .*unknown lose; there"):
        learn_task({"name": name, "lose": 1}, task.targets, task.labels, target_NY)


def test_its_report_has_files_curves_and_slides(known, tmp_path):
    task, target_NY, _ = known
    slides = [f"s{n}" for n in range(N)]
    rows = [
        ResultRow(title, trained, slides, slides, target_NY,
                  task.predict(logits_of(task, seed)).numpy())
        for seed, (title, trained) in enumerate([("frozen", False), ("end to end", True)])
    ]  # fmt: skip
    report = REPORTS[task.report]
    text = report.write(tmp_path, "test", task, rows, [("s99", "damaged")], {})
    assert task.title in text or task.monitor in text
    assert "s99: damaged" in text
    assert (tmp_path / "report.md").stat().st_size > 500
    metrics = json.loads((tmp_path / "metrics_test.json").read_text())
    assert metrics["notes"][0].startswith(f"test split: {N} slides of {N} cases. Intervals: 95 %")
    assert not any("s99" in note for note in metrics["notes"]), "the page lists them apart"
    report.write(tmp_path / "two", "test", task, rows, [], {}, {slides[0]: 3})
    metrics = json.loads((tmp_path / "two" / "metrics_test.json").read_text())
    assert (metrics["slides"], metrics["cases"]) == (N + 2, N), "a case of three slides"
    facts = metrics["arms"]
    assert list(facts) == ["frozen", "end to end"]
    assert "<figure" in "".join(report.curves(task, rows))
    choice = report.choose(task, rows[1], facts["end to end"])
    assert choice.slides
    assert {case.kind for case in choice.slides} <= set(choice.kinds)
    assert {case.slide_id for case in choice.slides} <= set(slides) - {"s3"}


def test_a_new_task_trains_and_is_reported(tmp_path):
    config = write_cohort(tmp_path, task={"name": "counts"})
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1"]) == 0
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "0"]) == 0
    (best,) = (tmp_path / "runs").glob("*/best.safetensors")
    model_config, facts = models.read_model_config(best)
    assert model_config.task == {"name": "counts", "largest": 1.0}
    assert "val_spearman" in facts
    table = pd.read_csv(best.parent / "predictions_test.csv")
    assert (table[["rate_EGFR", "rate_KRAS"]] > 0).all(axis=None)
    report = tmp_path / "runs" / "report_test"
    arms = json.loads((report / "metrics_test.json").read_text())["arms"]
    assert len(arms) == 5
    assert all("spearman" in arm["figures"]["macro"] for arm in arms.values())
    assert "EGFR, predicted against true" in (report / "report.html").read_text()
