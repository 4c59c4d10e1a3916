"""Small slides that share a chunk: seconds of an update, beside each slide in chunks of its own.

    python -m benchmarks.pack_chunks [--rounds 2] [--slides 4] [--compiled]

A ViT-S/14 (tiles of 224 px, made-up pixels, random weights) learns in full from an update of small
slides, 12 to 40 tiles each, at chunk 64: both passes and the loss, without the optimizer. Time is
processor time of one thread, the fastest of some rounds in turn. `--compiled` compiles the blocks,
where short chunks are filled up; the compiler's time is not counted.

Writes results/pack_chunks.csv, keeping the rows of the other kind, and the table between the
markers in README.md.
"""

from __future__ import annotations

import argparse
import csv
import time

import numpy as np
import torch

from benchmarks.record import RESULTS, facts, rewrite, write_rows
from tapfm.data.bag import Bag, Places
from tapfm.reports.plain_table import markdown
from tapfm.slide_model.model import ModelConfig, SlideModel, build
from tapfm.training.passes import Passes, packed

CHUNK, SMALLEST, LARGEST = 64, 12, 40
FILE = RESULTS / "pack_chunks.csv"


def update_of(slides: int) -> list[Bag]:
    """Return the slides of one update."""
    drawn, pixels = np.random.default_rng(0), torch.Generator().manual_seed(0)
    bags = []
    for number, count in enumerate(drawn.integers(SMALLEST, LARGEST + 1, slides)):
        size = int(count), 3, 224, 224
        tiles = torch.randint(0, 256, size, dtype=torch.uint8, generator=pixels)
        known, turn = (f"s{number}", f"c{number}", tiles), (0, number, number)
        bags.append(Bag(*known, Places.unknown(size[0]), torch.ones(1), number, turn))
    return bags


def packs_of(bags: list[Bag], share: bool) -> list[list[Bag]]:
    """Return the slides that come to one chunk."""
    packs, left = [], bags
    while left:
        packs.append(packed(left if share else left[:1], CHUNK))
        left = left[len(packs[-1]) :]
    return packs


def seconds(model: SlideModel, bags: list[Bag], share: bool) -> float:
    """Return processor seconds of both passes and the loss of an update."""
    passes, begun = Passes(model, CHUNK), time.process_time()
    for number, bag in enumerate(bags):
        encoded = passes.encode(bag, behind=bags[number + 1 :] if share else ())
        loss = model.aggregator.loss(encoded.tiles, bag.labels_K, model.task.loss())
        (loss / len(bags)).backward()
        passes.adapt(encoded)
    took = time.process_time() - begun
    model.zero_grad()
    return took


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--compiled", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig("dinov2_vits14", "tapfm_gated", ("A",), 224, 0.5, weights="random")
    model, bags = build(config, compiled=asked.compiled).train(), update_of(asked.slides)
    if asked.compiled:
        seconds(model, bags[:1], False)  # the compiler's
    took = {False: [], True: []}
    for _ in range(asked.rounds):
        for share, each in took.items():
            each.append(seconds(model, bags, share))
            print(f"shared {share}: {each[-1]:.1f} s", flush=True)
    tiles = sum(bag.count for bag in bags)
    rows = [
        {
            "compiled": asked.compiled, "shared": share, "slides": asked.slides, "tiles": tiles,
            "chunks": len(packs := packs_of(bags, share)), "filled": tiles / (CHUNK * len(packs)),
            "rounds": asked.rounds, "s_per_update": min(each), "slowest_s": max(each),
            **facts("cpu"),
        }
        for share, each in took.items()
    ]  # fmt: skip
    if FILE.exists():
        with FILE.open() as file:
            before = list(csv.DictReader(file))
        rows += [row for row in before if row["compiled"] != str(asked.compiled)]
    rows.sort(key=lambda row: (str(row["compiled"]), str(row["shared"])))
    write_rows(FILE, rows)
    table = [["blocks", "small slides", "chunks", "filled", "s an update", "s a tile"]]
    for row in rows:
        spent = float(row["s_per_update"])
        table.append([
            "compiled" if str(row["compiled"]) == "True" else "as they are",
            "share chunks" if str(row["shared"]) == "True" else "alone",
            str(row["chunks"]), f"{float(row['filled']):.0%}", f"{spent:.1f}",
            f"{spent / int(row['tiles']):.3f}",
        ])  # fmt: skip
    rewrite("pack_chunks", markdown(table))


if __name__ == "__main__":
    main()
