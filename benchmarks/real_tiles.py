"""Tile-supervised training on real tissue: every strategy against a linear probe, three seeds.

    python -m benchmarks.real_tiles            prepare, fit what is missing, write the table
    python -m benchmarks.real_tiles --table    the table alone, from what is there

336 tiles of 224 px, eight compartments of three slides, read at 112 px. Parts are spatial: along
each compartment the first half of its tiles trains, a fifth validates, the rest tests, cut between
blocks of `BLOCK` pixels, and blocks are what the bootstrap draws. Class and slide are tied except
within two slides, and neighbours across a cut are of one tissue: the table compares ways of
training, and says nothing of new patients. A cell (strategy, seed) that is done is not run again;
one that was stopped goes on. Tiles: Pathology Atlas, CC BY 4.0, Serdar Balci / Memorial Pathology,
doi 10.5281/zenodo.6382734.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import RESULTS, facts, rewrite
from tapfm.adapt.strategies import STRATEGIES
from tapfm.cli import main as tapfm
from tapfm.reports.html.tables import interval_cell
from tapfm.reports.plain_table import markdown
from tapfm.stats.bootstrap import percentiles, with_point
from tapfm.stats.confusions import averages, confusions
from tapfm.tile_training.fit import PROBE, RGB
from tapfm.tile_training.metrics import FIGURES

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TAPFM_DATA", ROOT.parent / "shared" / "data"))
CONFIG = ROOT / "configs" / "tiles" / "real_tiles.yaml"
TABLE = ROOT / "data" / "real_tiles" / "tiles.csv"
RESULT = RESULTS / "real_tiles.json"
WEIGHTS = DATA / "weights" / "dinov2_vits14_timm_fp16.safetensors"
BLOCK = 672  # tile pixels, three tiles or 0.34 mm: what is drawn together, and never cut
SHARES = (0.5, 0.7)  # of a compartment's tiles: where train and val end
RATES = {"full": 2e-5}  # the strategy's own is a slide's, 1e-6: nothing moves in 110 updates
DRAWS = 2000


def prepare() -> None:
    """Write the tiles' table: a block is a case; a compartment is cut along its longer side."""
    with (DATA / "tiles" / "tiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    blocks = defaultdict(list)
    for row in rows:
        place = [int(part) // BLOCK for part in Path(row["file"]).stem.split("_")[-2:]]
        blocks[row["compartment"], row["box"], *place].append(row)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["path", "label", "case_id", "split"])
        for name in sorted({key[0] for key in blocks}):
            keys = sorted(key for key in blocks if key[0] == name)
            spread = [np.ptp([key[axis] for key in keys]) for axis in (2, 3)]
            axis = 2 + int(np.argmax(spread))
            keys.sort(key=lambda key, axis=axis: (key[1], key[axis], key))
            total, done = sum(len(blocks[key]) for key in keys), 0
            for key in keys:
                split = ("train", "val", "test")[sum(done / total >= share for share in SHARES)]
                for row in blocks[key]:
                    path = (DATA / "tiles" / "images" / row["file"]).resolve()
                    writer.writerow([path, name, "/".join(map(str, key)), split])
                done += len(blocks[key])


def fit(strategy: str, seed: int, epochs: int, run: Path) -> float:
    """Fit one cell; return its processor seconds, since the machine may be busy."""
    began = time.process_time()
    arguments = ["fit-tiles", "--config", str(CONFIG), "--model.weights", str(WEIGHTS),
                 "--model.strategy", strategy, "--name", f"{strategy}_{seed}",
                 "--seed_everything", str(seed), "--run_dir", str(run),
                 "--trainer.max_epochs", str(epochs)]  # fmt: skip
    if strategy in RATES:
        arguments += ["--model.steps.encoder_lr", str(RATES[strategy])]
    if tapfm(arguments):
        raise SystemExit(f"{strategy}, seed {seed}: did not end well")
    return time.process_time() - began


def trainable(strategy: str) -> int:
    """Return the number of trained parameters of the encoder."""
    from tapfm.adapt.strategies import make_strategy
    from tapfm.encoders import backbones

    vit = backbones.load("dinov2_vits14", "random", tile_px=112).vit
    make_strategy(strategy).prepare(vit)
    return sum(p.numel() for p in vit.parameters() if p.requires_grad)


def summary(seeds: dict[str, list[int]], run: Path) -> dict:
    """Return every row's figures; a strategy's are means over its seeds.

    Args:
        seeds: of each strategy, those that are done.
        run: folder of the runs.
    """
    first = next((name, each[0]) for name, each in seeds.items())
    cells = {title: [(*first, title)] for title in (RGB, PROBE)}  # frozen: the same in every run
    cells |= {name: [(name, s, f"adapted, {name}_{s}") for s in each] for name, each in
              seeds.items()}  # fmt: skip
    said = {title: [_predictions(run, *cell) for cell in each] for title, each in cells.items()}
    cases, y_N, classes, _ = said[PROBE][0]
    times_BN = with_point(cases, DRAWS, 0)
    found = {}
    for title, each in said.items():
        tables = [confusions(y_N, p_NK.argmax(1), len(classes), times_BN) for *_, p_NK in each]
        found[title] = {name: [averages(table)[name] for table in tables] for name in FIGURES}
    reference = found[PROBE]["f1"][0]
    rows = {
        title: {
            **{name: vars(percentiles(np.mean(by_seed, 0))) for name, by_seed in each.items()},
            "f1_by_seed": [float(figure_B[0]) for figure_B in each["f1"]],
            "f1_minus_probe": vars(percentiles(np.mean(each["f1"], 0) - reference)),
        }
        for title, each in found.items()
    }
    return {"rows": rows, "tiles": len(y_N), "blocks": len(set(cases))}


def _predictions(run: Path, strategy: str, seed: int, title: str) -> tuple:
    """Return cases, true classes, names and probabilities of the test part."""
    path = run / f"{strategy}_{seed}" / "report_test" / "predictions_test.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    p_NK = np.array([[float(row[f"p_{name} ({title})"]) for name in classes] for row in rows])
    y_N = np.array([classes.index(row["label"]) for row in rows])
    return [row["case_id"] for row in rows], y_N, classes, p_NK


def table(result: dict) -> str:
    """Return a row a model."""
    lines = [["model", "macro F1 [95 %]", "each seed", "minus probe [95 %]", "balanced accuracy",
              "trained parameters", "processor s a run"]]  # fmt: skip
    for title, row in result["rows"].items():
        cost = result["cells"].get(title)
        said = [f"{cost['parameters']:,}", f"{np.mean(cost['seconds']):.0f}"] if cost else ["", ""]
        gain = interval_cell(row["f1_minus_probe"], sign="+") if title != PROBE else ""
        each = ", ".join(f"{value:.3f}" for value in row["f1_by_seed"]) if cost else ""
        accuracy = f"{row['balanced_accuracy']['value']:.3f}"
        lines.append([title, interval_cell(row["f1"]), each, gain, accuracy, *said])
    draws = result["rows"][PROBE]["f1"]["draws"]
    return markdown(lines) + (
        f"\n\n{result['tiles']} test tiles in {result['blocks']} spatial blocks; {draws} of "
        f"{DRAWS} draws had every class; {result['epochs']} epochs; one thread. "
        f"{result['machine']}; {result['date']}, commit {result['commit']}, torch "
        f"{result['torch']}, timm {result['timm']}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "real_tiles")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES,
                        default=["lora", "hiadapter", "pathotune", "full"])  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="run nothing")
    known = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if not known.table:
        prepare()
        if done.get("epochs") != known.epochs:
            done = {"epochs": known.epochs, "cells": {}}
        done |= facts("cpu")
    for seed in known.seeds if not known.table else ():
        for strategy in known.strategies:
            cell = done["cells"].setdefault(strategy, {"seconds": [], "seeds": []})
            if seed in cell["seeds"]:
                continue
            cell["seconds"].append(fit(strategy, seed, known.epochs, known.run))
            cell["seeds"].append(seed)
            cell["parameters"] = trainable(strategy)
            RESULT.write_text(json.dumps(done, indent=1) + "\n")
    done |= summary(
        {name: sorted(cell["seeds"]) for name, cell in done["cells"].items()}, known.run
    )
    RESULT.write_text(json.dumps(done, indent=1) + "\n")
    rewrite("real_tiles", table(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
