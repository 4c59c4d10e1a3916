"""One meaning under several spellings: words for unknown, names of one patient, of one class.

Tables that are joined from two sources spell the same thing in two ways. `tidy` removes what nobody
sees. The other functions return a key that is equal for texts that look like the same thing; keys
are compared and never shown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from slides.cohort.tcga_names import case_of

MISSING = frozenset({
    "na", "n a", "nan", "null", "nil", "none", "unknown", "unk", "missing", "not reported",
    "not available", "not applicable", "not evaluated", "not evaluable", "not assessed",
    "not tested", "not done", "not performed", "not determined", "not known", "not provided",
    "not collected", "not specified", "not recorded", "not allowed to collect", "no data",
    "undetermined", "unspecified", "discrepancy",
})  # fmt: skip
"""Words for unknown, as `_word` spells them, of the GDC, cBioPortal, pandas, R and spreadsheets."""
UNSEEN = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))  # no width: dropped
DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")


POSITIVE = frozenset({
    "yes", "y", "true", "t", "positive", "pos", "+", "mut", "mutated", "mutant", "mutation", "mt",
    "altered", "present", "high", "detected",
})  # fmt: skip
NEGATIVE = frozenset({
    "no", "n", "false", "f", "negative", "neg", "-", "wt", "wildtype", "wild type", "wild-type",
    "wild", "unaltered", "absent", "low", "not detected", "not mutated",
})  # fmt: skip
"""Words that may stand for 1 and 0 in a binary column; taken for them only if the user says so."""


def tidy(text: str) -> str:
    """Return text in Unicode's composed form, without unseen characters and outer spaces."""
    if text.isascii():
        return text.strip()
    text = unicodedata.normalize("NFC", text.translate(UNSEEN))
    return "".join(" " if each.isspace() else each for each in text).strip()


def missing_words(more: Iterable[str] = ()) -> frozenset[str]:
    """Return the words for unknown, extended by a user's own, for `is_missing`."""
    return MISSING | {_word(text) for text in more}


def is_missing(text: str, words: Collection[str] = MISSING) -> bool:
    """Return whether a cell says that its value is unknown: blank, a dash, `[Not Available]`."""
    return not text.strip("-.?'\"# \u2013\u2014") or _word(text) in words


def guess_values(texts: Iterable[str]) -> dict[str, int]:
    """Return what words for 1 and 0 seem to mean, `{mut: 1, wt: 0}`; nothing if one is unknown.

    Both sides must be there, in words or as 1 and 0.
    """
    meant = {}
    for text in texts:
        word, value = text.casefold(), read_number(text)
        if value in (0, 1):
            meant[text] = int(value)
        elif word in POSITIVE or word in NEGATIVE:
            meant[text] = int(word in POSITIVE)
        else:
            return {}
    words = {text: value for text, value in meant.items() if read_number(text) is None}
    return words if words and set(meant.values()) == {0, 1} else {}


def word_fault(name: str, texts: Iterable[str]) -> list[str]:
    """Return a fault of a column of nothing but words for 1 and 0, with what to write, or none."""
    texts = list(texts)
    if any(read_number(text) is not None for text in texts):
        return []
    meant = ", ".join(f"{word!r}: {value}" for word, value in guess_values(texts).items())
    return [
        f"column {name!r} is in words: if they mean so, write data.values: {{{meant}}}, or have "
        "`tapfm check --fix` write a table of 1 and 0"
    ] * bool(meant)


def value_reader(values: Mapping[Any, Any] | None) -> Callable[[str, str], str]:
    """Return a function of a label column's name and a cell's text: the text that is meant.

    Args:
        values: words of all label columns, `{mut: 1, wt: 0}`, or by column, `{EGFR: {mut: 1}}`.
            None or blank means unknown. YAML reads `yes` and `no` as true and false.
    """
    every = {key: value for key, value in (values or {}).items() if not isinstance(value, Mapping)}
    named = {tidy(str(key)): _by_word(value) for key, value in (values or {}).items()
             if isinstance(value, Mapping)}  # fmt: skip
    shared = _by_word(every)

    def meant(name: str, text: str) -> str:
        word = text.casefold()
        return named.get(name, {}).get(word, shared.get(word, text))

    return meant


def _by_word(values: Mapping[Any, Any]) -> dict[str, str]:
    found = {}
    for key, value in values.items():
        text = "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
        keys = [key] if not isinstance(key, bool) else ["yes", "y", "true", "on"] if key else [
            "no", "n", "false", "off"]  # fmt: skip
        found |= {tidy(str(each)).casefold(): text for each in keys}
    return found


def read_number(text: str) -> float | None:
    """Return the finite number in a cell; None if there is none, or it may be one of two.

    A comma is a decimal sign, but not where it may part thousands: 0,5 is read and 1,234 is not.
    """
    if re.fullmatch(r"[+-]?(0,\d+|\d+,(\d{1,2}|\d{4,}))", text):
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def case_key(case_id: str) -> str:
    """Return the same key for `7` and `007`, `103` and `103.0`, `P_12` and `p-12`.

    So have a TCGA, CPTAC or MSK patient and a sample of theirs.
    """
    text = unicodedata.normalize("NFKC", case_of(case_id)).translate(DASHES).casefold()
    text = re.sub(r"[\s_-]+", "-", text).strip("-")
    numbered = re.fullmatch(r"(\D*?)-?0*(\d+)(?:\.0+)?", text)
    return numbered[1] + numbered[2] if numbered else text


def class_key(name: str) -> str:
    """Return the same key for `Non-small cell` and `non_small cell`; others for HER2+ and HER2-.

    Letter case does not count, nor do separators within a name, unless they part two numbers. Signs
    count: `+`, `/`, `<` and a dash at the end of a word.
    """
    if (value := read_number(name)) is not None:
        return f"{value:g}"
    text = unicodedata.normalize("NFKC", name).translate(DASHES).casefold()
    text = re.sub(r"(?<=\d)[\s_.,;:-]+(?=\d)", "|", text)
    return re.sub(r"[\s_.,;:'\"()\[\]]+|(?<=\w)-(?=\w)", "", text) or text


def look_alike(names: Iterable[str]) -> list[str]:
    """Return "'A' and 'a' look like one class: spell it one way" for each such group of names."""
    groups = defaultdict(list)
    for name in names:
        groups[class_key(name)].append(repr(name))
    return [
        f"{' and '.join(alike)} look like one class: spell it one way"
        for alike in groups.values()
        if len(alike) > 1
    ]


def _word(text: str) -> str:
    """Return a cell's words in lower case, without brackets and other marks."""
    return " ".join(re.findall(r"[\w+]+", text.casefold().replace("_", " ")))
