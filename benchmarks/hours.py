"""Hours of a run on each card and on many, counted: the table of docs/hours.md.

    python -m benchmarks.hours

Two cohorts of slides of 500 to 30,000 tiles that give 300 of them an epoch each, as
configs/cohorts/tcga_luad.yaml draws them: about 500 slides (TCGA-LUAD; three fifths in training,
one fifth in validation) and 11,000 (all of TCGA). Models UNI and H-optimus-0, each with the setup
that `tapfm plan` chooses for the card; 20 epochs, 8 slides an update, a warm start and five shares
to choose from. Then the same with every tile in training, where pairing slides by size pays.

Writes results/hours.csv and the table between the markers in docs/hours.md. Nothing is timed.
"""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.record import HERE, RESULTS, rewrite, write_rows
from tapfm.encoders.backbones import find
from tapfm.planning import plan
from tapfm.planning.cards import CARDS
from tapfm.planning.epoch import Run, simulate_run
from tapfm.planning.footprint import Footprint
from tapfm.planning.speed import rates
from tapfm.recipe.warm_start import VIEWS

MODELS = ("uni", "h_optimus_0")
COHORTS = {"500 slides": 500, "11,000 slides": 11_000}
GPUS, EPOCHS, ACCUMULATE, TILES, WORKERS = (1, 8, 64), 20, 8, 300, 4
LOOKS = 6  # the warm start, and five shares of the change
PAGE = HERE.parent / "docs" / "hours.md"


def made_run(slides: int, every: bool) -> Run:
    """Return a run's passes over so many slides; it trains on `TILES` of each, or on every tile."""
    drawn = np.random.default_rng(0).lognormal(np.log(6000), 0.8, slides * 4 // 5)
    tiles_N = drawn.clip(500, 30_000).astype(int)
    train_N, val_N = np.split(tiles_N, [slides * 3 // 5])
    few, seen = (
        (train_N, train_N) if every else (train_N.clip(max=n) for n in (TILES, VIEWS * TILES))
    )
    passes = {"epochs": EPOCHS, "validations": EPOCHS, "looks": LOOKS}
    return Run(few, val_N, seen, ACCUMULATE, **passes)


def main() -> int:
    """Plan each model on each card, simulate each cohort."""
    made = functools.cache(lambda key, tile_px: Footprint(find(key), tile_px))
    plan.Footprint = lambda row, tile_px=None: made(row.key, tile_px)  # counted once a model
    rows = []
    for model in MODELS:
        for card in CARDS:
            option, _ = plan.fitting(find(model), 224, {"name": "full"}, {}, card.name)
            speed = rates(option.setup, option.cost, card, WORKERS)
            for cohort, slides in COHORTS.items():
                for every in (False, True):
                    row = {"model": model, "card": card.name, "setup": option.name,
                           "chunk": option.chunk, "cohort": cohort,
                           "tiles": "all" if every else TILES}  # fmt: skip
                    run = made_run(slides, every)
                    for gpus in GPUS:
                        found, hours = simulate_run(run, gpus, speed)
                        _, pairs = simulate_run(run, gpus, speed, paired=True)
                        row[f"hours_{gpus}"] = sum(hours.values())
                        row |= {f"{part}_hours_{gpus}": value for part, value in hours.items()}
                        row[f"efficiency_{gpus}"] = found.efficiency
                        row[f"paired_hours_{gpus}"] = sum(pairs.values())
                    rows.append(row)
    write_rows(RESULTS / "hours.csv", rows)
    rewrite("hours", table(rows), PAGE)
    return 0


def table(rows: list[dict]) -> str:
    """Return the hours as Markdown: 300 tiles a slide, then every tile."""
    parts = []
    for tiles in (TILES, "all"):
        title = f"{TILES} tiles a slide" if tiles == TILES else "every tile, paired by size"
        kind = "hours" if tiles == TILES else "paired_hours"
        head = " | ".join(f"{cohort}, {n}" for cohort in COHORTS for n in GPUS)
        parts += [f"| {title}: model, card | {head} |", "|---" * (1 + 2 * len(GPUS)) + "|"]
        for model in MODELS:
            for card in CARDS:
                mine = [r for r in rows if (r["model"], r["card"], r["tiles"]) ==
                        (model, card.name, tiles)]  # fmt: skip
                cells = [f"{r[f'{kind}_{n}']:,.1f}" for r in mine for n in GPUS]
                parts.append(f"| {model}, {card.name} ({mine[0]['setup']}) | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
