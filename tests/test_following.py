"""A verb ends with the command that usually follows, with the user's own paths."""

from pathlib import Path

import pytest

from tapfm.verbs.following import next_command


@pytest.mark.parametrize(
    ("verb", "flags", "command"),
    [
        ("demo", {"out": Path("data/demo")}, "tapfm fit --config demo"),
        ("demo", {"out": Path("a b")}, "tapfm fit --config demo --data.table 'a b'/cohort.csv"),
        ("index", {"config": [Path("my.yaml"), Path("b.yaml")]},
         "tapfm fit --config my.yaml --config b.yaml"),
        ("index", {"config": None}, None),
        ("probe", {"configs": [Path("my.yaml")]}, "tapfm fit --config my.yaml"),
        ("split", {"out": Path(__file__)}, f"tapfm check --table {__file__}"),
        ("split", {"out": Path("folder")}, None),
        ("test", {"run": Path("runs/x"), "split": "val"},
         "open runs/x/report_val/report.html; `tapfm heatmap SLIDE --model "
         "runs/x/RUN/best.safetensors`"),
        ("predict", {"path": Path("m.safetensors"), "out": Path("p")},
         "tapfm heatmap SLIDE --model m.safetensors --out p"),
        ("doctor", {}, None),
    ],
)  # fmt: skip
def test_what_follows(verb, flags, command):
    assert next_command(verb, flags) == command
