"""Every aggregator, regulariser and bag transform on the needle cohort's features.

    python -m benchmarks.needle_features            encode, train every row on five folds, compare
    python -m benchmarks.needle_features --only clam aem

The 90 slides of `benchmarks.needle`, 40 real H&E tiles each, 2 to 6 of them from an adenoma in a
positive; DINOv2 ViT-S/14 features at 1.0088 microns per pixel. Folds and the limits of what this
cohort can show are those of `benchmarks.needle`; the fit and its turned tiles those of
`benchmarks.aggregators`, with more epochs, since here are 54 training slides and not 150. A
method that looks at places sees the lattice on which the cohort's maker laid the tiles, which is no
tissue. AUROC is the mean of the folds'; its interval draws cases, the slides that share a tile.

Writes results/needle_features.json after each row, goes on there when run again, and writes the
table between the markers in README.md. Price: 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from benchmarks import aggregators, bag_transforms
from benchmarks.aggregators import REFERENCE, Row, drawn, encoded, gained, measure
from benchmarks.needle import FOLDS, TABLE, truth_rows, write_table
from benchmarks.record import RESULTS, facts, rewrite
from slides.cohort.resplit import run_split
from slides.files import write_json
from tapfm.data.bag import Places
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.reports.plain_table import markdown, span
from tapfm.stats.bootstrap import interval

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "needle_features"
RESULT = RESULTS / "needle_features.json"
EPOCHS = 15
Truth = list[dict[str, str]]  # the rows of tiles.csv
ROWS = aggregators.ROWS | {
    f"gated, {name}": row for name, row in bag_transforms.ROWS.items() if name != REFERENCE
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    names = parser.parse_args().only
    torch.set_num_threads(1)
    done = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    if missing := [name for name in names if name not in done]:
        about, truth, folds = facts("cpu"), truth_rows(), deal()
        tiles = tile_features(truth)
        for name in missing:
            done[name] = [measure_fold(ROWS[name], tiles, truth, fold) for fold in folds]
            print(name, flush=True)
            write_json(RESULT, about | {"rows": done})
    rewrite("needle_features", table(json.loads(RESULT.read_text())))
    return 0


def tile_features(truth: Truth) -> dict[str, torch.Tensor]:
    """Return features and colours of all tiles, in the order of tiles.csv; encode them once."""
    path = OUT / "features.pt"
    if not path.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        torch.save(encoded(truth), path)
    return torch.load(path, weights_only=True)


def deal() -> list[list[dict[str, str]]]:
    """Return the cohort's rows in each fold, with split and case."""
    write_table()
    run_split(TABLE, OUT / "folds", ["ADENOMA"], folds=FOLDS)
    found = []
    for fold in range(FOLDS):
        with (OUT / "folds" / f"{TABLE.stem}_{fold}.csv").open() as file:
            found.append(list(csv.DictReader(file)))
    return found


def measure_fold(
    row: Row, tiles: dict[str, torch.Tensor], truth: Truth, fold: list[dict[str, str]]
) -> dict:
    """Return a row's test slides of a fold, with their cases, logits and figures."""
    z, rows_of = tiles["colours" if row.colours else "z"], defaultdict(list)
    for number, tile in enumerate(truth):
        rows_of[tile["slide_id"]].append(number)
    bags: dict[str, list] = defaultdict(list)
    for slide in fold:
        rows = rows_of[slide["slide_id"]]
        corners = np.array([[int(truth[n]["x"]), int(truth[n]["y"])] for n in rows])
        own = FrozenSlide.of(
            slide["slide_id"], slide["case_id"], z[rows],
            torch.tensor([float(slide["ADENOMA"])]), places=Places.of([corners], [224.0], 1.0088),
        )  # fmt: skip
        planted = [at for at, n in enumerate(rows) if truth[n]["target"] == "1"]
        bags[slide["split"]].append((own, planted))
    cases = [slide.case_id for slide, _ in bags["test"]]
    return {"cases": cases, **measure(row, bags, 0, EPOCHS)}


def table(result: dict) -> str:
    """Return a line a row."""
    areas = {name: np.mean([*drawn(folds)], axis=0) for name, folds in result["rows"].items()}
    lines = [["method", "AUROC [95 %]", f"minus `{REFERENCE}` [95 %]",
              "tile AUROC: weights, logits", "CPU s a fit"]]  # fmt: skip
    for name in [name for name in ROWS if name in areas]:
        folds, gain = result["rows"][name], ""
        if name != REFERENCE and REFERENCE in areas:
            gain = gained(areas[name] - areas[REFERENCE])
        tile = np.mean([fold["tile_auroc"] for fold in folds], axis=0)
        lines.append([
            name, span(interval(areas[name])), gain,
            ", ".join(f"{value:.3f}" for value in tile),
            f"{np.mean([fold['cpu_s'] for fold in folds]):.1f}",
        ])  # fmt: skip
    about = (
        f"90 slides, {FOLDS} folds, {EPOCHS} epochs; one thread. {result['machine']}; "
        f"{result['date']}, commit {result['commit']}, torch {result['torch']}, timm "
        f"{result['timm']}."
    )
    return f"{markdown(lines)}\n\n{about}"


if __name__ == "__main__":
    sys.exit(main())
