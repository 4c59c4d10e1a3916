"""Configs are found by name, and every command runs from any folder.

The rule is told from what is on disk: paths below the config's own folder; or, for configs that
come with tapfm and those whose data are below the current folder alone, below the current folder.
"""

import re

import pytest
import yaml

from slides.errors import SettingsError
from tapfm.cli import main
from tapfm.config import read_source
from tapfm.config_paths import find_config, localised, located, with_absolute_paths
from tests.cohorts import write_cohort
from tests.conftest import ROOT


def config(folder, name="my.yaml", **parts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(parts, sort_keys=False))
    return folder / name


def read(path):
    (node,) = located([path])
    return None if node is None else yaml.safe_load(yaml.serialize(node))


def test_paths_are_relative_to_the_configs_own_folder(tmp_path, monkeypatch):
    own = tmp_path / "own"
    data = {"table": "t.csv", "slides_dir": "../slides", "cache_dir": None, "index_dir": "/index"}
    data["tiles"] = {"mpp": 1.0, "tissue": {"masks": "masks"}}
    path = config(own, run_dir="~/runs", model={"weights": "hub", "chunk": 3}, data=data)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(path) == {
        "run_dir": str(tmp_path / "runs"),
        "model": {"weights": "hub", "chunk": 3},
        "data": {"table": f"{own}/t.csv", "slides_dir": f"{own}/../slides", "cache_dir": None,
                 "index_dir": "/index",
                 "tiles": {"mpp": 1.0, "tissue": {"masks": f"{own}/masks"}}},
    }  # fmt: skip
    (own / "uni.safetensors").touch()
    path = config(own, model={"weights": "uni.safetensors"}, data={"table": "/t.csv"})
    assert read(path)["model"]["weights"] == f"{own}/uni.safetensors"
    assert read(path)["run_dir"] == f"{own}/runs/run", "a default goes by the config"
    assert read(path)["data"]["index_dir"] == f"{own}/data/index"


def test_numbers_stay_as_they_were_written(tmp_path, monkeypatch):
    path = config(tmp_path / "own", data={"table": "t.csv"})
    path.write_text("model: {steps: {head_lr: 1e-4}}\n" + path.read_text())
    monkeypatch.chdir("/")
    assert "head_lr: 1e-4}" in localised(["--config", str(path)])[1]
    assert localised([f"--config={path}"])[0].startswith("--config=model: {steps")


def test_data_below_the_current_folder_alone_are_taken_from_there(tmp_path, monkeypatch):
    path = config(tmp_path / "configs", data={"table": "data/t.csv"}, run_dir="runs/x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert read(path) is None, "used as it is"
    monkeypatch.chdir("/")
    assert read(path)["data"]["table"] == f"{path.parent}/data/t.csv"


def test_only_the_first_config_brings_defaults_and_no_flag_is_changed(tmp_path, monkeypatch):
    first = config(tmp_path / "a", data={"table": "t.csv"})
    second = config(tmp_path / "b", model={"chunk": 4})
    monkeypatch.chdir("/")
    words = localised(["--config", str(first), "--config", str(second), "--run_dir", "runs"])
    assert [yaml.safe_load(words[n]) for n in (1, 3)] == [
        {"data": {"table": f"{first.parent}/t.csv", "index_dir": f"{first.parent}/data/index"},
         "run_dir": f"{first.parent}/runs/run"},
        {"model": {"chunk": 4}},
    ]  # fmt: skip
    assert words[4:] == ["--run_dir", "runs"]
    second.write_text("run_dir: [")
    assert localised(["--config", str(second)]) == ["--config", str(second)], "told by its reader"


def test_configs_that_come_with_tapfm_go_by_name_and_by_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = ROOT / "configs" / "cohorts" / "demo.yaml"
    assert find_config("demo") == find_config("cohorts/demo") == demo
    assert find_config("pathpt/demo") == ROOT / "configs" / "pathpt" / "demo.yaml"
    assert localised(["--config", "demo", "-c=lora"]) == [
        "--config", str(demo), f"-c={ROOT / 'configs' / 'strategies' / 'lora.yaml'}"
    ]  # fmt: skip
    with pytest.raises(SettingsError, match=r"demoo: neither a file .* Did you mean demo\?"):
        find_config("demoo")
    (tmp_path / "demo").write_text("data: {}")
    assert str(find_config("demo")) == "demo", "a file of that name comes first"


def test_absolute_paths_count_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"run_dir": "runs", "model": {"weights": None}, "data": {"table": "a/t.csv", "mpp": 1}}
    assert with_absolute_paths(given) == {
        "run_dir": f"{tmp_path}/runs",
        "model": {"weights": None},
        "data": {"table": f"{tmp_path}/a/t.csv", "mpp": 1},
    }
    assert given["data"]["table"] == "a/t.csv", "what was given is as it was"


def test_every_command_of_a_cohort_runs_from_the_root_of_the_disk(tmp_path, monkeypatch, capsys):
    """Index, fit, its resumption from another folder, and test."""
    path = write_cohort(tmp_path)
    path.write_text(re.sub(rf"{tmp_path}/", "", path.read_text()))
    assert str(tmp_path) not in path.read_text()
    monkeypatch.chdir("/")
    assert read_source([path]).index_dir == tmp_path / "index"
    assert main(["index", "--config", str(path)]) == 0
    fit = ["fit", "--config", str(path), "--trainer.max_epochs", "1"]
    assert main(fit) == 0
    run = tmp_path / "runs" / "tapfm_gated"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["table"] == str(
        tmp_path / "cohort.csv"
    )
    monkeypatch.chdir(tmp_path)
    path.write_text(path.read_text().replace("table: cohort", "table: ./cohort"))
    assert main(["fit", "--config", "config.yaml", "--trainer.max_epochs", "1"]) == 0, "one run"
    monkeypatch.chdir(tmp_path / "slides")
    assert main(["test", "--run", "../runs", "--overlays", "0"]) == 0
    assert (tmp_path / "runs" / "report_test" / "report.html").is_file()
    assert not (tmp_path / "slides" / "runs").exists()
