"""Slides left out are said once, written at once, and too many of them end the run."""

import json
from types import SimpleNamespace

import pytest

from slides.errors import CohortError
from tapfm.cli import main
from tapfm.data.skipped import SkippedSlides
from tests.cohorts import write_cohort


def rows(**splits):
    return [
        SimpleNamespace(slide_id=f"{split}{n}", case_id=f"c{split}{n}", split=split)
        for split, number in splits.items()
        for n in range(number)
    ]


def test_each_is_said_and_written_as_it_happens(tmp_path, capsys):
    skipped, file = SkippedSlides(rows(train=30, val=4)), tmp_path / "skipped.json"
    skipped.note({"train0": "train0: torn"}, said=True)
    skipped.write_to(file, keep=False)
    assert json.loads(file.read_text()) == {"train0": "train0: torn"}
    assert capsys.readouterr().err == ""
    skipped.note({"val1": "val1: gone"})
    skipped.note({"val1": "val1: again"})
    assert capsys.readouterr().err == "tapfm: left out: val1: gone\n"
    assert json.loads(file.read_text()) == {"train0": "train0: torn", "val1": "val1: gone"}
    assert skipped.summary() == "1 of 30 train, 1 of 4 val"
    resumed = SkippedSlides(rows(train=30, val=4))
    resumed.write_to(file, keep=True)
    assert resumed == skipped
    assert SkippedSlides(rows(train=1)).summary() == ""


@pytest.mark.parametrize(("every", "limit", "least"), [(30, 0.1, 4), (5, 0.1, 2), (30, 0.5, 16)])
def test_too_many_end_the_run_with_a_choice(every, limit, least):
    skipped = SkippedSlides(rows(train=every, val=50), limit)
    skipped.note({f"val{n}": "x" for n in range(50)})
    for n in range(least - 1):
        skipped.note({f"train{n}": f"train{n}: torn"})
    says = rf"{least} of {every} training slides .*share of {limit:g} .*--data.max_skipped 0\.\d\d"
    with pytest.raises(CohortError, match=says):
        skipped.note({f"ctrain{least}": "a case"})
    SkippedSlides(rows(train=every), 1.0).note({f"train{n}": "x" for n in range(every)})


def test_a_fit_and_an_index_say_what_they_leave_out(tmp_path, capsys):
    config = write_cohort(tmp_path, on_error="skip")
    for name in ("s1.svs", "s3.svs", "s8.tif"):
        (tmp_path / "slides" / name).write_bytes(b"no slide " + name.encode())
    assert main(["index", "--config", str(config)]) == 0
    said = capsys.readouterr()
    assert "left out: s1: " in said.err
    assert "3 slides left out (2 of 7 train, 1 of 3 val)" in said.out
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    assert main(fit) == 2
    assert "2 of 7 training slides cannot be read" in capsys.readouterr().err
    assert main([*fit, "--data.max_skipped", "0.3"]) == 0
    assert "left out: 2 of 7 train, 1 of 3 val, 0 of 4 test" in capsys.readouterr().out
