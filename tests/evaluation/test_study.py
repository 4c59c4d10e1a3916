"""A study runs every cell once, continues where it stopped, and names failed cells.

The first test is the real thing: two strategies on a tiny cohort, fit and test in this process (the
commands are those that are else run as processes of their own). The others put a small program in
the place of `tapfm`, which leaves predictions where fit and test do, so that folds, seeds, failures
and resuming can be tried by the dozen.
"""

import contextlib
import csv
import json
import sys

import numpy as np
import pytest
import yaml

from slides.cohort.table import read_cohort
from slides.errors import SettingsError
from tapfm import cli
from tapfm.evaluation import study
from tapfm.evaluation.study import read_study, run_study
from tests.cohorts import write_cohort

STAND_IN = """
import csv, json, sys, pathlib, hashlib
import yaml
verb, *rest = sys.argv[1:]
values = {k: v for k, v in zip(rest, rest[1:])}
if verb == "fit":
    config = yaml.safe_load(pathlib.Path(rest[-1]).read_text())
    folder = pathlib.Path(config["run_dir"])
    strategy, seed = config["model"]["strategy"], config["seed_everything"]
    with (folder / "fits.txt").open("a") as file:
        file.write("fit\\n")
    broken = pathlib.Path(sys.argv[0]).with_name("broken.txt")
    if broken.exists() and broken.read_text() in str(folder):
        print("tapfm: the disk is full")
        sys.exit(2)
    table = list(csv.DictReader(open(config["data"]["table"])))
    skills = {"run": {"full": 1.2, "lora": 0.8, "frozen": 1.0}[strategy],
              "frozen/frozen_probe": 0.5}
    for name, skill in skills.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        with (folder / name / "predictions_test.csv").open("w") as out:
            out.write("slide_id,case_id,EGFR,p_EGFR\\n")
            for row in table:
                if row["split"] == "test":
                    key = f"{row['slide_id']} {name} {seed if name == 'run' else ''} {strategy}"
                    key = key if name == "run" else row["slide_id"]
                    noise = int(hashlib.md5(key.encode()).hexdigest(), 16) % 1000 / 1000
                    p = (skill * int(row["EGFR"]) + 2 * noise) / 5
                    out.write(f"{row['slide_id']},{row['case_id']},{row['EGFR']},{p}\\n")
else:
    report = pathlib.Path(values["--run"]) / "report_test"
    report.mkdir(exist_ok=True)
    config = yaml.safe_load((report.parent / "cell.yaml").read_text())
    trained = config["model"]["strategy"] != "frozen"
    title = "end to end, run" if trained else "frozen encoder, run"
    arms = {"frozen, probe": {"end_to_end": False}, title: {"end_to_end": trained}}
    task = {"name": "multilabel", "labels": ["EGFR"]}
    (report / "metrics_test.json").write_text(json.dumps({"task": task, "arms": arms}))
"""

OUTCOMES = """
import csv, json, sys, pathlib, random
import yaml
verb, *rest = sys.argv[1:]
values = {k: v for k, v in zip(rest, rest[1:])}
if verb == "fit":
    configs = [yaml.safe_load(pathlib.Path(p).read_text()) for k, p in zip(rest, rest[1:])
               if k == "--config"]
    folder, data = pathlib.Path(configs[-1]["run_dir"]), configs[0]["stand_in"]
    rows = [row for row in csv.DictReader(open(configs[-1]["data"]["table"]))]
    draw = random.Random(str(folder.relative_to(folder.parents[3])))
    for name, noise in (("run", 1), ("frozen/frozen_probe", 4)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        with (folder / name / "predictions_test.csv").open("w") as out:
            said = [n for n in data["said"]]
            out.write(",".join(["slide_id", "case_id", *data["truth"], *said]) + chr(10))
            for row in rows:
                if row["split"] == "test":
                    v = float(row["v"]) + noise * draw.gauss(0, 1)
                    p = {"p_high": v, "p_low": -v, "predicted_v": v, "risk": -v}
                    cells = [row["slide_id"], row["case_id"], *(row[n] for n in data["truth"])]
                    out.write(",".join([*cells, *(str(p[n]) for n in said)]) + chr(10))
else:
    run = pathlib.Path(values["--run"])
    report = run / "report_test"
    report.mkdir(exist_ok=True)
    spec = yaml.safe_load((run.parents[3] / "config.yaml").read_text())["stand_in"]["spec"]
    arms = {"frozen, probe": {"end_to_end": False}, "end to end, run": {"end_to_end": True}}
    (report / "metrics_test.json").write_text(json.dumps({"task": spec, "arms": arms}))
"""
KINDS = {  # task, labels, what metrics_test.json says of it, columns, words of the table
    "multiclass": ("multiclass", ["grade"],
                   {"name": "multiclass", "labels": ["high", "low"], "column": "grade",
                    "weight": [1, 1]},
                   ["grade"], ["p_high", "p_low"], "macro AUROC, one against the rest [95 %]"),
    "regression": ("regression", ["v"],
                   {"name": "regression", "labels": ["v"], "mean": [0], "std": [1]},
                   ["v"], ["predicted_v"], "R² (mean over targets) [95 %]"),
    "survival": ({"name": "survival", "time": "months", "event": "dead", "loss": "cox"}, None,
                 {"name": "survival", "labels": ["h"], "time": "months", "event": "dead",
                  "edges": [], "horizon": 5, "with_loss": "cox"},
                 ["months", "dead"], ["risk"], "concordance [95 %]"),
}  # fmt: skip


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A cohort of 30 cases that no one opens, and a program that pretends; folds are real."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(study, "TAPFM", [sys.executable, str(program)])
    monkeypatch.setattr(study, "index_and_cache", lambda source: None)
    monkeypatch.setattr(study, "read_source", lambda configs: None)
    lines = [f"c{n // 2},s{n},s{n}.svs,train,{n // 2 % 2}" for n in range(60)]
    header = "case_id,slide_id,slide_path,split,EGFR"
    (tmp_path / "cohort.csv").write_text("\n".join([header, *lines]) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"table": str(tmp_path / "cohort.csv")}}))
    file = tmp_path / "study.yaml"
    keys = {"config": str(config), "out": str(tmp_path / "out"), "folds": 3, "seeds": [0, 1],
            "strategies": ["full", "lora"], "jobs": 3}  # fmt: skip
    file.write_text(yaml.safe_dump(keys))
    return file


def counts(out):
    return sorted(len(path.read_text().split()) for path in out.rglob("fits.txt"))


def test_two_strategies_for_real(tmp_path, monkeypatch, capsys):
    config = write_cohort(tmp_path)

    def here(arguments, log):
        with log.open("a") as file, contextlib.redirect_stdout(file):
            return None if cli.main(arguments) == 0 else "failed"

    monkeypatch.setattr(study, "_command", here)
    short = tmp_path / "short.yaml"
    short.write_text("trainer: {max_epochs: 1}")
    flags = ["--config", str(config), "--config", str(short), "--out", str(tmp_path / "out"),
             "--strategies", "full", "bitfit", "frozen"]  # fmt: skip
    assert cli.main(["study", *flags]) == 0
    text = capsys.readouterr().out
    assert "4 slides of 4 cases; one split" in text
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    trained = {f"tapfm_gated_{arm}": arm != "frozen" for arm in ("full", "bitfit", "frozen")}
    assert list(result["arms"])[-3:] == list(trained)
    assert len(result["arms"]) == 7
    assert {arm: result["arms"][arm]["end_to_end"] for arm in trained} == trained
    assert "tapfm_gated_frozen" in result["arms"]["tapfm_gated_full"]["differences"]
    for arm in ("full", "bitfit", "frozen"):
        run = tmp_path / "out" / "fold_0" / "seed_0" / f"tapfm_gated_{arm}"
        own = json.loads((run / "report_test" / "metrics_test.json").read_text())
        row = "frozen encoder, run" if arm == "frozen" else "end to end, run"
        assert own["reference"] != "end to end, run"
        expected = own["arms"][row]["figures"]["EGFR"]["auroc"]["value"]
        found = result["arms"][f"tapfm_gated_{arm}"]["figures"]["pooled"]["EGFR"]["value"]
        assert found == pytest.approx(expected)
        assert yaml.safe_load((run / "run" / "config.yaml").read_text())["model"]["strategy"] == arm
        assert not (run / "frozen" / "20x_32px_0px_overlap").exists()  # features are shared
    assert len(list((tmp_path / "out" / "frozen").rglob("s0.h5"))) == 2, "features, RGB numbers"
    # stopped between fit and test: the fit is found done, and the study ends as it did
    best = (run / "run" / "best.safetensors").read_bytes()
    (run / "finished.json").unlink()
    assert cli.main(["study", *flags]) == 0
    assert "3 cells, 2 finished before" in capsys.readouterr().out
    assert (run / "run" / "best.safetensors").read_bytes() == best
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == result


def test_every_cell_once_and_the_table_pools_the_folds(quick, capsys):
    assert cli.main(["study", str(quick)]) == 0
    text = capsys.readouterr().out
    out = quick.parent / "out"
    assert counts(out) == [1] * 12
    assert "60 slides of 30 cases; 3 folds, out-of-fold predictions pooled" in text
    result = json.loads((out / "study.json").read_text())
    assert (result["reference"], result["first"]) == ("frozen, probe", "tapfm_gated_full")
    lora = result["arms"]["tapfm_gated_lora"]
    full = result["arms"]["tapfm_gated_full"]
    gain = lora["differences"]["tapfm_gated_full"]["pooled"]["EGFR"]["value"]
    values = [arm["figures"]["pooled"]["EGFR"]["value"] for arm in (lora, full)]
    assert gain == pytest.approx(values[0] - values[1])
    assert full["seeds"] == [0, 1]
    assert full["deviation_of_seeds"] > 0
    (line,) = [line for line in text.splitlines() if line.startswith("tapfm_gated_lora")]
    assert f"{values[0]:.3f}" in line
    assert f"{gain:+.3f} [" in line
    rows = list(csv.DictReader((out / "study.csv").open()))
    (row,) = [r for r in rows if (r["model"], r["label"]) == ("tapfm_gated_lora", "EGFR")]
    assert float(row["minus_first_value"]) == pytest.approx(gain, abs=1e-6)


def test_a_frozen_encoder_trained_alike_is_what_the_others_are_measured_against(quick, capsys):
    assert cli.main(["study", str(quick), "--strategies", "full", "frozen"]) == 0
    result = json.loads((quick.parent / "out" / "study.json").read_text())
    alike, full = (result["arms"][f"tapfm_gated_{name}"] for name in ("frozen", "full"))
    assert (result["reference"], alike["end_to_end"]) == ("tapfm_gated_frozen", False)
    assert alike["differences"] == {}
    gain = full["differences"]["tapfm_gated_frozen"]["pooled"]["EGFR"]["value"]
    values = [arm["figures"]["pooled"]["EGFR"]["value"] for arm in (full, alike)]
    assert gain == pytest.approx(values[0] - values[1])
    assert "frozen, probe" in full["differences"]
    assert "tapfm_gated_frozen *" in capsys.readouterr().out


def test_an_adapted_row_is_compared_with_its_own_frozen_controls(quick, capsys):
    """Each cell's control is pooled as the cell is; the verdict names every share saved."""
    program = quick.parent / "stand_in.py"
    text = STAND_IN.replace(
        '"frozen/frozen_probe": 0.5}', '"frozen/frozen_probe": 0.5}\n'
        '    if strategy == "full": skills["run/control"] = 0.4'
    ).replace(
        '{"task": task, "arms": arms}', '{"task": task, "arms": arms, "verdicts": verdicts}'
    ).replace(
        '    task = {"name"', '    verdicts, a = [], 0.5 * config["seed_everything"]\n'
        '    if config["model"]["strategy"] == "full":\n'
        '        arms["frozen encoder, same head, run"] = {"end_to_end": False}\n'
        '        verdicts = [{"choice": {"a": a, "source": "best epoch"}}]\n'
        '    task = {"name"'
    )  # fmt: skip
    program.write_text(text)
    assert cli.main(["study", str(quick)]) == 0
    result = json.loads((quick.parent / "out" / "study.json").read_text())
    arms, control = result["arms"], "tapfm_gated_full, frozen, same head"
    assert (arms[control]["end_to_end"], arms[control]["seeds"]) == (False, [0, 1])
    assert [each["a"] for each in arms["tapfm_gated_full"]["saved"]] == [0, 0.5] * 3
    assert arms["tapfm_gated_lora"]["saved"] == []
    gain = arms["tapfm_gated_full"]["differences"][control]["pooled"]["macro"]
    assert gain["low"] > 0, "or the test shows nothing"
    assert result["verdicts"] == [
        f"tapfm_gated_full: adapting gained {gain['value']:+.3f} [{gain['low']:+.3f}, "
        f"{gain['high']:+.3f}] macro AUROC over the frozen encoder with the same head; "
        "saved: a = 0, 0.5, 0, 0.5, 0, 0.5 in its 6 runs."
    ]
    printed = capsys.readouterr().out
    assert result["verdicts"][0] in " ".join(printed.split())
    assert printed.index("adapting gained") < printed.index("minus *")


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_dealt_and_has_its_own_figure(quick, kind, capsys):
    folder = quick.parent
    task, labels, spec, truth, said, title = KINDS[kind]
    (folder / "stand_in.py").write_text(OUTCOMES)
    values = np.random.default_rng(0).standard_normal(60)
    lines = ["case_id,slide_id,slide_path,split,grade,v,months,dead"]
    for n, v in enumerate(values):
        grade, months = "high" if v > 0 else "low", 10 + 3 * v
        lines.append(f"c{n},s{n},s{n}.svs,train,{grade},{v:.6f},{months:.4f},{int(n % 3 > 0)}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    data = {"table": str(folder / "cohort.csv"), "task": task, "labels": labels}
    stand_in = {"spec": spec, "truth": truth, "said": said}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data, "stand_in": stand_in}))
    assert cli.main(["study", str(quick), "--strategies", "full", "lora"]) == 0
    text = capsys.readouterr().out
    assert title in text
    assert "60 slides of 60 cases; 3 folds, out-of-fold predictions pooled" in text
    result = json.loads((folder / "out" / "study.json").read_text())
    assert result["reference"] == "frozen, probe"
    head = "all" if kind == "survival" else "macro"
    full, probe = (result["arms"][name] for name in ("tapfm_gated_full", "frozen, probe"))
    gain = full["differences"]["frozen, probe"]["pooled"][head]
    both = [arm["figures"]["pooled"][head]["value"] for arm in (full, probe)]
    assert gain["value"] == pytest.approx(both[0] - both[1])
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert f"{gain['value']:+.3f} [" in text
    row = next(csv.DictReader((folder / "out" / "study.csv").open()))
    assert f"{result['figure']}_value" in row
    tables = [list(csv.DictReader((folder / f"out/folds/cohort_{n}.csv").open())) for n in range(3)]
    tested = [[row for row in rows if row["split"] == "test"] for rows in tables]
    assert sorted(row["slide_id"] for rows in tested for row in rows) == sorted(
        f"s{n}" for n in range(60)
    )
    if kind == "multiclass":  # stratified over the classes
        shares = [np.mean([row["grade"] == "high" for row in rows]) for rows in tested]
        assert np.ptp(shares) < 0.06


@pytest.mark.parametrize("slides_dir", [None, "slides"])
def test_slides_are_found_from_the_table_of_each_fold(quick, slides_dir):
    """Both where the table lies and where `data.slides_dir` says; the cells' configs keep that."""
    folder = quick.parent
    for n in range(60):
        for place in (folder, folder / "slides"):
            place.mkdir(exist_ok=True)
            (place / f"s{n}.svs").write_bytes(bytes([n]))
    given = slides_dir and folder / slides_dir
    data = {"table": str(folder / "cohort.csv"), "slides_dir": given and str(given)}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    for table in study.prepare(read_study(quick, {}), data):
        rows = read_cohort(table, slides_dir=given).rows
        assert {row.path.resolve().parent for row in rows} == {given or folder}


def test_a_cell_that_fails_is_named_and_the_others_go_on_then_it_alone_is_run_again(quick, capsys):
    broken, out = quick.with_name("broken.txt"), quick.parent / "out"
    broken.write_text("fold_1/seed_0/tapfm_gated_lora")
    assert cli.main(["study", str(quick)]) == 2
    said = capsys.readouterr()
    assert "fold 1, seed 0, tapfm_gated_lora: fit failed: exit code 2: the disk is full" in said.err
    assert "failed: fold 1, seed 0, tapfm_gated_lora: fit: exit code 2" in said.out
    assert "tapfm_gated_lora: 1 of 2 seeds have every fold" in said.out
    assert len(list(out.rglob("finished.json"))) == 11
    assert json.loads((out / "study.json").read_text())["arms"]["tapfm_gated_lora"]["seeds"] == [1]
    broken.unlink()
    assert cli.main(["study", str(quick)]) == 0
    assert "12 cells, 11 finished before" in capsys.readouterr().out
    assert counts(out) == [1] * 11 + [2]
    tables = [path.read_bytes() for path in sorted((out / "folds").glob("*.csv"))]
    assert cli.main(["study", str(quick), "--seeds", "0", "1", "2"]) == 0
    assert counts(out) == [1] * 17 + [2]  # a seed was added; nothing was dealt or run again
    assert tables == [path.read_bytes() for path in sorted((out / "folds").glob("*.csv"))]


def test_each_case_is_tested_once(quick):
    run_study(read_study(quick, {"seeds": [0], "strategies": ["full"]}))
    tested = []
    for number in range(3):
        rows = list(csv.DictReader((quick.parent / f"out/folds/cohort_{number}.csv").open()))
        tested += [row["slide_id"] for row in rows if row["split"] == "test"]
    assert sorted(tested) == sorted(f"s{n}" for n in range(60))
    assert len(np.unique(tested)) == 60


def test_other_folds_or_another_config_in_one_folder_are_refused(quick):
    run_study(read_study(quick, {"seeds": [0], "strategies": ["full"]}))
    with pytest.raises(SettingsError, match="holds a study with other folds"):
        run_study(read_study(quick, {"folds": 4}))
    config = quick.with_name("config.yaml")
    config.write_text(config.read_text() + "trainer: {max_epochs: 2}\n")
    with pytest.raises(SettingsError, match="holds a study with other configs"):
        run_study(read_study(quick, {}))


def test_a_verb_is_run_as_the_program_would_and_its_fault_is_the_last_it_said(tmp_path):
    log = tmp_path / "log.txt"
    arguments = ["split", "--table", str(tmp_path / "none.csv"), "--out", str(tmp_path / "folds")]
    fault = study._command(arguments, log)
    assert fault.startswith("exit code 2: ")
    assert "there is no such file" in fault
    assert "$ tapfm split --table" in log.read_text()
    assert study._command(["split", "--help"], log) is None


def test_faults_of_a_study_are_named(tmp_path):
    good = {"config": ["a.yaml"], "out": "out"}
    with pytest.raises(SettingsError, match="study: config and out missing"):
        read_study(None, {"folds": None})
    with pytest.raises(SettingsError, match="there is no such study"):
        read_study(tmp_path / "none.yaml", {})
    file = tmp_path / "s.yaml"
    for text, said in (
        ("- a.yaml", "s.yaml: holds .'a.yaml'., and a study is"),
        ("a: [", "not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=said):
            read_study(file, {})
    file.write_text("epochs: 3")
    with pytest.raises(SettingsError, match="unknown epochs; there are config, out, folds"):
        read_study(file, {})
    with pytest.raises(SettingsError, match=r"strategies are \['lora', 'lora'\]"):
        read_study(None, {**good, "strategies": ["lora", "lora"]})
    with pytest.raises(SettingsError, match="jobs is 0"):
        read_study(None, {**good, "jobs": 0})
    two = [
        {"name": "lora", "rank": 4},
        {"name": "lora", "rank": 16},
        "configs/strategies/lean.yaml",
    ]
    names = [
        study.strategy_name(each)
        for each in read_study(None, {**good, "strategies": two}).strategies
    ]
    assert names == ["lora_rank4", "lora_rank16", "lean"]
