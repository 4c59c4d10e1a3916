"""Times verbs on tables of many slides: seconds of CPU and wall clock, largest resident size.

    python -m benchmarks.campaign.scale --rows 312 1250 20000

The slides are one small picture with a number behind its last byte, and indexes of it: what is
timed is what a table's length costs, not reading pixels. `test` is of a run that learned from the
first eight slides: the demo encoder, four tiles a slide, all but twelve slides in the split. It is
left out above 1250 slides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import yaml

from benchmarks.campaign.tries import emptied
from benchmarks.record import RESULTS, facts, rewrite, write_rows
from slides.cohort.table import read_cohort
from slides.files import file_fingerprint
from slides.streaming.settings import TileSettings
from slides.tiling.index import index_cohort, index_path, read_index, write_index
from slides.tiling.tissue import Tissue
from tapfm.cli import main as tapfm
from tapfm.data.datamodule import SlideData
from tests.conftest import stained_picture, write_pyramid

TESTED = 1250
TILES = TileSettings(32, 0.5, tissue=Tissue(min_area_um2=1000.0))


def write_table(table: Path, kinds: Iterable[tuple[str, int]]) -> None:
    """Write a table of slides with these splits and labels."""
    lines = ["case_id,slide_id,slide_path,split,x"]
    for number, (split, x) in enumerate(kinds):
        lines.append(f"c{number},s{number},slides/s{number}.tif,{split},{x}")
    table.write_text("\n".join(lines) + "\n")


def write_many(folder: Path, slides: int) -> Path:
    """Write slides with indexes and a table; return the table."""
    (folder / "slides").mkdir()
    table, where = folder / "cohort.csv", folder / "index"
    by_ten = ["train"] * 7 + ["val"] * 2 + ["test"]
    write_table(table, ((by_ten[number % 10], number // 10 % 2) for number in range(slides)))
    seed = write_pyramid(folder / "slides" / "s0.tif", stained_picture(311, 263), 0.5, levels=2)
    data = seed.read_bytes()
    for number in range(1, slides):
        (folder / "slides" / f"s{number}.tif").write_bytes(data + number.to_bytes(4, "little"))
    rows = read_cohort(table).rows
    index_cohort(rows[:1], where, TILES.grid, TILES.tissue, progress=False)
    one = read_index(index_path(where, TILES.grid, "s0"), TILES.grid, TILES.tissue)
    for row in rows[1:]:
        known = {"fingerprint": file_fingerprint(row.path), "file_name": row.path.name}
        own = replace(one, slide_id=row.slide_id, **known)
        write_index(index_path(where, TILES.grid, row.slide_id), own, TILES.tissue)
    return table


def measure(folder: Path, slides: int) -> list[dict]:
    """Return a row for each thing timed."""
    table, found = write_many(emptied(folder), slides), []

    def timed(what: str, call: Callable):
        wall, cpu = time.perf_counter(), time.process_time()
        value = call()
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        found.append({"slides": slides, "what": what, **spent})
        return value

    rows = timed("read the table", lambda: read_cohort(table).rows)
    where = folder / "index", TILES.grid, TILES.tissue
    timed("index, all looked at", lambda: index_cohort(rows, *where, progress=False))
    timed("index again", lambda: index_cohort(rows, *where, progress=False))
    how = {"index_dir": str(folder / "index"), "tiles": TILES, "workers": 0}
    data = timed("SlideData", lambda: SlideData(str(table), **how))
    timed("prepare_data", data.prepare_data)
    timed("slides of train and val", lambda: [data.rows("train"), data.rows("val")])
    if slides <= TESTED:
        run = write_run(table, slides)
        timed("test", lambda: tapfm(["test", "--run", str(run)]))
        timed("its page alone", lambda: tapfm(["report", "--run", str(run)]))
    return found


def write_run(table: Path, slides: int) -> Path:
    """Fit a run whose test split is all slides but twelve; return its folder."""
    folder = table.parent
    splits = ["train"] * 8 + ["val"] * 4 + ["test"] * (slides - 12)
    write_table(folder / "tested.csv", ((split, n % 2) for n, split in enumerate(splits)))
    config = {
        "run_dir": str(folder / "runs"),
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
        "model": {"model": "demo_vit", "steps": {"interpolate": []}},
        "data": {
            "table": str(folder / "tested.csv"),
            "index_dir": str(folder / "tested"),
            "tiles": {"tile_px": 112, "mpp": 0.5, "tissue": {"min_area_um2": 1000.0}},
            "workers": 0,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if tapfm(["fit", "--config", str(folder / "config.yaml")]):
        raise SystemExit("the run to test did not end well")
    return folder / "runs"


def main() -> None:
    """Measure, and write table and raw figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[312, 1250, 20000])
    counts, rows = parser.parse_args().rows, []
    with tempfile.TemporaryDirectory() as folder:
        for slides in counts:
            rows += measure(Path(folder) / "many", slides)
    about = facts("cpu")
    write_rows(RESULTS / "scale.csv", [{**row, **about} for row in rows])
    lines = [f"Seconds of CPU. {about['machine']}; {about['date']}, commit {about['commit']}.", ""]
    lines += ["| | " + " | ".join(f"{each} slides" for each in counts) + " |"]
    lines += ["|" + "---|" * (1 + len(counts))]
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = [f"{row['cpu_s']:.2f}" for row in rows if row["what"] == what]
        cells += [""] * (len(counts) - len(cells))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    rewrite("scale", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
