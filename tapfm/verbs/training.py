"""Verbs around training: `tapfm check`, `plan`, `probe`, `test`, `study`, `report`, `compare`..."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from tapfm.verbs import Do, at_least, config_flag, device_flags, later


def plan(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm plan`; return its action."""
    add = verb.add_argument
    add("--model", help="foundation model (h_optimus_0)")
    add("--gpu", help="a card (L4, RTX 4090, A100 80, ...) or GiB; this machine's, or 24")
    add("--tile-px", type=int, help="side of a tile; the model's own")
    config_flag(verb, dest="configs")
    add("--gpus", type=counts, default=[1], metavar="N,N", help="with --config: hours of its run "
        "on so many GPUs, such as 1,8,64")  # fmt: skip

    def do(configs: list[Path] | None, gpus: list[int], model: str | None, **flags) -> int:
        from slides.errors import SettingsError

        if not configs:
            return later("tapfm.planning.plan:run_plan")(model=model or "h_optimus_0", **flags)
        if model or flags["tile_px"]:
            raise SettingsError("plan: --model and --tile-px are the config's: leave them out")
        run = later("tapfm.preflight.cohort_plan:run_cohort_plan")
        return run(configs=configs, gpu=flags["gpu"], gpus=gpus)

    return do


def counts(text: str) -> list[int]:
    """Return whole numbers from a list such as 1,8,64."""
    return [at_least(1)(each) for each in text.split(",")]


def check(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm check`; return its action."""
    add = verb.add_argument
    config_flag(verb)
    add("--table", type=Path, help="the cohort's, in place of the config's")
    add("--slides-dir", type=Path, help="folder of its slides")
    add("--fix", type=Path, metavar="NEW.csv", help="write a mended table, and what was done")

    def do(config, table: Path | None, **flags) -> int:
        from slides.errors import SettingsError
        from tapfm.preflight.check import run_check

        if not config and not table:
            raise SettingsError("check: give --config of a run, or --table of a cohort")
        return run_check(config, table, **flags)

    return do


def probe(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm probe`; return its action."""
    add = verb.add_argument
    config_flag(verb, dest="configs", required=True)
    add("--out", type=Path, default=Path("probe"), help="folder (%(default)s)")
    add("--slides", type=int, default=32, help="training slides (%(default)s)")
    add("--epochs", type=int, default=3, help="of the trial fit (%(default)s)")
    return later("tapfm.evaluation.probe:run_probe")


def test(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm test`; return its action."""
    add = verb.add_argument
    run_flags(verb)
    add("--overlays", type=int, default=4, help="slides to draw (%(default)s)")
    add("--features", type=Path, help="frozen features that several folders share; <run>/frozen")
    add("--slide-features", type=Path, nargs="+", default=(), metavar="FOLDER",
        help="vectors of `tapfm embed`: a linear probe on each is a row")  # fmt: skip
    add(
        "--robustness",
        action="store_true",
        help="of adapted runs and their controls: drift, stain draws, RI, MaRI; two more passes",
    )
    return later("tapfm.evaluation.evaluate:run_test")


def study(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm study`; return its action."""
    add = verb.add_argument
    add("study", nargs="?", type=Path, help="YAML with the keys below; flags win")
    add("--config", action="append", help="the cohort's, and others behind it")
    add("--out", help="folder of the study")
    add("--folds", type=int, help="cross-validation; the table's split")
    add("--fold-seed", type=int, help="another one is another deal")
    add("--preserve-sites", action="store_true", default=None, help="a site in one fold only")
    add("--seeds", type=int, nargs="+", help="of training; 0")
    add("--strategies", nargs="+", metavar="STRATEGY", help="names, or configs to put behind; full")
    add("--aggregators", nargs="+", help="tapfm_gated")
    add("--jobs", type=int, help="fits at the same time; 1")
    add("--launcher", choices=("local", "slurm"), help="cells as jobs: processes here, or an "
        "array of Slurm's")  # fmt: skip
    add("--slurm", nargs="+", metavar="KEY=VALUE", help="for sbatch: partition=gpu time=600")

    def do(study: Path | None, **flags) -> int:
        from tapfm.evaluation.study import read_study, run_study

        return run_study(read_study(study, flags))

    return do


def report(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm report`; return its action."""
    run_flags(verb)
    return later("tapfm.reports.html.page:run_report")


def compare(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm compare`; return its action."""
    add = verb.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of tested runs; the first is "
        "what the others are measured against")  # fmt: skip
    add("--split", choices=("val", "test"), default="test", help="(%(default)s)")
    add("--out", type=Path, default=Path("compare"), help="folder (%(default)s)")
    return later("tapfm.reports.html.comparison:run_compare")


def pathpt(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm pathpt`; return its action."""
    add = verb.add_argument
    config_flag(verb, dest="configs", required=True)
    add("--question", type=Path, required=True, dest="question_file", metavar="YAML",
        help="of classes and prompts")  # fmt: skip
    add("--out", type=Path, default=Path("runs/pathpt"), help="folder (%(default)s)")
    add("--seed", type=int, default=0, help="of draws and training (%(default)s)")
    add("--drawn", type=int, default=4, help="test slides to draw (%(default)s)")
    device_flags(verb)
    return later("tapfm.pathpt.run:run_pathpt")


def doctor(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm doctor`; return its action."""
    verb.add_argument("--model", help="foundation model to check")
    verb.add_argument("--weights", help="its weights, as in model.weights")
    return later("tapfm.planning.doctor:run_doctor")


def run_flags(verb: ArgumentParser) -> None:
    """Add the flags of a cohort's runs and the split to report."""
    add = verb.add_argument
    add("--run", type=Path, required=True, help="folder of the cohort's runs")
    add("--split", choices=("val", "test"), default="test", help="(%(default)s)")
