"""Runs a verb in a process of its own that may be killed, and counts how it ends.

The process is forked from this one, which has everything imported: a try costs what the verb costs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.record import RESULTS, commit, rewrite
from tapfm.cli import main

LIMIT_S, MEMORY_GB, LINES = 10.0, 2.0, 8
FIELDS = ("attack", "tried", "survived", "seed", "commit", "date", "ends")


@dataclass(frozen=True)
class End:
    """The end of a try: exit code, output and what it took."""

    code: int
    """Exit code; negative for a signal."""
    said: str
    seconds: float
    gigabytes: float
    """Largest resident size."""
    late: bool = False
    """Whether it had to be ended."""

    @property
    def how(self) -> str:
        """`right`, `refused` in a few clear lines, or what is wrong."""
        if self.late:
            return "hang"
        if "Traceback" in self.said:
            return "traceback"
        if self.gigabytes > MEMORY_GB:
            return "memory"
        if self.code < 0:
            return signal.Signals(-self.code).name
        listed = self.errors and re.search(r": \d+ faults$", self.errors[0])  # one a line
        if self.code and not listed and not 0 < len(self.errors) <= LINES:
            return "unclear"
        return "refused" if self.code else "right"

    @property
    def errors(self) -> list[str]:
        """The lines of its error."""
        found = re.search(r"^tapfm: .*", self.said, re.S | re.M)
        return found[0].splitlines() if found else []


def attempt(
    arguments: list[str],
    limit: float = 600.0,
    prepare: Callable[[], object] | None = None,
    kill: tuple[float, int] | None = None,
) -> End:
    """Run a verb of tapfm and return how it ended.

    Args:
        arguments: of the command line.
        limit: seconds after which it is ended.
        prepare: called in the process before the verb.
        kill: seconds after which it gets a signal, and the signal.
    """
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        sys.stdout.flush()
        process = os.fork()
        if not process:
            code = 70
            try:
                os.setsid()
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(each, "w", closefd=False) for each in (1, 2))
                if prepare:
                    prepare()
                code = main(arguments)
            except SystemExit as error:
                code = int(error.code or 0)
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        late = killed = False
        while True:
            found, status, used = os.wait4(process, os.WNOHANG)
            spent = time.monotonic() - began
            if found:
                break
            if kill and not killed and spent > kill[0]:
                os.kill(process, kill[1])
                killed = True
            if spent > limit:
                os.killpg(process, signal.SIGKILL)
                late = True
            time.sleep(0.01)
        said.seek(0)
        text = said.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    return End(code, text, spent, used.ru_maxrss / 2**20, late)


def limited(kind: int, value: int) -> Callable[[], None]:
    """Return a preparation that sets a limit of the process."""
    return lambda: resource.setrlimit(kind, (value, value))


def record(attack: str, ends: Counter, survived: int, seed: int) -> None:
    """Add a row to campaign.csv in place of this attack's older one; rewrite the table."""
    path = RESULTS / "campaign.csv"
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["attack"] != attack]
    said = ", ".join(f"{number} {how}" for how, number in sorted(ends.items()))
    tried = sum(ends.values())
    rows.append(dict(zip(FIELDS, (attack, tried, survived, seed, commit(),
                                  date.today().isoformat(), said), strict=True)))  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["attack"]))
    rows.sort(key=lambda row: row["attack"])
    lines = [FIELDS, ["---"] * len(FIELDS), *([str(row[name]) for name in FIELDS] for row in rows)]
    rewrite("campaign", "\n".join(f"| {' | '.join(line)} |" for line in lines))
    print(f"{attack}: {survived} of {tried} survived; {said}")


def arguments(description: str, tries: int) -> argparse.Namespace:
    """Return the flags `--tries` and `--seed`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tries", type=int, default=tries)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def draw(seed: int, name: str, number: int) -> random.Random:
    """Return the random numbers of one try, whatever the others."""
    return random.Random(f"{seed} {name} {number}")


def emptied(folder: Path) -> Path:
    """Return a folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
