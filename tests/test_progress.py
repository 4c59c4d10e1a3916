"""A long job tells its progress: frames of a bar in a terminal, whole lines in a log file."""

import io
import sys

import pytest

from slides import progress
from slides.progress import progress_bar


class Terminal(io.StringIO):
    """What is written to it is seen."""

    def isatty(self):
        return True


def told(monkeypatch, output, **how):
    monkeypatch.setattr(sys, "stderr", output)
    assert list(progress_bar(range(5), "index", unit=" slides", **how)) == [0, 1, 2, 3, 4]
    return output.getvalue()


def test_a_log_file_has_lines(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    lines = told(monkeypatch, io.StringIO()).splitlines(keepends=True)
    assert all(line.startswith("index: ") and line.endswith("]\n") for line in lines)
    assert [line.split()[2].partition("/")[0] for line in lines][-1] == "5"
    assert len(lines) == 6, "none twice: 0 to 5"
    assert "\r" not in "".join(lines)
    assert not any("█" in line for line in lines)


def test_what_is_done_within_half_a_minute_says_nothing(monkeypatch):
    assert told(monkeypatch, io.StringIO()) == ""


@pytest.mark.parametrize("how", [{}, {"mininterval": 0}])
def test_a_terminal_has_a_bar(monkeypatch, how):
    text = told(monkeypatch, Terminal(), **how)
    assert text.count("\r") >= 2
    assert "█" in text or "#" in text


def test_a_bar_that_is_not_wanted_is_none(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    assert told(monkeypatch, io.StringIO(), disable=True) == ""
