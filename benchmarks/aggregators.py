"""Every aggregator on planted tiles in features mode: AUROC, tile AUROC, seconds, memory.

    python -m benchmarks.aggregators                encode, train every row on five splits, compare
    python -m benchmarks.aggregators --only clam    rows that are missing, of these names
    python -m benchmarks.aggregators --table        the table alone, from what is there

Bags of 100 real H&E tiles of the needle cohort's host tissue, as DINOv2 ViT-S/14 features; in a
positive, 5 are from the adenoma's head (2 take longer training than this: LOG.md). Each split deals
the source tiles anew, so no tile of a test bag is in any training bag; bags of one part share
tiles. Every source tile is turned by quarters as its name says, since which way is up tells much of
this tissue. Places are dealt at random: what a method makes of neighbours is noise here. One
patient carries the class: this measures methods and is no clinical claim. The RGB row says how much
colour alone gives. Tiles: Pathology Atlas, CC BY 4.0, Serdar Balci / Memorial Pathology, doi
10.5281/zenodo.6382734.

A fit is the run's own objective, bag by bag, AdamW, updates of 4 bags, the epoch of least
validation loss, one rate for all that falls to 0: it is short, and no method is tuned. Cost is of
one training step on 10,000 tiles, CPU seconds of one thread and bytes that autograd holds, and of a
forward pass on 20,000. Writes results/aggregators.json after each split of a row, and goes on there
when run again; then the table between the markers in README.md. Price: 15 minutes of one core.

A row is added to ROWS: a regulariser or bag transform goes beside an aggregator there.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from benchmarks.record import RESULTS, facts, rewrite
from slides.files import write_json
from slides.seeds import stable_seed
from slides.wsi.reader import Slide
from tapfm.data.bag import Moment, Places
from tapfm.encoders import backbones
from tapfm.engine.memory import SavedBytes
from tapfm.frozen.frozen_slide import FrozenSlide, feature_statistics, standardise
from tapfm.reports.plain_table import span
from tapfm.settings import Spec
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import Aggregator
from tapfm.stats.bootstrap import interval, percentiles, with_point
from tapfm.stats.metrics import auroc, auroc_draws
from tapfm.tasks.multilabel import Multilabel
from tapfm.training.objective import Objective, make_objective

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TAPFM_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = DATA / "weights" / "dinov2_vits14_timm_fp16.safetensors"
FEATURES = ROOT / "runs" / "aggregators" / "features.pt"
RESULT = RESULTS / "aggregators.json"
OTHERS = 800  # source tiles of host tissue; of the adenoma there are 185
BAG, PLANTED, CHUNK = 100, 5, 32
BAGS = {"train": 150, "val": 50, "test": 80}
POOLS = {"train": 0.6, "val": 0.15, "test": 0.25}  # shares of the source tiles
SPLITS, EPOCHS, UPDATE, RATE = 5, 5, 4, 1e-3
STEP_TILES, FORWARD_TILES, MIB = 10_000, 20_000, 2**20
REFERENCE, DRAWS = "gated", 2000
TASK = Multilabel(("adenoma",))
TARGET = torch.tensor([1.0])


@dataclass(frozen=True)
class Row:
    """One line of the table: an aggregator, with what is trained beside it."""

    aggregator: Spec
    regularisers: Sequence[Spec] = ()
    bag_transforms: Sequence[Spec] = ()
    colours: bool = False
    """Whether tiles are means and deviations of their colours, not features."""


ROWS = {
    "gated": Row("gated"),
    "rgb, gated": Row("gated", colours=True),
    "mean": Row("mean"),
    "additive": Row("additive"),
    "additive, plain mean of probabilities": Row(
        {"name": "additive", "attention": False, "probability": True}
    ),
    "dsmil": Row("dsmil"),
    "clam, one row (SB)": Row({"name": "clam", "multi": False}),
    "clam, a row a label (MB)": Row("clam"),
    "graph": Row("graph"),
    "case_transformer": Row("case_transformer"),
    "otsurv": Row("otsurv"),
    "ads": Row("ads"),
    "ads, random features": Row({"name": "ads", "keep": "random"}),
    "transmil, width 256": Row({"name": "transmil", "width": 256}),
    "regions, of one scale": Row("regions"),
    "mamba, local, width 256": Row({"name": "mamba", "scan": "local", "width": 256}),
    "mamba, reordered, width 256": Row({"name": "mamba", "width": 256}),
}


@dataclass
class Fit:
    """The best epoch of a fit."""

    loss: float = float("inf")
    logits_N: list[float] = field(default_factory=list)
    """Logits of the test bags."""
    tile_aurocs: list[float] = field(default_factory=list)
    """Mean AUROC of tile weights, and of tiles' logits where there are any, on positive bags."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    if not arguments.table:
        tiles, about = source_tiles(), facts("cpu")
        for split, name in product(range(SPLITS), arguments.only):
            if name not in done:
                done[name] = {"splits": [], **cost(ROWS[name], tiles)}
            if len(done[name]["splits"]) == split:
                bags = bags_of(split, tiles, ROWS[name].colours)
                done[name]["splits"].append(measure(ROWS[name], bags, split))
                print(split, name, flush=True)
                write_json(RESULT, about | {"rows": done})
    result = json.loads(RESULT.read_text())
    rewrite("aggregators", markdown(result))
    print(markdown(result))
    return 0


def source_tiles() -> dict[str, torch.Tensor]:
    """Return features, colours and class of every source tile that is used; encode them once."""
    if FEATURES.exists():
        return torch.load(FEATURES, weights_only=True)
    with (DATA / "needle" / "tiles.csv").open() as file:
        rows = {(row["src"], row["src_x"], row["src_y"]): row for row in csv.DictReader(file)}
    ranked = sorted(rows, key=lambda key: stable_seed("tile", *key))
    chosen = [key for key in ranked if rows[key]["target"] == "1"]
    chosen += [key for key in ranked if rows[key]["tile_class"] == "host"][:OTHERS]
    y = torch.tensor([float(rows[key]["target"]) for key in chosen])
    found = {**encoded([rows[key] for key in chosen]), "y": y}
    FEATURES.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, FEATURES)
    return found


def encoded(rows: Sequence[Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """Return features and colours of tiles of tiles.csv, each turned as its source's name says."""
    encoder = backbones.load("dinov2_vits14", str(WEIGHTS), tile_px=112).eval()
    z, colours = [], []
    for first in trange(0, len(rows), CHUNK, desc="encode"):
        tiles_C3HW = torch.stack([tile_of(row) for row in rows[first : first + CHUNK]])
        pixels = tiles_C3HW.float()
        colours.append(torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1))
        with torch.no_grad():
            z.append(encoder.encode(tiles_C3HW, "bf16")[0].float())
    return {"z": torch.cat(z), "colours": torch.cat(colours)}


def tile_of(row: Mapping[str, str]) -> torch.Tensor:
    """Return a tile at half its size, (3, 112, 112) uint8, turned by its source's name."""
    with Slide(DATA / "needle" / "slides" / f"{row['slide_id']}.tif") as slide:
        pixels = np.asarray(slide.region(int(row["x"]), int(row["y"]), 224, 224))
    turns = stable_seed("turn", row["src"], row["src_x"], row["src_y"]) % 4
    half = np.rot90(pixels, turns).reshape(112, 2, 112, 2, 3).mean((1, 3)).round()
    return torch.from_numpy(half.astype(np.uint8)).permute(2, 0, 1)


def bags_of(split: int, tiles: dict, colours: bool) -> dict[str, list[tuple[FrozenSlide, list]]]:
    """Return the bags of a split by part, each with the rows of its planted tiles."""
    rng, found = np.random.default_rng([17, split]), {part: [] for part in BAGS}
    z, y = tiles["colours" if colours else "z"], tiles["y"].numpy()
    pools = [
        np.split(
            rng.permutation(np.flatnonzero(y == side)),
            (np.cumsum([*POOLS.values()])[:-1] * (y == side).sum()).astype(int),
        )
        for side in (0, 1)
    ]
    for (part, count), others, planted in zip(BAGS.items(), *pools, strict=True):
        for n in range(count):
            rows = rng.choice(others, BAG, replace=False)
            places, label = rng.permutation(BAG), float(n % 2)
            if label:
                rows[:PLANTED] = rng.choice(planted, PLANTED, replace=False)
            where = lattice(places)
            name = f"{split}-{part}-{n}"
            slide = FrozenSlide.of(name, name, z[rows], torch.tensor([label]), places=where)
            found[part].append((slide, list(range(PLANTED)) if label else []))
    return found


def lattice(places: np.ndarray) -> Places:
    """Return tiles at these places of a square lattice, row by row."""
    side = -(-(len(places) ** 0.5) // 1)
    corners = np.stack([places % side, places // side], 1).astype(np.int64) * 448
    return Places.of([corners], [448.0], 0.5)


def measure(row: Row, bags: dict, split: int, epochs: int = EPOCHS) -> dict:
    """Return a row's test bags, logits and figures on one split."""
    began = time.process_time()
    best = fit(row, bags, split, epochs)
    return {
        "y": [slide.target_Y.item() for slide, _ in bags["test"]], "logits": best.logits_N,
        "val_loss": best.loss, "tile_auroc": best.tile_aurocs,
        "cpu_s": time.process_time() - began,
    }  # fmt: skip


def objective_of(row: Row, dim: int) -> tuple[Objective, Aggregator]:
    """Return a row's objective and its aggregator."""
    aggregator = make_aggregator(row.aggregator, dim, 1)
    beside = row.bag_transforms, row.regularisers
    return make_objective(TASK.loss(), aggregator, *beside, task=TASK), aggregator


def fit(row: Row, bags: dict, seed: int, epochs: int) -> Fit:
    """Return the epoch of least validation loss."""
    torch.manual_seed(seed)
    train, val, test = ([slide for slide, _ in bags[part]] for part in BAGS)
    objective, model = objective_of(row, train[0].z_TD.shape[1])
    standardise(model, *feature_statistics(train))
    learning = [*model.parameters(), *objective.parameters()]
    learning = [parameter for parameter in learning if parameter.requires_grad]
    optimizer, best, steps = torch.optim.AdamW(learning, RATE, weight_decay=1e-2), Fit(), 0
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train) // UPDATE)
    for epoch in range(epochs):
        model.train()
        for n in torch.randperm(len(train)).tolist():
            draw = stable_seed(seed, epoch, n) % 2**63
            moment = Moment(steps / (epochs * len(train)), epoch, draw, train[n].slide_id)
            target = train[n].target_Y
            (objective(model, train[n].tiles, target, moment).loss / UPDATE).backward()
            steps += 1
            if steps % UPDATE == 0:
                optimizer.step()
                falling.step()
                optimizer.zero_grad()
                objective.after_update()
        model.eval()
        with torch.no_grad():
            losses = [objective.task_loss(model(s.tiles).logits_K, s.target_Y) for s in val]
            if (mean := float(torch.stack(losses).mean())) < best.loss:
                outputs = [model(slide.tiles) for slide in test]
                logits_N = [float(output.logits_K) for output in outputs]
                best = Fit(mean, logits_N, tile_aurocs(outputs, bags["test"]))
    return best


def tile_aurocs(outputs: Sequence, bags: Sequence) -> list[float]:
    """Return the mean AUROC over positive bags of the tiles' weights, and of their logits."""
    found = []
    for output, (_, planted) in zip(outputs, bags, strict=True):
        if planted:
            truth = np.zeros(len(output.weights_T))
            truth[planted] = 1
            each = [output.weights_T]
            each += [] if output.tile_logits_TK is None else [output.tile_logits_TK[:, 0]]
            found.append([auroc(truth, values.double().numpy()) for values in each])
    return np.mean(found, axis=0).tolist()


def cost(row: Row, tiles: dict) -> dict[str, float]:
    """Return parameters, CPU seconds and MiB of a training step, and seconds of a forward pass."""
    torch.manual_seed(0)
    dim = tiles["colours" if row.colours else "z"].shape[1]
    objective, model = objective_of(row, dim)
    found = {"parameters": sum(p.numel() for p in model.parameters())}
    for name, count in (("step", STEP_TILES), ("forward", FORWARD_TILES)):
        z_TD, places = torch.randn(count, dim), lattice(np.arange(count))
        tiles = FrozenSlide.of("s", "s", z_TD, TARGET, places=places).tiles
        runs = []
        for _ in range(2):
            one, began = copy.deepcopy(model), time.process_time()
            if name == "step":
                with SavedBytes(but=one.parameters()) as held:
                    objective(one, tiles, TARGET, Moment(0.5, 0, 1)).loss.backward()
                found["step_mib"] = held.peak / MIB
            else:
                with torch.no_grad():
                    one(tiles)
            runs.append(time.process_time() - began)
        found[f"{name}_cpu_s"] = min(runs)
    return found


def drawn(splits: Sequence[Mapping]) -> Iterator[np.ndarray]:
    """Yield the AUROC of each split's test bags, as found and in draws of cases, or of bags."""
    for split, each in enumerate(splits):
        cases = each.get("cases") or [*map(str, range(len(each["y"])))]
        times_BN = with_point(cases, DRAWS, split)
        yield auroc_draws(np.array(each["y"]), np.array(each["logits"]), times_BN)


def gained(over_B: np.ndarray) -> str:
    """Return a difference with its interval, and whether that is above or below 0."""
    over = percentiles(over_B)
    said = ", loses" if over.high < 0 else ", gains" if over.low > 0 else ""
    return f"{span(over, sign='+')}{said}"


def markdown(result: dict) -> str:
    """Return a line a row."""
    lines = [
        "| aggregator | parameters | splits | AUROC [95 %] | minus `gated` [95 %] "
        "| tile AUROC: weights, logits | CPU s a fit "
        "| CPU s, MiB of a step on 10,000 tiles | CPU s forward, 20,000 tiles |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    areas = {name: [*drawn(row["splits"])] for name, row in result["rows"].items()}
    for name in [name for name in ROWS if name in areas]:
        row, own = result["rows"][name], np.mean(areas[name], axis=0)
        area, gain = interval(own), ""
        if name != REFERENCE and REFERENCE in areas:
            gain = gained(own - np.mean(areas[REFERENCE][: len(areas[name])], axis=0))
        tile = np.mean([each["tile_auroc"] for each in row["splits"]], axis=0)
        seconds = np.mean([each["cpu_s"] for each in row["splits"]])
        lines.append(
            f"| {name} | {row['parameters']:,} | {len(areas[name])} "
            f"| {area.value:.3f} [{area.low:.3f}, {area.high:.3f}] | {gain} "
            f"| {', '.join(f'{value:.3f}' for value in tile)} | {seconds:.0f} "
            f"| {row['step_cpu_s']:.2f}, {row['step_mib']:.0f} | {row['forward_cpu_s']:.2f} |"
        )
    counts = ", ".join(f"{count} {part}" for part, count in BAGS.items())
    lines.append(
        f"\nBags of {BAG} tiles, {PLANTED} planted; {counts}; AUROC is the mean of the "
        f"splits, differences of the same ones; one thread. {result['machine']}; "
        f"{result['date']}, commit {result['commit']}, torch {result['torch']}, timm "
        f"{result['timm']}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
