"""Errors about a user's slides, indexes, labels and cohort tables.

Every message says which slide or file, what was found, and what to do. Every class takes only that
string: PyTorch rebuilds an exception from a worker process as `type(error)(message)`, and a class
with more arguments would arrive as a RuntimeError that `except SlideError` does not catch.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


class SlideError(ValueError):
    """A fault in one slide's data, which the user can correct or skip."""


class NotASlideError(SlideError):
    """The file is missing, is not a slide, or is cut short."""


class MissingResolutionError(SlideError):
    """The slide gives no pixel size, or an impossible one."""


class TooCoarseError(SlideError):
    """The requested tiles are finer than the scan."""


class NoTissueError(SlideError):
    """No tile of the slide passes the tissue thresholds."""


class MaskError(SlideError):
    """A slide's own mask is missing, unreadable, or belongs to another slide."""


class CoordinatesError(SlideError):
    """Another program's tile coordinates are missing, damaged or do not fit the request."""


class StainError(SlideError):
    """A slide's stains cannot be estimated from its tiles."""


class UnreadableRegionError(SlideError):
    """The slide opens but some of its pixels cannot be decoded."""


class TileError(SlideError):
    """A labelled tile cannot be read, or is of another size than the others."""


class FeatureFileError(SlideError):
    """A slide's feature file is missing, damaged, or not like those of the other slides."""


class IndexSettingsError(SlideError):
    """An index on disk was made with settings other than the current ones."""


class IndexFileError(SlideError):
    """An index cannot be written (full disk), is missing, or is damaged."""


class SettingsError(ValueError):
    """One or more settings are invalid, or do not go together."""


class TilingError(SettingsError):
    """Tile or tissue settings are invalid."""


class CohortError(ValueError):
    """A cohort table has faults; the message lists all of them with row and remedy."""


class LabelError(ValueError):
    """A source of labels cannot be used; the message lists all its faults."""


class DownloadError(ValueError):
    """A manifest, or a file that it lists, is faulty."""


class SplitError(ValueError):
    """A split cannot be made, or a split that was read leaks or does not fit the cohort."""


def slide_fault(error: Exception, name: str, path: object) -> SlideError:
    """Return what reading a slide has raised as a fault of that slide."""
    if isinstance(error, SlideError):
        return error
    if isinstance(error, MemoryError):
        return UnreadableRegionError(
            f"{name}: {path} needs more memory than there is ({error}): it is damaged, or very "
            "large. Use fewer workers, or leave this slide out."
        )
    return UnreadableRegionError(
        f"{name}: {path} cannot be read ({error}). Check that it is there and that you may read "
        "it, or leave this slide out."
    )


LISTED = 8  # rows or values listed in one line before "and n more"
ON_ERROR = ("stop", "skip")


def some(values: list) -> str:
    """Return the first `LISTED` values as text, and how many more there are: "2, 3 and 40 more"."""
    head = ", ".join(str(value) for value in values[:LISTED])
    return head + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")


def some_rows(numbers: list[int]) -> str:
    """Return row numbers as text: "row 3" or "rows 3, 5"."""
    return ("row " if len(numbers) == 1 else "rows ") + some(numbers)


LONGEST = 240  # bytes of a name, of the 255 that a file's name may have with its ending
UNSEEN = {"Cc": "a control character", "Cf": "an invisible character",
          "Cs": "half a character", "Zl": "a line break", "Zp": "a line break"}  # fmt: skip


def name_fault(name: str) -> str:
    """Return why files cannot be named so, or "": invisible characters, a formula, too long."""
    for letter in name:
        if kind := UNSEEN.get(unicodedata.category(letter)):
            return f"{name[:60]!r} holds {kind} (U+{ord(letter):04X}): take it out"
    if name[:1] in ("=", "+", "-", "@"):
        return f"{name[:60]!r} begins like a formula, and spreadsheets would run it: rename it"
    if (length := len(name.encode(errors="replace"))) > LONGEST:
        return f"{name[:30]!r}... has {length} bytes, and files are named after it: {LONGEST} fit"
    return ""


def printable(text: str) -> str:
    """Return text whose control and invisible characters are escaped, but for line ends."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in "\n\t" and unicodedata.category(letter) in UNSEEN
        else letter
        for letter in text
    )


def refuse(
    faults: Iterable[str], where: object = "settings", error: type[ValueError] = SettingsError
) -> None:
    """Raise one error that lists all faults, if there are any.

    Raises:
        SettingsError: there is at least one fault; `error` names another class.
    """
    faults = list(faults)
    if faults:
        raise error(faults[0] if len(faults) == 1 else all_faults(where, faults))


def reading_faults(workers: int, on_error: str = "stop") -> list[str]:
    """Return the faults of the settings that everything that reads slides shares."""
    faults = []
    if workers < 0:
        faults.append(f"data.workers must be at least 0, got {workers}: 0 reads in this process")
    if on_error not in ON_ERROR:
        faults.append(f"data.on_error is {on_error!r}: give {' or '.join(ON_ERROR)}")
    return faults


def all_faults(where: object, faults: list[str]) -> str:
    """Return an error message that lists all faults: their number, then one a line."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"{where}: {count}\n" + "\n".join(f"  {printable(fault)}" for fault in faults)
