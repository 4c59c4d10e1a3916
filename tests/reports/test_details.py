"""Details of a row: chosen on validation, reported on test, without small groups."""

import math

import numpy as np
import pytest

from tapfm.reports.details import FEW_CASES, row_details, sections
from tapfm.stats.bootstrap import interval, with_point
from tapfm.stats.calibration import ece, fit_platt, fit_temperature, reliability
from tapfm.stats.delong import delong, delong_difference
from tapfm.stats.metrics import auroc_draws
from tapfm.stats.thresholds import choose_threshold, figures_at

LABELS = ["A", "B"]
DRAWS = 61


def cohort(slides=83, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random((slides, 2)) < 0.45).astype(float)
    p = 1 / (1 + np.exp(-2 * y + 1 - rng.standard_normal(y.shape)))
    y[rng.random(y.shape) < 0.08] = np.nan
    return y, p, [f"c{n // 2}" if n < 20 else f"d{n}" for n in range(slides)]


@pytest.fixture(scope="module")
def found():
    y, p, cases = cohort()
    sites = ["north" if n % 3 else "south" for n in range(len(y))]
    sites[:4] = ["tiny"] * 4
    groups = {"site": sites, "stain": ["HE"] * len(y)}
    val = cohort(41, seed=1)[:2]
    other = cohort(seed=2)[1]
    return row_details(
        LABELS, y, p, cases, validation=val, reference_NK=other, groups=groups, draws=DRAWS, seed=3
    )


def test_thresholds_come_from_validation_and_figures_from_the_split(found):
    y, p, cases = cohort()
    val = cohort(41, seed=1)
    times = with_point(cases, DRAWS, 3)
    for k, label in enumerate(LABELS):
        threshold = choose_threshold(val[0][:, k], val[1][:, k], "specificity_90")
        point = found["operating_points"][label]["specificity_90"]
        assert point["threshold"] == threshold
        expected = figures_at(threshold, y[:, k], p[:, k], times)["sensitivity"]
        assert point["sensitivity"] == interval(expected)
    macro = found["operating_points"]["macro"]
    assert macro["labels"] == LABELS
    each = [found["operating_points"][label]["balanced"]["f1"].value for label in LABELS]
    assert macro["balanced"]["f1"].value == pytest.approx(np.mean(each))


def test_calibration_is_fitted_on_validation_alone(found):
    y, p, _ = cohort()
    val = cohort(41, seed=1)
    for k, label in enumerate(LABELS):
        one = found["calibration"][label]
        for name, fit in (("temperature", fit_temperature), ("platt", fit_platt)):
            scaling = fit(val[0][:, k], val[1][:, k])
            assert one[name]["slope"] == scaling.slope
            assert one[name]["ece"] == ece(reliability(y[:, k], scaling(p[:, k])))
        assert one["raw"]["ece"] == ece(reliability(y[:, k], p[:, k]))


def test_delong_takes_cases_together_and_compares_with_the_reference(found):
    y, p, cases = cohort()
    other = cohort(seed=2)[1]
    one = found["delong"]["A"]
    assert one["se"] == delong(y[:, 0], p[:, 0], cases).se
    assert one["p"] == delong_difference(y[:, 0], p[:, 0], other[:, 0], cases).p
    assert one["positive_cases"] == len({c for c, v in zip(cases, y[:, 0], strict=True) if v == 1})


def test_groups_have_counts_and_small_ones_no_figure(found):
    y, p, cases = cohort()
    sites = found["subgroups"]["site"]
    assert "stain" not in found["subgroups"]  # one stain only is no group
    assert sites["tiny"]["slides"] == 4
    assert sites["tiny"]["labels"]["A"]["auroc"] is None
    own = np.array([n % 3 > 0 and n >= 4 for n in range(len(y))])
    names = [case for case, inside in zip(cases, own, strict=True) if inside]
    north = sites["north"]["labels"]["B"]
    assert north["positive_cases"] >= FEW_CASES
    expected = auroc_draws(y[own, 1], p[own, 1], with_point(names, DRAWS, 3))
    assert north["auroc"] == interval(expected)
    assert sum(each["slides"] for each in sites.values()) == len(y)


def test_without_validation_nothing_is_made_up():
    y, p, cases = cohort()
    y[:, 1] = 0
    found = row_details(LABELS, y, p, cases, draws=DRAWS)
    assert found["operating_points"] is None
    assert found["calibration"]["A"]["temperature"] is None
    assert found["calibration"]["A"]["raw"]["ece"] > 0
    assert found["subgroups"] == {}
    assert math.isnan(found["delong"]["B"]["se"])
    assert found["delong"]["A"]["difference"] is None
    val = cohort(41, seed=1)[:2]
    points = row_details(LABELS, y, p, cases, validation=val, draws=DRAWS)["operating_points"]
    assert points["macro"]["labels"] == ["A"]
    assert math.isnan(points["B"]["f1"]["f1"].value)


def test_sections_say_what_was_found(found):
    text = sections(LABELS, {"frozen": found, "tap|fm": found})
    for part in ("## Yes or no", "## Calibration", "## DeLong", "## By site"):
        assert part in text
    assert f"{found['operating_points']['A']['balanced']['threshold']:.3f}" in text
    north = found["subgroups"]["site"]["north"]["labels"]["B"]["auroc"]
    assert f"{north.value:.3f} [{north.low:.3f}, {north.high:.3f}]" in text
    counts = found["subgroups"]["site"]["tiny"]["labels"]["A"]
    assert f"{counts['positive_cases']}/{counts['negative_cases']} |  |  |" in text
    for table in text.split("## ")[1:]:
        rows = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1
    alone = sections(LABELS, {"frozen": row_details(LABELS, *cohort(), draws=DRAWS)})
    assert "## Yes or no" not in alone
