"""Runs a verb in a process of its own that may be killed, and counts how it ends.

The process is forked from this one, which has imported what verbs import when they run: a try costs
what the verb costs, and signals come where it works.
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
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

from benchmarks.record import RESULTS, commit, rewrite
from tapfm.cli import main

VERBS = ("tapfm.evaluation.continued", "tapfm.frozen.features", "tapfm.inference.export",
         "tapfm.inference.predict", "tapfm.pathpt.model", "tapfm.reports.html.page",
         "slides.streaming.loose_slides")  # fmt: skip
"""Modules of the verbs that are tried."""
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
    """Largest resident size, beside what it was forked with."""
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


class Running:
    """A verb of tapfm in a process of its own.

    Args:
        arguments: of the command line.
        prepare: called in the process before the verb.
    """

    def __init__(self, arguments: list[str], prepare: Callable[[], object] | None = None):
        for name in VERBS:
            import_module(name)
        self.said, self.began = tempfile.TemporaryFile(), time.monotonic()  # noqa: SIM115
        self.late, self.given = False, resident()
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            self._become(arguments, prepare)

    def _become(self, arguments: list[str], prepare: Callable[[], object] | None) -> None:
        code = 70
        try:
            os.setsid()
            os.dup2(self.said.fileno(), 1)
            os.dup2(self.said.fileno(), 2)
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

    @property
    def seconds(self) -> float:
        """Return the seconds since it began."""
        return time.monotonic() - self.began

    def ended(self, limit: float) -> End | None:
        """Return its end, or None while it runs; after `limit` seconds it is killed."""
        found, status, used = os.wait4(self.process, os.WNOHANG)
        if not found:
            if self.seconds > limit:
                os.killpg(self.process, signal.SIGKILL)
                self.late = True
            return None
        self.said.seek(0)
        text, code = self.said.read().decode(errors="replace"), os.waitstatus_to_exitcode(status)
        self.said.close()
        own = max(0, used.ru_maxrss * 1024 - self.given) / 2**30
        return End(code, text, self.seconds, own, self.late)


def group(processes: int) -> list[dict[str, str]]:
    """Return the variables by which torchrun tells each process its place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(processes)
    shared = {
        "TORCHELASTIC_RUN_ID": "benchmark", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def resident() -> int:
    """Return the bytes of this process that are in memory, which a fork begins with."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


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
    running = Running(arguments, prepare)
    while (end := running.ended(limit)) is None:
        if kill and running.seconds > kill[0]:
            os.kill(running.process, kill[1])
            kill = None
        time.sleep(0.01)
    return end


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
    """Return the flags `--tries`, `--seed`, `--minutes` and `--only`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tries", type=int, default=tries)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="no try begins after them")
    parser.add_argument("--only", nargs="*", default=(), help="some of the verbs or kinds")
    return parser.parse_args()


def numbered(tries: int, minutes: float | None = None) -> Iterator[int]:
    """Yield the numbers of tries until there are so many, or the time is up."""
    began = time.monotonic()
    for number in range(tries):
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            return
        yield number


def draw(seed: int, name: str, number: int) -> random.Random:
    """Return the random numbers of one try, whatever the others."""
    return random.Random(f"{seed} {name} {number}")


def emptied(folder: Path) -> Path:
    """Return a folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
