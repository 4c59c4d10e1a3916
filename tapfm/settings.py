"""Settings errors: everything wrong with a run's settings in one message, with near spellings.

Strategies, aggregators, regularisers and bag transforms are all named in a config the same way:
`name`, or `{name: name, option: value}`. Their options are the fields of a frozen dataclass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any

from slides.errors import SettingsError, refuse

__all__ = [
    "SettingsError",
    "below",
    "choose",
    "choose_each",
    "did_you_mean",
    "faults_of",
    "plain",
    "refuse",
    "spec_of",
]

Spec = str | Mapping[str, Any]
"""A name, or a name and options: `lora`, or `{name: lora, rank: 16}`."""
KINDS = {int: "a whole number", float: "a number", tuple: "a list", str: "text",
          bool: "true or false"}  # fmt: skip


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the closest of the known words, or an empty string."""
    near = get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def plain(name: str) -> str:
    """Return a name as it is compared: lower-case letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def faults_of(*calls: Callable[[], object]) -> list[str]:
    """Return the messages of the errors that calls raise for what is wrong with their settings."""
    faults = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            faults.append(str(error))
    return faults


def below(settings: Mapping[str, Any], least: Mapping[str, float], where: str = "") -> list[str]:
    """Return a fault for each number that is less than the least it may be; None is no number."""
    return [
        f"{where}{'.' * bool(where)}{key} must be {least_:g} or more, got {settings[key]}"
        for key, least_ in least.items()
        if settings[key] is not None and not math.inf > settings[key] >= least_
    ]


def unmet(*rules: tuple[str, Any, str, bool]) -> list[str]:
    """Return a fault for each setting that breaks its rule.

    Args:
        rules: name, value, what it must be, and whether it is.
    """
    return [f"{name} must be {rule}, got {value}" for name, value, rule, good in rules if not good]


def choose(
    kinds: Mapping[str, type], spec: Spec, where: str, error: type[SettingsError] = SettingsError
) -> Any:
    """Return one of several kinds of frozen dataclass, by name, or by name and options.

    Args:
        kinds: by name.
        spec: as in a config.
        where: the config's key, for messages.
        error: what is raised.

    Raises:
        SettingsError: no such name, an option it does not have, or one of another type; as `error`.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in kinds:
        raise error(
            f"{where}: name {name!r} is none of {', '.join(kinds)}.{did_you_mean(name, kinds)}"
        )
    defaults = {each.name: each.default for each in fields(kinds[name])}
    faults = []
    for key in sorted(options.keys() - defaults.keys()):
        there = ", ".join(f"{key} ({value})" for key, value in defaults.items())
        faults.append(
            f"{where}: {name} has no option {key}; there {'are ' + there if there else 'is none'}."
            f"{did_you_mean(key, defaults)}"
        )
    for key, value in options.items():
        kind = type(defaults.get(key))
        fits = (int, float) if kind is float else (list, tuple) if kind is tuple else kind
        if kind not in KINDS or key not in defaults:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{where}: {name}: {key} must be a finite number, got {value}")
        elif not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
            faults.append(f"{where}: {name}: {key} must be {KINDS[kind]}, got {value!r}")
        else:
            options[key] = kind(value)
    refuse(faults, where, error)
    return kinds[name](**options)


def choose_each(kinds: Mapping[str, type], specs: Iterable[Spec], where: str) -> dict[str, Any]:
    """Return several of `choose` by name, in order.

    Raises:
        SettingsError: as `choose`, or a name is given twice.
    """
    chosen = [choose(kinds, spec, where) for spec in specs]
    names = [spec_of(kinds, each)["name"] for each in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    refuse(f"{where}: {name} is given twice. Leave one out." for name in twice)
    return dict(zip(names, chosen, strict=True))


def spec_of(kinds: Mapping[str, type], chosen: Any) -> dict[str, Any]:
    """Return the name and every option, of which `choose` makes the same again."""
    name = next(name for name, kind in kinds.items() if kind is type(chosen))
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(chosen).items()}
    return {"name": name, **options}
