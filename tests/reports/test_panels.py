"""Panels draw the right numbers: lines are read back from the axis, or from the SVG."""

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from tapfm.reports.figures import row_styles
from tapfm.reports.html.panels import (
    BINS,
    cost_panels,
    inline,
    key,
    panel,
    pr_axis,
    reliability_axis,
    training_panels,
)
from tapfm.reports.rows import ResultRow
from tapfm.stats.metrics import auprc


def arm(title, end_to_end, y, p):
    slides = [f"s{n}" for n in range(len(y))]
    return ResultRow(title, end_to_end, slides, slides, np.c_[y], np.c_[p])


@pytest.fixture
def arms():
    rng = np.random.default_rng(4)
    y = (rng.random(43) < 0.4).astype(float)
    y[::9] = np.nan
    return [
        arm(title, end_to_end, y, np.round(0.3 * np.nan_to_num(y) + 0.7 * rng.random(43), 1))
        for title, end_to_end in (("frozen", False), ("a", True), ("b", True))
    ]


def test_the_area_under_each_precision_curve_is_its_auprc(arms):
    axis = Figure().subplots()
    pr_axis(axis, 0, "A", arms, row_styles(arms))
    *lines, share = axis.lines
    for each, line in zip(arms, lines, strict=True):
        recall, precision = line.get_data()
        area = -(np.diff(recall) * precision[:-1]).sum()  # steps, as they are drawn
        assert line.get_drawstyle() == "steps-post"
        assert area == pytest.approx(auprc(each.y_NK[:, 0], each.p_NK[:, 0]), abs=1e-12)
        assert line.get_label() == f"{area:.3f}"
    assert share.get_ydata()[0] == pytest.approx(np.nanmean(arms[0].y_NK))


def test_reliability_by_hand():
    """Ten slides in five bins of two; the one that is not known is in none."""
    p = np.array([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 0.99])
    y = np.array([0, 0, 0, 1, 0, 1, 1, 0, 1, 1, np.nan])
    one, axis = arm("a", True, y, p), Figure().subplots()
    reliability_axis(axis, 0, "A", [one], row_styles([one]))
    assert BINS == 5
    np.testing.assert_allclose(axis.lines[1].get_xdata(), [0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(axis.lines[1].get_ydata(), [0, 0.5, 0.5, 0.5, 1])
    assert axis.lines[1].get_label() == f"{np.mean((y - p)[:-1] ** 2):.3f}"


@pytest.mark.parametrize("draw", [pr_axis, reliability_axis])
def test_one_class_has_no_line(draw):
    one, axis = arm("a", True, np.zeros(9), np.linspace(0, 1, 9)), Figure().subplots()
    draw(axis, 0, "A", [one], row_styles([one]))
    assert axis.texts[0].get_text() == "one class only"
    assert axis.get_legend() is None


def test_an_arm_has_one_colour_in_the_key_and_in_every_panel(arms, tmp_path):
    log = tmp_path / "memory.csv"
    log.write_text(
        "step,slide_id,tiles_per_s,encode_rss_gib,adapt_rss_gib\n1,s1,50,2.5,\n2,s2,75,2,3.5\n"
    )
    shown = key(arms, {"b"})  # the second of the trained
    (colour,) = re.findall(r"stroke:(#\w+|var[^;]+);", shown)
    assert shown.count("<li>") == 1
    speed, memory = cost_panels(arms, {"b": log})
    assert f"stroke: {colour}" in memory.lower() or f"stroke: {colour.lower()}" in memory
    assert "GiB of the process" in memory
    assert "tiles per second" in speed


def test_peaks_are_the_largest_of_the_phases_there_were(monkeypatch, arms, tmp_path):
    log = tmp_path / "memory.csv"
    log.write_text("step,encode_rss_gib,adapt_rss_gib\n1,2.5,\n2,2,3.5\n3,4,1\n")
    drawn = []

    def drawing(draw, said, size):
        axis = Figure().subplots()
        draw(axis)
        drawn.append(axis)

    monkeypatch.setattr("tapfm.reports.html.panels.panel", drawing)
    cost_panels(arms, {"a": log})
    found = [line.get_xydata().tolist() for line in drawn[1].lines if len(line.get_xdata())]
    assert found == [[[1, 2.5], [2, 3.5], [3, 4]]]


def test_training_has_a_panel_for_what_was_measured(arms, tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("step,train/loss,val/loss,val/c_index,val/c_index_EGFR\n1,2,,,\n2,,1,0.5,0.5\n")
    rows = [*arms[:2], replace(arms[2], metrics_csv=log)]
    drawn = [re.search("<figcaption>(.*?)</figcaption>", each)[1] for each in training_panels(rows)]
    assert drawn == ["loss (marked: validation; thin: training, smoothed)", "validation c_index"]
    assert training_panels(arms) == []


def test_a_panel_is_part_of_the_page():
    long = "a label <of> " + "very " * 30 + "many words"
    drawn = panel(lambda axis: (axis.plot([0, 1], [1, 2], "ok"), axis.set_title(long)), "said & so")
    assert drawn.count(long.replace("<", "&lt;").replace(">", "&gt;")) == 1
    assert re.match(r'<figure class="panel"><figcaption>a label &lt;of&gt;', drawn)
    assert 'role="img" aria-label="said &amp; so"' in drawn
    assert "<?xml" not in drawn
    assert "<metadata" not in drawn
    assert "#000000" not in drawn
    assert re.search(r"<text [^>]*>0\.0</text>", drawn), "text is text"
    ids = re.findall(r' id="([^"]+)"', drawn)
    assert ids
    assert all(f"#{name}" in drawn for name in ids)
    other = panel(lambda axis: axis.plot([0, 1], [1, 2], "ok"), "other")
    assert not set(ids) & set(re.findall(r' id="([^"]+)"', other))


def test_two_dollars_in_a_name_are_no_formula():
    said = {"title": "HER2 $+ 5$%", "xlabel": "os$_$"}
    drawn = panel(lambda axis: axis.set(**said), "said")
    assert all(f">{name}</" in drawn for name in said.values())


def test_inline_keeps_the_ids_that_are_used():
    svg = ('<?xml version="1.0"?>\n<svg xmlns:xlink="x" width="9pt" viewBox="0 0 9 8" xmlns="y">'
           '<g id="axes_1"><path id="m1" style="fill: #e6e6e6"/><use xlink:href="#m1"/>'
           '<g clip-path="url(#p2)"/></g><clipPath id="p2"/></svg>')  # fmt: skip
    found = inline(svg, "it")
    assert "axes_1" not in found
    assert 'id="m1" style="fill: var(--grid)"' in found
    assert 'id="p2"' in found
    assert found.startswith('<svg viewBox="0 0 9 8" role="img" aria-label="it" xmlns="y">')
