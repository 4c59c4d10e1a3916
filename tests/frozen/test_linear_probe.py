"""The linear probe is scikit-learn's of the mean feature, for every task, chosen on validation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score

from tapfm.frozen.frozen_slide import FitError, FrozenSlide
from tapfm.frozen.linear_probe import STRENGTHS, fit_linear_probe
from tapfm.stats.metrics import auroc, macro_auroc
from tapfm.tasks import learn_task
from tapfm.tasks.multilabel import Multilabel

LABELS = ["A", "B"]
TIGHT = {"tol": 1e-10, "max_iter": 10_000}  # of the reference


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
        bags.append(FrozenSlide.of(f"s{n}", f"c{n}", z, y))
    return bags


def fit(train, val, **more):
    y = labels_of(train)
    weights = tuple((y == 0).sum(0) / np.maximum((y == 1).sum(0), 1))
    return fit_linear_probe(train, val, Multilabel(tuple(LABELS), weights), **more)


def with_features(slide, z_TD):
    return FrozenSlide.of(slide.slide_id, slide.case_id, z_TD, slide.target_Y)


def probs(probe, bags):
    return np.stack([probe.predict(bag)[0].numpy() for bag in bags])


def labels_of(bags):
    return np.stack([bag.target_Y.numpy() for bag in bags])


@pytest.fixture(scope="module")
def cohort():
    return [planted(slides, seed) for slides, seed in ((61, 1), (31, 2), (47, 3))]


def standardised(train, bags):
    """Mean features as the probe sees them, by numpy."""
    x, of = (np.stack([b.z_TD.mean(0).double().numpy() for b in part]) for part in (train, bags))
    return (of - x.mean(0)) / x.std(0)


def logits(probe, bags):
    return np.stack([probe.logits(bag)[0].numpy() for bag in bags])


def retarget(bags, target):
    """The same slides, with targets made of their number and of what is planted in them."""
    return [
        replace(bag, target_Y=torch.tensor(target(n, float(bag.z_TD[:, :2].mean()))))
        for n, bag in enumerate(bags)
    ]


def learned(spec, names, train, classes=()):
    return learn_task(spec, names, classes, labels_of(train))


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_labels_are_logistic_regression(cohort, strength):
    train, val, test = cohort
    probe = fit(train, val, strengths=[strength])
    y, x = labels_of(train), standardised(train, train)
    for k in range(2):
        known = ~np.isnan(y[:, k])
        weight = (y[known, k] == 0).sum() / (y[known, k] == 1).sum()
        model = LogisticRegression(C=strength, class_weight={0: 1, 1: weight}, **TIGHT)
        model.fit(x[known], y[known, k])
        expected = model.decision_function(standardised(train, test))
        np.testing.assert_allclose(logits(probe, test)[:, k], expected, atol=1e-4)
    assert macro_auroc(labels_of(test), probs(fit(train, val, strengths=[0.1]), test)) > 0.75


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_classes_are_multinomial_logistic_regression_with_the_tasks_weights(cohort, strength):
    def target(n, v):
        return [torch.nan if n % 9 == 0 else float(v > 3.2) + (n % 4 == 0)]

    train, val, test = (retarget(bags, target) for bags in cohort)
    task = learned("multiclass", ["grade"], train, ("low", "mid", "high"))
    probe = fit_linear_probe(train, val, task, strengths=[strength])
    y, x = labels_of(train)[:, 0], standardised(train, train)
    known = ~np.isnan(y)
    assert len(set(task.weight)) == 3
    weights = dict(enumerate(task.weight))
    model = LogisticRegression(C=strength, class_weight=weights, **TIGHT).fit(x[known], y[known])
    expected = model.predict_proba(standardised(train, test))
    np.testing.assert_allclose(probs(probe, test), expected, atol=1e-4)
    assert len(probe.chosen) == 1
    assert not np.allclose(expected, 1 / 3, atol=1e-3)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_values_are_ridge_regression_each_on_the_slides_where_it_is_known(cohort, strength):
    def target(n, v):
        return [torch.nan if n % 5 == 0 else 40 + 7 * v, torch.nan if n % 3 == 0 else n % 11 - v]

    train, val, test = (retarget(bags, target) for bags in cohort)
    task = learned("regression", ["TMB", "purity"], train)
    probe = fit_linear_probe(train, val, task, strengths=[strength])
    y, x = labels_of(train).astype(float), standardised(train, train)
    for k in range(2):
        known = ~np.isnan(y[:, k])
        mean, std = y[known, k].mean(), y[known, k].std()
        model = Ridge(alpha=1 / (2 * strength), solver="cholesky")
        model.fit(x[known], (y[known, k] - mean) / std)
        expected = model.predict(standardised(train, test)) * std + mean
        np.testing.assert_allclose(probs(probe, test)[:, k], expected, atol=1e-4)
    free = fit_linear_probe(train, val, task)
    assert free.chosen[0] != free.chosen[1]
    assert free.figure == pytest.approx(
        np.mean([r2_score(v[~np.isnan(v)], p[~np.isnan(v)])
                 for v, p in zip(labels_of(val).T, probs(free, val).T, strict=True)]), abs=1e-5
    )  # fmt: skip


def times(n, v):
    """Ties, a third censored, one in nine unknown."""
    if n % 9 == 0:
        return [torch.nan, torch.nan, float(n)]
    return [float(1 + (n * 7 + round(9 * v)) % 13), float(n % 3 > 0), float(n)]


@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_hazards_are_logistic_regressions_of_those_who_came_so_far(cohort, strength):
    train, val, test = (retarget(bags, times) for bags in cohort)
    task = learned({"name": "survival", "time": "t", "event": "e", "bins": 3}, ["t", "e"], train)
    probe = fit_linear_probe(train, val, task, strengths=[strength])
    (time, event, _), x = labels_of(train).T, standardised(train, train)
    last = np.searchsorted(task.edges, time, side="right")
    for j in range(3):
        here = ~np.isnan(time) & (last >= j)
        model = LogisticRegression(C=strength, **TIGHT)
        model.fit(x[here], (last[here] == j) & (event[here] == 1))
        expected = model.decision_function(standardised(train, test))
        np.testing.assert_allclose(logits(probe, test)[:, j], expected, atol=1e-4)


@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_cox_is_where_the_penalised_partial_likelihood_is_flat(cohort, strength):
    train, val, _ = (retarget(bags, times) for bags in cohort)
    spec = {"name": "survival", "time": "t", "event": "e", "loss": "cox"}
    probe = fit_linear_probe(train, val, learned(spec, ["t", "e"], train), strengths=[strength])
    (time, event, _), x = labels_of(train).T.astype(float), standardised(train, train)
    known, w = ~np.isnan(time), probe.weight_KD[0].double().numpy()
    slope = np.zeros(len(w))
    for i in np.flatnonzero(event == 1):
        at_risk = np.flatnonzero(time >= time[i])
        share = np.exp(x[at_risk] @ w)
        slope -= x[i] - share @ x[at_risk] / share.sum()
    data = slope / (event == 1).sum()
    np.testing.assert_allclose(data + w / (strength * known.sum()), 0, atol=1e-6)
    assert np.abs(data).max() > 1e-3, "not the trivial zero of both"
    assert probe.bias_K.abs() < 1e-12, "it cancels"


def test_validation_chooses_one_strength_for_logits_that_share_a_target(cohort):
    train, val, _ = (retarget(bags, times) for bags in cohort)
    spec = {"name": "survival", "time": "t", "event": "e", "loss": "cox"}
    task = learned(spec, ["t", "e"], train)
    probe = fit_linear_probe(train, val, task)
    each = [fit_linear_probe(train, val, task, strengths=[c]).figure for c in STRENGTHS]
    assert probe.figure == max(each)
    assert each[STRENGTHS.index(probe.chosen[0])] == max(each)
    assert f"concordance {max(each):.3f}" in probe.describe()


def test_validation_chooses_the_strength_of_each_label(cohort):
    train, val, _ = cohort
    probe = fit(train, val)
    y = labels_of(val)
    for k in range(2):
        each = [auroc(y[:, k], probs(fit(train, val, strengths=[c]), val)[:, k]) for c in STRENGTHS]
        assert each[STRENGTHS.index(probe.chosen[k])] == max(each)
    assert probe.figure == pytest.approx(macro_auroc(y, probs(probe, val)), abs=1e-6)
    assert f"{probe.figure:.3f}" in probe.describe()


def test_by_loss_every_case_that_a_fit_has_not_seen_has_a_say():
    """Validation and five folds of whole cases: the strengths of a loop over scikit-learn's fits.

    Three validation cases alone would choose others.
    """
    train = [replace(b, case_id=f"c{n // 2:02d}") for n, b in enumerate(planted(60, 1))]
    val, few = planted(9, 5), [0.001, 0.01, 0.1, 1.0]
    val = [replace(bag, case_id=f"v{n % 3}") for n, bag in enumerate(val)]
    probe, alone = fit_linear_probe(train, val, Multilabel(tuple(LABELS)), 0, few, True), []
    x, val_x = standardised(train, train), standardised(train, val)
    y, val_y = labels_of(train), labels_of(val)
    fold = np.array([int(bag.case_id[1:]) % 5 for bag in train])
    for k in range(2):
        known, val_known = ~np.isnan(y[:, k]), ~np.isnan(val_y[:, k])

        def unseen(strength, rest, at_x, at_y, k=k, known=known):
            model = LogisticRegression(C=strength, **TIGHT).fit(x[rest & known], y[rest & known, k])
            return np.logaddexp(0, -(2 * at_y - 1) * model.decision_function(at_x))

        both, validation = [], []
        for c in few:
            seen = [unseen(c, fold != f, x[(fold == f) & known], y[(fold == f) & known, k])
                    for f in range(5)]  # fmt: skip
            every = np.ones(len(x), bool)
            validation.append(unseen(c, every, val_x[val_known], val_y[val_known, k]).mean())
            both.append((3 * validation[-1] + 30 * np.concatenate(seen).mean()) / 33)
        assert probe.chosen[k] == few[int(np.argmin(both))]
        alone.append(few[int(np.argmin(validation))])
    assert list(probe.chosen) != alone


def test_seed_scale_and_a_constant_feature_do_not_matter(cohort):
    train, val, test = cohort

    def moved(bags):
        return [with_features(bag, torch.cat([bag.z_TD * 64 + 32, torch.ones(len(bag.z_TD), 1)], 1))
                for bag in bags]  # fmt: skip

    plain = fit(train, val)
    scaled = fit(moved(train), moved(val), seed=5)
    np.testing.assert_allclose(probs(plain, test), probs(scaled, moved(test)), atol=1e-3)


def test_labels_dealt_out_anew_teach_nothing(cohort):
    train, val, test = cohort
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    dealt = [replace(bag, target_Y=train[n].target_Y) for bag, n in zip(train, order, strict=True)]
    assert macro_auroc(labels_of(test), probs(fit(dealt, val), test)) < 0.7


def test_a_validation_split_of_one_class_falls_back_on_its_loss(cohort):
    train, val, _ = cohort
    one = [replace(bag, target_Y=torch.zeros(2)) for bag in val]
    assert np.isnan(fit(train, one).figure)


def test_bad_bags_are_named(cohort):
    train, val, _ = cohort
    single = [replace(bag, target_Y=torch.tensor([0.0, 1.0])) for bag in train]
    with pytest.raises(
        FitError, match="A: 61 known training slides, all 0; a probe needs two values"
    ):
        fit(single, val)
    with pytest.raises(ValueError, match=r"s0: .* one tile or more of 11 features"):
        fit(train, [with_features(val[0], val[0].z_TD[:, :3])])
