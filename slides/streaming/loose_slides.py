"""Slides outside any cohort as rows of a table: named by their files, labels unknown."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from slides.cohort.table import SlideRow
from slides.errors import SettingsError, SlideError, name_fault, refuse
from slides.wsi.reader import Slide
from slides.wsi.resolution import stated_otherwise
from slides.wsi.slide_file import slide_file, slide_name


def rows_of_files(paths: Sequence[Path], mpp: float | None) -> list[SlideRow]:
    """Return slides without a table as rows of one, named by their files, labels unknown.

    Args:
        paths: the slides' files.
        mpp: microns per level-0 pixel of the slides that state none, or None.

    Raises:
        SettingsError: two slides have the same name, or one that no file may have.
    """
    named: dict[str, Path] = {}
    faults = [f"{path!s:.100}: {why}" for path in paths if (why := name_fault(slide_name(path)))]
    refuse([fault.encode("unicode_escape").decode() for fault in faults], "slides")
    for path in dict.fromkeys(map(slide_file, paths)):  # `slides/*` names a MIRAX slide twice
        if (other := named.setdefault(name := slide_name(path), path)) is not path:
            raise SettingsError(
                f"{name}: {other} and {path} both have this name, and the files of one "
                "would overwrite those of the other. Rename one, or run them apart, each with "
                "its own --out."
            )
    return [
        SlideRow(name, name, path, "test", _where_unstated(name, path, mpp), "", "", ())
        for name, path in named.items()
    ]


def _where_unstated(name: str, path: Path, mpp: float | None) -> float | None:
    """Return `mpp`, or None if the slide states its own; say so where they differ."""
    if mpp is None:
        return None
    try:
        with warnings.catch_warnings(), Slide(path, name=name) as slide:
            warnings.simplefilter("ignore")  # repeated when the slide is read
            if slide.mpp_source == "objective power":  # a guess
                return mpp
            other = stated_otherwise(slide.facts.properties, mpp)
    except SlideError:  # it states none, or cannot be read, which is reported later
        return mpp
    if other:
        print(
            f"tapfm: {name}: --slide-mpp is for slides that do not state theirs; its file states "
            f"{other}, which is taken and not {mpp:g}. If the file is wrong, give mpp in a cohort "
            "table.",
            file=sys.stderr,
        )
    return None
