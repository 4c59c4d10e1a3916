"""The linear probe is logistic regression of the mean feature, chosen on validation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tapfm.baselines import FeatureBag
from tapfm.linear_probe import STRENGTHS, fit_linear_probe
from tapfm.metrics import auroc, macro_auroc
from tapfm.tasks.multilabel import Multilabel

LABELS = ["A", "B"]


def planted(slides, seed, dim=11, shift=0.7):
    """Label A moves feature 0 of every tile, label B feature 1; some labels are unknown."""
    generator = torch.Generator().manual_seed(seed)
    bags = []
    for n in range(slides):
        y = torch.tensor([n % 2, (n // 2) % 3 == 0], dtype=torch.float32)
        z = 3 + torch.randn(5 + n % 3, dim, generator=generator)
        z[:, :2] += shift * y + 0.5 * torch.randn(2, generator=generator)
        if n % 7 == 0:
            y[n % 2] = torch.nan
        bags.append(FeatureBag(f"s{n}", f"c{n}", z, y))
    return bags


def fit(train, val, **more):
    y = labels_of(train)
    weights = tuple((y == 0).sum(0) / np.maximum((y == 1).sum(0), 1))
    return fit_linear_probe(train, val, Multilabel(tuple(LABELS), weights), **more)


def said(probe, bags):
    return np.stack([probe.predict(bag)[0].numpy() for bag in bags])


def labels_of(bags):
    return np.stack([bag.y_K.numpy() for bag in bags])


@pytest.fixture(scope="module")
def cohort():
    return [planted(slides, seed) for slides, seed in ((61, 1), (31, 2), (47, 3))]


def test_it_is_logistic_regression_of_the_standardised_mean(cohort):
    train, val, test = cohort
    probe = fit(train, val, strengths=[0.1])
    x, xt = (np.stack([b.z_TD.mean(0).double().numpy() for b in part]) for part in (train, test))
    mean, std = x.mean(0), x.std(0)
    y = labels_of(train)
    for k in range(2):
        known = ~np.isnan(y[:, k])
        weight = (y[known, k] == 0).sum() / (y[known, k] == 1).sum()
        model = LogisticRegression(C=0.1, class_weight={0: 1, 1: weight}, tol=1e-8)
        model.fit((x[known] - mean) / std, y[known, k])
        expected = model.predict_proba((xt - mean) / std)[:, 1]
        np.testing.assert_allclose(said(probe, test)[:, k], expected, atol=1e-3)
    assert macro_auroc(labels_of(test), said(probe, test)) > 0.75


def test_validation_chooses_the_strength_of_each_label(cohort):
    train, val, _ = cohort
    probe = fit(train, val)
    y = labels_of(val)
    for k in range(2):
        each = [auroc(y[:, k], said(fit(train, val, strengths=[c]), val)[:, k]) for c in STRENGTHS]
        assert each[STRENGTHS.index(probe.chosen[k])] == max(each)
    assert probe.val_score == pytest.approx(macro_auroc(y, said(probe, val)), abs=1e-6)
    assert f"{probe.val_score:.3f}" in probe.describe()


def test_seed_scale_and_a_constant_feature_do_not_matter(cohort):
    train, val, test = cohort

    def moved(bags):
        return [replace(bag, z_TD=torch.cat([bag.z_TD * 64 + 32, torch.ones(len(bag.z_TD), 1)], 1))
                for bag in bags]  # fmt: skip

    plain = fit(train, val)
    scaled = fit(moved(train), moved(val), seed=5)
    np.testing.assert_allclose(said(plain, test), said(scaled, moved(test)), atol=1e-3)


def test_labels_dealt_out_anew_teach_nothing(cohort):
    train, val, test = cohort
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    dealt = [replace(bag, y_K=train[n].y_K) for bag, n in zip(train, order, strict=True)]
    assert macro_auroc(labels_of(test), said(fit(dealt, val), test)) < 0.7


def test_a_validation_split_of_one_class_falls_back_on_its_loss(cohort):
    train, val, _ = cohort
    one = [replace(bag, y_K=torch.zeros(2)) for bag in val]
    assert np.isnan(fit(train, one).val_score)


def test_bad_bags_are_named(cohort):
    train, val, _ = cohort
    single = [replace(bag, y_K=torch.tensor([0.0, 1.0])) for bag in train]
    with pytest.raises(ValueError, match="A: 0 known positive and 61 known negative"):
        fit(single, val)
    with pytest.raises(ValueError, match=r"s0: .* one tile or more of 11 features"):
        fit(train, [replace(val[0], z_TD=val[0].z_TD[:, :3])])
