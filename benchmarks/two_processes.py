"""Compare the hours that `tapfm plan --gpus` simulates with two processes that train together.

    python -m benchmarks.two_processes [--repeats 4] [--keep FOLDER]

A painted cohort of 24 training slides of very unequal sizes trains the demo encoder for two epochs,
4 slides an update of each process, in three ways, in turn: one process; two processes that know
nothing of each other; two processes of one run (Lightning's DDP over gloo). Each process has one
core and one thread. The rates of a process (seconds of a tile in both passes and in one, of a
slide, of an update) are fitted to the first epoch of a run by itself; what averaging takes is
measured between two processes alone. From these, `planning.epoch` forecasts the second epoch of
the run by itself and both epochs of the run of two, and the validations.

Other programs take part of this machine, so everything is measured by two clocks. The wall clock:
the rates are those of the two processes that know nothing of each other, which bear the same load
as the two of one run. The processor's clock, which others' load hardly touches: of each stretch
between two averagings the slower process counts, as it does where each process has a card.

A repeat that is in results/two_processes.csv at this commit is not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
import yaml

from benchmarks.campaign.tries import group
from benchmarks.record import RESULTS, facts, rewrite, write_rows
from slides.demo.cohort import plan_demo, write_slide
from tapfm.distributed import average
from tapfm.encoders.backbones import build, find
from tapfm.planning.epoch import Rates, pass_seconds, simulate
from tapfm.preflight.cohort_plan import indexed_tiles

SPLITS, ACCUMULATE, EPOCHS = ("train",) * 24 + ("val",) * 8, 4, 2
TISSUE_MM2 = 0.04, 0.5
TAPFM = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]
CLOCKS = {"wall": time.monotonic, "processor": time.process_time}
RESULT = RESULTS / "two_processes.csv"


class Trace(L.Callback):
    """Writes what each process's clocks show at the events of its training and validation."""

    def __init__(self):
        self.rows: list[dict] = []

    def note(self, trainer, event: str, tiles: int = 0) -> None:
        """Add a row."""
        clocks = {name: now() for name, now in CLOCKS.items()}
        self.rows.append({"epoch": trainer.current_epoch, "event": event, "tiles": tiles, **clocks})

    def on_train_epoch_start(self, trainer, module) -> None:
        """An epoch begins: its first slide is not read yet."""
        self.note(trainer, "begin")

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        """The gradients of head or encoder are averaged."""
        self.note(trainer, "averaged")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """A slide is done."""
        self.note(trainer, "slide", batch.count)

    def on_validation_start(self, trainer, module) -> None:
        """Validation begins."""
        self.note(trainer, "validation")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *_) -> None:
        """A slide of validation is done."""
        self.note(trainer, "validated", batch.count)

    def on_validation_end(self, trainer, module) -> None:
        """All processes have gathered what they predicted."""
        self.note(trainer, "gathered")

    def on_fit_end(self, trainer, module) -> None:
        """Write the file that the environment names."""
        rank = os.environ.get("RANK", "0")
        write_rows(Path(os.environ["TRACE"] + f"_{rank}.csv"), [exact(row) for row in self.rows])


def exact(row: dict) -> dict:
    """Return a row whose clocks are text, to the microsecond."""
    return {**row, **{name: f"{row[name]:.6f}" for name in CLOCKS}}


def write_cohort(folder: Path) -> Path:
    """Paint the cohort and index it; return its config."""
    config = folder / "config.yaml"
    if config.exists():
        return config
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    (folder / "truth").mkdir(exist_ok=True)
    draw, lines = np.random.default_rng(0), ["case_id,slide_id,slide_path,split,EGFR"]
    for number, (slide, split) in enumerate(zip(plan_demo(0, len(SPLITS)), SPLITS, strict=True)):
        area = float(np.exp(draw.uniform(*np.log(TISSUE_MM2))))
        specimen = replace(slide.specimen, tissue_mm2=area)
        painted = replace(slide, slide_id=f"s{number}", mpp=0.5, specimen=specimen)
        write_slide(painted, folder)
        lines.append(f"c{number},s{number},{painted.path},{split},{number % 2}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    settings = {
        "run_dir": str(folder / "runs"),
        "resume_minutes": 0,
        "trainer": {
            "accelerator": "cpu", "max_epochs": EPOCHS, "log_every_n_steps": ACCUMULATE,
            "callbacks": [{"class_path": "benchmarks.two_processes.Trace"}],
        },
        "model": {"model": "demo_vit", "chunk": 16,
                  "steps": {"accumulate": ACCUMULATE, "interpolate": []}},
        "data": {
            "table": str(folder / "cohort.csv"), "index_dir": str(folder / "index"),
            "cache_dir": str(folder / "cache"), "tiles": {"tile_px": 112, "mpp": 0.5},
            "workers": 0,
        },
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    run([[*TAPFM, "index", "--config", str(config)]], [{}], folder / "index.log")
    return config


def run(commands: Sequence[list[str]], environments: Sequence[dict], log: Path) -> None:
    """Run commands side by side, each on one core.

    Raises:
        SystemExit: one failed; the log's end is printed.
    """
    running = []
    for core, (command, more) in enumerate(zip(commands, environments, strict=True)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        with log.with_name(f"{log.stem}_{core}.log").open("w") as file:
            bound = ["taskset", "-c", str(core), *command]
            running.append(subprocess.Popen(bound, env=environment, stdout=file, stderr=file))
    codes = [process.wait() for process in running]
    if any(codes):
        for core in range(len(commands)):
            print(log.with_name(f"{log.stem}_{core}.log").read_text()[-2000:])
        raise SystemExit(f"{log.stem} failed")


def fit(config: Path, name: str, together: bool, processes: int) -> list[list[dict]]:
    """Train in one run, or in several that know nothing of each other; return their traces."""
    folder = config.parent
    names = [name if together else f"{name}_{rank}" for rank in range(processes)]
    for each in names:  # of a repeat that was stopped
        shutil.rmtree(folder / "runs" / each, ignore_errors=True)
    commands = [[*TAPFM, "fit", "--config", str(config), "--name", each] for each in names]
    traces = [{"TRACE": str(folder / each)} for each in names]
    if together:
        flags = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
        commands = [[*each, *flags] for each in commands]
        places = group(processes)
        traces = [{**each, **place} for each, place in zip(traces, places, strict=True)]
    run(commands, traces, folder / f"{name}.log")
    ranks = range(processes) if together else [0] * processes
    return [read(folder / f"{each}_{rank}.csv") for each, rank in zip(names, ranks, strict=True)]


def read(path: Path) -> list[dict]:
    """Return a trace with its numbers."""
    with path.open() as file:
        return [
            {**row, "epoch": int(row["epoch"]), "tiles": int(row["tiles"])}
            | {name: float(row[name]) for name in CLOCKS}
            for row in csv.DictReader(file)
        ]


def training(trace: list[dict], epoch: int) -> list[dict]:
    """Return an epoch's events from its begin to its last slide."""
    mine = [r for r in trace if r["epoch"] == epoch]
    return [r for r in mine if r["event"] in ("begin", "averaged", "slide")]


def rates_of(traces: Sequence[list[dict]], clock: str, average_s: float) -> Rates:
    """Return a process's rates, fitted to the first epoch of runs by themselves.

    A slide takes tile_s for each tile and slide_s, and the last of an update update_s more; a slide
    of validation takes forward_s for each tile.
    """
    rows, seconds, seen, forward = [], [], 0, 0.0
    for trace in traces:
        events = [r for r in training(trace, 0) if r["event"] != "averaged"]
        for number, (before, after) in enumerate(pairwise(events), 1):
            rows.append((after["tiles"], 1, number % ACCUMULATE == 0))
            seconds.append(after[clock] - before[clock])
        for before, after in pairwise(trace):
            if after["event"] == "validated" and after["epoch"] == 0:
                seen += after["tiles"]
                forward += after[clock] - before[clock]
    design = np.array(rows, float)
    (tile_s, slide_s, update_s), *_ = np.linalg.lstsq(design, np.array(seconds), rcond=None)
    return Rates(
        float(tile_s), forward / seen, max(0.0, float(update_s)), max(0.0, float(slide_s)),
        average_s=average_s,
    )  # fmt: skip


def epoch_seconds(traces: Sequence[list[dict]], epoch: int, clock: str) -> float:
    """Return seconds of an epoch of a run: between two averagings the slowest process counts."""
    each = [training(trace, epoch) for trace in traces]
    if clock == "wall":
        return max(e[-1][clock] for e in each) - min(e[0][clock] for e in each)
    marks = [[r[clock] for r in e if r["event"] != "slide"] + [e[-1][clock]] for e in each]
    return float(np.diff(np.array(marks), axis=1).max(axis=0).sum())


def validation_seconds(traces: Sequence[list[dict]], epoch: int, clock: str) -> float:
    """Return seconds of a validation: the slowest process's."""
    found = []
    for trace in traces:
        mine = {r["event"]: r[clock] for r in trace if r["epoch"] == epoch}
        found.append(mine["validated"] - mine["validation"])  # the last slide's
    return max(found)


def time_average(rank: int) -> None:
    """Print seconds of averaging the gradients of an encoder and a head between two processes."""
    dist.init_process_group("gloo")
    learn = list(build(find("demo_vit")).parameters())
    for parameter in learn:
        parameter.grad = torch.randn_like(parameter)
    seconds = []
    for _ in range(12):
        dist.barrier()
        began = [now() for now in CLOCKS.values()]
        average(learn)
        seconds.append([now() - then for now, then in zip(CLOCKS.values(), began, strict=True)])
    dist.destroy_process_group()
    if not rank:
        print("averaging", *np.median(seconds[2:], axis=0))


def averaging(folder: Path) -> dict[str, float]:
    """Return seconds of averaging between two processes that do nothing else, by clock."""
    command = [sys.executable, "-m", "benchmarks.two_processes", "--average"]
    run([[*command, str(rank)] for rank in range(2)], group(2), folder / "average.log")
    said = (folder / "average_0.log").read_text().split("averaging ")[1].split()
    return {name: float(value) for name, value in zip(CLOCKS, said, strict=False)}


def repeat(config: Path, number: int) -> list[dict]:
    """Return rows of forecast and measured seconds, by clock, processes, epoch and part."""
    train, val = (indexed_tiles([config], split) for split in ("train", "val"))
    apart = averaging(config.parent)
    alone = fit(config, f"alone{number}", False, 1)
    beside = fit(config, f"beside{number}", False, 2)
    two = fit(config, f"two{number}", True, 2)
    found = []
    for clock in CLOCKS:
        for processes, traces, by in ((1, alone, alone), (2, two, beside)):
            rates = rates_of(by, clock, apart[clock])
            for epoch in range(2 - processes, EPOCHS):  # the first gave one process its rates
                forecast = simulate(train, processes, rates, ACCUMULATE, epoch=epoch)
                validation = pass_seconds(val, processes, replace(rates, slide_s=0))
                pairs = {
                    "training": (forecast.seconds, epoch_seconds(traces, epoch, clock)),
                    "validation": (validation, validation_seconds(traces, epoch, clock)),
                }
                for part, (expected, measured) in pairs.items():
                    found.append({
                        "repeat": number, "clock": clock, "processes": processes, "epoch": epoch,
                        "part": part, "forecast_s": expected, "measured_s": measured,
                        "ratio": expected / measured, "tile_s": rates.tile_s,
                        "forward_s": rates.forward_s, "slide_s": rates.slide_s,
                        "update_s": rates.update_s, "average_s": rates.average_s,
                        "waiting": forecast.waiting, "load": os.getloadavg()[0], **facts("cpu"),
                    })  # fmt: skip
    return found


def done() -> list[dict]:
    """Return the rows that were measured at this commit."""
    if not RESULT.exists():
        return []
    with RESULT.open() as file:
        return [row for row in csv.DictReader(file) if row["commit"] == facts("cpu")["commit"]]


def main() -> int:
    """Run the repeats that are missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="folder of the cohort, which is left behind")
    parser.add_argument("--average", type=int, help=argparse.SUPPRESS)  # of this process
    given = parser.parse_args()
    if given.average is not None:
        time_average(given.average)
        return 0
    rows = done()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        for number in range(given.repeats):
            if any(int(row["repeat"]) == number for row in rows):
                continue
            rows += repeat(write_cohort(folder), number)
            write_rows(RESULT, rows)
    rewrite("two_processes", table(done()))
    return 0


def table(rows: Sequence[dict]) -> str:
    """Return medians over repeats as Markdown."""
    about = rows[0]
    repeats = len({row["repeat"] for row in rows})
    lines = [
        f"{about['machine']}; {about['date']}, commit {about['commit']}, torch {about['torch']}; "
        f"medians of {repeats} repeats, in brackets the range of ratios.",
        "",
        "| clock, processes, part | forecast, s | measured, s | forecast / measured |",
        "|---|---|---|---|",
    ]
    kinds = dict.fromkeys((r["clock"], r["processes"], r["part"]) for r in rows)
    for kind in kinds:
        mine = [r for r in rows if (r["clock"], r["processes"], r["part"]) == kind]
        expected, measured, ratios = (
            [float(r[key]) for r in mine] for key in ("forecast_s", "measured_s", "ratio")
        )
        lines.append(
            f"| {kind[0]}, {kind[1]}, {kind[2]} | {np.median(expected):.1f} | "
            f"{np.median(measured):.1f} | {np.median(ratios):.2f} [{min(ratios):.2f}, "
            f"{max(ratios):.2f}] |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
