"""What can be wrong with a user's slides, their index, their labels or their cohort table.

Every message says which slide or file, what was found, and what to do. Every class takes that one
string: PyTorch rebuilds an exception from a worker process as `type(error)(message)`, and a class
that needs more arguments comes back as a bare RuntimeError that `except SlideError` misses.
"""


class SlideError(ValueError):
    """A fault in one slide's data, which the user can mend or skip."""


class NotASlideError(SlideError):
    """The file is missing, is no slide, or ends before its own table of contents does."""


class MissingResolutionError(SlideError):
    """The slide does not say how large its pixels are, or says something absurd."""


class TooCoarseError(SlideError):
    """The tiles asked for are finer than the scan."""


class NoTissueError(SlideError):
    """No tile of the slide passes the tissue thresholds."""


class MaskError(SlideError):
    """A slide's own mask is missing, cannot be read, or is of another slide."""


class CoordinatesError(SlideError):
    """Tiles that another program chose are missing, damaged, not those asked for, or in the way."""


class StainError(SlideError):
    """A slide's stains cannot be estimated from its tiles."""


class UnreadableRegionError(SlideError):
    """The slide opens but some of its pixels cannot be decoded."""


class TileError(SlideError):
    """A labelled tile cannot be read, or is of another size than the others."""


class IndexSettingsError(SlideError):
    """An index on disk was made with other settings than those asked for."""


class IndexFileError(SlideError):
    """An index cannot be written (full disk), is missing, or is damaged."""


class SettingsError(ValueError):
    """Settings that cannot be, or not together: all that is wrong with them."""


class TilingError(SettingsError):
    """Tiles or tissue such as cannot be asked for."""


class CohortError(ValueError):
    """What is wrong with a cohort table: all its faults, each with its row and remedy."""


class LabelError(ValueError):
    """A source of labels cannot be used: all that is wrong with it."""


class DownloadError(ValueError):
    """What is wrong with a manifest, or with the files that it lists."""


class SplitError(ValueError):
    """A split cannot be made, or one that was read leaks or does not fit the cohort."""


LISTED = 8  # rows or values spelled out in one line before "and n more"


def some(values: list) -> str:
    """The first few, and how many more: 2, 3, 5 and 40 more."""
    head = ", ".join(str(value) for value in values[:LISTED])
    return head + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")


def some_rows(numbers: list[int]) -> str:
    """Rows of a table."""
    return ("row " if len(numbers) == 1 else "rows ") + some(numbers)


def all_faults(where: object, faults: list[str]) -> str:
    """The message of an error that lists everything: how many faults, then each on its line."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"{where}: {count}\n" + "\n".join(f"  {fault}" for fault in faults)
