"""A verb over slides as jobs: its own command line again, with some of the slides each."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slides.errors import SettingsError
from tapfm.launcher.jobs import Job, Launcher, Local, launch
from tapfm.launcher.slurm import Slurm

OWN = ("launcher", "jobs", "per_job", "slurm", "only")  # not handed on to a job


def launcher_of(kind: str, jobs: int | None, slurm: Sequence[str] | None) -> Launcher:
    """Return the launcher that the flags ask for.

    Raises:
        SettingsError: Slurm is missing, or an option is not KEY=VALUE.
    """
    if kind == "local":
        if slurm:
            raise SettingsError("--slurm is for --launcher slurm: leave it out")
        return Local(jobs or 1)
    if bad := [each for each in slurm or () if "=" not in each]:
        raise SettingsError(f"--slurm {bad[0]}: give KEY=VALUE, such as partition=gpu")
    return Slurm(jobs or 64, dict(each.split("=", 1) for each in slurm or ()))


def command_of(verb: ArgumentParser, flags: Mapping[str, Any]) -> list[str]:
    """Return the command line that a verb would read these flags from, without positionals."""
    words = []
    for action in verb._actions:
        value = flags.get(action.dest)
        if not action.option_strings or action.dest in OWN or value in (None, action.default):
            continue
        flag = action.option_strings[-1]
        if isinstance(action, argparse._StoreTrueAction):
            words.append(flag)
        elif isinstance(action, argparse._AppendAction):
            words += [word for each in value for word in (flag, str(each))]
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def slide_jobs(
    verb: ArgumentParser,
    flags: Mapping[str, Any],
    names: Sequence[str],
    files: Callable[[str], Sequence[str]],
    per_job: int,
    parts: Path | None = None,
) -> list[Job]:
    """Return jobs of a verb, `per_job` slides each.

    Args:
        verb: its parser.
        flags: as they were read.
        names: of the slides; those of a config are chosen by `--only`.
        files: patterns of the files that a slide has afterwards.
        per_job: slides of a job.
        parts: where each job has a folder of its own for `--out`; None: all write into one.
    """
    name = verb.prog.split()[-1]
    slides = dict(zip(names, flags["slides"], strict=True)) if flags.get("slides") else {}
    jobs = []
    for start in range(0, len(names), per_job):
        mine = names[start : start + per_job]
        own = [str(slides[each]) for each in mine] if slides else ["--only", *mine]
        title = mine[0] if len(mine) == 1 else f"{mine[0]}_and_{len(mine) - 1}"
        common = command_of(verb, {**flags, "out": parts / title} if parts else flags)
        patterns = tuple(pattern for each in mine for pattern in files(each))
        if parts:
            patterns = (str(parts / title / "predictions.csv"),)
        command = (name, *own, *common)
        jobs.append(Job(title, (command,), patterns))
    return jobs


def launch_slides(jobs: Sequence[Job], folder: Path, flags: Mapping[str, Any]) -> dict[str, str]:
    """Run a verb's jobs; return those that failed, each with its reason."""
    launcher = launcher_of(flags["launcher"], flags["jobs"], flags["slurm"])
    return launch(jobs, folder, launcher)
