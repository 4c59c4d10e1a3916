"""Everything in a metrics_<split>.json is on the page, once, and as text."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from tapfm.reports.html.tables import (
    GroupRow,
    Html,
    further_table,
    results_table,
    split_table,
    table,
)
from tapfm.reports.report import write_results
from tapfm.reports.rows import ResultRow


class Rows(HTMLParser):
    """Cells of the rows of all tables."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("th", "td")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def interval(value, low=None, high=None, draws=2000):
    return {"value": value, "low": low, "high": high, "draws": draws}


@pytest.fixture
def metrics():
    """Return two rows of one label, with every kind of further key that another version might
    write.
    """
    return {
        "split": "test", "slides": 40, "cases": 31, "draws": 2000, "seed": 0,
        "reference": "frozen, <MLP>",
        "skipped": [],
        "arms": {
            "frozen, <MLP>": {
                "end_to_end": False,
                "figures": {
                    "macro": {"auroc": interval(0.5), "auprc": interval(None), "labels": ["A"]},
                    "A": {"auroc": interval(0.75, 0.625, 0.875),
                          "auprc": interval(0.5, 0.4, 0.6, 9),
                          "positives": 13, "known": 37, "brier": 0.1875,
                          "thresholds": {"youden": {"value": 0.3125, "sensitivity": 0.9375}}},
                },
                "auroc_difference": None,
            },
            "end to end, tapfm": {
                "end_to_end": True,
                "figures": {
                    "macro": {"auroc": interval(0.5), "auprc": interval(0.5), "labels": ["A"]},
                    "A": {"auroc": interval(0.96875, 0.9, 1.0), "auprc": interval(0.25, 0.2, 0.3),
                          "positives": 13, "known": 37, "ece": interval(0.03125, 0.01, 0.05),
                          "bins": [0.1, 0.2], "curve": list(range(99))},
                },
                "auroc_difference": {"A": interval(0.21875, -0.1, 0.3)},
                "delong": {"A": {"value": 0.53125, "low": 0.5, "high": 0.59375, "p": 0.0078125,
                                 "z": 2.65625}},
                "calibration": {"method": "isotonic"},
            },
        },
        "subgroups": {"site": {"Ulm": {"auroc": interval(0.8125, 0.7, 0.9), "slides": 21}}},
    }  # fmt: skip


def test_the_first_table_has_the_figures_that_decide(metrics):
    rows = Rows(results_table(metrics)).rows
    assert rows == [
        ["model", "AUROC [95 %]", "AUPRC [95 %]", "AUROC difference to *"],
        ["macro"],
        ["frozen, <MLP> *", "0.500 [no interval]", "not defined", ""],
        ["end to end, tapfm", "0.500 [no interval]", "0.500 [no interval]", ""],
        ["A, 13 of 37 positive"],
        ["frozen, <MLP> *", "0.750 [0.625, 0.875]", "0.500 [0.400, 0.600] †", ""],
        ["end to end, tapfm", "0.969 [0.900, 1.000]", "0.250 [0.200, 0.300]",
         "+0.219 [-0.100, +0.300]"],
    ]  # fmt: skip


def test_the_second_has_all_that_is_left(metrics):
    header, *rows = Rows(further_table(metrics)).rows
    assert header == ["figure", "frozen, <MLP>", "end to end, tapfm"]
    found, label = {}, None
    for name, *values in rows:
        label = label if values else name
        found |= {(label, name): values} if values else {}
    assert list(found)[:3] == [
        ("A", "thresholds youden sensitivity"), ("A", "thresholds youden value"), ("A", "ECE")
    ]  # fmt: skip
    assert found == {
        ("A", "brier"): ["0.1875", ""],
        ("A", "thresholds youden value"): ["0.3125", ""],
        ("A", "thresholds youden sensitivity"): ["0.9375", ""],
        ("A", "ECE"): ["", "0.031 [0.010, 0.050]"],
        ("A", "bins"): ["", "0.1, 0.2"],
        ("A", "curve"): ["", "99 entries, in the JSON"],
        ("A", "DeLong"): ["", "0.531 [0.500, 0.594]"],
        ("A", "DeLong p"): ["", "0.007812"],
        ("A", "DeLong z"): ["", "2.656"],
        ("of the whole row", "calibration method"): ["", "isotonic"],
    }
    assert Rows(split_table(metrics)).rows[1:] == [
        ["subgroups site Ulm AUROC", "0.812 [0.700, 0.900]"],
        ["subgroups site Ulm slides", "21"],
    ]


def test_no_number_of_the_file_is_lost(metrics):
    """Every number but counts, draws and what is said to be in the JSON is in one of the tables."""
    text = " ".join(
        map(str, (results_table(metrics), further_table(metrics), split_table(metrics)))
    )

    def leaves(value, key=""):
        if isinstance(value, dict):
            for name, each in value.items():
                yield from leaves(each, name)
        elif isinstance(value, float) and key not in ("draws", "curve"):
            yield value

    shown = {float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)}
    for value in leaves({"arms": metrics["arms"], "subgroups": metrics["subgroups"]}):
        assert min(abs(value - each) for each in shown) < 5.1e-4, value


def test_another_tasks_figures_take_the_first_places(metrics):
    for arm in metrics["arms"].values():
        arm["figures"] = {"survival": {"c_index": interval(0.625, 0.5, 0.75), "events": 21}}
        arm["auroc_difference"] = None
    metrics["reference"] = None
    rows = Rows(results_table(metrics)).rows
    assert rows[0] == ["model", "c index [95 %]"]
    assert rows[1:3] == [["survival"], ["frozen, <MLP>", "0.625 [0.500, 0.750]"]]
    assert ["events", "21", "21"] in Rows(further_table(metrics)).rows


def test_the_reports_own_file_is_read(tmp_path):
    rng = np.random.default_rng(3)
    y = (rng.random((31, 2)) < 0.5).astype(float)
    slides = [f"s{n}" for n in range(31)]
    arms = [ResultRow(title, end_to_end, slides, slides, y, np.clip(0.2 * y + rng.random(y.shape),
    0, 1))
            for title, end_to_end in (("frozen", False), ("end to end, a", True))]  # fmt: skip
    said = write_results(tmp_path, "test", ["A", "B"], arms, draws=50)
    metrics = json.loads((tmp_path / "metrics_test.json").read_text())
    numbers = re.findall(r"[-+]?\d\.\d{3} \[[^]]+\]", said)
    shown = re.findall(r"[-+]?\d\.\d{3} \[[^]]+\]", results_table(metrics))
    assert sorted(numbers) == sorted(shown)
    assert len(numbers) == 15
    assert metrics["notes"][0].startswith("test split: 31 slides of 31 cases")


def test_text_is_escaped_and_html_is_not():
    evil = '<img src=x onerror="alert(1)">'
    text = table([evil], [[evil, Html("<b>bold</b>")], GroupRow(evil)], caption=evil)
    assert "<img" not in text
    assert unescape(text).count(evil) == 4
    assert "<td><b>bold</b></td>" in text
    assert table(["a", "b"], [["c", "x" * 61]]).count('class="text"') == 1
