"""A run goes on with the rows and the schedule that it was begun with, or is refused by name."""

import json

import pandas as pd
import pytest

from slides.errors import CohortError
from tapfm.cli import main
from tapfm.data.streamed import as_begun
from tapfm.training.begun import changed_rows, sha256_of
from tests.cohorts import write_cohort


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch, with a choice after it, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("begun")
    fit = ["fit", "--config", str(write_cohort(folder)), "--model.steps.interpolate", "[0, 1]"]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    return folder, fit


@pytest.fixture
def table(run):
    """The cohort's table; it is put back afterwards."""
    path = run[0] / "cohort.csv"
    text = path.read_text()
    yield path
    path.write_text(text)


CHANGES = {
    "a label": (("c3,s3,slides/s3.svs,train,1,1", "c3,s3,slides/s3.svs,train,0,1"),
                "s3 (train): EGFR was 1, is 0"),
    "one more is known": (("train,0,\n", "train,0,1\n"), "s2 (train): KRAS was blank, is 1"),
    "another split": (("c3,s3,slides/s3.svs,train", "c3,s3,slides/s3.svs,val"),
                      "s3 (train): taken out"),
    "a case": (("c7,s7", "c77,s7"), "s7 (val): case_id was c7, is c77"),
    "a row less": (("c5,s5,slides/s5.svs,train,1,0\n", ""), "s5 (train): taken out"),
    "another file": (("c6,s6,slides/s6.tif", "c6,s6,slides/other.tif"),
                     "s6 (train): file was s6.tif, is other.tif"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_rows_are_refused_by_name(run, table, change, capsys):
    folder, fit = run
    (old, new), line = CHANGES[change]
    assert table.read_text().count(old) == 1
    table.write_text(table.read_text().replace(old, new))
    other = folder / "slides" / "other.tif"
    if change == "another file":
        other.write_bytes((folder / "slides" / "s6.tif").read_bytes())
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    assert main([*fit, "--trainer.max_epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert "holds a run on other rows. Put them back, or give another --name" in said
    assert line in said
    assert len(said.splitlines()) <= 5
    after = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {
        folder / "runs" / "tapfm_gated" / "unfinished"
    }


def test_rows_of_test_teach_nothing_and_are_said(run, table, capsys):
    _, fit = run
    table.write_text(table.read_text().replace("c13,s13", "c130,s13"))
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 rows of test have changed: s13 (test): case_id was c13, is c130" in said


def test_another_number_of_epochs_has_to_be_asked_for(run, capsys):
    folder, fit = run
    of_run = folder / "runs" / "tapfm_gated"
    assert main([*fit, "--trainer.max_epochs", "2"]) == 2
    said = capsys.readouterr().err
    assert "holds a run of 1 epochs, and trainer.max_epochs is 2" in said
    assert "--extend true" in said
    rows = pd.read_csv(of_run / "metrics.csv")
    assert rows["epoch"].max() == 0
    chosen = (of_run / "interpolation.json").stat().st_mtime_ns
    assert main([*fit, "--trainer.max_epochs", "2", "--extend", "true"]) == 0
    assert pd.read_csv(of_run / "metrics.csv")["epoch"].max() == 1
    assert (of_run / "interpolation.json").stat().st_mtime_ns > chosen, "it is chosen anew"


def test_a_damaged_record_is_said(run, capsys):
    folder, fit = run
    record = folder / "runs" / "tapfm_gated" / "cohort.json"
    whole = record.read_text()
    record.write_text(whole[: len(whole) // 2])
    assert main([*fit, "--trainer.max_epochs", "2"]) == 2
    assert "cohort.json: damaged" in capsys.readouterr().err
    record.write_text(whole)
    known = json.loads(whole)
    assert known["train"]["sha256"] == sha256_of(known["train"]["rows"])


def test_order_counts_as_a_change():
    rows = {"a": {"x": 1}, "b": {"x": 0}}
    assert changed_rows(rows, {"b": {"x": 0}, "a": {"x": 1}}, "val") == [
        "the rows of val are in another order"
    ]
    assert sha256_of(rows) != sha256_of({"b": {"x": 0}, "a": {"x": 1}})
    assert changed_rows(rows, dict(rows), "val") == []


class Row:
    def __init__(self, name):
        self.slide_id = name


def test_a_resumed_run_has_the_slides_that_it_had(capsys):
    rows = [Row(name) for name in "abc"]
    assert as_begun(rows, "train", None, {}) == rows
    assert as_begun(rows, "train", ["a", "c"], {}) == [rows[0], rows[2]]
    assert "split train: b: left out when this run was begun" in capsys.readouterr().out
    with pytest.raises(
        CohortError, match=r"begun with 1 slides .* cannot be read now.*\n  d: gone"
    ):
        as_begun(rows, "train", ["a", "d"], {"d": "d: gone"})
