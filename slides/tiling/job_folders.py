"""Finds a slide's coordinate file of TRIDENT, CLAM, AtlasPatch or hs2p, and hashes it.

    path = find_coordinates("trident_job/20x_256px_0px_overlap", "TCGA-05-4244-01Z-00-DX1.d4ff")

`slides.tiling.other_tools` reads the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from slides.errors import CoordinatesError, all_faults
from slides.files import names_of

NAMES = (  # TRIDENT; CLAM and AtlasPatch; hs2p
    "{}_patches.h5", "{}.h5", "{}.coordinates.meta.json",
)  # fmt: skip
FOLDERS = ("", "patches", "tiles", "*/patches")


def find_coordinates(
    folder: str | Path, slide_id: str, slide_path: str | Path | None = None
) -> Path:
    """Return the path of a slide's coordinate file in a job folder.

    It is named by its slide_id, else by its file (`slides.files.names_of`).

    Raises:
        CoordinatesError: there is none, or there are several, which the message lists.
    """
    folder = Path(folder)
    folders = [
        each
        for where in FOLDERS
        for each in (sorted(folder.glob(where)) if "*" in where else [folder / where])
    ]
    stems = names_of(slide_id, slide_path)
    for stem in stems:
        every = [each / name.format(stem) for each in folders for name in NAMES]
        found = [path for path in every if path.is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            raise CoordinatesError(
                f"{slide_id}: {folder} holds its coordinates {len(found)} times: "
                f"{', '.join(str(path.relative_to(folder)) for path in found)}. Give one of the "
                "folders."
            )
    raise CoordinatesError(
        f"{slide_id}: no coordinates in {folder}. Looked for "
        f"{', '.join(name.format(stem) for stem in stems for name in NAMES)} there and in "
        f"{', '.join(where for where in FOLDERS if where)}. Give the folder of the job."
    )


def find_all(folder: str | Path, slides: Iterable[tuple[str, Path | None]]) -> None:
    """Check that each slide, a slide_id with its path, has its coordinates.

    Raises:
        CoordinatesError: some have none, or several; all are listed with their reasons.
    """
    faults = []
    for slide_id, path in slides:
        try:
            find_coordinates(folder, slide_id, path)
        except CoordinatesError as fault:
            faults.append(str(fault))
    if faults:
        raise CoordinatesError(all_faults(folder, faults))


def hs2p_parts(path: Path) -> tuple[Path, Path]:
    """Return the paths of a slide's two hs2p files: its tiles (may be absent) and their facts."""
    stem = path.name.removesuffix(".npz").removesuffix(".meta.json")
    return path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.meta.json")


def coordinates_sha256(path: Path) -> str:
    """Return the SHA-256 of a coordinate file; of both files for hs2p."""
    parts = [path]
    if path.suffix != ".h5":
        tiles, facts = hs2p_parts(path)
        parts = [tiles, facts] if tiles.exists() else [facts]
    try:
        return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    except OSError as error:
        why = error.strerror or error
        raise CoordinatesError(f"{path}: cannot be read: {why}. Copy it again.") from error
