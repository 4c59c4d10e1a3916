"""What is wrong with the arguments of `tapfm fit` and `fit-tiles`: all faults, one line each.

jsonargparse, which reads them for Lightning, stops at the first fault. Here that fault is noted,
what caused it is taken out, and the rest is read again, until nothing is left to say.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tapfm.config import read_yaml
from tapfm.settings import KINDS, SettingsError, did_you_mean
from tapfm.yaml_files import compose, read_text

WANTED = {kind.__name__: text for kind, text in KINDS.items()}
WANTED |= {"NoneType": "null", "dict": "keys and values", "list": "a list"}
EXPECTED = re.compile(
    r"Expected an? (?:<class '(?:[\w.]+\.)?(\w+)'>|typing\.Literal\[(.*?)\](?=\. Got|$))", re.M
)


@dataclass
class Given:
    """A flag and its values, or a config."""

    words: list[str]
    """As on the command line; behind a config, those that belong to nothing."""
    config: yaml.MappingNode | None = None

    @property
    def arguments(self) -> list[str]:
        """Return what the parser reads; a config as YAML."""
        if self.config is None:
            return self.words
        return ["--config", yaml.serialize(self.config, Dumper=yaml.SafeDumper), *self.words]

    def drop(self, key: str) -> bool:
        """Take out a key and all keys below it; return whether it was there."""
        if self.config is not None:
            return _drop(self.config, key)
        mine = bool(self.words) and f"{_flag(self.words[0])}.".startswith(f"{key}.")
        self.words = [] if mine else self.words
        return mine


def argument_faults(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Return all that is wrong with the arguments: keys, types, choices, missing files.

    Args:
        parser: Lightning's, made with `exit_on_error=False`.
        arguments: of the command line.
    """
    keys = list(parser.get_defaults().keys())
    given, faults = _given(arguments)
    gone = set(keys if faults else ())  # what is not known to be missing
    for each in given:
        for key, value in list(_not_groups(each.config, keys)):
            faults.append(_no_group(key, value, keys))
            each.drop(key)
    while True:
        try:
            parser.parse_args([word for each in given for word in each.arguments])
            return faults
        except argparse.ArgumentError as error:
            found, culprits = explain(error.message, keys)
            missing = not culprits and found[0].partition(":")[0] in gone
            faults += [] if missing else found
            gone.update(culprits)
            dropped = [each.drop(key) for each in given for key in culprits]
            if not any(dropped):
                return faults


def explain(message: str, keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a line for each fault that a message of jsonargparse names, and the keys at fault."""
    if message.startswith("unrecognized arguments: "):
        words = message.partition(": ")[2].split()
        unknown = [_flag(word) for word in words if word.startswith("--")]
        stray = [f"{' '.join(words)}: belongs to no key. Write --KEY VALUE."]
        return [_unknown(key, keys) for key in unknown] or stray, unknown
    if found := re.match(r"Group '(.+)' does not accept option '(.+)'", message):
        key = ".".join(found.groups())
        return [_unknown(key, keys)], [key]
    if found := re.match(r"Option '(.+)' is not accepted", message):
        return [_unknown(found[1], keys)], [found[1]]
    if found := re.match(r"argument .*--([\w.]+): expected one argument", message):
        return [f"{found[1]}: no value. Write --{found[1]} VALUE."], [found[1]]
    if found := re.match(r'Linked "(.+)" must be given via "(.+)"', message):
        return [f"{found[1]}: taken from {found[2]}. Leave it out."], [found[1]]
    if found := re.match(r"the following arguments are required: (.+)", message):
        return [f"{found[1]}: missing. Give it in a config, or as --{found[1]}."], []
    if found := re.match(r'Parser key "(.+?)":(.*)', message, re.S):
        return [_mismatch(found[1], found[2], keys)], [found[1]]
    return [" ".join(message.split())], []


def _mismatch(key: str, message: str, keys: Sequence[str]) -> str:
    """Return the line for a value of a wrong type, or of none of the choices."""
    if found := re.search(r"Unable to load config '(.*)'", message):
        return _no_group(key, found[1], keys)
    if found := re.search(r"Problem with given (class_path .*):\n\s*(.*)", message):
        return f"{key}: {found[1]}: {found[2]}."
    found = re.search(r"(?:Got|Given) value: (.*)", message)
    value = found[1] if found else ""
    if found := re.match(r"NestedArg\(key='(.*?)'", value):
        return _unknown(f"{key}.{found[1]}", keys)
    wanted, choices = {}, []
    for kind, literal in EXPECTED.findall(message):
        choices += re.findall(r"'(.*?)'", literal)
        wanted[f"one of {', '.join(choices)}" if literal else WANTED.get(kind, "")] = None
    if "dot import path" in message:
        wanted["the path of a class"] = None
    wanted.pop("", None)
    help_ = did_you_mean(value, choices) or (f" Write [{value}]." if "a list" in wanted else "")
    return f"{key}: {value!r} is not {', or '.join(wanted) or 'what it takes'}.{help_}"


def _unknown(key: str, keys: Sequence[str]) -> str:
    near = did_you_mean(key, keys) or " `--help all` lists the keys."
    return f"{key}: there is no such key.{near}"


def _no_group(key: str, value: str, keys: Sequence[str]) -> str:
    below = next(each for each in keys if each.startswith(f"{key}."))
    return f"{key}: {value!r} is not keys and values. Set the keys below it, such as {below}."


def _given(arguments: Sequence[str]) -> tuple[list[Given], list[str]]:
    """Return the arguments flag by flag, and what is wrong with the configs among them."""
    given, faults = [], []
    for word in arguments:
        if word.startswith("--") or word == "-c" or not given:
            given.append(Given([word]))
        else:
            given[-1].words.append(word)
    for each in given:
        flag, equals, value = each.words[0].partition("=")
        if flag not in ("-c", "--config") or not (equals or each.words[1:]):
            continue
        value = value if equals else each.words[1]
        try:
            inline = "\n" in value or ("{" in value and not Path(value).is_file())
            if not inline:
                read_yaml(Path(value))
                name, value = value, read_text(Path(value))
            node = compose(value, "--config" if inline else name)
            each.words = each.words[1 if equals else 2 :]
            each.config = node if isinstance(node, yaml.MappingNode) else None
        except SettingsError as error:
            faults.append(" ".join(str(error).split()))
            each.words = []
    return given, faults


def _flag(word: str) -> str:
    """Return the key of a flag: model.chunk of --model.chunk=4."""
    return word.partition("=")[0].removeprefix("--")


def _not_groups(node: yaml.Node | None, keys: Sequence[str], at: str = "") -> Iterator:
    """Yield keys of a config that stand for a group and have one value, and that value."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{at}{name.value}"
        if any(each.startswith(f"{key}.") for each in keys):
            if isinstance(value, yaml.MappingNode):
                yield from _not_groups(value, keys, f"{key}.")
            elif value.value not in ("", "null", "~"):
                yield key, value.value


def _drop(node: yaml.Node, key: str) -> bool:
    """Take a key out of a config; return whether it was there."""
    if not isinstance(node, yaml.MappingNode):
        return False
    first, _, rest = key.partition(".")
    here = [pair for pair in node.value if pair[0].value == first]
    if rest:
        return sum(_drop(value, rest) for _, value in here) > 0
    node.value = [pair for pair in node.value if pair not in here]
    return bool(here)
