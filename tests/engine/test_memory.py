"""`engine.memory`: what a phase cost, and what autograd holds; and the benchmark that shows both.

A count of bytes is exact and checked as such. Of times and resident memory only what must hold on
any machine is checked: order, and that a large array shows.
"""

import csv
import functools
import json
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tapfm.engine.chunked import encode_bag
from tapfm.engine.memory import PhaseMeter, SavedBytes, reset_resident, resident_gib, saved_bytes
from tests.card import PretendCard
from tests.conftest import ROOT
from tests.tiny import random_tiles, tiny_encoder

ROWS, COLUMNS = 13, 7
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


class TestSavedBytes:
    def test_is_exact(self):
        """A product holds both factors; a sum nothing."""
        a, b = (torch.randn(ROWS, COLUMNS, requires_grad=True) for _ in range(2))
        assert saved_bytes(lambda: a * b) == 2 * ROWS * COLUMNS * 4
        assert saved_bytes(lambda: a + b) == 0

    def test_a_storage_counts_once_and_whole(self):
        a = torch.randn(ROWS, COLUMNS, requires_grad=True)
        assert saved_bytes(lambda: a * a) == ROWS * COLUMNS * 4
        assert saved_bytes(lambda: a[:2] * a[3:5]) == ROWS * COLUMNS * 4

    def test_parameters_can_be_left_out(self):
        layer = torch.nn.Linear(COLUMNS, 3)
        x = torch.randn(ROWS, COLUMNS, requires_grad=True)
        held = ROWS * COLUMNS * 4
        assert saved_bytes(lambda: layer(x), but=layer.parameters()) == held
        assert saved_bytes(lambda: layer(x)) == held + layer.weight.numel() * 4

    def test_peak_is_not_the_sum_of_graphs_let_go(self):
        a = torch.randn(ROWS, requires_grad=True)

        def chunks():
            for _ in range(5):
                a.exp().sum().backward()

        assert saved_bytes(chunks) == ROWS * 4

    def test_live_falls_when_a_graph_goes(self):
        a = torch.randn(ROWS, requires_grad=True)
        with SavedBytes() as held:
            y = a.exp()
            assert held.live == ROWS * 4
            y.sum().backward()
            del y
            assert held.live == 0
            assert held.peak == ROWS * 4
            held.peak = held.live
            (a[:2] * 1.0).sum()
            assert held.peak == 0

    def test_pass_1_holds_nothing_and_a_graph_does(self):
        encoder, tiles = tiny_encoder(), random_tiles(5).split(2)
        cpu = torch.device("cpu")
        assert saved_bytes(lambda: encode_bag(encoder, tiles, seed=0, device=cpu)) == 0
        assert saved_bytes(lambda: encoder(tiles[0])) > 0


class TestPhaseMeter:
    def test_names_and_figures(self):
        meter = PhaseMeter("cpu")
        for name in ("encode", "adapt"):
            with meter.phase(name):
                time.sleep(0.01)
        figures = meter.take()()
        assert list(figures) == ["encode", "adapt"]
        for each in figures.values():
            assert each["s"] >= 0.01
            assert set(each) <= {"s", "rss_gib"}
        assert meter.take()() == {}

    def test_a_phase_that_comes_twice_adds_up(self):
        meter = PhaseMeter(torch.device("cpu"))
        for pause in (0.02, 0.01):
            with meter.phase("encode"):
                time.sleep(pause)
        assert meter.take()()["encode"]["s"] >= 0.03

    def test_a_slide_that_failed_leaves_no_figures(self):
        meter = PhaseMeter("cpu")
        with meter.phase("encode"):
            pass
        with pytest.raises(ZeroDivisionError), meter.phase("adapt"):
            _ = 1 / 0
        assert meter.take()() == {}

    @linux
    def test_resident_memory_is_the_phases_own_peak(self):
        meter = PhaseMeter("cpu")
        with meter.phase("large"):
            np.ones(400 * 2**20, np.uint8)  # let go before the phase ends: still its peak
        with meter.phase("small"):
            pass
        figures = meter.take()()
        assert figures["large"]["rss_gib"] - figures["small"]["rss_gib"] > 0.3

    @linux
    def test_resident_memory_where_the_system_says_nothing(self, monkeypatch, tmp_path):
        assert resident_gib() > 0
        monkeypatch.setattr("tapfm.engine.memory.PROCESS", tmp_path / "none")
        reset_resident()
        assert resident_gib() is None
        meter = PhaseMeter("cpu")
        with meter.phase("encode"):
            pass
        assert set(meter.take()()["encode"]) == {"s"}

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_peaks_are_each_phases_own(self):
        meter = PhaseMeter("cuda")
        with meter.phase("large"):
            torch.ones(400 * 2**20, dtype=torch.uint8, device="cuda")
        with meter.phase("small"):
            torch.ones(2**20, dtype=torch.uint8, device="cuda")
        figures = meter.take()()
        large, small = figures["large"], figures["small"]
        assert 0.3 < large["allocated_gib"] - small["allocated_gib"] < 0.5
        assert large["reserved_gib"] >= large["allocated_gib"]
        assert large["s"] >= 0
        assert set(small) == {"s", "allocated_gib", "reserved_gib"}


class TestBenchmark:
    @pytest.fixture
    def bench(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT)
        import benchmarks.peak_memory as bench

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        monkeypatch.setattr(bench, "cores", lambda: 1)
        yield bench
        torch.set_num_threads(threads)

    def job(self, bench, method, tiles):
        return bench.Job(method, tiles, "demo_vit", "cpu", "fp32", False, 5, None)

    def test_ours_is_flat_and_the_other_grows(self, bench):
        def held(method, tiles):
            *phases, whole = bench.measure(self.job(bench, method, tiles))
            assert [row["phase"] for row in phases] == ["encode", "aggregate", "adapt"]
            assert whole["status"] == "ok"
            return whole["autograd_mib"]

        # the features' own small graph grows by some bytes a tile
        assert held("two_pass", 7) == pytest.approx(held("two_pass", 13), rel=1e-4)
        assert held("one_graph", 13) > 1.8 * held("one_graph", 7)

    def test_out_of_memory_is_a_row(self, bench, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(bench, "Step", full)
        (row,) = bench.measure(self.job(bench, "one_graph", 7))
        assert row["status"] == "out of memory"
        assert row["tiles"] == 7

    def test_readme_keeps_what_is_not_ours(self, bench, tmp_path):
        from benchmarks import record

        results, readme = tmp_path / "results", tmp_path / "README.md"
        about = {"machine": "a machine", "date": "d", "commit": "c", "torch": "t", "timm": "v"}
        whole = {"phase": "slide", "status": "ok", "autograd_mib": 43.8, "rss_mib": 1024.0}
        rows = [
            {**bench.place(self.job(bench, "two_pass", 7)), **whole, "seconds": 0.5, **about},
            {**bench.failed(self.job(bench, "one_graph", 7)), **about},
        ]
        bench.write_rows(results / "peak_memory_cpu.csv", rows, bench.COLUMNS)
        bench.draw(bench.read_csv(results / "peak_memory_cpu.csv"), results / "x.png")
        with (results / "peak_memory_cpu.csv").open() as file:
            assert next(csv.DictReader(file))["autograd_mib"] == "43.8"
        marks = "<!-- peak_memory:begin -->\nold\n<!-- peak_memory:end -->"
        readme.write_text(f"before\n{marks}\nafter\n")
        for _ in range(2):
            record.rewrite("peak_memory", bench.all_tables(results), readme)
        text = readme.read_text()
        assert "old" not in text
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert text.count("| 7 | 43.8 | out of memory | 1.00 | out of memory |") == 1
        with pytest.raises(ValueError, match="no <!-- other:begin -->"):
            record.rewrite("other", "", readme)


class Here:
    """A process pool that calls in this process, where the pretend card is."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        return SimpleNamespace(result=functools.partial(function, *arguments))


def test_the_gpu_benchmark_runs_through_on_a_pretend_card(monkeypatch, tmp_path):
    """Finds its faults before it takes GPU time; of its figures only bytes mean something here."""
    import benchmarks.gpu_engine as bench

    fewer = {name: each for name, each in bench.SCHEMES.items() if name != "residual, recompute"}
    changed = {"CHUNK": 2, "SCHEMES": fewer, "REPEATS": 1, "RESULTS": tmp_path,
               "ProcessPoolExecutor": Here,
               "rewrite": lambda _, text: (tmp_path / "table.md").write_text(text)}  # fmt: skip
    for name, value in changed.items():
        monkeypatch.setattr(bench, name, value)
    flags = ["--models", "demo_vit", "--largest", "2", "--tiles", "2"]
    monkeypatch.setattr("sys.argv", ["gpu_engine", *flags])
    with PretendCard():
        assert bench.main() == 0
    results = json.loads((tmp_path / "gpu_engine.json").read_text())
    found, text = results["demo_vit"], (tmp_path / "table.md").read_text()
    assert found["bags"]["ours"] | {"seconds": 1} == {"scheme": "master", "tiles": 2, "seconds": 1}
    assert found["bags"]["official"]["tiles"] >= 2
    assert all(rate > 0 for rate in found["speed"].values())
    assert found["machine"].startswith("Pretend; ")
    assert set(found["attention"]) == {"bfloat16", "float32"}
    assert f"Attention: {found['attention']['bfloat16']} in bfloat16" in text
    peaks = {name: each["allocated_reserved"][0][0] for name, each in found["peaks"].items()}
    assert set(peaks) == set(bench.SCHEMES)
    assert peaks["residual"] < peaks["adamw"]
    found["peaks"]["master"]["allocated_reserved"] = [(1.0, 1.5), (1.009, 1.6)]
    found["peaks"]["offload"]["allocated_reserved"] = []
    text = bench.tables(results)
    assert "| demo_vit | 2 (master) |" in text
    assert "| 1.00 | 1.50 | 1.50 |" in text, "0.009 GiB over 6 tiles more"
    assert re.search(r"demo_vit, offload \| \S+ \| does not fit", text)
