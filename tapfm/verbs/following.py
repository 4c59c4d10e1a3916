"""The command that usually follows a verb, which is printed at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any


def next_command(verb: str, flags: Mapping[str, Any]) -> str | None:
    """Return what to type next; None where the verb says so itself, or nothing follows.

    Args:
        verb: that has ended well.
        flags: its own.
    """
    configs = flags.get("config") or flags.get("configs") or ()
    given = " ".join(f"--config {quote(str(each))}" for each in configs)
    out = flags.get("out")
    if verb == "demo":
        where = "" if out == Path("data/demo") else f" --data.table {quote(str(out))}/cohort.csv"
        return f"tapfm fit --config demo{where}"
    if verb in ("labels", "split"):
        return f"tapfm check --table {quote(str(out))}" if out and Path(out).is_file() else None
    if verb in ("index", "probe") and given:
        return f"tapfm fit {given}"
    if verb == "test":
        page = Path(flags["run"]) / f"report_{flags['split']}" / "report.html"
        return f"open {page}; `tapfm heatmap SLIDE --model {flags['run']}/RUN/best.safetensors`"
    if verb == "predict":
        return f"tapfm heatmap SLIDE --model {quote(str(flags['path']))} --out {quote(str(out))}"
    return "tapfm check --config CONFIG" if verb == "plan" else None
