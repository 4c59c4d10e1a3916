"""The benchmark of strategies: finished cells are not run again, and the table has their values."""

import json
import sys
from argparse import Namespace

import pytest

from tests.cohorts import write_cohort
from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.strategies as bench

    return bench


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "draws": 9}


def cell(value, gain=0.2, lr=2e-4, **also):
    about = {"machine": "a machine", "date": "d", "commit": "c", "torch": "t", "timm": "v"}
    figures = {"auroc": {"macro": interval(value)}, "minus_frozen": {"macro": interval(gain)}}
    cost = {"parameters": 1234, "held_mib": 43.81, "processor_s": 600, "resident_gib": 1.0}
    return {**about, "lr": lr, **figures, **cost, **also}


def baselines(value):
    return {**cell(0), "arms": {"frozen, gated attention": {"macro": interval(value)}}}


def test_what_is_there_is_not_run_again(bench, monkeypatch, tmp_path, capsys):
    started = []

    def start(name, seed, arguments):
        started.append((name, seed))
        if name == "ssf":
            raise RuntimeError("failed, see log.txt")
        return baselines(0.9) if name == "baselines" else cell(0.95)

    monkeypatch.setattr(bench, "start_cell", start)
    result = tmp_path / "strategies.json"
    asked = ["bench", "--strategies", "lora@1e-3", "ssf", "--seeds", "4", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", [*asked, "--result", str(result)])
    assert bench.main() == 1, "one failed"
    assert started[0] == ("baselines", 4), "the others are set against it"
    assert set(started) == {("baselines", 4), ("lora@1e-3", 4), ("ssf", 4)}
    started.clear()
    assert bench.main() == 1
    assert started == [("ssf", 4)], "what failed is tried again, and nothing else"
    assert set(json.loads(result.read_text())["seeds"]["4"]) == {"baselines", "lora@1e-3"}
    monkeypatch.setattr(sys, "argv", [*asked[:-1], "3", "--result", str(result)])
    with pytest.raises(SystemExit, match="cells of 2 epochs, and 3 were asked for"):
        bench.main()
    monkeypatch.setattr(sys, "argv", ["bench", "--strategies", "lorra"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "'lorra' is none of" in capsys.readouterr().err


def test_the_table_has_seeds_side_by_side_in_the_packages_order(bench):
    seeds = {
        "10": {"baselines": baselines(0.8), "ssf": cell(0.7, gain=0.05, lr=1e-3)},
        "2": {
            "lora": cell(0.91, processor_s=200),
            "baselines": baselines(0.9),
            "ssf": cell(0.5, lr=1e-3),
        },
    }
    lines = bench.table({"epochs": 7, "seeds": seeds}).splitlines()
    assert lines[0].index("seed 2:") < lines[0].index("seed 10:")
    assert lines[2].startswith("| frozen, gated attention |  | 0 | 0.900 [0.800, 1.000] | 0.800 ")
    lora = "| lora | 2e-4 | 1,234 | 0.910 [0.810, 1.010] |  | 0.910 | 1 of 1 | 43.8 | 1.00 | 200 |"
    assert lines[3] == lora
    assert lines[4].endswith("| 0.600 | 1 of 2 | 43.8 | 1.00 | 600 |"), "a mean, and one gain"
    assert "7 epochs" in lines[-1]


def test_a_cell_fits_and_tests_beside_the_baselines(bench, monkeypatch, tmp_path):
    """Runs in this process, on a cohort of a few tiny slides."""
    cohort = tmp_path / "cohorts" / "5"
    config = write_cohort(cohort)
    monkeypatch.setattr(bench, "prepare", lambda seed, work: (work / "config.yaml", {}))
    arguments = Namespace(work=tmp_path / "work", cohorts=tmp_path / "cohorts", epochs=1)
    from tapfm import cli

    assert cli.main(["index", "--config", str(config)]) == 0
    found = {}
    for name in ("baselines", "last_n@1e-3", "frozen"):
        folder = bench.folder_of(name, 5, arguments)
        folder.mkdir(parents=True)
        assert bench.run_cell(name, 5, arguments) == 0
        found[name] = json.loads((folder / "cell.json").read_text())
    assert len(found["baselines"]["arms"]) == 4
    assert found["frozen"]["parameters"] == found["frozen"]["held_mib"] == 0
    cell = found["last_n@1e-3"]
    assert cell["lr"] == 1e-3
    assert cell["parameters"] == 198_272 + 256, "a block of the demo encoder, and the final norm"
    assert cell["held_mib"] > 0
    best = max(arm["macro"]["value"] for arm in found["baselines"]["arms"].values())
    gain = cell["minus_frozen"]["macro"]["value"]
    assert gain == pytest.approx(cell["auroc"]["macro"]["value"] - best)
