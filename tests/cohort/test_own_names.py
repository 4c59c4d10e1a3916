"""A table with its owner's columns and words is read alike by every verb that takes a table."""

import csv
from pathlib import Path

import pytest
import yaml

from slides.errors import SettingsError
from tapfm.cli import main
from tapfm.config import read_source
from tapfm.evaluation.study import Study, plan_cells, prepare
from tapfm.reports.slide_table import by_split, slide_table
from tests.cohorts import write_cohort

OWN = {"Patient No": "case_id", "Scan": "slide_id", "Place": "slide_path", "Set": "split",
       "EGFR mutated": "EGFR"}  # fmt: skip
WORDS = {"EGFR": {"hit": 1, "miss": 0}, "KRAS": {"hit": 1, "miss": 0, "see letter": None}}
QUESTION = {
    "classes": [
        {"name": "normal tissue"},
        {"name": "tumour with smooth chromatin", "where": {"EGFR": 0}},
        {"name": "tumour with prominent nucleoli", "where": {"EGFR": 1}},
    ],
    "templates": ["{} ."], "shots": [1], "draws": 1,
}  # fmt: skip


def write_own(config, lines):
    """Put the owner's names and words into a cohort's table, and what they mean into its config."""
    header, *rows = lines
    theirs = {ours: name for name, ours in OWN.items()}
    table = config.parent / "cohort.csv"
    words = {"1": "Hit", "0": "miss", "": "see letter"}
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([theirs.get(name, name) for name in header])
        writer.writerows([*row[:4], *(words[cell] for cell in row[4:])] for row in rows)
    settings = yaml.safe_load(config.read_text())
    settings["data"] |= {"columns": OWN, "values": WORDS, "labels": ["EGFR", "KRAS"]}
    settings["trainer"]["max_epochs"] = 1
    config.write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the same cohort in tapfm's names and words, and its table's lines."""
    config = write_cohort(tmp_path_factory.mktemp("plain"))
    return config, [line.split(",") for line in (config.parent / "cohort.csv").read_text().split()]


@pytest.fixture(scope="module")
def own(plain, tmp_path_factory):
    config = write_cohort(tmp_path_factory.mktemp("own"))
    write_own(config, plain[1])
    return config


def rows_of(*configs):
    """Return what a config's slides must be the same in."""
    rows = read_source([Path(each) for each in configs]).rows
    return [(r.case_id, r.slide_id, r.path.name, r.path.is_file(), r.split, str(r.labels))
            for r in rows]  # fmt: skip


def test_a_split_keeps_the_owners_names_and_words(own, plain, tmp_path, capsys):
    assert rows_of(own) == rows_of(plain[0])
    for config, name in ((own, "own"), (plain[0], "plain")):
        assert main(["split", "--config", str(config), "--out", str(tmp_path / name),
                     "--folds", "3"]) == 0  # fmt: skip
        told = capsys.readouterr().out
        first = tmp_path / name / "cohort_0.csv"
        assert f"next: tapfm check --config {config} --table {first}\n" in told
        balance = told.partition(f"{tmp_path}")[0]
        assert main(["check", "--config", str(config), "--table", str(first)]) == 0
        capsys.readouterr()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"table": str(first)}}))
        (tmp_path / f"{name}.txt").write_text(balance)
    assert (tmp_path / "own.txt").read_text() == (tmp_path / "plain.txt").read_text()
    dealt = [rows_of(own, tmp_path / "own.yaml"), rows_of(plain[0], tmp_path / "plain.yaml")]
    assert dealt[0] == dealt[1]
    assert [row[4] for row in dealt[0]] != [row[4] for row in rows_of(own)], "dealt anew"
    header, line = (tmp_path / "own" / "cohort_0.csv").read_text().splitlines()[:2]
    assert header == "Patient No,Scan,Place,Set,EGFR mutated,KRAS"
    assert "miss" in line


def test_other_programs_are_given_what_the_words_mean(own, plain, tmp_path):
    formats = ["--format", "table", "clam", "patho-bench"]
    for config, name in ((own, "own"), (plain[0], "plain")):
        where = ["--out", str(tmp_path / name), "--labels", "EGFR"]
        assert main(["split", "--config", str(config), *where, *formats]) == 0
    files = {p.relative_to(tmp_path / "own") for p in (tmp_path / "own").rglob("*.*")}
    assert len(files) == 4
    for file in files - {Path("cohort_0.csv")}:
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_a_studys_folds_are_read_with_the_configs_names(own, plain, tmp_path):
    found = []
    for config, name in ((own, "own"), (plain[0], "plain")):
        data = yaml.safe_load(config.read_text())["data"]
        study = Study((str(config),), str(tmp_path / name), folds=3)
        cells = plan_cells(study, prepare(study, data))
        for cell in cells:
            cell.folder.mkdir(parents=True)
            (cell.folder / "cell.yaml").write_text(yaml.safe_dump(dict(cell.changes)))
        found.append([rows_of(*cell.configs, cell.folder / "cell.yaml") for cell in cells])
    assert len(found[0]) == 3
    assert found[0] == found[1]


def test_a_run_learns_the_same(own, plain, tmp_path, capsys):
    """Check, index, features, plan, fit, the report's counts: the owner's words change nothing."""
    written = []
    for config in (own, plain[0]):
        each, folder = ["--config", str(config)], config.parent
        assert main(["check", *each]) == 0
        assert main(["index", *each]) == 0
        assert main(["features", *each, "--model", "demo_vit"]) == 0
        assert main(["plan", *each, "--gpu", "L4"]) == 0
        assert main(["fit", *each, "--trainer.max_epochs", "1"]) == 0
        counts = [line for line in capsys.readouterr().out.splitlines() if line[:6] == "  EGFR"]
        run = folder / "runs" / "tapfm_gated"
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]
        slides = slide_table(tmp_path / f"{folder.name}.csv", data)
        written.append(((run / "metrics.csv").read_text(), counts, by_split(slides, data)))
    assert len(written[0][1]) == 2, "of 1 and of 0"
    assert written[0] == written[1]


def test_the_question_of_pathpt_is_of_what_the_words_mean(own, tmp_path, monkeypatch, capsys):
    def towers(device, **how):
        raise SettingsError("far enough: both tables are read")

    monkeypatch.setattr("tapfm.pathpt.run.load_towers", towers)
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(QUESTION))
    words = ["--question", str(tmp_path / "q.yaml"), "--out", str(tmp_path / "out")]
    assert main(["pathpt", "--config", str(own), *words]) == 2
    assert "far enough" in capsys.readouterr().err


def test_a_probe_takes_them(own, tmp_path):
    few = ["--slides", "2", "--epochs", "1"]
    assert main(["probe", "--config", str(own), "--out", str(tmp_path), *few]) == 0
    assert (tmp_path / "probe.csv").is_file()


def test_split_without_a_table(capsys):
    assert main(["split", "--out", "x.csv"]) == 2
    assert "give --table of a cohort, or --config of a run" in capsys.readouterr().err
