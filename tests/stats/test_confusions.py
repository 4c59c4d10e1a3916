"""Figures from counts are scikit-learn's, on slides repeated as often as a draw has them."""

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from tapfm.stats import confusions as module
from tapfm.stats.bootstrap import bootstrap_cases, once
from tapfm.stats.confusions import averages, confusions, f1s, recalls


def said_of(seed=0, slides=53):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, slides)
    return y, np.where(rng.random(slides) < 0.4, y, rng.integers(0, 4, slides))


@pytest.mark.parametrize("block", [1, 1000])
def test_every_draw_as_scikit_learn_says(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    y, said = said_of()
    times = bootstrap_cases([str(n // 2) for n in range(53)], draws=19, seed=1)
    tables = confusions(y, said, 4, times)
    found = averages(tables)
    for b, times_N in enumerate(times):
        rows = np.repeat(np.arange(53), times_N)
        assert (tables[b] == confusion_matrix(y[rows], said[rows], labels=range(4))).all()
        for name, expected in {
            "accuracy": accuracy_score(y[rows], said[rows]),
            "balanced_accuracy": balanced_accuracy_score(y[rows], said[rows]),
            "f1": f1_score(y[rows], said[rows], average="macro"),
            "weighted_f1": f1_score(y[rows], said[rows], average="weighted"),
        }.items():
            assert found[name][b] == pytest.approx(expected, abs=1e-12)


def test_each_class_as_scikit_learn_says():
    y, said = said_of(seed=2)
    tables = confusions(y, said, 4, once(y))
    expected = precision_recall_fscore_support(y, said)
    for ours, theirs in zip(
        (recalls(tables.swapaxes(1, 2)), recalls(tables), f1s(tables)), expected, strict=False
    ):
        assert ours[0] == pytest.approx(theirs, abs=1e-12)


def test_a_draw_that_lacks_a_class_has_no_average_but_an_accuracy():
    y, said = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 3])  # nothing is of class 3
    times = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [1, 0, 1, 1], [1, 1, 0, 1]])  # 1 is said there
    found = averages(confusions(y, said, 4, times))
    assert found["accuracy"] == pytest.approx([1 / 2, 1 / 2, 2 / 3, 1 / 3])
    assert found["balanced_accuracy"] == pytest.approx([1 / 2, np.nan, 2 / 3, np.nan], nan_ok=True)
    f1 = [(2 / 3 + 2 / 3) / 3, np.nan, 2 / 3, np.nan]
    assert found["f1"] == pytest.approx(f1, nan_ok=True)
    assert np.isnan(found["weighted_f1"][[1, 3]]).all()


def test_of_nothing_there_is_no_figure():
    nothing = np.empty(0, int)
    for figure in averages(confusions(nothing, nothing, 3, np.ones((2, 0)))).values():
        assert np.isnan(figure).all()
