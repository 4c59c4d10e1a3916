"""Does reading keep up? A consumer that takes 100 tiles/s, fed by two cores.

    python -m benchmarks.streaming --demo data/demo/cohort.csv

The consumer stands for a GPU at the speed of a ViT-g on a large card: it sleeps 10 ms for each tile
it is given, and while it sleeps reading goes on. `busy` is the share of its time after the first
slide that it slept, and did not wait. CPU time is that of all processes over all tiles taken: a
tenth of it, in ms, is how many cores reading needs to keep up, and `cores` how many were used.
Nothing is cached; tiles are 224 px at 0.5 mpp, most from scans of 0.25, so 448 px are decoded and
reduced for each.

    training    slides read ahead, all tiles augmented (colour too), in the order of an epoch
    large       the same of four large slides (benchmarks/indexing.py), a draw of 300 tiles each
    twice       those, two passes over each, as training takes them, with memory for 100 tiles a
                slide: the others are read again in each pass
    streamed    validation: all tiles of slide after slide, by one prefetcher of workers
    (slides.streaming.prefetch)

All is done twice and the run that waited less in all is the table's. Writes results/streaming.csv
(a row a run) and the table between the markers in README.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.indexing import MPP, write_large_slide
from benchmarks.record import RESULTS, cpu_seconds, facts, rewrite, write_rows
from slides.cohort.table import SlideRow, read_cohort
from slides.grid import Grid
from slides.streaming.bounded_tiles import SlideTiles
from slides.streaming.order import SlideSampler
from slides.streaming.prefetch import Prefetcher
from slides.streaming.stream import Augment, BagDataset, SlideLoader
from slides.streaming.workers import StreamedSlide
from slides.tiling.index import TileIndex, index_cohort, index_path, read_index
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide

RATE = 100  # tiles a second
CHUNK = 25  # of the consumer
GRID, TISSUE = Grid(224, 0.5), Tissue()
SLIDES, LARGE, DRAW, HELD, WORKERS, RUNS = 20, 4, 300, 100, 2, 2


class TileSource:
    """Slides and their indexes, for worker processes."""

    def __init__(self, index_dir: Path):
        self.index_dir = index_dir

    def __call__(self, row: SlideRow) -> tuple[Slide, TileIndex]:
        """Return a slide's tiles, as `slides.streaming.tile_source.TileSource` does."""
        index = read_index(index_path(self.index_dir, GRID, row.slide_id), GRID, TISSUE)
        return Slide(row.path, row.mpp, row.slide_id), index


def prepare(folder: Path, demo: Path) -> tuple[list[SlideRow], list[SlideRow]]:
    """Return the first slides of the demo cohort and copies of a large one, all indexed."""
    rows = list(read_cohort(demo).rows)[:SLIDES]
    path = write_large_slide(folder / "large.tif")
    large = []
    for number in range(LARGE):
        copy = folder / f"large{number}.tif"
        os.link(path, copy)
        large.append(SlideRow(f"c{number}", copy.stem, copy, "train", MPP, "", "", ()))
    index_cohort(rows + large, folder / "index", GRID, TISSUE, 2)
    return rows, large


def bags(
    rows: list[SlideRow], tile_source: TileSource, passes: int = 1, **options
) -> Iterator[Iterable]:
    """Yield each slide's tiles, read ahead, as often as asked for."""
    dataset = BagDataset(rows, tile_source, augment=Augment(colour=0.1), **options)
    for bag in SlideLoader(dataset, SlideSampler(len(rows)), WORKERS):
        yield (chunk for _ in range(passes) for chunk in bag.tiles.split(CHUNK))


def streamed(rows: list[SlideRow], tile_source: TileSource) -> Iterator[Iterable]:
    """Yield each slide's tiles, while the next one's are read."""
    prefetcher = Prefetcher(WORKERS)
    slides = [
        SlideTiles(StreamedSlide.of(partial(tile_source, row), tile_source(row)[1]), prefetcher)
        for row in rows
    ]
    with prefetcher:
        for tiles in slides:
            yield tiles.split(CHUNK)


def consume(slides: Iterator[Iterable[Tensor]]) -> dict:
    """Take all tiles at the rate; return the time, and the share of waiting."""
    count = tiles = 0
    waited = worked = 0.0
    cpu, start = cpu_seconds(), time.perf_counter()
    first, began = 0.0, start
    for chunks in slides:
        for chunk in chunks:
            got = time.perf_counter()
            if count:
                waited += got - began
                worked += len(chunk) / RATE
            else:
                first += got - began
            tiles += len(chunk)
            time.sleep(len(chunk) / RATE)
            began = time.perf_counter()
        count += 1
    cpu, seconds = cpu_seconds() - cpu, time.perf_counter() - start
    return {
        "slides": count, "tiles": tiles, "first_wait_s": first, "waited_s": waited,
        "busy": worked / (worked + waited), "cpu_ms": 1000 * cpu / tiles, "cores": cpu / seconds,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    runs = [[row for row in rows if row["run"] == number] for number in range(RUNS)]
    best = min(runs, key=lambda run: sum(row["waited_s"] for row in run))
    about = best[0]
    text = f"{RATE} tiles/s, {WORKERS} workers. {about['machine']}; {about['date']}, commit "
    text += f"{about['commit']}; better of two runs.\n\n"
    text += "| | slides | tiles taken | wait in the first, s | busy after it "
    text += "| CPU ms a tile | cores |\n|---|---|---|---|---|---|---|"
    for row in best:
        text += f"\n| {row['what']} | {row['slides']} | {row['tiles']} | "
        text += f"{row['first_wait_s']:.2f} | {row['busy']:.1%} | {row['cpu_ms']:.1f} | "
        text += f"{row['cores']:.2f} |"
    return text


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--demo", type=Path, default=Path("data/demo/cohort.csv"), help="its table")
    given = top.parse_args(argv)
    about, found = facts("cpu"), []
    with tempfile.TemporaryDirectory() as scratch:
        rows, large = prepare(Path(scratch), given.demo)
        tile_source = TileSource(Path(scratch) / "index")
        for run in range(RUNS):
            for what, slides in {
                "training": bags(rows, tile_source),
                "large": bags(large, tile_source, budget=DRAW),
                "twice": bags(large, tile_source, 2, budget=DRAW, hold=HELD, workers=WORKERS),
                "streamed": streamed(rows, tile_source),
            }.items():
                found.append({"run": run, "what": what, **consume(slides), **about})
                print(found[-1], flush=True)
    write_rows(RESULTS / "streaming.csv", found)
    rewrite("streaming", table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
