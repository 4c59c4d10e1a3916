"""Kills every verb that writes at a random moment, runs it again, and compares the files.

    python -m benchmarks.campaign.kills --tries 20

A try survives if the second call ends as one that was never killed, to the byte; if nothing half
written is left; and if the exit code of the first is the signal's. `fit, two` is two processes with
gloo, started as torchrun starts them: one or both get the signal, and where one ends the other gets
SIGTERM after a while, as from torchrun.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.campaign.tries import (
    End,
    Running,
    arguments,
    attempt,
    draw,
    emptied,
    group,
    numbered,
    record,
)
from tests.cohorts import write_cohort

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TWO, GRACE_S = "fit, two", 20.0


def verbs(folder: Path, config: Path) -> dict[str, tuple[list[str], Path, tuple[str, ...]]]:
    """Return each verb's arguments, the folder it writes and the files to compare."""
    slide, out = folder / "slides" / "s1.svs", folder / "out"
    model = folder / "model" / "best.safetensors"
    fit = ["fit", "--config", str(config), "--run_dir", str(out), "--resume_every", "2"]
    return {
        "index": (["index", "--config", str(config)], folder / "index", ("*_patches.h5",)),
        "fit": ([*fit, "--name", "run"], out, ("metrics.csv", "best.safetensors")),
        "predict": (
            ["predict", str(slide), "--model", str(model), "--out", str(out), "--workers", "0"],
            out, ("predictions.csv",),
        ),
        "export": (["export", "--model", str(model), "--out", str(out)], out, ("*",)),
        "features": (
            ["features", "--config", str(config), "--model", str(model), "--out", str(out)],
            out, ("*.h5",),
        ),
    }  # fmt: skip


def with_model(folder: Path) -> tuple[Path, Path]:
    """Write a cohort and fit a model on it; return their folder and the config."""
    config = write_cohort(emptied(folder) / "cohort")
    base = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    assert attempt([*base, "--run_dir", str(config.parent), "--name", "model"]).code == 0
    return config.parent, config


def content(out: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files to compare."""
    found = (path for pattern in patterns for path in out.rglob(pattern) if path.is_file())
    hidden = (path for path in found if not path.name.startswith("."))
    return {str(path.relative_to(out)): path.read_bytes() for path in hidden}


def pair(
    command: list[str],
    kill: tuple[float, int] | None = None,
    ranks: tuple[int, ...] = (),
    limit: float = 600.0,
) -> list[End]:
    """Run a fit in two processes, some of which get a signal; return both ends."""
    running = [Running(command, partial(os.environ.update, own)) for own in group(2)]
    ends: list[End | None] = [None, None]
    alone = None
    while None in ends:
        for rank, one in enumerate(running):
            ends[rank] = ends[rank] or one.ended(limit)
        if kill and running[0].seconds > kill[0]:
            for rank in ranks:
                if ends[rank] is None:
                    os.kill(running[rank].process, kill[1])
            kill = None
        if any(ends) and None in ends:
            alone = alone or time.monotonic()
            if time.monotonic() - alone > GRACE_S:  # once a while, until it has heard it
                os.kill(running[ends.index(None)].process, signal.SIGTERM)
                limit = min(limit, running[0].seconds + 3 * GRACE_S)
                alone = time.monotonic()
        time.sleep(0.01)
    return ends


def interrupted(name: str, command: list[str], which: int, after: float, numbers: Random) -> End:
    """Run a verb that gets a signal; return its end, or of two that which is not right."""
    if name != TWO:
        return attempt(command, kill=(after, which))
    ranks = numbers.choice(((0,), (1,), (0, 1)))
    ends = pair(command, (after, which), ranks)
    others = (0, 1, 128 + which, 128 + signal.SIGTERM)  # of one that was not killed itself
    for rank, end in enumerate(ends):
        if rank not in ranks and (end.code not in others or end.late):
            return end
    return ends[ranks[0]]


def kill(
    folder: Path,
    tries: int,
    seed: int,
    only: tuple[str, ...] = (),
    minutes: float | None = None,
) -> Counter:
    """Kill verbs in turn; return how the tries ended."""

    def run(name: str) -> End:
        return pair(chosen[name][0])[0] if name == TWO else attempt(chosen[name][0])

    every = verbs(*with_model(folder))
    command, *written = every["fit"]
    two = ["--name", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    every[TWO] = ([*command, *two], *written)
    chosen = {name: every[name] for name in only or every}
    whole = {}
    for name, (_, out, patterns) in chosen.items():
        shutil.rmtree(out, ignore_errors=True)
        end = run(name)
        assert end.code == 0, end.said
        whole[name] = end.seconds, content(out, patterns)
        assert whole[name][1], name
    ends = Counter()
    for number in numbered(tries, minutes):
        name = list(chosen)[number % len(chosen)]
        command, out, patterns = chosen[name]
        numbers = draw(seed, name, number)
        shutil.rmtree(out, ignore_errors=True)
        which = numbers.choice(SIGNALS)
        first = interrupted(name, command, which, numbers.uniform(0, whole[name][0]), numbers)
        right_code = first.code in (0, -which, 128 + which)
        second = run(name)
        same = content(out, patterns) == whole[name][1]
        left = list(out.rglob("*.partial"))
        fine = second.code == 0 and same and not left and right_code
        how = "same" if fine else f"{name} {which.name}: code {first.code}, then {second.how}"
        print(number, name, which.name, f"{first.seconds:.1f} s of {whole[name][0]:.1f}", how)
        if not fine:
            print("same" if same else "other files", left, first.said[-600:], second.said[-600:])
        ends[how] += 1
    return ends


def main() -> None:
    """Try and record."""
    flags = arguments(__doc__, 20)
    with tempfile.TemporaryDirectory() as folder:
        ends = kill(Path(folder), flags.tries, flags.seed, tuple(flags.only), flags.minutes)
    what = ", ".join(flags.only) or "index, fit, predict, export, features, fit, two"
    record(f"kills: {what}", ends, ends["same"], flags.seed)


if __name__ == "__main__":
    main()
