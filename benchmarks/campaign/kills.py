"""Kills every verb that writes at a random moment, runs it again, and compares the files.

    python -m benchmarks.campaign.kills --tries 20

A try survives if the second call ends as one that was never killed, to the byte; if nothing half
written is left; and if the exit code of the first is the signal's.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.campaign.tries import arguments, attempt, draw, emptied, record
from tests.cohorts import write_cohort

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


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


def content(out: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files to compare."""
    found = (path for pattern in patterns for path in out.rglob(pattern) if path.is_file())
    hidden = (path for path in found if not path.name.startswith("."))
    return {str(path.relative_to(out)): path.read_bytes() for path in hidden}


def kill(folder: Path, tries: int, seed: int, only: tuple[str, ...] = ()) -> Counter:
    """Kill verbs in turn; return how the tries ended."""
    config = write_cohort(emptied(folder) / "cohort")
    folder = config.parent
    base = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    assert attempt([*base, "--run_dir", str(folder), "--name", "model"]).code == 0
    every = verbs(folder, config)
    chosen = {name: every[name] for name in only or every}
    whole = {}
    for name, (command, out, patterns) in chosen.items():
        shutil.rmtree(out, ignore_errors=True)
        end = attempt(command)
        assert end.code == 0, end.said
        whole[name] = end.seconds, content(out, patterns)
        assert whole[name][1], name
    ends = Counter()
    for number in range(tries):
        name = list(chosen)[number % len(chosen)]
        command, out, patterns = chosen[name]
        numbers = draw(seed, name, number)
        shutil.rmtree(out, ignore_errors=True)
        which = numbers.choice(SIGNALS)
        first = attempt(command, kill=(numbers.uniform(0, whole[name][0]), which))
        right_code = first.code in (0, -which, 128 + which)
        second = attempt(command)
        same = content(out, patterns) == whole[name][1]
        left = list(out.rglob("*.partial"))
        fine = second.code == 0 and same and not left and right_code
        how = "same" if fine else f"{name} {which.name}: code {first.code}, then {second.how}"
        if not fine:
            print(how, "same" if same else "other files", left, second.said[-600:])
        ends[how] += 1
    return ends


def main() -> None:
    """Try and record."""
    flags = arguments(__doc__, 20)
    with tempfile.TemporaryDirectory() as folder:
        ends = kill(Path(folder), flags.tries, flags.seed)
    record("kills: index, fit, predict, export, features", ends, ends["same"], flags.seed)


if __name__ == "__main__":
    main()
