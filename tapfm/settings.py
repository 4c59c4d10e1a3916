"""Settings errors: everything wrong with a run's settings in one message, with near spellings."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from slides.errors import SettingsError, all_faults

__all__ = ["SettingsError", "did_you_mean", "refuse"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the closest of the known words, or an empty string."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def refuse(faults: Iterable[str], where: str = "settings") -> None:
    """Raise one error that lists all faults.

    Raises:
        SettingsError: there is at least one.
    """
    faults = list(faults)
    if len(faults) == 1:
        raise SettingsError(faults[0])
    if faults:
        raise SettingsError(all_faults(where, faults))
