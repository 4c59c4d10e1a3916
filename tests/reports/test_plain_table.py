"""Tables as text: cells with intervals, bars in Markdown, aligned columns."""

import math

import pytest

from tapfm.reports.plain_table import aligned, markdown, ruled, span
from tapfm.stats.bootstrap import Interval


@pytest.mark.parametrize(
    ("figure", "sign", "said"),
    [
        (None, "", ""),
        (Interval(0.9, 0.8484, 0.95, 100), "", "0.900 [0.848, 0.950]"),
        (Interval(0.1, -0.2, 0.3, 100), "+", "+0.100 [-0.200, +0.300]"),
        (Interval(0.9, 0.8, 0.95, 89), "", "0.900 [0.800, 0.950] †"),
        (Interval(0.9, math.nan, math.nan, 0), "", "0.900 [no interval]"),
        (Interval(math.nan, math.nan, math.nan, 0), "", "undefined"),
    ],
)
def test_a_figure_as_a_cell(figure, sign, said):
    assert span(figure, 100, sign) == said


def test_undefined_may_be_said_otherwise_and_draws_need_not_be_known():
    assert span(Interval(math.nan, 0, 0, 0), undefined="one class only") == "one class only"
    assert span(Interval(0.9, 0.8, 0.95, 1)) == "0.900 [0.800, 0.950]"


def test_a_bar_in_a_cell_is_no_column():
    assert markdown([["a|b", "c"], ["1", ""]]) == "| a\\|b | c |\n|---|---|\n| 1 |  |"


def test_columns_are_in_line_and_groups_ruled():
    table = [["of", "model"], ["A", "one"], ["", "another"], ["BCD", "one"]]
    assert aligned(table) == ["of   model", "A    one", "     another", "BCD  one"]
    rule = "-" * 12
    assert ruled(table) == [
        "of   model", rule, "A    one", "     another", rule, "BCD  one"
    ]  # fmt: skip
