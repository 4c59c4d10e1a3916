"""Keys of version 0.1 under their names of today: of a command line, and of a run on disk.

They work for one more version. A run that was begun with them is continued as the run it is.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from tapfm.config_paths import with_absolute_paths
from tapfm.settings import spec_of
from tapfm.slide_model.aggregators import AGGREGATORS, aggregator_options, name_of


def rename_old_keys(model: MutableMapping[str, Any]) -> list[str]:
    """Move the values of old keys of `model` to their new names; return a line for each."""
    lines, steps = [], model["steps"]
    if steps.get("head_start") is not None:
        if steps["head_start"]:
            lines.append("model.steps.head_start is now model.steps.warm_start")
        steps["warm_start"] = bool(steps.get("warm_start") or steps["head_start"])
        steps["head_start"] = None
    temperature = model.get("temperature")
    if temperature is not None:
        name = name_of(model["aggregator"])
        model["temperature"] = None
        if hasattr(aggregator_options(name), "temperature"):
            given = model["aggregator"]
            given = {"name": given} if isinstance(given, str) else dict(given)
            model["aggregator"] = {**given, "temperature": temperature}
            lines.append(
                "model.temperature is now an option of the aggregator: "
                f"model.aggregator: {{name: {name}, temperature: {temperature}}}"
            )
        else:
            lines.append(f"model.temperature is of the CLS score, which {name} does not look at")
    return lines


def changed_keys(
    then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Return a line for each key that differs between two configs of a run.

    Args:
        then: what a run was begun with; keys of later versions are missing.
        now: what it is to be continued with.
        defaults: full key -> value, which a missing key counts as.
    """
    then, now = with_absolute_paths(then), with_absolute_paths(now)
    then["model"]["steps"] = dict(then["model"]["steps"])
    rename_old_keys(then["model"])
    then, now = ({**each, "model": {**each["model"], **_aggregator(each["model"])}}
                 for each in (then, now))  # fmt: skip
    return _changed(then, now, defaults, "")


def _changed(then: Mapping, now: Mapping, defaults: Mapping[str, Any], above: str) -> list[str]:
    lines = []
    for name in sorted(then.keys() | now.keys()):
        key = f"{above}{name}"
        was, is_ = (each[name] if name in each else defaults.get(key) for each in (then, now))
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            lines += _changed(was, is_, defaults, f"{key}.")
        elif was != is_ and not _same_list(was, is_):
            lines.append(f"{key} was {was}, is {is_}")
    return lines


def _same_list(was: object, is_: object) -> bool:
    """Return whether both are sequences of the same values; YAML has no tuples."""
    sequences = isinstance(was, list | tuple) and isinstance(is_, list | tuple)
    return sequences and list(was) == list(is_)


def _aggregator(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the aggregator with all its options; empty for a run on tiles."""
    if "aggregator" not in model:
        return {}
    return {"aggregator": spec_of(AGGREGATORS, aggregator_options(model["aggregator"]))}
