"""Lets every verb meet a full disk, a read-only one, and limits of files and memory.

    python -m benchmarks.campaign.disks --tries 20        (root, for mounts)

A try survives if it ends in a few clear lines (or right, where there was room), and the same
command then ends right where there is room.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.campaign.kills import verbs, with_model
from benchmarks.campaign.tries import arguments, attempt, draw, emptied, limited, numbered, record

NEW_NAMESPACE = 0x20000  # CLONE_NEWNS


def mounted(where: Path, options: str) -> None:
    """Mount a tmpfs that this process and its children alone see."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], check=True)


def preparations(out: Path, numbers: random.Random) -> dict[str, Callable[[], None]]:
    """Return what is done to a process before its verb."""
    kilobytes = int(2 ** numbers.uniform(2, 13))
    return {
        "full disk": partial(mounted, out, f"size={kilobytes}k"),
        "read-only disk": partial(mounted, out, "ro"),
        "small /dev/shm": partial(mounted, Path("/dev/shm"), "size=64k"),
        "file size": limited(resource.RLIMIT_FSIZE, kilobytes * 1024),
        "open files": limited(resource.RLIMIT_NOFILE, numbers.randint(16, 64)),
    }


def fill(
    folder: Path,
    tries: int,
    seed: int,
    only: tuple[str, ...] = (),
    minutes: float | None = None,
) -> Counter:
    """Run verbs on full disks in turn; return how the tries ended."""
    every, ends = verbs(*with_model(folder)), Counter()
    for number in numbered(tries, minutes):
        name = list(only or every)[number % len(only or every)]
        command, out, _ = every[name]
        numbers = draw(seed, name, number)
        ways = preparations(out, numbers)
        way = numbers.choice(list(ways))
        emptied(out)
        end = attempt(command, limit=300, prepare=ways[way])
        fine = end.how in ("right", "refused")
        if fine and way not in ("full disk", "read-only disk"):
            fine = attempt(command, limit=300).code == 0
        if not fine:
            print(name, way, number, end.how, end.code, end.said[-900:])
        ends["survived" if fine else f"{name}, {way}: {end.how}"] += 1
    return ends


def main() -> None:
    """Try and record."""
    if os.geteuid():
        raise SystemExit("disks mounts file systems: run it as root")
    flags = arguments(__doc__, 20)
    with tempfile.TemporaryDirectory() as folder:
        ends = fill(Path(folder), flags.tries, flags.seed, tuple(flags.only), flags.minutes)
    record("disks: full, read-only, small /dev/shm, limits", ends, ends["survived"], flags.seed)


if __name__ == "__main__":
    main()
