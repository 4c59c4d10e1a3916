"""A verb ends with the command that usually follows, with the user's own paths, to be typed."""

import re
import shlex
from pathlib import Path

import pytest

from tapfm.cli import LIGHTNINGS, VERBS, parser
from tapfm.config import data_keys
from tapfm.config_paths import find_config
from tapfm.following import FOLLOWING, next_command

MY = {"config": [Path("my.yaml"), Path("b c.yaml")]}
GIVEN = "--config my.yaml --config 'b c.yaml'"
CASES = [
    ("demo", {"out": Path("data/demo")}, "tapfm fit --config demo"),
    ("demo", {"out": Path("a b")}, "tapfm fit --config demo --data.table 'a b'/cohort.csv"),
    ("labels", {"out": Path(__file__), "config": None}, f"tapfm check --table {__file__}"),
    ("labels", {"out": None, "config": [Path("my.yaml")]}, "tapfm check --config my.yaml"),
    ("labels", {"out": None, "config": None}, None),
    ("split", {"out": Path(__file__)}, f"tapfm check --table {__file__}"),
    ("split", {**MY, "out": Path("FOLDS")},
     f"tapfm check {GIVEN} --table FOLDS/split_0.csv"),
    ("split", {"out": Path("FOLDS")}, "tapfm check --table FOLDS/split_0.csv"),
    ("index", {**MY, "slides": []}, f"tapfm fit {GIVEN}"),
    ("index", {"config": None, "slides": [Path("a b.svs"), Path("c.svs")]},
     "tapfm predict 'a b.svs' --model RUN/best.safetensors"),
    ("check", {**MY, "fix": None, "table": None, "slides_dir": None}, f"tapfm fit {GIVEN}"),
    ("check", {"config": None, "fix": None, "table": Path("/x/t.csv"), "slides_dir": Path("/x")},
     "tapfm fit --data.table /x/t.csv --data.slides_dir /x"),
    ("check", {**MY, "fix": Path("n.csv"), "table": None, "slides_dir": None},
     "tapfm check --table n.csv  # and set data.table to it in your config"),
    ("plan", {"configs": [Path("my.yaml")]}, "tapfm check --config my.yaml"),
    ("plan", {"configs": None}, "tapfm check --config CONFIG"),
    ("probe", {"configs": [Path("my.yaml")]}, "tapfm fit --config my.yaml"),
    ("fit", {"folder": Path("runs/my cohort/lora")}, "tapfm test --run 'runs/my cohort'"),
    ("fit-tiles", {"folder": Path("runs/lora")},
     "tapfm export --model runs/lora/best.safetensors --out exported"),
    ("test", {"run": Path("TWO"), "split": "val"}, "tapfm compare TWO --split val"),
    ("test", {"run": Path("ONE"), "split": "test"}, "tapfm view ONE/a"),
    ("study", {**MY, "out": "s"}, f"tapfm fit {GIVEN}  # with what s/study.html shows as best"),
    ("study", {"config": None, "out": None},
     "tapfm fit --config CONFIG  # with what study.html shows as best"),
    ("report", {"run": Path("TWO"), "split": "test"}, "tapfm compare TWO"),
    ("compare", {"runs": [Path("TWO")], "split": "test"}, "tapfm view TWO/a"),
    ("compare", {"runs": [Path("x/a"), Path("x/b")], "split": "val"}, "tapfm view x/a --split val"),
    ("view", {"run": Path("runs/x")}, "tapfm heatmap SLIDE --model runs/x/best.safetensors"),
    ("predict", {"path": Path("m.safetensors"), "out": Path("p"), "slides": [Path("s.svs")]},
     "tapfm heatmap s.svs --model m.safetensors --out p"),
    ("heatmap", {"path": Path("m.safetensors")},
     "tapfm export --model m.safetensors --out exported"),
    ("heatmap", {"path": Path("r/pathpt.safetensors")}, None),
    ("features", {"config": None}, None),
    ("features", {"config": [Path("CONFIG_HERE")], "out": Path("JOB")},
     "tapfm fit --config CONFIG_HERE --config features_only --data.features_dir "
     "JOB/20x/features_uni"),
    ("histaug", {"config": [Path("my.yaml")], "out": Path("h.safetensors")},
     "tapfm fit --config my.yaml --config features_only --data.features_dir FOLDER "
     "--model.bag_transforms '[{name: histaug, weights: h.safetensors}]'"),
    ("embed", {"features": Path("JOB/20x/features_uni"), "out": Path("v")},
     "tapfm test --run RUN --slide-features v"),
    ("embed", {"features": Path("JOB/20x/features_uni"), "out": None},
     "tapfm test --run RUN --slide-features JOB/20x/slide_features_titan"),
    ("embed", {"features": None, "out": None}, "tapfm test --run RUN --slide-features FOLDER"),
    ("pathpt", {"out": Path("p")}, "tapfm heatmap SLIDE --model p/pathpt.safetensors"),
    ("export", {"out": Path("e")}, None),
    ("doctor", {"model": None}, "tapfm demo"),
    ("doctor", {"model": "uni"}, "tapfm plan --model uni"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What some verbs have left behind."""
    for name in ("ONE/a/best.safetensors", "TWO/a/best.safetensors", "TWO/b/best.safetensors",
                 "FOLDS/split_1.csv", "FOLDS/split_0.csv",
                 "JOB/20x/features_uni/s.h5", "JOB/20x/slide_features_titan/s.h5"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("verb", "flags", "command"), CASES, ids=[str(n) for n in range(len(CASES))]
)
def test_what_follows(folder, verb, flags, command):
    assert next_command(verb, flags) == command


def test_every_verb_has_a_row_and_a_case():
    assert set(FOLLOWING) == set(VERBS)
    assert {verb for verb, _, _ in CASES} == set(VERBS)


@pytest.mark.parametrize("command", sorted({each[2] for each in CASES if each[2]}))
def test_what_follows_can_be_typed(command):
    program, verb, *words = shlex.split(command, comments=True)
    assert program == "tapfm"
    if verb not in LIGHTNINGS:
        parser().parse_args([verb, *words])
        return
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert re.fullmatch(r"--(config|model\.bag_transforms|data\.\w+)", flag)
        assert not flag.startswith("--data.") or flag.removeprefix("--data.") in data_keys()
        if flag == "--config" and value.islower() and "." not in value:
            assert find_config(value).is_file(), "one that comes with tapfm"
