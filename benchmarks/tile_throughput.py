"""Tiles per second and core, ours beside OpenSlide's own loop, others, and the bare JPEG decode.

    python -m benchmarks.tile_throughput --slide a.svs
    python -m benchmarks.tile_throughput              the real slides in TAPFM_DATA

Every reader reads the same tiles of the same file in this one process, and the readers take turns
in short rounds, so that whatever else the machine does hits all alike. The file is in the system's
memory, but each round opens the readers anew, so their own caches of decoded tiles start empty: a
round that only repeats the one before it would time copying. Time is CPU time of the process, all
its threads together: tiles a second *and core*. The figure is the median round. `ratio` is against
OpenSlide's loop in the same rounds. Each reader's tiles are compared with OpenSlide's: `worst` is
the largest difference in any channel of any pixel; 0: the same bits.

Tasks: `aligned`, one of the file's own tiles; `random`, 224 px anywhere, unscaled; `lattice`, 224
px in the order of an index; `reduce`, 443 px reduced to 224, as from a 0.2527 mpp scan at 0.5. All
reduce alike (Pillow's HAMMING), so there the readers differ by their decoding only. `threads`: the
tiles of `lattice`, half by each of two threads that share one open slide; here, and only here, time
is wall clock, so the machine must have two idle cores.

Writes results/tile_throughput.csv (a row a slide, task and reader) and the table between the
markers in README.md. Readers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from benchmarks.record import README, RESULTS, facts, rewrite, write_rows
from slides.wsi.jpeg_tiles import JpegDecoder
from slides.wsi.reader import Slide

DEFAULT = ("atlas/PDACtc3_20x.tif", "fixtures/CMU-1-Small-Region.svs")
TASKS = ("aligned", "random", "lattice", "reduce", "threads")
COLUMNS = (
    "slide", "task", "reader", "tiles", "tiles_per_s", "ms_per_tile", "ratio", "worst", "version",
    "machine", "date", "commit",
)  # fmt: skip
SEED = 0
opened_before: list[Slide] = []


def spots(slide: Slide, task: str, count: int, tile: tuple[int, int]) -> list[tuple[int, ...]]:
    """Yield x0, y0, width, height and the side of the wanted tile."""
    rng = np.random.default_rng(SEED)
    if task == "aligned":
        columns, rows = slide.width0 // tile[0], slide.height0 // tile[1]
        every = [(c * tile[0], r * tile[1]) for r in range(rows) for c in range(columns)]
        chosen = rng.choice(len(every), min(count, len(every)), replace=False)
        return [(*every[n], *tile, tile[0]) for n in sorted(chosen)]
    size0 = 443 if task == "reduce" else 224
    if task in ("lattice", "threads"):
        columns = slide.width0 // size0
        first = columns * (slide.height0 // size0 // 3)
        total = columns * (slide.height0 // size0) - first
        numbers = range(first, first + min(count, total))
        return [(n % columns * 224, n // columns * 224, 224, 224, 224) for n in numbers]
    corners = rng.integers(0, (slide.width0 - size0, slide.height0 - size0), (count, 2)).tolist()
    return [(x0, y0, size0, size0, 224) for x0, y0 in corners]


def reduced(rgb: np.ndarray, size: int) -> np.ndarray:
    """Return a tile reduced as `Slide.region` does, for readers that only decode."""
    if rgb.shape[1] == size:
        return rgb
    image = Image.fromarray(rgb)
    return np.asarray(image.resize((size, size), Image.Resampling.HAMMING, box=(0, 0, *image.size)))


def readers(path: Path) -> dict[str, tuple[str, Callable]]:
    """Return, by name, the package with the version, and tile(x0, y0, width, height, size)."""
    for slide in opened_before:
        slide.close()  # its tiles are dropped; memory that they had is used again, as in any run
    ours, plain = Slide(path, mpp=0.5), openslide.OpenSlide(path)
    opened_before[:] = [ours]
    plain.set_cache(openslide.OpenSlideCache(64 << 20))  # as much as ours has

    def tapfm(x0, y0, width, height, size):
        if width != height:
            return ours.levels.pixels(x0, y0, 0, width, height)
        return ours.region(x0, y0, width, size)

    def openslide_loop(x0, y0, width, height, size):
        image = plain.read_region((x0, y0), 0, (width, height)).convert("RGB")
        return reduced(np.asarray(image), size)

    found = {
        "OpenSlide": ("openslide-bin", openslide_loop),
        "tapfm": ("tapfm", tapfm),
    }
    for name, (package, opened) in OTHERS.items():
        with contextlib.suppress(ImportError):
            found[name] = package, partial(_decoded_and_reduced, opened(path))
    return found


def _decoded_and_reduced(decode: Callable, x0, y0, width, height, size) -> np.ndarray:
    return reduced(decode(x0, y0, width, height), size)


def tiffslide(path: Path) -> Callable:
    from tiffslide import TiffSlide

    slide = TiffSlide(path)
    return lambda x0, y0, w, h: slide.read_region((x0, y0), 0, (w, h), as_array=True)


def fastslide(path: Path) -> Callable:
    from fastslide import FastSlide

    slide = FastSlide.from_file_path(str(path))
    return lambda x0, y0, w, h: slide.read_region((x0, y0), 0, (w, h)).numpy()


def cucim(path: Path) -> Callable:
    """Return cuCIM's reader on the CPU, with a new process-wide cache as large as ours."""
    from cucim import CuImage  # hangs in a process that has torch

    CuImage.cache("per_process", memory_capacity=64)
    slide = CuImage(str(path))
    return lambda x0, y0, w, h: np.asarray(slide.read_region((x0, y0), (w, h), 0))


def hs2p(path: Path) -> Callable:
    """Return hs2p's OpenSlide reader; with cuCIM it would use that."""
    from hs2p.wsi.reader import open_slide

    slide = open_slide(path, backend="openslide")
    return lambda x0, y0, w, h: slide.read_region((x0, y0), 0, (w, h))


OTHERS = {  # name: package whose version counts, and what opens a slide: decode(x0, y0, w, h)
    "tiffslide": ("tiffslide", tiffslide),
    "fastslide": ("fastslide", fastslide),
    "cuCIM": ("cucim-cu12", cucim),
    "hs2p": ("hs2p", hs2p),
}


def bare_decode(path: Path, slide: Slide) -> Callable | None:
    """Return a file's own tile decoded from memory by libjpeg-turbo: the lower bound."""
    import simplejpeg

    file = JpegDecoder(path, slide.vendor, slide.facts.level_sizes)
    grid = file.levels[0]
    if grid is None:
        return None
    streams = {}

    def tile(x0, y0, width, height, size):
        number = y0 // height * grid.columns + x0 // width
        if number not in streams:
            data = os.pread(file._descriptor, int(grid.counts[number]), int(grid.offsets[number]))
            streams[number] = file._stream(grid, data)
        return simplejpeg.decode_jpeg(streams[number])

    return tile


def measure(path: Path, task: str, count: int, rounds: int) -> list[dict]:
    """Return the rows of one task on one slide, one for each reader."""
    slide = Slide(path, mpp=0.5)
    grid = JpegDecoder(path, slide.vendor, slide.facts.level_sizes).levels[0]
    tile = (grid.tile_width, grid.tile_height) if grid else (256, 256)
    wanted = spots(slide, task, count, tile)
    every = readers(path)
    if task == "aligned" and (bare := bare_decode(path, slide)):
        every["bare JPEG decode"] = ("simplejpeg", bare)
    truth = [every["OpenSlide"][1](*spot) for spot in wanted]
    worst, seconds = {}, {name: [] for name in every}
    for name, (_, read) in every.items():
        pairs = (
            (np.asarray(read(*spot))[..., :3], t) for spot, t in zip(wanted, truth, strict=True)
        )
        worst[name] = max(int(np.abs(a.astype(int) - t).max()) for a, t in pairs)
    for _ in range(rounds):
        for name in every:
            opened = readers(path)  # fresh handles: no tile is decoded yet but by `bare`
            read = opened[name][1] if name in opened else every[name][1]
            read(0, 0, *wanted[0][2:])  # opening and our check against OpenSlide, untimed
            seconds[name].append(seconds_for(read, wanted, 2 if task == "threads" else 1))
    rows = []
    for name, (package, _) in every.items():
        each = statistics.median(seconds[name])
        against = zip(seconds["OpenSlide"], seconds[name], strict=True)
        rows.append({
            "slide": path.name, "task": task, "reader": name, "tiles": len(wanted),
            "tiles_per_s": 1 / each, "ms_per_tile": each * 1e3,
            "ratio": statistics.median(theirs / ours for theirs, ours in against),
            "worst": worst[name], "version": installed(package),
        })  # fmt: skip
    return rows


def seconds_for(read: Callable, wanted: list[tuple[int, ...]], threads: int) -> float:
    """Return seconds a tile: CPU time of one thread, or wall clock of several that share them."""
    if threads == 1:
        began = time.process_time()
        for spot in wanted:
            read(*spot)
        return (time.process_time() - began) / len(wanted)
    size = -(-len(wanted) // threads)
    shares = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(len, shares))  # the threads are there
        began = time.perf_counter()
        list(pool.map(lambda share: [read(*spot) for spot in share] and None, shares))
        return (time.perf_counter() - began) / len(wanted)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        from tapfm import __version__

        return __version__


def table(rows: list[dict[str, str]]) -> str:
    """Return a table a slide, as Markdown."""
    parts = []
    for slide in dict.fromkeys(row["slide"] for row in rows):
        mine = [row for row in rows if row["slide"] == slide]
        versions = dict.fromkeys(f"{r['reader']} {r['version']}" for r in mine)
        parts.append(
            f"**{slide}**. {mine[0]['machine']}; {mine[0]['date']}, commit {mine[0]['commit']}; "
            f"{', '.join(versions)}.\n\n| reader | "
            + " | ".join(f"{task}: tiles/s, ratio, worst" for task in TASKS)
            + " |"
        )
        parts[-1] += "\n" + "|---" * (1 + len(TASKS)) + "|"
        for reader in dict.fromkeys(row["reader"] for row in mine):
            cells = []
            for task in TASKS:
                row = next((r for r in mine if (r["task"], r["reader"]) == (task, reader)), None)
                cells.append(
                    f"{float(row['tiles_per_s']):.0f}, {float(row['ratio']):.2f}x, {row['worst']}"
                    if row
                    else ""
                )
            parts[-1] += f"\n| {reader} | " + " | ".join(cells) + " |"
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.tile_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--slide", type=Path, nargs="+", help="slides; those in TAPFM_DATA otherwise")
    top.add_argument("--tiles", type=int, default=120, help="a round (%(default)s)")
    top.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    given = top.parse_args(argv)
    data = Path(os.environ.get("TAPFM_DATA", README.parents[2] / "shared" / "data")) / "slides"
    about, rows = facts("cpu"), []
    for path in given.slide or [data / name for name in DEFAULT]:
        for task in TASKS:
            for row in measure(path, task, given.tiles, given.rounds):
                rows.append({k: ({**row, **about}).get(k, "") for k in COLUMNS})
                print(f"{row['slide']:<28} {task:<8} {row['reader']:<17} "
                      f"{row['tiles_per_s']:8.0f} tiles/s  {row['ratio']:6.2f}x  "
                      f"worst {row['worst']}", flush=True)  # fmt: skip
    path = RESULTS / "tile_throughput.csv"
    write_rows(path, rows, COLUMNS)
    with path.open(newline="") as file:
        rewrite("tile_throughput", table(list(csv.DictReader(file))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
