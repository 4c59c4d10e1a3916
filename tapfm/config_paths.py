"""Finds configs by name, and resolves the paths in them, so that a command runs from any folder.

A relative path in a config is relative to the config's own folder. Two kinds are not: configs that
come with tapfm (`--config demo`) and configs whose data lie below the current folder and not below
their own; their paths are relative to the current folder. Defaults (`runs/run`, `data/index`) go by
the first config. A run's own config.yaml has absolute paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from slides.errors import SettingsError
from tapfm.settings import did_you_mean
from tapfm.yaml_files import compose, read_text

INPUTS = ("data.table", "data.source", "data.slides_dir", "data.features_dir",
          "data.tiles.tissue.masks", "data.tiles.tissue.coords")  # fmt: skip
PATHS = (*INPUTS, "model.weights", "model.start_from", "data.index_dir", "data.cache_dir",
         "run_dir", "features")  # fmt: skip
DEFAULTS = {"run_dir": "runs/run", "data.index_dir": "data/index"}
FIRST = ("cohorts", "recipes")  # folders of configs in which a name is looked for first
FLAGS = ("--config", "-c")


def shipped_configs() -> Path:
    """Return the folder of the configs that come with tapfm: of the package, or of a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def find_config(name: str | Path) -> Path:
    """Return a config's file: as given, or the one that comes with tapfm under that name.

    Args:
        name: a path, or a name such as `demo`, `cohorts/demo`, `lora`.

    Raises:
        SettingsError: a name that no config has.
    """
    path, top = Path(name), shipped_configs()
    if not re.fullmatch(r"[\w/-]+", str(name)) or path.exists():
        return path
    there = sorted(top.rglob("*.yaml"), key=lambda each: (each.parent.name not in FIRST, each))
    for each in there:
        if str(path) in (each.stem, str(each.relative_to(top).with_suffix(""))):
            return each
    names = sorted({each.stem for each in there})
    raise SettingsError(
        f"{name}: neither a file nor a config that comes with tapfm.{did_you_mean(name, names)} "
        f"There are: {', '.join(names)}."
    )


def located(configs: Sequence[Path]) -> list[yaml.MappingNode | None]:
    """Return the YAML of configs, with paths that can be used from the current folder.

    None stands for a config that is used as it is: its paths need no change, or it cannot be read.
    """
    nodes = [_compose(path) for path in configs]
    bases = _bases(configs, nodes)
    given = {key for node in nodes for key in PATHS if _find(node, key)}
    own = next((n for n, node in enumerate(nodes) if node and bases[n]), None)
    changed = []
    for number, (node, base) in enumerate(zip(nodes, bases, strict=True)):
        if node is None or base is None:
            changed.append(None)
            continue
        for key in PATHS:
            if (value := _find(node, key)) is not None:
                value.value, value.style = _placed(base, key, value.value), None
        for key, default in DEFAULTS.items() if number == own else ():
            if key not in given and not (key.startswith("data.") and "data.source" in given):
                _put(node, key, str(base / default))
        changed.append(node)
    return changed


def localised(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `tapfm fit` with configs found by name, and paths in them resolved.

    Raises:
        SettingsError: a name that no config has.
    """
    words: list[str] = list(arguments)
    places = _places(words)
    files = [find_config(words[number].removeprefix(prefix)) for number, prefix in places]
    for (number, prefix), file, node in zip(places, files, located(files), strict=True):
        text = node and yaml.serialize(node, Dumper=yaml.SafeDumper)
        words[number] = prefix + (text or str(file))
    return words


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Return the configs that the arguments of `tapfm fit` name, those that are there."""
    words = [arguments[number].removeprefix(prefix) for number, prefix in _places(arguments)]
    return [path for word in words if "\n" not in word and (path := find_config(word)).is_file()]


def _places(words: Sequence[str]) -> list[tuple[int, str]]:
    """Return at which word each config stands, and what the word has in front of it."""
    places = []
    for number, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in FLAGS and (equals or number + 1 < len(words)):
            places.append((number, f"{flag}=") if equals else (number + 1, ""))
    return places


def with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose paths are absolute, relative ones counting from the current folder."""
    made = deepcopy(dict(config))
    for key in PATHS:
        *above, name = key.split(".")
        part: Any = made
        for each in above:
            part = part.get(each) if isinstance(part, Mapping) else None
        if isinstance(part, dict) and isinstance(part.get(name), str):
            part[name] = _placed(Path.cwd(), key, part[name])
    return made


def _bases(configs: Sequence[Path], nodes: Sequence[yaml.Node | None]) -> list[Path | None]:
    """Return the folder that each config's paths start from; None is the current one."""
    bases: list[Path | None] = []
    for path, node in zip(configs, nodes, strict=True):
        folder, here = path.absolute().parent, Path.cwd()
        inputs = [value.value for key in INPUTS if (value := _find(node, key)) is not None]
        inputs = [each for each in inputs if not Path(each).expanduser().is_absolute()]
        elsewhere = any((here / each).exists() for each in inputs)
        own = any((folder / each).exists() for each in inputs)
        shipped = path.resolve().is_relative_to(shipped_configs().resolve())
        current = folder == here or shipped or (inputs and elsewhere and not own)
        bases.append(None if current else folder)
    return bases


def _placed(base: Path, key: str, text: str) -> str:
    """Return a path as it is used from anywhere; weights that are no file stay as they are."""
    path = base / Path(text).expanduser()
    known = key != "model.weights" or path.exists()
    return str(path.absolute()) if known and text not in ("", "null", "~") else text


def _compose(path: Path) -> yaml.MappingNode | None:
    try:
        node = compose(read_text(path), path)
    except SettingsError:
        return None  # whoever reads it says what is wrong
    return node if isinstance(node, yaml.MappingNode) else None


def _find(node: yaml.Node | None, key: str) -> yaml.ScalarNode | None:
    """Return the value of a dotted key, if it is text."""
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((value for name, value in pairs if name.value == part), None)
    text = isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str")
    return node if text else None


def _put(node: yaml.MappingNode, key: str, value: str) -> None:
    """Add a dotted key, unless one above it has a single value."""
    *above, name = key.split(".")
    for part in above:
        inner = next((each for key_, each in node.value if key_.value == part), None)
        if inner is None:
            inner = yaml.MappingNode("tag:yaml.org,2002:map", [])
            node.value.append((_text(part), inner))
        if not isinstance(inner, yaml.MappingNode):
            return
        node = inner
    node.value = [pair for pair in node.value if pair[0].value != name]
    node.value.append((_text(name), _text(value)))


def _text(value: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", value)
