"""Reads the `data` of a config without torch or Lightning, as `tapfm index` needs it.

`tapfm fit` reads the same YAML through Lightning's CLI, which checks every value; here those that
say which slides and which tiles are checked.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from slides.cohort.table import Cohort, read_cohort
from slides.errors import SettingsError
from slides.streaming.settings import Source, TileSettings
from slides.streaming.stain import METHODS
from slides.tiling.tissue import Tissue
from tapfm.config_lines import with_lines
from tapfm.config_paths import find_config, located
from tapfm.settings import did_you_mean, refuse


def read_source(configs: Sequence[Path]) -> Source:
    """Return the cohort and its tiles, from one or more YAML files; later ones win.

    Raises:
        SettingsError: all missing files, unknown keys and values that cannot be.
        CohortError: all the faults of the table.
    """
    data, faults = _read_data(configs)
    where = "data.tiles"
    tiles = _keys(data.get("tiles"), where)
    tissue = _keys(tiles.pop("tissue", None), f"{where}.tissue")
    faults += [*_faults(Tissue, tissue, f"{where}.tissue"), *_faults(TileSettings, tiles, where)]
    stain = data.get("stain")
    if stain not in (None, *METHODS):
        faults.append(f"data.stain: {stain!r} is none of {', '.join(METHODS)}, nor null")
    on_error = data.get("on_error", "stop")
    for key in ("labels", "missing"):
        if not isinstance(data.get(key, []), list | None):
            faults.append(f"data.{key}: {data[key]!r} is no list: write [{data[key]}]")
    for key in ("columns", "values"):
        if not isinstance(data.get(key) or {}, Mapping):
            faults.append(f"data.{key}: {data[key]!r} is not lines of `name: value`")
    if on_error not in ("stop", "skip"):
        faults.append(f"data.on_error: {on_error!r} is neither stop nor skip")
    workers, cache_gb = data.get("workers", 2), data.get("cache_gb")
    faults += _no_numbers({"workers": workers, "cache_gb": cache_gb or 0}, "data")
    refuse(with_lines(faults, configs), ", ".join(map(str, configs)))
    return source_of_data({**data, "workers": workers, "on_error": on_error}, read_cohort_of(data))


def read_cohort_of(data: Mapping[str, Any]) -> Cohort:
    """Return the cohort that the keys of `data` name.

    Raises:
        CohortError: all the faults of the table.
    """
    folder = data.get("slides_dir")
    return read_cohort(
        Path(data["table"]),
        data.get("labels"),
        folder and Path(folder),
        task=data.get("task") or "multilabel",
        need_slides=not data.get("features_dir"),
        **spelling_of(data),
    )


def spelling_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a table's columns and cells are to be read, for `read_cohort` and `run_split`."""
    return {
        "missing": data.get("missing") or (),
        "names": data.get("columns"),
        "values": data.get("values"),
    }


def source_of_data(data: Mapping[str, Any], cohort: Cohort) -> Source:
    """Return a cohort's slides with the tiles that the keys of `data` ask for."""
    tiles, cache = dict(data.get("tiles") or {}), data.get("cache_dir")
    tissue = Tissue(**(tiles.pop("tissue", None) or {}))
    return Source(
        cohort.rows,
        Path(data.get("index_dir", "data/index")),
        Path(cache) if cache else None,
        TileSettings(**tiles, tissue=tissue),
        data.get("on_error", "stop"),
        int(data.get("workers", 2)),
        data.get("stain"),
        data.get("cache_gb"),
    )


def read_data(configs: Sequence[Path]) -> dict[str, Any]:
    """Return the keys below `data` of one or more YAML files, as they stand; later files win.

    Raises:
        SettingsError: a file is missing or damaged, a key is unknown, or none names a table.
    """
    data, faults = _read_data(configs)
    refuse(with_lines(faults, configs), ", ".join(map(str, configs)))
    return data


def _read_data(configs: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    data: dict[str, Any] = {}
    configs = [find_config(config) for config in configs]
    for config, node in zip(configs, located(configs), strict=True):
        found = read_yaml(config)
        if node is not None:
            found = yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))
        data = overlaid(data, _keys(found.get("data"), f"{config}: data"))
    known = data_keys()
    faults = [
        f"data.{key}: there is no such key.{did_you_mean(key, known)}"
        for key in data.keys() - known
    ]
    if not data.get("table"):
        faults.append(f"{configs[-1]}: data.table is missing: give the cohort's table")
    return data, sorted(faults)


def data_keys() -> set[str]:
    """Return what `SlideData` takes, from its text: importing it would import torch."""
    tree = ast.parse((Path(__file__).parent / "data" / "datamodule.py").read_text())
    made = next(node for node in tree.body if getattr(node, "name", "") == "SlideData")
    init = next(node for node in made.body if getattr(node, "name", "") == "__init__")
    return {argument.arg for argument in init.args.args[1:]}


def merged(configs: Sequence[Path]) -> dict[str, Any]:
    """Return all keys of one or more YAML files, as they stand; later files win.

    Raises:
        SettingsError: a file is missing or damaged.
    """
    found: dict[str, Any] = {}
    for config in configs:
        found = overlaid(found, read_yaml(config))
    return found


def preamble(config: Path) -> str:
    """Return the comment that a config opens with: its purpose, and what it expects where."""
    lines = []
    for line in config.read_text(errors="replace").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines)


def read_yaml(file: Path, what: str = "config") -> dict[str, Any]:
    """Return the keys and values of a YAML file, called `what` in errors.

    Raises:
        SettingsError: there is no such file, or it is something else.
    """
    from tapfm.yaml_files import load, read_text

    found = load(read_text(file, what), file) or {}
    if not isinstance(found, dict):
        raise SettingsError(f"{file}: holds {found!r:.60}, and a {what} is lines of `key: value`")
    return found


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested keys of both; `over` wins."""
    both = {k: overlaid(base[k], v) if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)
            else v for k, v in over.items()}  # fmt: skip
    return {**base, **both}


def _keys(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values or {}, Mapping):
        raise SettingsError(f"{where}: {values!r:.60} is not lines of `key: value`")
    return dict(values or {})


def _faults(cls: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Return unknown keys of a dataclass, and values that are no numbers where it has some."""
    known = {each.name: each.default for each in fields(cls)}
    faults = [
        f"{where}: unknown {key}; there are {', '.join(known)}.{did_you_mean(key, known)}"
        for key in sorted(values.keys() - known.keys())
    ]
    numbers = {key: v for key, v in values.items() if isinstance(known.get(key), int | float)}
    return faults + _no_numbers(numbers, where)


def _no_numbers(values: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{where}.{key}: {value!r} is no number from 0 on"
        for key, value in values.items()
        if not isinstance(value, int | float) or value < 0
    ]
