"""Finds the file by which a slide is opened, where a slide is a folder or many files.

A DICOM slide is a series: a file for each level, and others of label and overview. A MIRAX slide
is `name.mrxs` and a folder `name` beside it. OpenSlide opens either by one file; people name the
folder, or any file of it, and `slides/*` names both. So one slide has one path here, and one name.

Source: DICOM PS3.3, VL Whole Slide Microscopy Image; PS3.5, data element encoding.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from slides.files import slide_stem

DICOM_ENDINGS = ("", ".dcm", ".dicom")
WHOLE_SLIDE = b"1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class of VL Whole Slide Microscopy
HEAD = 1 << 17  # bytes that hold the identifiers of a DICOM file
# Study and series side by side: only so at the file's own level, not of series it refers to.
SERIES = re.compile(rb" \0\r\0(?:UI..|....)[\d.]+[\0 ]? \0\x0e\0(?:UI..|....)([\d.]+)", re.DOTALL)
MIRAX_INDEX, MIRAX_ENDINGS = "Slidedat.ini", (".ini", ".dat")  # in the folder of a MIRAX slide


def slide_file(path: Path) -> Path:
    """Return the file by which the slide at a path is opened; the path itself if it is one.

    A folder of several slides, or of none, is returned as it is: `why_folder` says why. So is what
    may not be read.
    """
    with suppress(OSError):
        if path.is_dir():
            found = [mirax] if (mirax := _mirax(path)) else _slides_in(path)
            return found[0] if len(found) == 1 else path
        if path.suffix.lower() in MIRAX_ENDINGS:
            return _mirax(path.parent) or path
        if path.suffix.lower() in DICOM_ENDINGS and path.is_file():
            for files in _series_of(path.parent).values():
                if path.name in files:
                    return path.with_name(files[0])
    return path


def slide_name(path: Path) -> str:
    """Return the name of the slide that is opened by a file: of a DICOM series its folder's.

    It is the file's stem where the folder holds several series, and of every other slide.
    """
    series = _series_of(path.parent) if path.suffix.lower() in DICOM_ENDINGS else {}
    alone = len(series) == 1 and path.name in next(iter(series.values()))
    return path.absolute().parent.name if alone else slide_stem(path)


def why_folder(path: Path) -> str:
    """Return a sentence about a folder that is not one slide, with a remedy."""
    found = _slides_in(path)
    if not found:
        return f"{path} is a folder without a slide. Give the slide's file"
    names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
    return f"{path} is a folder of {len(found)} slides. Give the file of one: {names}"


def _mirax(folder: Path) -> Path | None:
    """Return the .mrxs file whose folder this is."""
    if not (folder / MIRAX_INDEX).is_file():
        return None
    name = folder.absolute().name
    beside = (folder.absolute().with_name(name + end) for end in (".mrxs", ".MRXS"))
    return next((file for file in beside if file.is_file()), None)


def _slides_in(folder: Path) -> list[Path]:
    """Return the slides that lie in a folder itself, each by its file."""
    import openslide  # here, because most slides are files, and a table needs no reader

    series = _series_of(folder)
    parts = {name for files in series.values() for name in files}
    others = sorted(
        file
        for file in folder.iterdir()
        if file.name not in parts and not file.name.startswith(".") and file.is_file()
        and openslide.OpenSlide.detect_format(file)
    )  # fmt: skip
    return [folder / files[0] for files in series.values()] + others


def _series_of(folder: Path) -> dict[bytes, tuple[str, ...]]:
    """Return the DICOM slides in a folder: the names of a series' files, the largest first."""
    try:
        return _read_series(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=1024)
def _read_series(folder: Path, _changed: int) -> dict[bytes, tuple[str, ...]]:
    found: dict[bytes, list[tuple[int, str]]] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in DICOM_ENDINGS:
            continue
        if not file.is_file():
            continue
        with file.open("rb") as data:
            head = data.read(HEAD)
        if head[128:132] != b"DICM" or WHOLE_SLIDE not in head[:1024]:
            continue
        if series := SERIES.search(head):
            found.setdefault(series[1], []).append((-file.stat().st_size, file.name))
    return {uid: tuple(name for _, name in sorted(files)) for uid, files in found.items()}
