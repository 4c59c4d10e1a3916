"""The command that usually follows a verb, which is printed at its end, with the user's own paths.

Words in capitals (SLIDE, CONFIG) are for the user to fill in. A row returns None where nothing
follows: `export` has written a README that says how to load the model, and labels without a table
of slides are no cohort yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

Flags = Mapping[str, Any]


def next_command(verb: str, flags: Flags) -> str | None:
    """Return what to type next, or None where nothing follows.

    Args:
        verb: that has ended well.
        flags: its own; of `fit` and `fit-tiles`, `folder`: the run's.
    """
    return FOLLOWING[verb](flags)


def say_next(verb: str, flags: Flags) -> None:
    """Print what to type next, if anything follows."""
    if command := next_command(verb, flags):
        print(f"next: {command}")


def _given(flags: Flags) -> str:
    """Return `--config X --config Y`, as it was given."""
    configs = flags.get("config") or flags.get("configs") or ()
    return " ".join(f"--config {quote(str(each))}" for each in configs)


def _demo(flags: Flags) -> str:
    out = flags["out"]
    where = "" if out == Path("data/demo") else f" --data.table {quote(str(out))}/cohort.csv"
    return f"tapfm fit --config demo{where}"


def _table(flags: Flags) -> str | None:
    out = flags.get("out")
    if out and Path(out).is_dir():  # of several tables, the first
        out = next(iter(sorted(Path(out).glob("*.csv"))), None)
    words = [_given(flags)] * bool(_given(flags))
    words += [f"--table {quote(str(out))}"] * bool(out and Path(out).is_file())
    return f"tapfm check {' '.join(words)}" if words else None


def _index(flags: Flags) -> str:
    if given := _given(flags):
        return f"tapfm fit {given}"
    return f"tapfm predict {quote(str(flags['slides'][0]))} --model RUN/best.safetensors"


def _check(flags: Flags) -> str:
    if fix := flags["fix"]:
        return f"tapfm check --table {quote(str(fix))}  # and set data.table to it in your config"
    words = [_given(flags)] * bool(_given(flags))
    for key in ("table", "slides_dir"):
        if flags[key]:
            words.append(f"--data.{key} {quote(str(flags[key].absolute()))}")
    return f"tapfm fit {' '.join(words)}"


def _tested(flags: Flags) -> str:
    run, split = flags["run"], " --split val" * (flags["split"] == "val")
    runs = sorted(path.parent for path in run.glob("*/best.safetensors"))
    if len(runs) > 1:
        return f"tapfm compare {quote(str(run))}{split}"
    return f"tapfm view {quote(str(runs[0] if runs else run))}{split}"


def _compare(flags: Flags) -> str:
    runs = sorted(path.parent for path in flags["runs"][0].glob("*/best.safetensors"))
    split = " --split val" * (flags["split"] == "val")
    return f"tapfm view {quote(str(runs[0] if runs else flags['runs'][0]))}{split}"


def _study(flags: Flags) -> str:
    given = _given(flags) or "--config CONFIG"
    page = Path(flags["out"]) / "study.html" if flags["out"] else "study.html"
    return f"tapfm fit {given}  # with what {page} shows as best"


def _features(flags: Flags) -> str | None:
    """Return the run on what was written last below the job folder; single slides are no run."""
    if not (given := _given(flags)):
        return None
    from tapfm.config import read_data

    base = flags["out"] or Path(read_data(flags["config"]).get("index_dir") or "data/index")
    found = sorted(base.glob("*/features_*"), key=lambda path: path.stat().st_mtime)
    where = quote(str(found[-1])) if found else "FOLDER"
    return f"tapfm fit {given} --config features_only --data.features_dir {where}"


def _embed(flags: Flags) -> str:
    base = (flags["features"] or Path("FOLDER")).parent
    found = sorted(base.glob("slide_features_*"), key=lambda path: path.stat().st_mtime)
    out = flags["out"] or (found[-1] if found else "FOLDER")
    return f"tapfm test --run RUN --slide-features {quote(str(out))}"


def _histaug(flags: Flags) -> str:
    given = _given(flags) or "--config CONFIG"
    options = quote(f"[{{name: histaug, weights: {flags['out']}}}]")
    return (
        f"tapfm fit {given} --config features_only --data.features_dir FOLDER "
        f"--model.bag_transforms {options}"
    )


def _heatmap(flags: Flags) -> str | None:
    if Path(flags["path"]).name == "pathpt.safetensors":  # which has no export
        return None
    return f"tapfm export --model {quote(str(flags['path']))} --out exported"


def _draw(model: object, slide: object = "SLIDE", out: object = None) -> str:
    where = f" --out {quote(str(out))}" if out else ""
    slide = slide if slide == "SLIDE" else quote(str(slide))
    return f"tapfm heatmap {slide} --model {quote(str(model))}{where}"


FOLLOWING: dict[str, Callable[[Flags], str | None]] = {
    "demo": _demo,
    "labels": _table,
    "split": _table,
    "index": _index,
    "check": _check,
    "plan": lambda flags: f"tapfm check {_given(flags) or '--config CONFIG'}",
    "probe": lambda flags: f"tapfm fit {_given(flags)}",
    "fit": lambda flags: f"tapfm test --run {quote(str(flags['folder'].parent))}",
    "fit-tiles": lambda flags: (
        f"tapfm export --model {quote(str(flags['folder'] / 'best.safetensors'))} --out exported"
    ),
    "test": _tested,
    "study": _study,
    "report": _tested,
    "compare": _compare,
    "view": lambda flags: _draw(flags["run"] / "best.safetensors"),
    "predict": lambda flags: _draw(flags["path"], flags["slides"][0], flags["out"]),
    "heatmap": _heatmap,
    "features": _features,
    "embed": _embed,
    "histaug": _histaug,
    "pathpt": lambda flags: _draw(flags["out"] / "pathpt.safetensors"),
    "export": lambda flags: None,
    "doctor": lambda flags: (
        f"tapfm plan --model {quote(flags['model'])}" if flags["model"] else "tapfm demo"
    ),
}
"""By verb."""
