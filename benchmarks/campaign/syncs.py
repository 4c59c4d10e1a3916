"""Checks by strace that a file's bytes are on the disk before it takes its name.

    python -m benchmarks.campaign.syncs

What a power cut leaves is what was synced. Each rename of a verb's file must follow an fsync of
that file, and be followed by one of its folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.campaign.kills import verbs
from benchmarks.campaign.tries import arguments, attempt, emptied, record
from tests.cohorts import write_cohort

CALLS = "openat,open,fsync,fdatasync,rename,renameat,renameat2"
LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')


def unsynced(trace: str, below: str) -> tuple[int, list[str]]:
    """Return how many renames below a folder a trace has, and those that are not synced."""
    names, synced, renames, wrong, waiting = {}, set(), 0, [], {}
    for found in filter(None, map(LINE.match, trace.splitlines())):
        process, call, rest, value = found.groups()
        paths = PATH.findall(rest)
        if call in ("open", "openat") and paths and int(value) >= 0:
            names[process, value] = paths[0]
        elif call in ("fsync", "fdatasync"):
            name = names.get((process, rest.strip()), "")
            synced.add(name)
            waiting = {to: folder for to, folder in waiting.items() if folder != name}
        elif call.startswith("rename") and len(paths) == 2 and below in paths[1]:
            renames += 1
            if paths[0] not in synced and ".partial" in paths[0]:  # else it is moved, not written
                wrong.append(f"{paths[1]}: renamed before it was synced")
            if ".partial" in paths[0]:
                waiting[paths[1]] = str(Path(paths[1]).parent)
    return renames, wrong + [f"{name}: its folder was not synced" for name in waiting]


def trace(folder: Path, only: tuple[str, ...] = ()) -> Counter:
    """Trace verbs; return how their renames went."""
    config = write_cohort(emptied(folder) / "cohort")
    folder, ends = config.parent, Counter()
    base = ["fit", "--config", str(config), "--run_dir", str(folder), "--name", "model"]
    assert attempt([*base, "--trainer.max_epochs", "1"]).code == 0
    every = verbs(folder, config)
    for name in only or every:
        command, out, _ = every[name]
        emptied(out)
        log = folder / "trace.txt"
        code = "import sys; from tapfm.cli import main; sys.exit(main(sys.argv[1:]))"
        strace = ["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-o", str(log)]
        subprocess.run([*strace, sys.executable, "-c", code, *command], check=True)
        renames, wrong = unsynced(log.read_text(errors="replace"), str(folder))
        print("\n".join(wrong))
        ends["synced"] += renames - len(wrong)
        ends[f"{name}: not synced"] += len(wrong)
    return +ends


def main() -> None:
    """Trace and record."""
    flags = arguments(__doc__, 0)
    with tempfile.TemporaryDirectory() as folder:
        ends = trace(Path(folder))
    record("syncs: renames of all these verbs", ends, ends["synced"], flags.seed)


if __name__ == "__main__":
    main()
