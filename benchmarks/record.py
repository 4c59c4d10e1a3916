"""Writes what several benchmarks share: results, tables in README.md, smaller cohorts.

Raw figures go to `results/`, with machine, date and commit. A script's tables stand in README.md
between two markers of its name, <!-- name:begin --> and <!-- name:end -->, and everything else
there is written by hand.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import resource
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from slides.files import write_text

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"


def rewrite(name: str, tables: str, readme: Path | None = None) -> None:
    """Put a script's tables between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    readme = readme or README
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{readme}: there is no {begin} followed by {end} to write between")
    readme.write_text(f"{before}{begin}\n{tables.rstrip()}\n{end}{after}")


def write_rows(
    path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None
) -> None:
    """Write raw figures, numbers to four digits; columns default to those of the first row."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def write_compact(path: Path, value: object) -> None:
    """Write JSON in one line, numbers to eight digits: predictions that a table is made of."""
    write_text(path, json.dumps(rounded(value), separators=(",", ":")) + "\n")


def rounded(value: object) -> object:
    """Return JSON's content with every number to eight digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def write_part(whole: Path, part: Path, patients: int, seed: int) -> None:
    """Write a cohort's table with some of its training patients, and all others."""
    with whole.open() as file:
        rows = [*csv.DictReader(file)]
    training = sorted({row["case_id"] for row in rows if row["split"] == "train"})
    left_out = {*np.random.default_rng(seed).permutation(training)[patients:].tolist()}
    with part.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            if row["case_id"] not in left_out:
                writer.writerow(row | {"slide_path": str(whole.parent / row["slide_path"])})


def facts(device: str) -> dict[str, str]:
    """Return machine, date, commit and versions."""
    machine = f"{processor()}, {cores()} cores"
    if device.startswith("cuda"):
        import torch  # here, since cuCIM hangs in a process that has it

        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return {
        "machine": machine, "date": date.today().isoformat(), "commit": commit(),
        "torch": version("torch"), "timm": version("timm"),
    }  # fmt: skip


def commit() -> str:
    """Return the checked-out commit; `-dirty` if more than benchmark results differ."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(HERE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    name = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    outcomes = (f":!{path.relative_to(HERE.parent)}" for path in (RESULTS, README))
    differs = git("diff", "--quiet", "HEAD", "--", ".", *outcomes).returncode == 1
    return f"{name}-dirty" if differs else name


def cpu_seconds() -> float:
    """Return processor seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
