"""Many genes: both correlations, and which genes are significant at a false discovery rate."""

import numpy as np
import pytest
import torch
from scipy import stats

from tapfm.stats.outcomes import pearson, spearman
from tapfm.tasks import TaskError, learn_task
from tapfm.tasks.expression import RATE, over_genes, significant

SLIDES, GENES = 23, 9


def expression(seed=0):
    """Genes of different means, of which the first half can be predicted."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(SLIDES, GENES))
    y_NK = np.exp2(own + np.linspace(1, 5, GENES)) - 1
    said_NK = np.where(np.arange(GENES) < 4, own, rng.normal(size=own.shape)) + np.linspace(1, 5, 9)
    y_NK[2, 1] = y_NK[5, 3] = np.nan
    return np.maximum(y_NK, 0), np.exp2(said_NK) - 1


def task_of(y_NK, **options):
    names = [f"G{k}" for k in range(GENES)]
    return learn_task({"name": "expression", **options}, names, (), y_NK)


def test_both_correlations_and_the_rate_are_those_of_scipy():
    y_NK, said_NK = expression()
    found = task_of(y_NK, log=True).measure(y_NK, said_NK, np.ones((1, SLIDES)))
    log_y, log_said = np.log2(1 + y_NK), np.log2(1 + said_NK)
    p_K = []
    for k in range(GENES):
        known = ~np.isnan(y_NK[:, k])
        r, p = stats.spearmanr(y_NK[known, k], said_NK[known, k])
        p_K.append(p if r > 0 else 1.0)
        assert found[f"G{k}"]["spearman"][0] == pytest.approx(r, abs=1e-10)
        plain = stats.pearsonr(log_y[known, k], log_said[known, k])[0]
        assert found[f"G{k}"]["pearson"][0] == pytest.approx(plain, abs=1e-10)
    own = []
    for y, said in zip(log_y, log_said, strict=True):
        known = ~np.isnan(y)
        own.append(stats.pearsonr(y[known], said[known])[0])
    assert found["macro"]["pearson_over_genes"][0] == pytest.approx(np.mean(own), abs=1e-10)
    expected = (stats.false_discovery_control(p_K) <= RATE).mean()
    assert 0 < expected < 1
    assert found["macro"]["significant"][0] == pytest.approx(expected)


def test_the_mean_of_each_gene_scores_over_genes_and_not_over_slides():
    y_NK, _ = expression()
    mean_NK = np.broadcast_to(np.nanmean(y_NK, 0), y_NK.shape)
    found = task_of(y_NK, log=True).measure(y_NK, mean_NK, np.ones((1, SLIDES)))["macro"]
    assert found["pearson_over_genes"][0] > 0.6
    assert np.isnan(found["pearson"][0])
    assert np.isnan(found["significant"][0])


def test_over_genes_weighs_slides_by_how_often_they_are_drawn():
    y_NK, said_NK = expression()
    once = over_genes(y_NK, said_NK, np.eye(SLIDES), spearman)
    times_BN = np.random.default_rng(1).integers(0, 3, (4, SLIDES)).astype(float)
    expected = times_BN @ once / times_BN.sum(1)
    np.testing.assert_allclose(over_genes(y_NK, said_NK, times_BN, spearman), expected)
    constant = over_genes(y_NK, 0 * said_NK, np.ones((1, SLIDES)), pearson)
    assert np.isnan(constant).all()


def test_repeats_of_a_slide_are_no_evidence():
    r_BK, few, many = np.full((1, 5), 0.5), np.full((1, 5), 9.0), np.full((1, 5), 90.0)
    assert significant(r_BK, few)[0] == 0
    assert significant(r_BK, many)[0] == 1
    assert significant(-r_BK, many)[0] == 0
    y_NK, said_NK = expression()
    task = task_of(y_NK)
    plain = task.measure(y_NK, said_NK, np.ones((1, SLIDES)))["macro"]["significant"]
    ten = task.measure(y_NK, said_NK, np.full((1, SLIDES), 10.0))["macro"]["significant"]
    assert plain == ten


def test_the_loss_of_logarithms_by_hand():
    y_NK, _ = expression()
    task = task_of(y_NK, log=True)
    log_y = np.log2(1 + y_NK)
    assert task.mean == pytest.approx(tuple(np.nanmean(log_y, 0)))
    logits = torch.zeros(SLIDES, GENES, dtype=torch.float64)
    expected = np.nanmean(((log_y - np.nanmean(log_y, 0)) / np.nanstd(log_y, 0)) ** 2)
    found = task.loss().double()(logits, torch.tensor(y_NK)).item()
    assert found == pytest.approx(expected, rel=1e-6)  # constants are float32
    np.testing.assert_allclose(task.predict(logits)[0], np.exp2(task.mean) - 1)
    with pytest.raises(TaskError, match="log: true takes values of 0 or more"):
        task_of(y_NK - 5, log=True)
