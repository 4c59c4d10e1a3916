"""Hours of a run on each card and on many, counted: the table of docs/hours.md.

    python -m benchmarks.hours

Two cohorts of slides that give 300 tiles an epoch each, as configs/cohorts/tcga_luad.yaml draws
them: about 500 slides (TCGA-LUAD, three fifths in training) and 11,000 (all of TCGA). Models UNI
and H-optimus-0, each with the setup that `tapfm plan` chooses for the card; 20 epochs, 8 slides an
update. Then the same with every tile of slides between 500 and 30,000 tiles, where sizes differ and
pairing slides by size pays.

Writes results/hours.csv and the table between the markers in docs/hours.md. Nothing is timed.
"""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.record import HERE, RESULTS, rewrite, write_rows
from tapfm.encoders.backbones import find
from tapfm.planning import plan
from tapfm.planning.cards import CARDS
from tapfm.planning.epoch import simulate
from tapfm.planning.footprint import Footprint
from tapfm.planning.speed import rates

MODELS = ("uni", "h_optimus_0")
COHORTS = {"500 slides": 300, "11,000 slides": 6600}  # slides in training, three fifths
GPUS, EPOCHS, ACCUMULATE, TILES, WORKERS = (1, 8, 64), 20, 8, 300, 4
PAGE = HERE.parent / "docs" / "hours.md"


def sizes(slides: int, every: bool) -> np.ndarray:
    """Return the tiles that each training slide gives."""
    if not every:
        return np.full(slides, TILES)
    drawn = np.random.default_rng(0).lognormal(np.log(6000), 0.8, slides)
    return drawn.clip(500, 30_000).astype(int)


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
                    for gpus in GPUS:
                        each, tiles_N = max(1, ACCUMULATE // gpus), sizes(slides, every)
                        found = simulate(tiles_N, gpus, speed, each)
                        pairs = simulate(tiles_N, gpus, speed, each, paired=True)
                        row[f"hours_{gpus}"] = found.seconds * EPOCHS / 3600
                        row[f"efficiency_{gpus}"] = found.efficiency
                        row[f"paired_hours_{gpus}"] = pairs.seconds * EPOCHS / 3600
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
