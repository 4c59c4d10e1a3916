"""How long `tapfm index` takes, and how much memory: one core, a very large slide, the demo cohort.

    python -m benchmarks.indexing --demo data/demo/cohort.csv

The large slide is written here: 100,000 x 80,000 px at 0.25 mpp, JPEG tiles of 256 px, levels of 1,
4 and 16 as Aperio scanners leave them. A third of it is tissue, in blocks of 4,096 px, of 64 kinds
of tile; tiles of a kind share their bytes in the file, so that it takes 2 MB of disk, but every one
that is read is decoded. A run is the whole command in a process of its own that may use one core:
seconds by the clock and of CPU time, interpreter and imports included, and those of a slide in the
ledger, by the clock; memory is the kernel's count of its peak. All is done twice, and the run whose
large slide was quicker is the table's.

Writes results/indexing.csv (a row a run) and the table between the markers in README.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks.record import RESULTS, facts, rewrite, write_rows

WIDTH0, HEIGHT0, MPP, TILE, BLOCK, KINDS = 100_000, 80_000, 0.25, 256, 4096, 64
LEVELS = (1, 4, 16)
RUNS = 2
SHORT, LONG, WORD = 3, 4, 16  # TIFF's numbers of 2, 4 and 8 bytes
COMMAND = "from tapfm.cli import main; raise SystemExit(main())"


def write_large_slide(path: Path) -> Path:
    """A BigTIFF pyramid whose tiles share their bytes; `path` is returned."""
    rng = np.random.default_rng(0)
    kinds = [
        jpeg(np.full((TILE, TILE, 3), (243, 242, 244), float) + rng.normal(0, 2, (TILE, TILE, 3)))
    ]
    kinds += [jpeg(stained(rng)) for _ in range(KINDS)]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        counts = np.array([len(kind) for kind in kinds], "<u4")
        offsets = (file.tell() + np.cumsum(counts) - counts).astype("<u8")
        file.write(b"".join(kinds))
        link = 8  # where the next directory's place is to be written
        for step in LEVELS:
            width, height = WIDTH0 // step, HEIGHT0 // step
            kind = kind_of_tiles(-(-width // TILE), -(-height // TILE), step, rng)
            arrays = [offsets[kind].tobytes(), counts[kind].tobytes()]
            where = []
            for data in arrays:
                where.append(file.tell())
                file.write(data)
            tags = [
                (254, LONG, 1, int(step > 1)), (256, LONG, 1, width), (257, LONG, 1, height),
                (258, SHORT, 3, 8 | 8 << 16 | 8 << 32), (259, SHORT, 1, 7), (262, SHORT, 1, 6),
                (277, SHORT, 1, 3), (284, SHORT, 1, 1),
                (322, SHORT, 1, TILE), (323, SHORT, 1, TILE),
                (324, WORD, len(kind), where[0]), (325, LONG, len(kind), where[1]),
                (530, SHORT, 2, 2 | 2 << 16),
            ]  # fmt: skip
            here = file.tell()
            file.write(struct.pack("<Q", len(tags)))
            file.write(b"".join(struct.pack("<HHQQ", *tag) for tag in tags))
            following = file.tell()
            file.write(struct.pack("<Q", 0))
            file.seek(link)
            file.write(struct.pack("<Q", here))
            file.seek(0, os.SEEK_END)
            link = following
    return path


def kind_of_tiles(columns: int, rows: int, step: int, rng: np.random.Generator) -> np.ndarray:
    """The kind of each tile, row by row: 0 is glass. Blocks in an ellipse are tissue."""
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    x0, y0 = ((each * TILE * step // BLOCK + 0.5) * BLOCK for each in (x, y))
    inside = ((x0 / WIDTH0 - 0.5) / 0.36) ** 2 + ((y0 / HEIGHT0 - 0.5) / 0.32) ** 2 < 1
    return np.where(inside, rng.integers(1, KINDS + 1, inside.shape), 0).ravel()


def stained(rng: np.random.Generator) -> np.ndarray:
    """Pink with dark nuclei."""
    tile = np.full((TILE, TILE, 3), (214, 160, 200), float)
    tile[np.kron(rng.random((TILE // 8, TILE // 8)) < 0.3, np.ones((8, 8))) > 0] = (96, 62, 140)
    return tile + rng.normal(0, 6, tile.shape)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=85, subsampling=2)
    return buffer.getvalue()


def measure(folder: Path, table: Path, tile_px: int) -> dict:
    """`tapfm index` of a table, in a process of its own on one core."""
    config = folder / "config.yaml"
    data = {"table": str(table), "index_dir": str(folder / "index"), "workers": 0}
    data["tiles"] = {"tile_px": tile_px, "mpp": 0.5}
    config.write_text(yaml.safe_dump({"data": data}))
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "index", "--config", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.sched_setaffinity(child.pid, {min(os.sched_getaffinity(0))})
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"tapfm index ended with {status}")
    (ledger,) = (folder / "index").glob("*/ledger.csv")
    with ledger.open(newline="") as file:
        rows = list(csv.DictReader(file))
    each = [float(row["seconds"]) for row in rows]
    return {
        "slides": len(rows), "tiles": sum(int(row["tiles"]) for row in rows),
        "seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime,
        "index_median_s": statistics.median(each), "index_worst_s": max(each),
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }  # fmt: skip


def large_table(folder: Path) -> Path:
    """A table of one row: the large slide."""
    write_large_slide(folder / "large.tif")
    header = "case_id,slide_id,slide_path,split,mpp"
    (folder / "large.csv").write_text(f"{header}\nc,large,large.tif,train,{MPP}\n")
    return folder / "large.csv"


def table(rows: list[dict]) -> str:
    best = rows_of_better_run(rows)
    about = best[0]
    text = f"{about['machine']}, one used; {about['date']}, commit {about['commit']}; "
    text += "better of two runs.\n\n"
    text += "| | slides | tiles | command, s | of CPU, s | a slide, s: median, worst | peak GB |\n"
    text += "|---|---|---|---|---|---|---|"
    for row in best:
        text += f"\n| {row['what']} | {row['slides']} | {row['tiles']} | {row['seconds']:.1f} | "
        text += f"{row['cpu_s']:.1f} | {row['index_median_s']:.2f}, {row['index_worst_s']:.2f} | "
        text += f"{row['peak_gb']:.2f} |"
    return text


def rows_of_better_run(rows: list[dict]) -> list[dict]:
    runs = [[row for row in rows if row["run"] == number] for number in range(RUNS)]
    return min(runs, key=lambda run: run[0]["seconds"])


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.indexing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--demo", type=Path, default=Path("data/demo/cohort.csv"), help="its table")
    given = top.parse_args(argv)
    about, rows = facts("cpu"), []
    with tempfile.TemporaryDirectory() as scratch:
        large = large_table(Path(scratch))
        jobs = {
            f"{WIDTH0:,} x {HEIGHT0:,} px, 224 px at 0.5": (large, 224),
            "demo cohort, 112 px at 0.5": (given.demo.resolve(), 112),
        }
        for run in range(RUNS):
            for what, (source, tile_px) in jobs.items():
                with tempfile.TemporaryDirectory() as folder:
                    row = {"run": run, "what": what, **measure(Path(folder), source, tile_px)}
                rows.append({**row, **about})
                print(row, flush=True)
    write_rows(RESULTS / "indexing.csv", rows)
    rewrite("indexing", table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
