"""Every regulariser and bag transform beside gated attention, on planted tiles in features mode.

    python -m benchmarks.bag_transforms            train every row on five splits, and compare
    python -m benchmarks.bag_transforms --table    the table alone, from what is there

Bags, splits, rate and their limits are those of `benchmarks.aggregators`: 100 tiles of the needle
cohort, some planted in a positive. A fit is a run's objective, AdamW with a falling rate, the epoch
of least validation loss. `skipped` is
the share of a slide's tiles that pass 2 of an end-to-end run would not encode again, past any
warm-up. Left out: `anchor` and `consistency`, which are of an encoder that learns; `histaug` and
`replay`, which need another file.

Writes results/bag_transforms.json after each row, and the table between the markers in README.md.
Price: about 5 minutes of one core, where the features are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.aggregators import (
    BAGS,
    EPOCHS,
    RATE,
    SPLITS,
    UPDATE,
    bags_of,
    drawn,
    lattice,
    source_tiles,
)
from benchmarks.record import RESULTS, facts, rewrite
from slides.files import write_json
from slides.seeds import stable_seed
from tapfm.data.bag import Moment
from tapfm.frozen.frozen_slide import FrozenSlide, feature_statistics, standardise
from tapfm.reports.plain_table import markdown
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.stats.bootstrap import interval, percentiles
from tapfm.tasks.multilabel import Multilabel
from tapfm.training.objective import make_objective

CONFIGS = Path(__file__).parent.parent / "configs"
RESULT, REFERENCE = RESULTS / "bag_transforms.json", "gated"
ROWS = {
    REFERENCE: {},
    "aem": {"regularisers": ["aem"]},
    **{
        name: yaml.safe_load((CONFIGS / "bag_transforms" / f"{name}.yaml").read_text())["model"]
        for name in ("tile_dropout", "mhim", "mhim_v1", "packmil")
    },
}
TASK = Multilabel(("adenoma",))


def main() -> int:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    only_table = parser.parse_args().table
    torch.set_num_threads(1)
    done = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    if not only_table:
        tiles, about = source_tiles(), facts("cpu")
        for name in [name for name in ROWS if name not in done]:
            done[name] = measure(ROWS[name], tiles)
            write_json(RESULT, about | {"rows": done})
    rewrite("bag_transforms", table(json.loads(RESULT.read_text())))
    return 0


def measure(model: dict, tiles: dict) -> dict:
    """Return a row's figures on every split, CPU seconds of a fit, and the share skipped."""
    splits, used = [], 0.0
    for split in range(SPLITS):
        bags, began = bags_of(split, tiles, colours=False), time.process_time()
        loss, logits_N = fit(model, bags, RATE, split)
        used += time.process_time() - began
        y = [slide.target_Y.item() for slide, _ in bags["test"]]
        splits.append({"y": y, "logits": logits_N, "val_loss": loss})
    share = skipped(model, tiles["z"].shape[1])
    return {"fit_cpu_s": used / SPLITS, "splits": splits, "skipped": share}


def parts(model: dict, dim: int):
    """Return the aggregator and the objective of a row."""
    aggregator = make_aggregator("gated", dim, 1)
    chosen = model.get("bag_transforms"), model.get("regularisers")
    return aggregator, make_objective(TASK.loss(), aggregator, *chosen, task=TASK)


def fit(model: dict, bags: dict, lr: float, seed: int) -> tuple[float, list[float]]:
    """Return the least validation loss, and that epoch's logits of the test bags."""
    torch.manual_seed(seed)
    train, val, test = ([slide for slide, _ in bags[part]] for part in BAGS)
    aggregator, objective = parts(model, train[0].z_TD.shape[1])
    standardise(aggregator, *feature_statistics(train))
    learning = [p for each in (aggregator, objective) for p in each.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr, weight_decay=1e-2)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(train) // UPDATE)
    best, steps = (float("inf"), []), 0
    for epoch in range(EPOCHS):
        aggregator.train(), objective.train()
        for n in torch.randperm(len(train)).tolist():
            own = stable_seed(seed, epoch, n) % 2**63
            moment = Moment(steps / (EPOCHS * len(train)), epoch, own, train[n].slide_id)
            outcome = objective(aggregator, train[n].tiles, train[n].target_Y, moment)
            (outcome.loss / UPDATE).backward()
            steps += 1
            if steps % UPDATE == 0:
                optimizer.step(), falling.step()
                optimizer.zero_grad()
                objective.after_update()
        aggregator.eval()
        with torch.no_grad():
            losses = [objective.task_loss(aggregator(s.tiles).logits_K, s.target_Y) for s in val]
            if (mean := float(torch.stack(losses).mean())) < best[0]:
                best = mean, [float(aggregator(slide.tiles).logits_K) for slide in test]
    return best


def skipped(model: dict, dim: int, count: int = 1000) -> float:
    """Return the share of a bag's tiles that get no gradient half-way through a run."""
    torch.manual_seed(0)
    aggregator, objective = parts(model, dim)
    z_TD = torch.randn(count, dim).requires_grad_()
    places = lattice(np.arange(count))
    tiles = FrozenSlide.of("s", "s", z_TD, torch.tensor([1.0]), places=places).tiles
    objective(aggregator, tiles, torch.tensor([1.0]), Moment(0.5, 0, 1)).loss.backward()
    return 1 - float(z_TD.grad.any(1).float().mean())


def table(result: dict) -> str:
    """Return a line a row."""
    areas = {name: np.mean([*drawn(row)], axis=0) for name, row in result["rows"].items()}
    lines = [
        ["gated and", "AUROC [95 %]", "minus gated [95 %]", "skipped in pass 2", "CPU s a fit"]
    ]
    for name in [name for name in ROWS if name in areas]:
        row, area = result["rows"][name], interval(areas[name])
        gain = ""
        if name != REFERENCE:
            over = percentiles(areas[name] - areas[REFERENCE])
            loses = ", loses" if over.high < 0 else ", gains" if over.low > 0 else ""
            gain = f"{over.value:+.3f} [{over.low:+.3f}, {over.high:+.3f}]{loses}"
        lines.append([
            "nothing" if name == REFERENCE else name,
            f"{area.value:.3f} [{area.low:.3f}, {area.high:.3f}]", gain,
            f"{row['skipped']:.0%}", f"{row['fit_cpu_s']:.1f}",
        ])  # fmt: skip
    about = (
        f"{SPLITS} splits, whose mean is given; one thread. {result['machine']}; {result['date']}, "
        f"commit {result['commit']}, torch {result['torch']}."
    )
    return f"{markdown(lines)}\n\n{about}"


if __name__ == "__main__":
    sys.exit(main())
