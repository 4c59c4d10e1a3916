"""`tapfm check` says on one page what would go wrong; its exit code says if a run can begin.

Each test breaks one thing of a cohort that is ready, and looks for that thing's line.
"""

import re
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pandas as pd
import pytest

from slides.cohort.table import read_cohort
from tapfm.cli import main
from tapfm.encoders.backbones import find
from tapfm.planning.footprint import Setup
from tapfm.planning.whole_run import Sample, forecast_run, spread, work
from tests.cohorts import write_cohort


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Return the folder of a cohort that is ready, to be copied."""
    folder = tmp_path_factory.mktemp("ready")
    write_cohort(folder)
    return folder


@pytest.fixture
def cohort(ready, tmp_path):
    """Return a copy's config, with paths relative to it."""
    shutil.copytree(ready, tmp_path / "c")
    config = tmp_path / "c" / "config.yaml"
    config.write_text(config.read_text().replace(f"{ready}/", ""))
    return config


def change(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def page(capsys, *words):
    code = main(["check", *map(str, words)])
    return code, capsys.readouterr().out


def test_a_cohort_that_is_ready(cohort, capsys):
    code, said = page(capsys, "--config", cohort)
    assert code == 0
    for line in (
        r"^Table .*cohort\.csv$", r"^ +slides +7 +3 +4$", r"^ +EGFR 1 +3 +2 +2$",
        r"^Slides   14 of 14 can be read, .* 14 at 0\.5 \(", r"^Model    demo_vit, weights in the",
        r"^Card ", r"^Time .* index .* fit .* test ", r"^Disk .* free \d", r"^Ready: 0 faults",
        rf"^next: tapfm fit --config {cohort}$", "^warning  too few slides for narrow intervals",
    ):  # fmt: skip
        assert re.search(line, said, re.M), (line, said)
    assert len(said.splitlines()) < 40, "one page"
    assert not (cohort.parent / "index").exists(), "nothing is written"


@pytest.mark.parametrize("skip", [False, True])
def test_slides_that_cannot_be_read_are_faults_or_left_out(cohort, capsys, skip):
    (cohort.parent / "slides" / "s3.svs").write_text("no slide")
    if skip:
        change(cohort, ("workers: 0", "workers: 0\n  on_error: skip"))
    code, said = page(capsys, "--config", cohort)
    assert code == (not skip)
    assert "13 of 14 can be read" in said
    assert re.search(rf"^{'warning ' if skip else 'FAULT   '} s3: ", said, re.M)
    assert ("Not ready" in said) is not skip


def test_tiles_finer_than_the_scan_are_a_fault(cohort, capsys):
    change(cohort, ("mpp: 0.5", "mpp: 0.1"))
    code, said = page(capsys, "--config", cohort)
    assert code == 1
    assert "0 of 14 can be read" in said
    assert "9 more slides cannot be read" in said


def test_a_disk_without_room_is_a_fault(cohort, capsys, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("tapfm.preflight.check.shutil.disk_usage", lambda _: usage(1000))
    code, said = page(capsys, "--config", cohort)
    assert code == 1
    assert "FAULT    the disk has 0.0 MB free and the run takes up to " in said


def test_splits_sites_and_unknown_labels_are_told(cohort, capsys):
    table = pd.read_csv(cohort.parent / "cohort.csv", dtype=str)
    table["site"] = "here"
    table.loc[0, ["EGFR", "KRAS"]] = None
    table = table[table["split"] != "test"]
    table.to_csv(cohort.parent / "cohort.csv", index=False)
    code, said = page(capsys, "--config", cohort)
    assert code == 0
    for line in ("sites in several splits: here", "no slide is in split test",
                 "1 training slides have no known label"):  # fmt: skip
        assert f"warning  {line}" in said
    table.loc[table["split"] == "val", "split"] = "train"
    table.to_csv(cohort.parent / "cohort.csv", index=False)
    code, said = page(capsys, "--config", cohort)
    assert code == 1
    assert "FAULT    no slide is in split val: `tapfm split` deals one" in said


def test_settings_that_fit_would_refuse_are_refused_here(cohort, capsys):
    change(cohort, ("chunk: 5", "chunk: 0"), ("workers: 0", "wrokers: 0"))
    assert main(["check", "--config", str(cohort)]) == 2
    said = capsys.readouterr().err
    assert "data.wrokers: there is no such key. Did you mean data.workers?" in said
    assert len(said.splitlines()) < 6
    assert main(["check"]) == 2
    assert "give --config of a run, or --table of a cohort" in capsys.readouterr().err


def test_a_sloppy_workbook_is_mended_when_asked_and_then_ready(cohort, tmp_path, capsys):
    """A fellow with a folder of slides and an Excel table."""
    sheet = pd.read_csv(cohort.parent / "cohort.csv", dtype={"EGFR": str, "KRAS": str})
    sheet = sheet.rename(columns={"case_id": "Patient ID"}).drop(columns="slide_id")
    sheet["slide_path"] = "D:\\scans\\" + sheet["slide_path"].str.partition("/")[2]
    sheet["EGFR"] = sheet["EGFR"].map({"1": "mut", "0": "wt"})
    table = cohort.parent / "cohort.xlsx"
    sheet.to_excel(table, index=False)
    code, said = page(capsys, "--table", table)
    assert code == 1
    assert "column 'case_id' is missing: if it is 'Patient ID', write data.columns" in said
    assert "--fix NEW.csv would mend: column 'Patient ID': now case_id; slide_path, folder" in said
    new = tmp_path / "new.csv"
    code, said = page(capsys, "--table", table, "--fix", new)
    assert code == 0
    done = new.with_suffix(".changes.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in done] == [
        "column 'Patient ID'", "slide_path, folder of 14 slides",
        "column slide_id", "column EGFR", "slide_path",
    ]  # fmt: skip
    before = read_cohort(cohort.parent / "cohort.csv")
    after = read_cohort(new)
    assert [(r.case_id, r.slide_id, r.path, str(r.labels)) for r in after.rows] == [
        (r.case_id, r.slide_id, r.path, str(r.labels)) for r in before.rows
    ]
    assert page(capsys, "--config", cohort, "--table", new)[0] == 0


def test_a_forecast_by_hand():
    """10 slides of 100 tiles: each number is counted here from its own definition."""
    steps = SimpleNamespace(interpolate=[0, 1], warm_start=True, head_first=0.25)
    config = SimpleNamespace(
        data=SimpleNamespace(tiles_per_slide=20, workers=2, cache_dir=None,
                             tiles=SimpleNamespace(tile_px=10)),
        trainer=SimpleNamespace(max_epochs=6, check_val_every_n_epoch=3),
        model=SimpleNamespace(steps=steps, strategy="full"),
    )  # fmt: skip
    counts = {"train": 5, "val": 2, "test": 3}
    found, row = Sample(tiles=100.0, index_s=4.0, tile_s=0.02), find("demo_vit")
    made = forecast_run(counts, found, (4e9, 1e9), 1e11, config, row, 1000, 3)
    step, forward, read = 0.04, 0.01, 0.01
    assert made.hours["index"] * 3600 == pytest.approx(10 * 4 / 2)
    assert made.hours["cache"] == 0
    looks = 3 * (5 * 3 * 20 + 200) * forward  # three views of twenty tiles, of a hundred
    fit = 6 * 5 * 20 * (step * 3 / 4 + forward / 4) + 2 * 200 * forward + looks
    assert made.hours["fit"] * 3600 == pytest.approx(fit)
    test = 1000 * (forward + read) + 2 * 500 * forward
    assert made.hours["test"] * 3600 == pytest.approx(test)
    assert made.disk == {"index": 32_000, "cache": 0, "run": 1000 * row.dim * 4 + 36 * 1000}
    assert made.tiles == 1000
    config.model.strategy, config.data.cache_dir, config.data.tiles_per_slide = "frozen", "c", None
    frozen = forecast_run(counts, found, (1e9, 1e9), 1e11, config, row, 1000, 3)
    assert frozen.hours["fit"] * 3600 == pytest.approx((500 + 200) * forward), "encoded once"
    assert frozen.disk["cache"] == 1000 * 300


def test_the_work_of_a_step_is_that_of_its_passes():
    step, forward = work(find("demo_vit"), 32, Setup("fp32", "adamw"))
    assert step == pytest.approx(4 * forward, rel=0.01)  # pixels have no gradient
    assert work(find("demo_vit"), 32, Setup("fp32", "adamw", strategy="frozen")) == (
        forward, forward
    )  # fmt: skip
    assert forward < work(find("demo_vit"), 32, Setup("fp32", strategy="lora"))[0] < step
    assert spread(list(range(10))) == [0, 4, 9]
    assert spread([7]) == [7]
