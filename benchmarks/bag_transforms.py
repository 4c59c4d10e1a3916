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
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.aggregators import (
    SPLITS,
    Row,
    bags_of,
    drawn,
    gained,
    lattice,
    measure,
    objective_of,
    source_tiles,
)
from benchmarks.record import RESULTS, facts, rewrite
from slides.files import write_json
from tapfm.data.bag import Moment
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.reports.plain_table import markdown
from tapfm.settings import Spec
from tapfm.stats.bootstrap import interval

CONFIGS = Path(__file__).parent.parent / "configs" / "bag_transforms"
RESULT, REFERENCE = RESULTS / "bag_transforms.json", "gated"


def transforms_of(config: str) -> list[Spec]:
    """Return the bag transforms of a config."""
    return yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["bag_transforms"]


ROWS = {
    REFERENCE: Row("gated"),
    "aem": Row("gated", regularisers=["aem"]),
    **{
        name: Row("gated", bag_transforms=transforms_of(name))
        for name in ("tile_dropout", "mhim", "mhim_v1", "packmil")
    },
}


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
            done[name] = measure_all(ROWS[name], tiles)
            write_json(RESULT, about | {"rows": done})
    rewrite("bag_transforms", table(json.loads(RESULT.read_text())))
    return 0


def measure_all(row: Row, tiles: dict) -> dict:
    """Return a row's figures on every split, CPU seconds of a fit, and the share skipped."""
    splits = [measure(row, bags_of(split, tiles, False), split) for split in range(SPLITS)]
    share = skipped(row, tiles["z"].shape[1])
    return {
        "fit_cpu_s": np.mean([each["cpu_s"] for each in splits]),
        "splits": splits,
        "skipped": share,
    }


def skipped(row: Row, dim: int, count: int = 1000) -> float:
    """Return the share of a bag's tiles that get no gradient half-way through a run."""
    torch.manual_seed(0)
    objective, aggregator = objective_of(row, dim)
    z_TD = torch.randn(count, dim).requires_grad_()
    places = lattice(np.arange(count))
    tiles = FrozenSlide.of("s", "s", z_TD, torch.tensor([1.0]), places=places).tiles
    objective(aggregator, tiles, torch.tensor([1.0]), Moment(0.5, 0, 1)).loss.backward()
    return 1 - float(z_TD.grad.any(1).float().mean())


def table(result: dict) -> str:
    """Return a line a row."""
    areas = {name: np.mean([*drawn(row["splits"])], axis=0) for name, row in result["rows"].items()}
    lines = [
        ["gated and", "AUROC [95 %]", "minus gated [95 %]", "skipped in pass 2", "CPU s a fit"]
    ]
    for name in [name for name in ROWS if name in areas]:
        row, area = result["rows"][name], interval(areas[name])
        gain = ""
        if name != REFERENCE:
            gain = gained(areas[name] - areas[REFERENCE])
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
