"""Curves are drawn from the right numbers: the data of the lines is read back from the figure."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from tapfm.reports.figures import curves_figure, read_curves, roc_figure
from tapfm.reports.rows import ResultRow

LABELS = ["A", "B", "C"]


def arm(title="tapfm", end_to_end=True, seed=0):
    rng = np.random.default_rng(seed)
    y = (np.random.default_rng(9).random((41, 3)) < 0.4).astype(float)
    p = np.round(0.3 * y + rng.random(y.shape), 1)  # tied
    y[::7, 0] = np.nan
    slides = [f"s{n}" for n in range(41)]
    return ResultRow(title, end_to_end, slides, slides, y, p)


def test_roc_lines_are_scikit_learns():
    rows = [arm(), arm("frozen", False, 1)]
    figure = roc_figure(LABELS, rows)
    for k, axis in enumerate(figure.axes):
        assert axis.get_title().startswith(LABELS[k])
        for each, line in zip(rows, axis.lines[1:], strict=True):  # the first is the diagonal
            known = ~np.isnan(each.y_NK[:, k])
            fpr, tpr, _ = roc_curve(
                each.y_NK[known, k], each.p_NK[known, k], drop_intermediate=False
            )
            np.testing.assert_allclose(line.get_xdata(), fpr)
            np.testing.assert_allclose(line.get_ydata(), tpr)


def test_a_label_of_one_class_has_no_curve():
    one = arm()
    figure = roc_figure(LABELS, [replace(one, y_NK=np.where([1, 1, 0], one.y_NK, 0))])
    assert len(figure.axes[2].lines) == 1
    assert figure.axes[2].texts[0].get_text() == "one class only"


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_any_number_of_labels_is_laid_out(labels):
    one = arm()
    wide = replace(one, y_NK=np.tile(one.y_NK[:, 1:2], labels), p_NK=one.p_NK[:, [1] * labels])
    figure = roc_figure([f"L{k}" for k in range(labels)], [wide])
    assert sum(axis.get_visible() for axis in figure.axes) == labels


def test_arms_are_told_apart():
    rows = [arm(f"row {n}", n % 2 == 1, n) for n in range(7)]
    lines = roc_figure(LABELS, rows).axes[0].lines[1:]
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 7
    solid = [line.get_linestyle() == "-" for line in lines]
    assert solid == [each.end_to_end for each in rows]


def test_curves_skip_blank_cells_nan_and_names(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,epoch,slide_id,train/loss,val/loss,val/auroc\n"
        "1,0,s7,0.5,,\n2,0,s3,nan,,\n2,0,,,0.75,0.625\n3,1,s7,0.25,,\n"
    )
    curves = read_curves(path)
    assert set(curves) == {"step", "epoch", "train/loss", "val/loss", "val/auroc"}
    np.testing.assert_array_equal(curves["train/loss"], [[1, 3], [0.5, 0.25]])
    np.testing.assert_array_equal(curves["val/auroc"], [[2], [0.625]])
    figure = curves_figure([arm("frozen", False), replace(arm(), metrics_csv=path)])
    loss, auroc, tiles = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.5, 0.25], [0.75]]
    assert list(auroc.lines[0].get_ydata()) == [0.625]
    assert len(tiles.lines) == 0  # no such column in this run
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tapfm"]


def test_an_empty_metrics_file_draws_an_empty_figure(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n")
    assert read_curves(path) == {}
    curves_figure([replace(arm(), metrics_csv=path)])


def test_training_curves_are_smoothed_and_end_where_the_run_ends(tmp_path):
    path = tmp_path / "metrics.csv"
    loss = np.random.default_rng(0).random(401)
    rows = [f"{step},{value}" for step, value in enumerate(loss, start=1)]
    path.write_text("\n".join(["step,train/loss", *rows]) + "\n")
    line = curves_figure([replace(arm(), metrics_csv=path)]).axes[0].lines[0]
    assert line.get_xdata()[-1] == 401
    assert line.get_ydata()[-1] == pytest.approx(loss[-20:].mean())
    assert line.get_ydata()[0] == pytest.approx(loss[:20].mean())
