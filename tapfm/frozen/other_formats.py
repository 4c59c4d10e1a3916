"""Writes features as CLAM and STAMP lay them out, from files of `tapfm features`.

    CLAM    features_<encoder>_clam/h5_files/<slide>.h5    `features`, `coords` in level-0 pixels
            features_<encoder>_clam/pt_files/<slide>.pt    a tensor (T, D)
    STAMP   features_<encoder>_stamp/<slide>.h5            `feats` in half precision, `coords` in
                                                           micrometres; attributes on the file
    pt      features_<encoder>_pt/<slide>.pt               a tensor (T, D), as eva and others read
    csv     features_<encoder>_csv/<slide>.csv             a header and a row a tile, for SlideChat
    TRIDENT features_<encoder>/<slide>.h5                  those files themselves: nothing is added

CLAM's and STAMP's are read back by `data.features_dir`. STAMP's version is not written: it refuses
files of a newer one than its own.

Source: CLAM of 2025-04, STAMP 2.4 (`stamp.preprocessing`).

Shapes: T tiles of a slide, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from slides.cohort.table import SlideRow
from slides.errors import SettingsError
from slides.files import replacing
from slides.hdf5 import open_h5, writing_h5
from slides.streaming.settings import Source
from slides.streaming.tile_source import TileSource
from slides.tiling.index_file import TileIndex


def write_formats(
    formats: Sequence[str], folder: Path, rows: Sequence[SlideRow], source: Source
) -> None:
    """Write features of slides for other programs, in folders beside that of `tapfm features`.

    Args:
        formats: of `FORMATS`.
        folder: of the files of `tapfm features`.
        rows: slides that have one.
        source: slides and tiles.

    Raises:
        SettingsError: a feature is beyond the numbers of a format.
        WriteError: the disk is full.
    """
    tiles = TileSource.of(source)
    for row in rows if formats else ():
        write_slide(formats, folder / f"{row.slide_id}.h5", tiles.index(row))


def write_slide(formats: Sequence[str], ours: Path, index: TileIndex) -> None:
    """Write one slide's features for other programs; `ours` is its file of `tapfm features`.

    Raises:
        SettingsError: a feature is beyond the numbers of a format.
        WriteError: the disk is full.
    """
    with open_h5(ours) as file:
        z_TD, encoder = file["features"][:], str(file["features"].attrs["encoder"])
    for name in formats:
        FORMATS[name](ours.parent.with_name(f"{ours.parent.name}_{name}"), z_TD, index, encoder)


def _clam(folder: Path, z_TD: np.ndarray, index: TileIndex, encoder: str) -> None:
    name = index.slide_id
    with writing_h5(folder / "h5_files" / f"{name}.h5") as file:
        file["features"] = z_TD.astype(np.float32)
        file["coords"] = index.coords0
    _pt(folder / "pt_files", z_TD, index, encoder)


def _stamp(folder: Path, z_TD: np.ndarray, index: TileIndex, encoder: str) -> None:
    with np.errstate(over="ignore"):  # said below
        half_TD = z_TD.astype(np.float16)
    if not np.isfinite(half_TD).all():
        raise SettingsError(
            f"{index.slide_id}: features of {encoder} exceed 65504, the largest number of STAMP's "
            "half precision. Leave --format stamp out."
        )
    with writing_h5(folder / f"{index.slide_id}.h5") as file:
        file["feats"] = half_TD
        file["coords"] = (index.coords0 * index.slide_mpp).astype(np.float32)
        file.attrs["extractor"] = encoder
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = index.size0 * index.slide_mpp
        file.attrs["tile_size_px"] = index.grid.size
        file.attrs["feat_type"] = "tile"


def _pt(folder: Path, z_TD: np.ndarray, index: TileIndex, encoder: str) -> None:
    with replacing(folder / f"{index.slide_id}.pt") as path:
        torch.save(torch.from_numpy(z_TD.astype(np.float32)), path)


def _csv(folder: Path, z_TD: np.ndarray, index: TileIndex, encoder: str) -> None:
    with replacing(folder / f"{index.slide_id}.csv") as path:
        header = ",".join(map(str, range(z_TD.shape[1])))
        np.savetxt(path, z_TD.astype(np.float32), "%.7g", ",", header=header, comments="")


FORMATS: dict[str, Callable[[Path, np.ndarray, TileIndex, str], None]] = {
    "clam": _clam,
    "stamp": _stamp,
    "pt": _pt,
    "csv": _csv,
    "trident": lambda *_: None,
}
