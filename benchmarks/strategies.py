"""Every strategy on several demo cohorts: its AUROC, share of trained parameters, and price.

    python -m benchmarks.strategies --seeds 0 1 2 --jobs 2

A cell is a strategy on a seed's cohort, the one of `benchmarks.demo_seeds` (painted where it is not
there yet): `tapfm fit` for as many epochs as every other cell, then the test split, set against the
best frozen baseline of that cohort. All begin with the head as a linear probe has it
(`warm_start`), and then train the slide model too: `frozen` does that and no more, so what a row
has above it is the strategy's. Cells run in processes of their own, one thread each.
results/strategies.json and the table between the markers in README.md are written after each; a
cell that is in it is not run again, and a fit that was stopped goes on.

Learning rate: the strategy's own; for `full` and `last_n`, whose own is made for foundation models,
2e-5, a tenth of the demo's: a head that knows what it wants sends gradients ten times as large as
one that begins with nothing. `lora@1e-3` is LoRA at another.

Price: 2 to 5 minutes of one core a cell of 12 epochs, 300 MB of disk a seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
import yaml

from benchmarks.demo_seeds import CONFIG, ROOT, prepare
from benchmarks.record import RESULTS, facts, rewrite
from tapfm import cli
from tapfm.adapt.strategies import STRATEGIES, make_strategy
from tapfm.data.datamodule import SlideData
from tapfm.engine.memory import saved_bytes
from tapfm.evaluation.predicted_rows import frozen_rows
from tapfm.inference.prediction import predict_all, write_predictions
from tapfm.recipe.best_weights import BEST
from tapfm.reports.html.tables import interval_cell
from tapfm.reports.rows import ResultRow, read_result_row
from tapfm.slide_model import model as models
from tapfm.slide_model.model import SlideModel
from tapfm.stats.metrics import MACRO, evaluate, paired_difference
from tapfm.tasks import Task
from tapfm.training.fit import read_config

RESULT = RESULTS / "strategies.json"
BASELINES = "baselines"  # the cell of the frozen rows, which the others are set against
OWN_MATRICES = {"full": 2e-5, "last_n": 2e-5}
DEMO = yaml.safe_load(CONFIG.read_text())
PREDICTIONS = "predictions_test.csv"
PHASES = ("encode", "aggregate", "adapt")
MIB = 2**20


def main() -> int:
    """Run the missing cells that are asked for; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), metavar="NAME[@LR]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=DEMO["trainer"]["max_epochs"],
                        help="of every cell (%(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (%(default)s)")
    parser.add_argument("--cohorts", type=Path, default=ROOT / "runs" / "demo_seeds")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "strategies")
    parser.add_argument("--result", type=Path, default=RESULT,
                        help="another leaves README.md alone (%(default)s)")  # fmt: skip
    parser.add_argument("--cell", action="store_true", help="run the one cell in this process")
    arguments = parser.parse_args()
    try:  # what is misspelt is said before hours are spent
        for name in {*arguments.strategies} - {BASELINES}:
            learning_rate(name)
    except ValueError as fault:
        parser.error(str(fault))
    if arguments.cell:
        return run_cell(arguments.strategies[0], arguments.seeds[0], arguments)
    results, failed = read_results(arguments.result, arguments.epochs), 0
    for names in ([BASELINES], arguments.strategies):
        missing = [
            (name, seed)
            for seed in arguments.seeds
            for name in names
            if name not in results["seeds"].get(str(seed), {})
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            cells = {pool.submit(start_cell, *cell, arguments): cell for cell in missing}
            for done in as_completed(cells):
                name, seed = cells[done]
                if done.exception():
                    print(f"seed {seed}, {name}: {done.exception()}", file=sys.stderr, flush=True)
                    failed += 1
                    continue
                results["seeds"].setdefault(str(seed), {})[name] = done.result()
                arguments.result.write_text(json.dumps(results, indent=1) + "\n")
                print(f"seed {seed}, {name}: done", flush=True)
                if arguments.result == RESULT:
                    rewrite("strategies", table(results))
    return 1 if failed else 0


def read_results(path: Path, epochs: int) -> dict:
    """Return the existing results.

    Raises:
        SystemExit: cells of another number of epochs, which would be another comparison.
    """
    results = json.loads(path.read_text()) if path.exists() else {"epochs": epochs, "seeds": {}}
    if results["epochs"] != epochs:
        raise SystemExit(
            f"{path} holds cells of {results['epochs']} epochs, and {epochs} were asked for. "
            f"Give --epochs {results['epochs']}, or another --result."
        )
    return results


def learning_rate(name: str) -> float:
    """Return the learning rate of a cell's encoder; raise StrategyError for an unknown strategy."""
    strategy, _, given = name.partition("@")
    own = make_strategy(strategy).lr
    return float(given or OWN_MATRICES.get(strategy, own))


def folder_of(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the folder of a cell."""
    return arguments.work.absolute() / f"{arguments.epochs}_epochs" / str(seed) / name


def start_cell(name: str, seed: int, arguments: argparse.Namespace) -> dict:
    """Start a cell in its own process.

    Raises:
        RuntimeError: it failed; the message says where its output is.
    """
    folder = folder_of(name, seed, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.strategies", "--cell"]
    command += ["--strategies", name, "--seeds", str(seed), "--epochs", str(arguments.epochs)]
    command += [
        "--cohorts",
        str(arguments.cohorts.absolute()),
        "--work",
        str(arguments.work.absolute()),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"failed, see {log.name}")
    return json.loads((folder / "cell.json").read_text())


def run_cell(name: str, seed: int, arguments: argparse.Namespace) -> int:
    """Run one cell; its figures go to cell.json."""
    cohort, folder = arguments.cohorts / str(seed), folder_of(name, seed, arguments)
    about = facts("cpu")
    config = prepare(seed, cohort)[0] if name == BASELINES else cohort / "config.yaml"
    run = ["--config", str(config), "--seed_everything", str(seed)]
    if name == BASELINES:
        found = measure_frozen(run, folder)
    else:
        validate = math.gcd(arguments.epochs, DEMO["trainer"]["check_val_every_n_epoch"])
        run += ["--trainer.max_epochs", str(arguments.epochs)]  # and the last one is validated
        run += ["--trainer.check_val_every_n_epoch", str(validate)]
        found = measure(name, run, folder, folder_of(BASELINES, seed, arguments))
    (folder / "cell.json").write_text(json.dumps({**about, **found}))
    return 0


def measure_frozen(run: Sequence[str], folder: Path) -> dict:
    """Run the baselines of `tapfm test`; their predictions stay in `folder`."""
    first = read_config([*run, "--model.strategy", "full"])
    arms = frozen_rows(first, folder, "test", "cpu")
    labels = first.datamodule.label_names
    return {"arms": {arm.title: figures(labels, arm) for arm in arms}}


def measure(name: str, run: Sequence[str], folder: Path, frozen: Path) -> dict:
    """Fit, predict the test split, and count.

    Args:
        name: the cell's.
        run: arguments of `tapfm fit`: config, seed, epochs.
        folder: of the cell.
        frozen: of the baselines' cell.
    """
    lr = learning_rate(name)
    run = [*run, "--model.strategy", name.partition("@")[0], "--model.steps.encoder_lr", str(lr)]
    run += ["--model.steps.head_first", "0", "--model.steps.warm_start", "true"]
    run += ["--data.workers", "0"]  # tiles are cached: reading them is less than a process's start
    began = time.process_time()
    if cli.main(["fit", *run, "--run_dir", str(folder.parent), "--name", folder.name]):
        raise SystemExit(1)
    spent = time.process_time() - began
    settings = read_config(run)
    data: SlideData = settings.datamodule
    chunk, model = settings.model.chunk, models.load(folder / BEST)
    predictions = predict_all(model, data.streamed(data.rows("test")), chunk, name)
    write_predictions(folder / PREDICTIONS, data.task, predictions)
    labels, arm = (
        data.label_names,
        read_result_row(name, folder / PREDICTIONS, data.task, end_to_end=True),
    )
    tiles = data.streamed(data.rows("val")[:1])
    bag = next(iter(tiles))
    return {
        "lr": lr,
        "parameters": sum(p.numel() for p in model.encoder.parameters() if p.requires_grad),
        "auroc": figures(labels, arm),
        "minus_frozen": gain(data.task, arm, frozen),
        "val_auroc": models.read_model_config(folder / BEST)[1]["val_auroc"],
        "held_mib": held_mib(model, next(bag.tiles.split(chunk))),
        "processor_s": round(spent),
        "resident_gib": peak(folder / "memory.csv"),
    }


def figures(labels: Sequence[str], arm: ResultRow) -> dict[str, dict]:
    """Return AUROC with its interval, macro and of each label."""
    found = evaluate(labels, arm.y_NK, arm.p_NK, arm.case_ids)
    return {label: asdict(each["auroc"]) for label, each in found.items()}


def gain(task: Task, arm: ResultRow, frozen: Path) -> dict[str, dict]:
    """Return AUROC minus that of the best frozen baseline, on the same slides and draws."""
    labels = list(task.labels)
    arms = [
        read_result_row(path.parent.name, path, task, end_to_end=False)
        for path in sorted(frozen.glob(f"*/{PREDICTIONS}"))
    ]
    best = max(arms, key=lambda each: figures(labels, each)[MACRO]["value"])
    assert best.slide_ids == arm.slide_ids, "both take the test split in the table's order"
    found = paired_difference(labels, arm.y_NK, arm.p_NK, best.p_NK, arm.case_ids)
    return {label: asdict(each) for label, each in found.items()}


def held_mib(model: SlideModel, tiles_CP: torch.Tensor) -> float:
    """Return what autograd holds for the backward of one chunk, without parameters, in MiB."""
    model.train()
    return saved_bytes(lambda: model.encode(tiles_CP), model.encoder.parameters()) / MIB


def peak(memory_csv: Path) -> float | None:
    """Return the peak resident memory of all training steps, GiB."""
    with memory_csv.open(newline="") as file:
        cells = [row[f"{phase}_rss_gib"] for row in csv.DictReader(file) for phase in PHASES]
    return max((float(cell) for cell in cells if cell), default=None)


def table(results: dict) -> str:
    """Return a row a strategy, AUROC by seed; the baselines first."""
    seeds = dict(sorted(results["seeds"].items(), key=lambda item: int(item[0])))
    rows = [cells[BASELINES]["arms"] for cells in seeds.values() if BASELINES in cells]
    baselines = dict.fromkeys(title for arms in rows for title in arms)
    names = {name: None for cells in seeds.values() for name in cells if name != BASELINES}
    order = ["frozen", *STRATEGIES]  # the control, then as the package lists them
    names = sorted(names, key=lambda n: (order.index(n.partition("@")[0]), n))
    header = ["strategy", "LR", "learns", *(f"seed {seed}: macro AUROC [95 %]" for seed in seeds)]
    header += [
        "mean",
        "above the best frozen",
        "held for a chunk, MiB",
        "resident, GiB",
        "fit, processor s",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for title in baselines:
        found = [cells.get(BASELINES, {}).get("arms", {}).get(title) for cells in seeds.values()]
        lines.append(row([title, "", "0"], found, [""] * 4))
    for name in names:
        cells = [seeds[seed].get(name) for seed in seeds]
        there = [cell for cell in cells if cell]
        above = sum(cell["minus_frozen"][MACRO]["low"] > 0 for cell in there)
        resident = [cell["resident_gib"] for cell in there if cell["resident_gib"]]
        lines.append(
            row(
                [
                    name,
                    f"{there[0]['lr']:.0e}".replace("e-0", "e-").replace("0e+00", ""),
                    f"{there[0]['parameters']:,}",
                ],
                [cell and cell["auroc"] for cell in cells],
                [
                    f"{above} of {len(there)}",
                    f"{there[0]['held_mib']:.1f}",
                    f"{max(resident):.2f}" if resident else "",
                    f"{mean(cell['processor_s'] for cell in there):.0f}",
                ],
            )
        )
    every = [cell for cells in seeds.values() for cell in cells.values()]
    said = {key: ", ".join(sorted({cell[key] for cell in every}))
            for key in ("machine", "date", "commit", "torch", "timm")}  # fmt: skip
    lines += ["", f"{results['epochs']} epochs each. {said['machine']}; {said['date']}, commit "
              f"{said['commit']}, torch {said['torch']}, timm {said['timm']}."]  # fmt: skip
    return "\n".join(lines)


def row(before: list[str], found: list[dict | None], behind: list[str]) -> str:
    """Return a row of the table: AUROC with interval of each seed, and their mean."""
    macro = [each and each[MACRO] for each in found]
    middle = mean(each["value"] for each in macro if each)
    cells = [interval_cell(each) for each in macro]
    return "| " + " | ".join([*before, *cells, f"{middle:.3f}", *behind]) + " |"


if __name__ == "__main__":
    sys.exit(main())
