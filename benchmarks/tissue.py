"""Traits planted into real tissue: what adapting gains over the frozen encoder, part by part.

    python -m benchmarks.tissue                         the recipe, on three seeds of planting
    python -m benchmarks.tissue --only full "VESICULAR: anchor" --seeds 0
    python -m benchmarks.tissue --minutes 60            begin no fit after so long

Slides are quarters of real H&E windows (`benchmarks.tissue_plants`): enlarged nuclei, cleared
nuclei and a coin, each its own label, dealt within every patient. Patients of train, val and test
are others. The encoder is a ViT-S/14 with DINOv2's architecture, no pathology model, which is
(nearly) blind to both traits, so that there is something to adapt to.

Each row is compared with its control: the same run's frozen encoder with a slide model fitted in
the same way (`tapfm.recipe.saved_model`). `benchmarks.tissue_table` computes the figures and says
how.

All weights learn (`full`) in the cohort's config and in the rows of that name, LoRA in all others.
Parts of the recipe (`PARTS`) are fitted where `--only` names them, as `KARYOMEGALY: anchor`,
`VESICULAR: anchor` or, for all labels at once, `three labels: anchor`; the table says which were.
A fit whose predictions are in results/tissue is not repeated, on any machine, and one that was
stopped goes on. Writes results/tissue.json and the table between the markers in README.md; rows
from before predictions were kept stay until as many seeds are fitted anew. Price: about 20
minutes of one core a fit, and four for a seed's frozen rows.
Tissue: Pathology Atlas, MIT per repository, Serdar Balci / Memorial Pathology, doi
10.5281/zenodo.6382734.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.needle import LORA, WEIGHTS
from benchmarks.record import facts, write_compact, write_part
from benchmarks.tissue_plants import LABELS, TILE, write_cohort
from benchmarks.tissue_table import FROZEN, KEPT, write_results
from tapfm.config import overlaid
from tapfm.data.bag import Bag
from tapfm.evaluation.predicted_rows import frozen_rows
from tapfm.evaluation.study import TAPFM
from tapfm.recipe.best_weights import BEST
from tapfm.recipe.saved_model import ADAPTED, CONTROL, INTERPOLATION
from tapfm.slide_model.model import SlideModel, load
from tapfm.stats.metrics import auroc
from tapfm.training.fit import Cli, read_config

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "cohorts" / "tissue.yaml"
# one core for each fit; and tiles of 65 tokens, for which torch's fused attention is slow on a CPU
HOW = {"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}
BY_LORA = {"model": {"strategy": LORA, "steps": {"encoder_lr": 4e-4}}}
FEW_UPDATES = {"data": {"sampler": "balanced"}, "model": {"steps": {"accumulate": 16}}}
PARTS: dict[str, dict[str, Any]] = {  # one part of the recipe each
    "16 balanced slides an update": FEW_UPDATES,
    "4 balanced slides an update": overlaid(FEW_UPDATES, {"model": {"steps": {"accumulate": 4}}}),
    "without mean of weights": {"model": {"steps": {"average": 0.0}}},
    "without warm start": {"model": {"steps": {"warm_start": False}}},
    "twelve tiles of a slide": {"data": {"tiles_per_slide": 12},
                                "trainer": {"max_epochs": 9, "check_val_every_n_epoch": 3}},
    "three tiles of a slide": {"data": {"tiles_per_slide": 3},
                               "trainer": {"max_epochs": 36, "check_val_every_n_epoch": 12}},
    "all tiles in a step": {"data": {"tiles_per_slide": None},
                            "trainer": {"max_epochs": 3, "check_val_every_n_epoch": 1}},
    "tapfm_gated": {"model": {"aggregator": "tapfm_gated"}},
    "all blocks": {"model": {"strategy": LORA | {"last": 0}}},
    "lora on q, k and v": {"model": {"strategy": LORA | {"targets": ["q", "k", "v"]}}},
    "half the rate": {"model": {"steps": {"encoder_lr": 2e-4}}},
    "a tenth of the head's rate": {"model": {"steps": {"head_lr": 1e-4}}},
    "head solved each epoch": {"model": {"steps": {"solve_head": True}}},
    "pull to the start": {"model": {"steps": {"pull": 0.05}}},
    "anchor": {"model": {"regularisers": [{"name": "anchor", "weight": 0.1}]}},
    "two views alike": {"model": {"regularisers": [{"name": "consistency", "weight": 0.1}]},
                        "data": {"views": 2, "stain_jitter": 0.1},
                        "trainer": {"max_epochs": 9, "check_val_every_n_epoch": 3}},
    "stain and scale varied": {"data": {"colour": 0.15, "stain_jitter": 0.2, "scale_jitter": 0.15}},
}  # fmt: skip
FULL: dict[str, dict[str, Any]] = {
    "full": {},
    **{f"{label}: full": {"data": {"labels": [label]}} for label in LABELS},
    "8 training patients: full": {},
}
WHOLE: dict[str, dict[str, Any]] = {  # of LoRA: what a run without --only fits, beside `FULL`
    "lora": {},
    **{f"one label: {label}": {"data": {"labels": [label]}} for label in LABELS},
    "two labels, no NOISE": {"data": {"labels": ["KARYOMEGALY", "VESICULAR"]}},
    "8 training patients": {},
    "12 training patients": {},
    "16 balanced slides an update": FEW_UPDATES,
    "16 balanced slides an update, alpha 8": overlaid(
        FEW_UPDATES, {"model": {"strategy": {"alpha": 8.0}}}
    ),
    "8 training patients, 16 balanced slides an update": FEW_UPDATES,
    "12 training patients, 16 balanced slides an update": FEW_UPDATES,
}
OF_PARTS = {f"{label}: {name}": overlaid(part, {"data": {"labels": [label]}})
            for label in ("VESICULAR", "KARYOMEGALY") for name, part in PARTS.items()}  # fmt: skip
OF_PARTS |= {f"three labels: {name}": part for name, part in PARTS.items() if name not in WHOLE}
ROWS = FULL | {row: overlaid(BY_LORA, change) for row, change in (WHOLE | OF_PARTS).items()}
"""Maps each row to its changes of the cohort's config."""
PATIENTS = {row: int(row.split()[0]) for row in ROWS if "training patients" in row}  # of 17


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tissue")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "tissue")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=ROWS, default=[*FULL, *WHOLE])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    about, began = facts("cpu"), time.monotonic()
    torch.set_num_threads(1)
    for row, seed in product(arguments.only, arguments.seeds):
        if kept(row, seed).exists() or time.monotonic() - began > 60 * arguments.minutes:
            continue
        folder = arguments.out / str(seed) / kept(row, seed).stem
        run_cell(row, seed, folder, arguments.data / str(seed), about["commit"])
        write_table(about)
    write_table(about)
    return 0


def kept(row: str, seed: int) -> Path:
    """Return the file of a fit's predictions."""
    return KEPT / str(seed) / f"{row.replace(' ', '_').replace(':', '')}.json"


def write_table(about: Mapping[str, str]) -> None:
    """Write the results of all fits, and the table."""
    write_results(about, ROWS, PATIENTS)


def run_cell(row: str, seed: int, folder: Path, data: Path, commit: str) -> None:
    """Plant, fit, and note what the run's model and its control say of the test slides."""
    if not (data / "cohort.csv").exists():  # the last of its files
        write_cohort(data, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "cell.yaml"
    places = {name: str(data / name) for name in ("index", "cache")}
    changes = {
        "run_dir": str(folder),
        "name": "run",
        "seed_everything": seed,
        "model": {"weights": str(WEIGHTS)},
        "data": {"table": str(data / "cohort.csv"), "index_dir": places["index"],
                 "cache_dir": places["cache"]},
    }  # fmt: skip
    if row in PATIENTS:
        changes["data"]["table"] = str(folder / "cohort.csv")
        write_part(data / "cohort.csv", folder / "cohort.csv", PATIENTS[row], seed)
    own.write_text(yaml.safe_dump(overlaid(changes, ROWS[row])))
    arguments, began = ["--config", str(CONFIG), "--config", str(own)], time.monotonic()
    resumed = (folder / "run").exists()
    if subprocess.run([*TAPFM, "fit", *arguments], env=os.environ | HOW, check=False).returncode:
        raise SystemExit(f"tissue: {row}, seed {seed}: fit failed")
    minutes = None if resumed else (time.monotonic() - began) / 60
    run, truth = folder / "run", read_truth(data / "tiles.csv")
    cli = read_config(arguments)
    frozen = KEPT / str(seed) / FROZEN
    if not frozen.exists():
        write_compact(frozen, frozen_predictions(seed, data, folder.parent))
    choice = json.loads((run / INTERPOLATION).read_text())
    files = {"adapted": BEST, "control": CONTROL}
    if choice["a"] < 1:
        files["best_epoch"] = ADAPTED
    models = {name: judge(load(run / file), cli, truth) for name, file in files.items()}
    cell = {"row": row, "seed": seed, "commit": commit, "labels": list(cli.datamodule.label_names),
            "minutes": minutes, "interpolation": choice, **models}  # fmt: skip
    write_compact(kept(row, seed), cell)


def frozen_predictions(seed: int, data: Path, folder: Path) -> dict[str, list]:
    """Return probabilities of the frozen rows of `tapfm test`, by title, and of which slides."""
    places = ["--data.table", str(data / "cohort.csv"), "--data.index_dir", str(data / "index"),
              "--data.cache_dir", str(data / "cache"), "--seed_everything", str(seed),
              "--model.weights", str(WEIGHTS)]  # fmt: skip
    plain = ["--model.strategy", "full", "--trainer.logger", "false"]
    cli = read_config(["--config", str(CONFIG), *places, *plain])
    rows = frozen_rows(cli, folder / "frozen", "test", "cpu")
    return {row.title: {"cases": list(row.case_ids), "y_NK": row.y_NK.tolist(),
                        "said_NK": row.p_NK.tolist()} for row in rows}  # fmt: skip


@torch.no_grad()
def judge(model: SlideModel, cli: Cli, truth: Mapping[tuple[str, str], set]) -> dict[str, Any]:
    """Return cases, targets and logits of the test slides, and how well planted tiles are found."""
    data, found = cli.datamodule, defaultdict(list)
    tiles: dict[str, list[float]] = defaultdict(list)
    for bag in data.test_dataloader():
        output = model(bag, cli.model.chunk)
        found["cases"].append(bag.case_id)
        found["y_NK"].append(bag.labels_K.tolist())
        found["said_NK"].append(output.logits_K.tolist())
        for k, label in enumerate(data.label_names):
            said_T = output.weights_T
            if output.tile_logits_TK is not None:
                said_T = output.tile_logits_TK[:, k]
            value = tile_auroc(bag, said_T.numpy(), truth[bag.slide_id, label])
            tiles[label] += [] if np.isnan(value) else [value]
    planted = {label: float(np.mean(each)) for label, each in tiles.items() if each}
    return {**found, "tile_auroc": planted}


def tile_auroc(bag: Bag, said_T: np.ndarray, planted: set[tuple[int, int]]) -> float:
    """Return how well a number a tile tells a slide's planted tiles from the others; or nan."""
    side0 = bag.places.grid_px0_T.mean().item()  # a little off TILE: tiles are of one mpp
    cells = ((bag.places.coords0_T2 + side0 / 2) // TILE).long().tolist()
    is_planted = [(column, row) in planted for column, row in cells]
    return auroc(np.array(is_planted, float), said_T)


def read_truth(path: Path) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """Return the planted tiles' columns and rows, by slide and label; none for others."""
    planted = defaultdict(set)
    with path.open() as file:
        for row in csv.DictReader(file):
            for label in LABELS:
                if row.get(label.lower()) == "1":
                    cell = int(row["x"]) // TILE, int(row["y"]) // TILE
                    planted[row["slide_id"], label].add(cell)
    return planted


if __name__ == "__main__":
    sys.exit(main())
