"""Traits planted into real tissue: what adapting gains over the frozen encoder, part by part.

    python -m benchmarks.tissue                         the recipe, on three seeds of planting
    python -m benchmarks.tissue --only full "VESICULAR: anchor" --seeds 0
    python -m benchmarks.tissue --minutes 60            begin no fit after so long

Slides are quarters of real H&E windows (`benchmarks.tissue_plants`): enlarged nuclei, cleared
nuclei and a coin, each its own label, dealt within every patient. Patients of train, val and test
are others. The encoder is a ViT-S/14 with DINOv2's architecture, no pathology model, which is
(nearly) blind to both traits, so that there is something to adapt to.

Each row is compared with its control: the same run's frozen encoder with a slide model fitted in
the same way (`tapfm.recipe.saved_model`). Intervals are of paired differences, averaged over the
seeds; cases are drawn, with their slides of all seeds. Two figures say where a gain comes from. *Of
one patient* is the AUROC among the slides of each test patient, averaged: it does not see that
patients differ without the trait. *Tiles found* is the AUROC of a tile's own logit within positive
slides. Where validation kept less than the whole change, the results also hold what the model of
the best epoch would have gained (`refused`; `whole_gain` over all seeds).

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
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.needle import LORA, WEIGHTS
from benchmarks.record import RESULTS, facts, rewrite, write_compact
from benchmarks.tissue_plants import TILE, write_cohort
from slides.files import write_json
from tapfm.config import overlaid
from tapfm.data.bag import Bag
from tapfm.evaluation.predicted_rows import frozen_rows
from tapfm.evaluation.study import TAPFM
from tapfm.recipe.best_weights import BEST
from tapfm.recipe.saved_model import ADAPTED, CONTROL, INTERPOLATION
from tapfm.slide_model.model import SlideModel, load
from tapfm.stats.bootstrap import percentiles, with_point
from tapfm.stats.metrics import auroc, auroc_draws
from tapfm.training.fit import Cli, read_config

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "cohorts" / "tissue.yaml"
KEPT, FROZEN = RESULTS / "tissue", "frozen.json"  # predictions, a file a fit; of the frozen rows
LABELS = "KARYOMEGALY", "VESICULAR", "NOISE"
DRAWS = 2000
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
    "a quarter of the rate": {"model": {"steps": {"encoder_lr": 1e-4}}},
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
    path = RESULTS / "tissue.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else {}
    result = {**about, "rows": merged(old, read_rows())}
    write_json(path, result)
    rewrite("tissue", markdown(result))
    print(markdown(result))


def read_rows() -> dict[str, Any]:
    """Return the figures of all rows whose predictions are kept."""
    read = {path: json.loads(path.read_text()) for path in sorted(KEPT.glob("*/*.json"))}
    frozen = {int(path.parent.name): own for path, own in read.items() if path.name == FROZEN}
    return summary([own for path, own in read.items() if path.name != FROZEN], frozen)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return new rows, and old ones of more seeds than the new one has; frozen first."""
    rows = dict(old)
    for row, figures_of in new.items():
        if row not in old or len(old[row]["seeds"]) <= len(figures_of["seeds"]):
            rows[row] = figures_of
    return {row: rows[row] for row in [*(row for row in rows if row not in ROWS),
                                       *filter(rows.get, ROWS)]}  # fmt: skip


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
        files["refused"] = ADAPTED
    models = {name: judge(load(run / file), cli, truth) for name, file in files.items()}
    cell = {"row": row, "seed": seed, "commit": commit, "labels": list(cli.datamodule.label_names),
            "minutes": minutes, "interpolation": choice, **models}  # fmt: skip
    write_compact(kept(row, seed), cell)


def write_part(whole: Path, part: Path, patients: int, seed: int) -> None:
    """Write a cohort's table with some of its training patients, and all others."""
    with whole.open() as file:
        rows = [*csv.DictReader(file)]
    training = sorted({row["case_id"] for row in rows if row["split"] == "train"})
    left_out = {*np.random.default_rng(seed).permutation(training)[patients:].tolist()}
    with part.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            if row["case_id"] not in left_out:
                writer.writerow(row | {"slide_path": str(whole.parent / row["slide_path"])})


def frozen_predictions(seed: int, data: Path, folder: Path) -> dict[str, list]:
    """Return logits of the frozen rows of `tapfm test`, by title, and of which slides."""
    places = ["--data.table", str(data / "cohort.csv"), "--data.index_dir", str(data / "index"),
              "--data.cache_dir", str(data / "cache"), "--seed_everything", str(seed),
              "--model.weights", str(WEIGHTS)]  # fmt: skip
    plain = ["--model.strategy", "full", "--trainer.logger", "false"]
    cli = read_config(["--config", str(CONFIG), *places, *plain])
    rows = frozen_rows(cli, folder / "frozen", "test", "cpu")
    return {row.title: {"cases": list(row.case_ids), "y_NK": row.y_NK.tolist(),
                        "logits_NK": row.p_NK.tolist()} for row in rows}  # fmt: skip


@torch.no_grad()
def judge(model: SlideModel, cli: Cli, truth: Mapping[tuple[str, str], set]) -> dict[str, Any]:
    """Return cases, targets and logits of the test slides, and how well planted tiles are found."""
    data, found = cli.datamodule, defaultdict(list)
    tiles: dict[str, list[float]] = defaultdict(list)
    for bag in data.test_dataloader():
        output = model(bag, cli.model.chunk)
        found["cases"].append(bag.case_id)
        found["y_NK"].append(bag.labels_K.tolist())
        found["logits_NK"].append(output.logits_K.tolist())
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


def summary(
    cells: Sequence[Mapping[str, Any]], frozen_by_seed: Mapping[int, Mapping]
) -> dict[str, Any]:
    """Return AUROC and paired differences of every row, averaged over its seeds."""
    frozen, rows = {}, {}
    cells = [cell | {name: cell[name] | {"labels": cell["labels"]}
                     for name in ("adapted", "control", "refused") if name in cell}
             for cell in cells]  # fmt: skip
    for seed, predictions in frozen_by_seed.items():
        for title, row in predictions.items():
            frozen.setdefault(title, {})[seed] = row | {"labels": LABELS}
    by_row: dict[str, list] = defaultdict(list)
    for cell in cells:
        by_row[cell["row"]].append(cell)
    for title, seeds in frozen.items():
        rows[title] = {"seeds": sorted(seeds), "figures": figures([*seeds.values()]),
                       "of_one": of_one_patient([*seeds.values()])}  # fmt: skip
    for row in filter(by_row.get, ROWS):
        own = sorted(by_row[row], key=lambda cell: cell["seed"])
        adapted, control = ([cell[name] for cell in own] for name in ("adapted", "control"))
        rows[row] = {
            "seeds": [cell["seed"] for cell in own], "figures": figures(adapted),
            "control": figures(control), "gain": figures(adapted, control),
            "of_one": of_one_patient(adapted), "control_of_one": of_one_patient(control),
            "whole_gain": figures([cell.get("refused", cell["adapted"]) for cell in own], control),
            "by_seed": [*map(of_seed, own)],
            "a": [cell["interpolation"]["a"] for cell in own],
            "tile_auroc": {label: float(np.mean([each["tile_auroc"][label] for each in adapted]))
                           for label in adapted[0]["tile_auroc"] if label != "NOISE"},
            "minutes": [cell["minutes"] for cell in own if cell["minutes"]],
            "commits": sorted({cell["commit"] for cell in own}),
        }  # fmt: skip
    return rows


def of_seed(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one fit gained, and what its refused model would have."""
    control = [cell["control"]]
    found = {"seed": cell["seed"], "gain": figures([cell["adapted"]], control),
             "of_one": of_one_patient([cell["adapted"]]),
             "control_of_one": of_one_patient(control)}  # fmt: skip
    if "refused" in cell:
        refused = [cell["refused"]]
        found |= {"refused": figures(refused, control), "refused_of_one": of_one_patient(refused)}
    return found


def figures(own: Sequence[Mapping], minus: Sequence[Mapping] = ()) -> dict[str, list[float]]:
    """Return value, low and high of each label's AUROC, or of its difference, mean over seeds."""
    found = {}
    for k, label in enumerate(own[0]["labels"]):
        drawn = []
        for n, each in enumerate(own):
            y_N, times_BN = np.array(each["y_NK"])[:, k], with_point(each["cases"], DRAWS, 0)
            value_B = auroc_draws(y_N, np.array(each["logits_NK"])[:, k], times_BN)
            if minus:
                value_B = value_B - auroc_draws(
                    y_N, np.array(minus[n]["logits_NK"])[:, k], times_BN
                )
            drawn.append(value_B)
        each = percentiles(np.mean(drawn, axis=0))
        found[label] = [each.value, each.low, each.high]
    return found


def of_one_patient(own: Sequence[Mapping]) -> dict[str, float]:
    """Return each label's AUROC among the slides of a patient, mean over patients and seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in own:
        cases_N, y_NK, said_NK = (np.array(each[key]) for key in ("cases", "y_NK", "logits_NK"))
        for case in np.unique(cases_N):
            of_case_N = cases_N == case
            for k, label in enumerate(each["labels"]):
                y_N = y_NK[of_case_N, k]
                if 0 < y_N.mean() < 1:
                    found[label].append(auroc(y_N, said_NK[of_case_N, k]))
    return {label: float(np.mean(values)) for label, values in found.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """Return a row a model: AUROC, gain over its control, a, planted tiles found, minutes."""
    head = ["row", "seeds", *LABELS, *(f"{label} gained" for label in LABELS[:2]),
            "of one patient", "frozen, of one", "a", "tiles found", "minutes",
            "commit"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, row in result["rows"].items():
        cells = [title, ", ".join(map(str, row["seeds"]))]
        cells += [spelled(row["figures"].get(label)) for label in LABELS]
        cells += [spelled(row.get("gain", {}).get(label), "+") for label in LABELS[:2]]
        cells += [pair(row.get("of_one", {})), pair(row.get("control_of_one", {}))]
        cells.append(", ".join(f"{a:g}" for a in row.get("a", [])))
        cells.append(pair(row.get("tile_auroc", {})))
        cells.append(", ".join(f"{each:.0f}" for each in row.get("minutes", [])))
        cells.append(", ".join(row.get("commits", [])))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\n{result['machine']}; {result['date']}, torch {result['torch']}, timm {result['timm']}; "
        f"frozen rows and table: commit {result['commit']}."
    )
    return "\n".join(lines)


def pair(values: Mapping[str, float]) -> str:
    """Return the figures of the two traits."""
    return ", ".join(f"{values[label]:.2f}" for label in LABELS[:2] if label in values)


def spelled(figure: Sequence[float] | None, sign: str = "") -> str:
    """Return a figure with its interval."""
    if figure is None:
        return ""
    value, low, high = figure
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    sys.exit(main())
