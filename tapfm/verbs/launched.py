"""`--launcher local | slurm` of `tapfm index`, `features` and `predict`: slides as jobs."""

from __future__ import annotations

import csv
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapfm.verbs import at_least

if TYPE_CHECKING:
    from slides.streaming.settings import Source

FLAGS = ("launcher", "jobs", "per_job", "slurm")


def launcher_flags(verb: ArgumentParser) -> None:
    """Add the flags of a launcher."""
    add = verb.add_argument
    add("--launcher", choices=("local", "slurm"), help="run as jobs: processes here, or an array "
        "of Slurm's; the same command runs what is left")  # fmt: skip
    add("--jobs", type=at_least(1), help="at the same time; 1 here, 64 of Slurm's")
    add("--per-job", type=at_least(1), default=1, help="slides of a job (%(default)s)")
    add("--slurm", nargs="+", metavar="KEY=VALUE", help="for sbatch: partition=gpu time=600 "
        "gpus-per-node=1")  # fmt: skip


def launch_source(
    verb: ArgumentParser, flags: Mapping[str, Any], source: Source, folder: Path, pattern: str
) -> int:
    """Run a verb over a source's slides as jobs; index what they left, for the ledger.

    Args:
        verb: its parser.
        flags: as they were read.
        source: of slides and tiles.
        folder: of the files; the jobs' logs and results are in its `jobs`.
        pattern: of the file that a slide has afterwards, with `{slide_id}`.

    Returns:
        0, or 2 if a job failed.
    """
    from slides.streaming.settings import index_and_cache
    from slides.tiling.index_file import index_path
    from tapfm.launcher.slides import launch_slides, slide_jobs

    names = [row.slide_id for row in source.rows]
    jobs = slide_jobs(
        verb, flags, names, lambda name: [pattern.format(slide_id=name)], flags["per_job"]
    )
    failed = launch_slides(jobs, folder / "jobs" / verb.prog.split()[-1], flags)
    where = source.index_dir, source.tiles.grid
    there = [row for row in source.rows if index_path(*where, row.slide_id).exists()]
    tiles, _ = index_and_cache(replace(source, rows=there, on_error="skip"))
    print(f"{len(there)} of {len(names)} slides are indexed, {tiles} tiles; {len(failed)} failed")
    return 2 if failed else 0


def launch_predictions(verb: ArgumentParser, flags: Mapping[str, Any]) -> int:
    """Run `tapfm predict` or `heatmap` over slides as jobs, and bring their files together.

    Returns:
        0, or 2 if a job failed.

    Raises:
        SettingsError: the slides are one case, which is predicted as one.
    """
    from slides.errors import SettingsError
    from slides.wsi.reader import slide_stem
    from tapfm.launcher.slides import launch_slides, slide_jobs

    if flags["case"]:
        raise SettingsError("--case: all its slides are one prediction: leave --launcher out")
    out: Path = flags["out"]
    parts = out / "jobs" / verb.prog.split()[-1]
    names = [slide_stem(path) for path in flags["slides"]]
    jobs = slide_jobs(verb, flags, names, lambda _: (), flags["per_job"], parts)
    failed = launch_slides(jobs, parts, flags)
    for job in jobs:
        if job.name not in failed:
            _bring(parts / job.name, out)
    print(f"{out}: {len(jobs) - len(failed)} of {len(jobs)} jobs predicted", file=sys.stderr)
    return 2 if failed else 0


def _bring(part: Path, out: Path) -> None:
    """Move a job's files, and join its rows with those there."""
    from slides.files import join_csv

    with (part / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    join_csv(out / "predictions.csv", header, rows)
    for file in part.iterdir():
        if file.name != "predictions.csv":
            file.replace(out / file.name)


def chosen(rows: Sequence[Any], only: Sequence[str] | None) -> list[Any]:
    """Return the slides named by `--only`, in the table's order; all if there is no such flag.

    Raises:
        SettingsError: the table has no such slide.
    """
    from slides.errors import SettingsError
    from tapfm.settings import did_you_mean

    if only is None:
        return list(rows)
    there = {row.slide_id for row in rows}
    if unknown := [name for name in only if name not in there]:
        near = did_you_mean(unknown[0], there)
        raise SettingsError(f"--only {unknown[0]}: the table has no such slide.{near}")
    return [row for row in rows if row.slide_id in set(only)]
