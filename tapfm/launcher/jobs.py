"""Jobs: command lines of `tapfm` with a log and a result each, run by one of two launchers.

    <folder>/<name>.log         output of its commands
    <folder>/<name>.json        written last: exit code, seconds, reason of a failure, its files
    <folder>/failed.csv         the jobs of the last launch that failed, and why

A job is done if its result says so, its commands are the same and the files it wrote are there;
`launch` runs the others. A job that ends without a result (its node failed, it was cancelled or ran
out of memory) has failed, and is run by the next launch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from slides.errors import SettingsError
from slides.files import write_csv, write_json
from slides.progress import progress_bar

TAPFM = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other."""

    name: str
    """Of its log and result; a file name."""
    commands: tuple[tuple[str, ...], ...]
    """Arguments of `tapfm`."""
    files: tuple[str, ...] = ()
    """Patterns of the files that it writes; each must have one."""

    def fault(self, folder: Path) -> str | None:
        """Return why a job is not done; None if it is."""
        path = folder / f"{self.name}.json"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return "it ended without a result: its node failed, it was cancelled, or killed"
        except (OSError, ValueError) as error:
            return f"its result is damaged: {error}"
        if found["commands"] != [list(each) for each in self.commands]:
            return "its result is of other settings"
        if found["reason"]:
            return found["reason"]
        gone = [file for file in found["files"] if not Path(file).exists()]
        return f"{gone[0]} is not there any more" if gone else None

    def run(self, folder: Path) -> str | None:
        """Run the commands until one fails; write and return the reason, None if all is well."""
        folder.mkdir(parents=True, exist_ok=True)
        path, log = folder / f"{self.name}.json", folder / f"{self.name}.log"
        path.unlink(missing_ok=True)
        code, reason, seconds = 0, None, []
        for command in self.commands:
            began = time.perf_counter()
            code, reason = run_command(command, log)
            seconds.append(round(time.perf_counter() - began, 1))
            if reason:
                break
        files = {pattern: _matches(pattern) for pattern in self.files}
        if lost := next((pattern for pattern, found in files.items() if not found), None):
            reason = reason or _last_word(log, 0) or f"no {lost} was written"
        found = [file for each in files.values() for file in each]
        write_json(path, {"commands": [list(each) for each in self.commands], "code": code,
                          "seconds": seconds, "reason": reason, "files": found})  # fmt: skip
        return reason


def _matches(pattern: str) -> list[str]:
    """Return the files of a pattern of an absolute or relative path."""
    path = Path(pattern)
    return sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))


def run_command(command: Sequence[str], log: Path) -> tuple[int, str | None]:
    """Run a verb with its output in a log; return its exit code, and why it failed or None."""
    with log.open("a") as file:
        file.write(f"\n$ tapfm {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        done = subprocess.run([*TAPFM, *command], stdout=file, stderr=file, check=False)
    if not done.returncode:
        return 0, None
    word = _last_word(log, start) or "no output"
    return done.returncode, f"exit code {done.returncode}: {word} (see {log})"


def _last_word(log: Path, start: int) -> str:
    """Return the last line of a log that tapfm wrote of a fault, or its last line."""
    with log.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    faults = [line.removeprefix("tapfm: ") for line in lines if line.startswith("tapfm: ")]
    return (faults or lines or [""])[-1]


class Launcher(Protocol):
    """Runs jobs somewhere."""

    def run(self, jobs: Sequence[Job], folder: Path) -> None:
        """Return when all jobs have ended; each wrote its result if it could."""


class Local:
    """Runs jobs as processes of this machine.

    Args:
        at_once: how many.
    """

    def __init__(self, at_once: int = 1):
        self.at_once = at_once

    def run(self, jobs: Sequence[Job], folder: Path) -> None:
        """Run all jobs; each writes its result."""
        with ThreadPoolExecutor(self.at_once) as pool:
            ended = pool.map(lambda job: job.run(folder), jobs)
            for job, fault in zip(
                jobs, progress_bar(ended, total=len(jobs), unit="job"), strict=True
            ):
                if fault:
                    tqdm.write(f"{job.name}: {fault}", file=sys.stderr)


def launch(jobs: Sequence[Job], folder: Path, launcher: Launcher) -> dict[str, str]:
    """Run the jobs that are not done; return those that failed, each with its reason.

    Raises:
        SettingsError: two jobs have one name.
    """
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"two jobs are named {', '.join(twice)}: rename their slides")
    left = [job for job in jobs if job.fault(folder)]
    print(f"{folder}: {len(jobs)} jobs, {len(jobs) - len(left)} done before", flush=True)
    if left:
        folder.mkdir(parents=True, exist_ok=True)
        launcher.run(left, folder)
    failed = {job.name: fault for job in left if (fault := job.fault(folder))}
    write_table(folder, failed)
    return failed


def write_table(folder: Path, failed: dict[str, str]) -> None:
    """Write the failed jobs as a table and print it; no failures leave no table."""
    path = folder / "failed.csv"
    if not failed:
        path.unlink(missing_ok=True)
        return
    write_csv(path, ["job", "reason"], sorted(failed.items()))
    width = max(map(len, failed))
    for name, reason in sorted(failed.items()):
        print(f"{name:<{width}}  {reason}", file=sys.stderr)
    print(f"{path}: {len(failed)} failed. The same command runs what is left.", file=sys.stderr)
