"""Time and memory of `tapfm index` on one core, beside hs2p.

    python -m benchmarks.indexing --demo data/demo/cohort.csv

The large slide is written here: 100,000 x 80,000 px at 0.25 mpp, JPEG tiles of 256 px, levels of 1,
4 and 16 as Aperio scanners leave them. A third of it is tissue, in blocks of 4,096 px, of 64 kinds
of tile; tiles of a kind share their bytes in the file, so that it takes 2 MB of disk, but every one
that is read is decoded. A run is the whole command in a process of its own that may use one core:
seconds by the clock and of CPU time, interpreter and imports included, and those of a slide by the
clock; memory is the kernel's count of its peak.

hs2p (benchmarks/hs2p_tiles.py) makes tiles of the same size and resolution of the same slides;
where it is not installed the table says so. The programs take turns, three times; a row is the run
that took least CPU time. Lattices and rules of tissue differ, so the areas that tiles cover are
compared (benchmarks/areas.py): what both cover of what either does, and on the demo cohort how much
of the painted tissue is covered, and how much of what is covered is painted tissue.

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
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks.areas import read_areas
from benchmarks.record import RESULTS, facts, rewrite, write_rows

WIDTH0, HEIGHT0, MPP, TILE, BLOCK, KINDS = 100_000, 80_000, 0.25, 256, 4096, 64
LEVELS = (1, 4, 16)
TARGET = 0.5  # mpp of the tiles asked for
RUNS = 3
SHORT, LONG, WORD = 3, 4, 16  # TIFF's numbers of 2, 4 and 8 bytes
COMMAND = "from tapfm.cli import main; raise SystemExit(main())"
LAUNCH = """
import os, resource, subprocess, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.run(sys.argv[1:], check=True, **quiet)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""  # a process begins its count of memory with that of the one it was forked from: a small one


def write_large_slide(path: Path) -> Path:
    """Write a BigTIFF pyramid whose tiles share their bytes; return `path`."""
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
    """Return the kind of each tile, row by row: 0 is glass; blocks in an ellipse are tissue."""
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    x0, y0 = ((each * TILE * step // BLOCK + 0.5) * BLOCK for each in (x, y))
    inside = ((x0 / WIDTH0 - 0.5) / 0.36) ** 2 + ((y0 / HEIGHT0 - 0.5) / 0.32) ** 2 < 1
    return np.where(inside, rng.integers(1, KINDS + 1, inside.shape), 0).ravel()


def stained(rng: np.random.Generator) -> np.ndarray:
    """Return a pink tile with dark nuclei."""
    tile = np.full((TILE, TILE, 3), (214, 160, 200), float)
    tile[np.kron(rng.random((TILE // 8, TILE // 8)) < 0.3, np.ones((8, 8))) > 0] = (96, 62, 140)
    return tile + rng.normal(0, 6, tile.shape)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=85, subsampling=2)
    return buffer.getvalue()


def tapfm_command(folder: Path, table: Path, tile_px: int) -> list[str]:
    """Return the `tapfm index` command, with its configuration in the folder."""
    config = folder / "config.yaml"
    data = {"table": str(table), "index_dir": str(folder), "workers": 0}
    data["tiles"] = {"tile_px": tile_px, "mpp": TARGET}
    config.write_text(yaml.safe_dump({"data": data}))
    return [sys.executable, "-c", COMMAND, "index", "--config", str(config)]


def hs2p_command(folder: Path, table: Path, tile_px: int) -> list[str]:
    """Return the command that calls hs2p for each slide."""
    arguments = [str(table), str(tile_px), str(TARGET), str(folder)]
    return [sys.executable, "-m", "benchmarks.hs2p_tiles", *arguments]


def measure(command: list[str], folder: Path) -> dict:
    """Run a command in its own process on one core; return its figures."""
    began = time.perf_counter()
    used = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCH, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    cpu_s, peak_kb = map(float, used.stdout.split())
    (ledger,) = folder.rglob("ledger.csv")
    with ledger.open(newline="") as file:
        rows = list(csv.DictReader(file))
    each = [float(row["seconds"]) for row in rows]
    return {
        "slides": len(rows), "tiles": sum(int(row["tiles"]) for row in rows),
        "seconds": seconds, "cpu_s": cpu_s,
        "index_median_s": statistics.median(each), "index_worst_s": max(each),
        "peak_gb": peak_kb * 1024 / 1e9,
    }  # fmt: skip


def large_table(folder: Path) -> Path:
    """Write a table of one row: the large slide."""
    write_large_slide(folder / "large.tif")
    header = "case_id,slide_id,slide_path,split,mpp"
    (folder / "large.csv").write_text(f"{header}\nc,large,large.tif,train,{MPP}\n")
    return folder / "large.csv"


def table(rows: list[dict]) -> str:
    about, best = rows[0], {}
    for row in rows:
        key = row["what"], row["program"]
        best[key] = min(best.get(key, row), row, key=lambda each: each["cpu_s"])
    text = f"{about['machine']}, one used; {about['date']}, commit {about['commit']}; of {RUNS} "
    text += "runs in turns, the one of least CPU time.\n\n"
    text += "| slides, tiles asked for | program | tiles | command, s | of CPU, s "
    text += (
        "| a slide, s: median, worst | peak GB | area shared | tissue covered | tissue of it |\n"
    )
    text += "|---|---|---|---|---|---|---|---|---|---|"
    for row in best.values():
        text += f"\n| {row['what']} | {row['program']} | {row['tiles']} | {row['seconds']:.1f} | "
        text += f"{row['cpu_s']:.1f} | {row['index_median_s']:.3f}, {row['index_worst_s']:.2f} | "
        text += f"{row['peak_gb']:.2f} | "
        shares = (row[name] for name in ("shared", "tissue_covered", "covered_tissue"))
        text += " | ".join("" if share != share else f"{share:.1%}" for share in shares) + " |"
    if len(programs()) == 1:
        text += "\n\nhs2p was not installed."
    return text


def programs() -> dict[str, Callable]:
    """Return name, version and command maker of tapfm, and of hs2p if installed."""
    found = {"tapfm": tapfm_command}
    if find_spec("hs2p"):
        found[f"hs2p {version('hs2p')}"] = hs2p_command
    return found


def one_round(source: Path, tile_px: int) -> list[dict]:
    """Run every program on a table, one after the other; return figures and areas."""
    rows, ours = [], None
    for program, command in programs().items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            row = {"program": program, **measure(command(folder, source, tile_px), folder)}
            found = read_areas(source, folder)
        shared = found.shared(ours) if ours else float("nan")
        ours = ours or found
        covered, tissue = found.against_truth()
        shares = {"tissue_covered": covered, "covered_tissue": tissue}
        rows.append({**row, "shared": shared, **shares})
    return rows


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
        jobs = {
            f"{WIDTH0:,} x {HEIGHT0:,} px; 224 px": (large_table(Path(scratch)), 224),
            "140 of the demo cohort; 112 px": (given.demo.resolve(), 112),
        }
        for run in range(RUNS):
            for what, job in jobs.items():
                for row in one_round(*job):
                    rows.append({"run": run, "what": what, **row, **about})
                    print(rows[-1], flush=True)
    write_rows(RESULTS / "indexing.csv", rows)
    rewrite("indexing", table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
