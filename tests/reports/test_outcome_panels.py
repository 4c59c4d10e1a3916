"""Panels of classes, values and times draw the right numbers: read back from the axis."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import chi2

from tapfm.reports.html.outcome_panels import (
    confusion,
    risk_by_case,
    time_axis,
    value_axis,
)
from tapfm.reports.html.task_reports import REPORTS
from tapfm.reports.outcome_report import write_outcomes
from tapfm.reports.rows import ResultRow
from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.regression import Regression
from tapfm.tasks.survival import Survival

NAN = float("nan")
TIMES = Survival(("h",), "months", "dead", (), 5.0, "cox")


def arm(y, p, cases=None, title="a"):
    slides = [f"s{n}" for n in range(len(y))]
    return ResultRow(title, True, slides, cases or slides, np.array(y, float), np.array(p, float))


def survival_arm(seed=0, cases=40):
    rng = np.random.default_rng(seed)
    time, event = np.round(rng.exponential(8, cases)) + 1, (rng.random(cases) < 0.6).astype(float)
    time[3] = event[3] = NAN
    risk = -time + rng.standard_normal(cases) * 6
    return arm(np.c_[time, event, np.full(cases, NAN)], np.nan_to_num(risk)[:, None])


def kaplan_meier(time, event, at):
    """The product over event times, by its definition."""
    share = 1.0
    for t in np.unique(time[(event == 1) & (time <= at)]):
        share *= 1 - (event[time == t]).sum() / (time >= t).sum()
    return share


def log_rank(groups):
    """p of the usual chi-square of one degree of freedom."""
    time, event = (np.concatenate(each) for each in zip(*groups, strict=True))
    in_first = np.arange(len(time)) < len(groups[0][0])
    gap = variance = 0.0
    for t in np.unique(time[event == 1]):
        risk, died = time >= t, (time == t) & (event == 1)
        n, n1, d = risk.sum(), (risk & in_first).sum(), died.sum()
        gap += (died & in_first).sum() - d * n1 / n
        if n > 1:
            variance += d * (n1 / n) * (1 - n1 / n) * (n - d) / (n - 1)
    return chi2.sf(gap**2 / variance, 1)


def test_numbers_are_written_before_pictures(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2\n")
    one, out = replace(survival_arm(), metrics_csv=tmp_path / "metrics.csv"), tmp_path / "report"
    monkeypatch.setattr("tapfm.reports.outcome_report.save_figure", None)
    with pytest.raises(TypeError):
        write_outcomes(out, "test", TIMES, [one], draws=9)
    written = sorted(path.name for path in out.iterdir())
    assert written == ["metrics_test.json", "predictions_test.csv"]


def test_curves_are_kaplan_meiers_and_p_is_the_log_rank_tests():
    one, axis = survival_arm(), Figure().subplots()
    time_axis(axis, TIMES, one)
    known = ~np.isnan(one.y_NK[:, 0])
    time, event, risk = one.y_NK[known, 0], one.y_NK[known, 1], one.p_NK[known, 0]
    high = risk >= np.median(risk)
    groups = [(time[each], event[each]) for each in (high, ~high)]
    curves, ticks = axis.lines[::2], axis.lines[1::2]
    for (own_time, own_event), curve, tick in zip(groups, curves, ticks, strict=True):
        assert curve.get_drawstyle() == "steps-post"
        x, y = curve.get_data()
        assert (x[0], y[0]) == (0, 1)
        assert x[-1] == own_time.max()
        for at in np.linspace(0, own_time.max(), 50):
            drawn = y[np.searchsorted(x, at, side="right") - 1]
            assert drawn == pytest.approx(kaplan_meier(own_time, own_event, at), abs=1e-12)
        np.testing.assert_array_equal(np.sort(tick.get_xdata()), np.sort(own_time[own_event == 0]))
    p = log_rank(groups)
    assert axis.get_legend().get_title().get_text() == f"log-rank p = {p:.2g}"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        f"higher risk, {high.sum()} cases", f"lower risk, {(~high).sum()} cases"
    ]  # fmt: skip


def test_slides_of_a_case_are_one_of_their_mean_risk():
    y = [[5, 1, NAN], [5, 1, NAN], [9, 0, NAN], [NAN, NAN, NAN]]
    one = arm(y, [[1], [4], [2], [7]], ["c", "c", "b", "a"])
    time, event, risk = risk_by_case(one)
    assert (time.tolist(), event.tolist(), risk.tolist()) == ([9, 5], [0, 1], [2, 2.5])


def test_without_events_there_is_no_test():
    axis = Figure().subplots()
    time_axis(axis, TIMES, arm([[3, 0, 0], [4, 0, 0]], [[1], [2]]))
    assert axis.get_legend().get_title().get_text() == "log-rank p: undefined"
    axis = Figure().subplots()
    time_axis(axis, TIMES, arm([[NAN] * 3] * 2, [[1], [2]]))
    assert not axis.lines


def test_who_is_still_seen_is_counted():
    html = "".join(REPORTS["times"].curves(TIMES, [survival_arm(), survival_arm(1)]))
    assert html.count("<figure") == 2
    one = survival_arm()
    assert f"<td>{int(np.nansum(one.y_NK[:, 1]))}</td>" not in html  # of halves, not of all
    time, event, risk = risk_by_case(one)
    high = risk >= np.median(risk)
    when = np.linspace(0, time.max(), 6)[1:-1]
    cells = [high.sum(), int(event[high].sum()), *((time[high] >= t).sum() for t in when)]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in html


def test_points_are_slides_whose_value_is_known():
    one, axis = arm([[1], [NAN], [3], [4]], [[1.5], [9], [2], [4]]), Figure().subplots()
    value_axis(axis, 0, one, (0, 10))
    line, points = axis.lines
    assert line.get_xydata().tolist() == [[0, 0], [10, 10]]
    assert points.get_xydata().tolist() == [[1, 1.5], [3, 2], [4, 4]]
    spread = np.var([1, 3, 4]) * 3
    assert points.get_label() == f"R² {1 - 1.25 / spread:.3f}"
    html = "".join(REPORTS["values"].curves(Regression(("v<",), (0.0,), (1.0,)), [one, one]))
    assert html.count("<figure") == 2
    assert "v&lt;, predicted against true" in html


def test_confusions_and_each_class_against_the_rest():
    task = Multiclass(("x", "y"), "kind", (1.0, 1.0))
    one = arm([[0], [0], [1], [1], [1], [NAN]],
              [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.6, 0.4], [1, 0]])  # fmt: skip
    assert confusion(task, one) == [[1, 1], [1, 2]]
    html = "".join(REPORTS["classes"].curves(task, [one]))
    assert "<td>1</td><td>2</td><td>67%</td>" in html
    assert html.count("<figure") == 6
    assert "x, 2 of 5 positive" in html
    unknown = arm([[NAN]], [[0.5, 0.5]])
    assert confusion(task, unknown) == [[0, 0], [0, 0]]
