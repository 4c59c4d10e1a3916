"""What `tapfm index` needs of a config, read without torch or Lightning.

`tapfm fit` reads the same YAML through Lightning's CLI, which knows every key; here the keys of
`data` that say which slides and which tiles are enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from slides.cohort.table import read_cohort
from slides.errors import SettingsError
from slides.streaming.settings import Source, TileSettings
from slides.streaming.stain import METHODS
from slides.tiling.tissue import Tissue


def read_source(configs: Sequence[Path]) -> Source:
    """The cohort and its tiles, from one or more YAML files; later ones win.

    Raises:
        SettingsError: a file is missing or damaged, or a key of `data.tiles` is unknown.
        CohortError: all the faults of the table.
    """
    data = read_data(configs)
    tiles = _keys(data.get("tiles"), "data.tiles")
    where = "data.tiles.tissue"
    tissue = _checked(Tissue, _keys(tiles.pop("tissue", None), where), where)
    settings = _checked(TileSettings, {**tiles, "tissue": tissue}, "data.tiles")
    folder, cache, stain = (data.get(key) for key in ("slides_dir", "cache_dir", "stain"))
    if stain not in (None, *METHODS):
        raise SettingsError(f"data.stain: {stain!r} is none of {', '.join(METHODS)}, nor null")
    labels, on_error = data.get("labels"), data.get("on_error", "stop")
    if labels is not None and not isinstance(labels, list):
        raise SettingsError(f"data.labels: {labels!r} is no list: write [{labels}]")
    if on_error not in ("stop", "skip"):
        raise SettingsError(f"data.on_error: {on_error!r} is neither stop nor skip")
    workers, cache_gb = data.get("workers", 2), data.get("cache_gb")
    _numbers({"workers": workers, "cache_gb": 0 if cache_gb is None else cache_gb}, "data")
    return Source(
        read_cohort(
            Path(data["table"]),
            labels,
            folder and Path(folder),
            task=data.get("task") or "multilabel",
        ).rows,
        Path(data.get("index_dir", "data/index")),
        Path(cache) if cache else None,
        settings,
        on_error,
        int(workers),
        stain,
        cache_gb,
    )


def read_data(configs: Sequence[Path]) -> dict[str, Any]:
    """The keys below `data` of one or more YAML files, as they stand; later files win.

    Raises:
        SettingsError: a file is missing or damaged, or none names a table.
    """
    data: dict[str, Any] = {}
    for config in configs:
        data = _merged(data, _keys(read_yaml(config).get("data"), f"{config}: data"))
    if not data.get("table"):
        raise SettingsError(f"{configs[-1]}: data.table is missing: give the cohort's table")
    return data


def preamble(config: Path) -> str:
    """The comment a config opens with: what it is for, and what it expects where."""
    lines = []
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines)


def read_yaml(file: Path, what: str = "config") -> dict[str, Any]:
    """A YAML file's keys and values; `what` it is to be called.

    Raises:
        SettingsError: it is missing, or something else.
    """
    import yaml

    if not file.is_file():
        there = sorted(path.stem for path in file.parent.glob("*.yaml"))
        listed = f" There are: {', '.join(there)}." if there else ""
        raise SettingsError(f"{file}: there is no such {what}.{listed}")
    try:
        found = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not YAML: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{file}: holds {found!r:.60}, and a {what} is lines of `key: value`")
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)
            else v for k, v in over.items()}  # fmt: skip
    return {**base, **both}


def _keys(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values or {}, Mapping):
        raise SettingsError(f"{where}: {values!r:.60} is not lines of `key: value`")
    return dict(values or {})


def _checked(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of what a config says; a value whose default is a number must be one."""
    known = {each.name: each.default for each in fields(cls)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise SettingsError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    _numbers({key: v for key, v in values.items() if isinstance(known[key], int | float)}, where)
    return cls(**values)


def _numbers(values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if not isinstance(value, int | float) or value < 0:
            raise SettingsError(f"{where}.{key}: {value!r} is no number from 0 on")
