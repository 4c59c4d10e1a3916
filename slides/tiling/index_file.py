"""The index file of a slide: one h5, readable by TRIDENT, written atomically.

It has TRIDENT's dataset `coords` and attributes, plus the true resolution, each tile's tissue
fraction and the hash of all settings. A file made with other settings is refused, never silently
reused. Its magnifications are 10 / mpp, not nominal, so that TRIDENT reads the same pixels.

The bytes are made in memory, written under a temporary name, synced and renamed: a full disk or a
kill leaves the old file or none. A checksum over the tiles detects later damage.

Source: TRIDENT 0.3 for the names of folders, datasets and attributes.
Differs: tiles are sized by microns per pixel (443 level-0 px at 0.2527, where it reads 448).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slides.errors import CoordinatesError, IndexFileError, IndexSettingsError
from slides.files import damage_as, write_whole
from slides.grid import MAX_TILES, Grid
from slides.hdf5 import open_h5
from slides.tiling.job_folders import coordinates_sha256, find_coordinates
from slides.tiling.masks import mask_sha256
from slides.tiling.tissue import Tissue

if TYPE_CHECKING:
    import h5py

WRITER = "tapfm slides.tiling.index_file"
FIGURES = ("pen_fraction", "blur")  # measured for each tile; absent in older files
BOMB_BYTES, BOMB_RATIO = 1 << 28, 100  # features and corners are never packed so small
WRITER_VERSION = 2  # part of the settings' hash: raise it when the same settings choose other tiles


@dataclass(frozen=True, eq=False)
class TileIndex:
    """The tiles of one slide. T tiles, row by row."""

    slide_id: str
    coords0: np.ndarray
    """(T, 2) int64: x0, y0 of the top-left corners."""
    tissue_fraction: np.ndarray
    """(T,) float32 in [0, 1]."""
    grid: Grid
    size0: int
    """Side of a tile in level-0 pixels."""
    width0: int
    height0: int
    slide_mpp: float
    mpp_source: str
    bounds0: tuple[int, int, int, int]
    """x0, y0, width, height of the scanned part."""
    level: int
    """The level that tiles are read from."""
    tissue_mm2: float
    """Tissue on the whole slide, in square millimetres."""
    mask_sha256: str
    fingerprint: str
    """Fingerprint of the slide's file, which detects a replaced slide (`slides.files`)."""
    pen_fraction: np.ndarray | None = None
    """(T,) float32: the share of each tile under marker strokes; None if not measured."""
    blur: np.ndarray | None = None
    """(T,) float32, see `slides.tiling.focus`; nan or None where it was not measured."""
    origin: str = ""
    """The other program that chose the tiles, and its file; "" if this one did."""
    file_name: str = ""
    """The slide's file, by which masks and coordinates may be named; "" in older indexes."""

    def __len__(self) -> int:
        return len(self.coords0)

    @property
    def step0(self) -> int:
        """Level-0 pixels from a tile of the lattice to the next, at least 1."""
        return max(1, round(self.size0 * (self.grid.size - self.grid.overlap) / self.grid.size))

    def part(self, rows: slice | np.ndarray) -> TileIndex:
        """Return the index of some of the tiles, in the order of `rows`."""
        each = {"coords0": self.coords0, "tissue_fraction": self.tissue_fraction, **_figures(self)}
        return replace(self, **{name: values[rows] for name, values in each.items()})


def index_path(index_dir: str | Path, grid: Grid, slide_id: str) -> Path:
    """Return the path of a slide's index, in TRIDENT's folder layout."""
    return Path(index_dir) / grid.tag / "patches" / f"{slide_id}_patches.h5"


def write_index(path: str | Path, index: TileIndex, tissue: Tissue) -> None:
    """Write an index completely, or keep the old file.

    Raises:
        IndexFileError: it cannot be written: full disk, no permission.
    """
    import h5py

    path = Path(path)
    buffer = io.BytesIO()  # HDF5 straight onto a full disk may fail only on closing, half written
    with h5py.File(buffer, "w") as file:
        rows = min(4096, max(1, len(index)))
        coords = file.create_dataset(
            "coords", data=index.coords0, dtype="i8", chunks=(rows, 2), maxshape=(None, 2)
        )
        file.create_dataset("tissue_fraction", data=index.tissue_fraction, dtype="f4")
        for name, values in _figures(index).items():
            file.create_dataset(name, data=values, dtype="f4")
        coords.attrs.update(index_attributes(index, tissue, path.parent.parent))
    write_whole(path, buffer.getvalue(), index.slide_id)


def index_attributes(index: TileIndex, tissue: Tissue, folder: Path) -> dict:
    """Return the attributes of the dataset `coords`: TRIDENT's, then ours.

    Args:
        index: the tiles.
        tissue: the settings that chose them.
        folder: the index's folder, `20x_224px_0px_overlap`.
    """
    grid, settings = index.grid, _settings(index.grid, tissue, index.slide_id, index.file_name)
    return {
        "patch_size": grid.size,
        "patch_size_level0": index.size0,
        "level0_magnification": _magnification0(grid, index.size0),
        "target_magnification": grid.magnification,
        "overlap": grid.overlap,
        "name": index.slide_id,
        "savetodir": str(folder),
        "level0_width": index.width0,
        "level0_height": index.height0,
        # from here on ours, which TRIDENT ignores
        "mpp_level0": index.slide_mpp,
        "mpp_source": index.mpp_source,
        "target_mpp": grid.mpp,
        "patch_size_level0_exact": grid.size * grid.mpp / index.slide_mpp,
        "read_level": index.level,
        "bounds_level0": np.array(index.bounds0, np.int64),
        "tissue_mm2": index.tissue_mm2,
        "slide_fingerprint": index.fingerprint,
        "writer": WRITER,
        "writer_version": WRITER_VERSION,
        "origin": index.origin,
        "slide_file": index.file_name,
        "settings": settings,
        "spec_sha256": _sha256(settings.encode()),
        "mask_sha256": index.mask_sha256,
        "tiles_sha256": _tiles_sha256(
            index.coords0, index.tissue_fraction, *_figures(index).values()
        ),
    }


def read_index(
    path: str | Path, grid: Grid, tissue: Tissue, slide_path: str | Path | None = None
) -> TileIndex:
    """Read an index that was made with these settings.

    Masks and coordinates may be named by the file `slide_path`; None is the one it was made from.

    Raises:
        IndexFileError: there is none, or the file is damaged.
        IndexSettingsError: it was made with other settings; the message lists which.
        MaskError, CoordinatesError: this slide's mask or coordinates, named in `tissue`, are
            missing.
        CoordinatesError: another program wrote it.
    """
    path = Path(path)
    if not path.is_file():
        raise IndexFileError(f"{path.name}: no index at {path}. Make it with `tapfm index`.")
    with damage_as(lambda why: IndexFileError(_damaged(path, why))):
        with open_h5(path) as file:
            attrs = dict(must_be_tiles(file["coords"]).attrs)
            if "spec_sha256" not in attrs:
                raise CoordinatesError(
                    f"{path.stem.removesuffix('_patches')}: its index would take the place of "
                    f"{path}, which another program wrote. Name another folder for the index "
                    "(--out); --coords takes that program's tiles as they are."
                )
            coords0 = file["coords"][:].astype(np.int64)
            fraction = file["tissue_fraction"][:]
            figures = {name: file[name][:] for name in FIGURES if name in file}
        if tissue.coords is not None:  # another program's grid may differ slightly: keep it
            theirs = Grid(*(attrs[key].item() for key in ("patch_size", "target_mpp", "overlap")))
            if other := grid.other_tiles(theirs):
                raise IndexSettingsError(_other_settings(path, attrs, other))
            grid = theirs
        _same_settings(path, attrs, grid, tissue, slide_path)
        whole = attrs["tiles_sha256"] == _tiles_sha256(coords0, fraction, *figures.values())
        index = TileIndex(
            slide_id=str(attrs["name"]),
            coords0=coords0,
            tissue_fraction=fraction,
            grid=grid,
            size0=int(attrs["patch_size_level0"]),
            width0=int(attrs["level0_width"]),
            height0=int(attrs["level0_height"]),
            slide_mpp=float(attrs["mpp_level0"]),
            mpp_source=str(attrs["mpp_source"]),
            bounds0=tuple(int(value) for value in attrs["bounds_level0"]),
            level=int(attrs["read_level"]),
            tissue_mm2=float(attrs["tissue_mm2"]),
            mask_sha256=str(attrs["mask_sha256"]),
            fingerprint=str(attrs["slide_fingerprint"]),
            origin=str(attrs.get("origin", "")),
            file_name=str(attrs.get("slide_file", "")),
            **figures,
        )
    if not whole:
        raise IndexFileError(_damaged(path, "the tiles do not match their checksum"))
    return index


def must_be_tiles(data: h5py.Dataset) -> h5py.Dataset:
    """Return a dataset, or raise ValueError if it holds more than a slide's tiles; reads none."""
    rows = math.prod(data.shape[:-1] or data.shape)
    stored = data.id.get_storage_size()
    if rows > MAX_TILES or (data.nbytes > BOMB_BYTES and data.nbytes > BOMB_RATIO * stored):
        raise ValueError(
            f"{rows} rows, {data.nbytes / 1e9:.1f} GB of which {stored / 1e6:.1f} MB are stored: "
            f"no slide has so many tiles ({MAX_TILES} are the most)"
        )
    return data


def _settings(grid: Grid, tissue: Tissue, slide_id: str, file_name: str | Path) -> str:
    """Return all settings that decide which tiles are chosen, as canonical JSON.

    Masks and coordinates enter by their contents, not by their path.
    """
    if tissue.coords is not None:
        sha256 = coordinates_sha256(find_coordinates(tissue.coords, slide_id, file_name))
        chosen = {"grid": asdict(grid), "coords": {"sha256": sha256}}
        return json.dumps({**chosen, "writer_version": WRITER_VERSION}, sort_keys=True)
    chosen_by = {key: value for key, value in asdict(tissue).items() if value is not None}
    if chosen_by.pop("masks", None) is not None:
        chosen_by["mask_sha256"] = mask_sha256(tissue.masks, slide_id, file_name)
    settings = {"grid": asdict(grid), "tissue": chosen_by, "writer_version": WRITER_VERSION}
    return json.dumps(settings, sort_keys=True)


def _same_settings(
    path: Path, attrs: dict, grid: Grid, tissue: Tissue, slide_path: str | Path | None
) -> None:
    asked = _settings(
        grid, tissue, str(attrs["name"]), slide_path or str(attrs.get("slide_file", ""))
    )
    if attrs["spec_sha256"] == _sha256(asked.encode()):
        return
    had, wanted = _flat(json.loads(attrs["settings"])), _flat(json.loads(asked))
    other = [
        f"{key} was {had.get(key)!r}, asked for {wanted.get(key)!r}"
        for key in sorted(had.keys() | wanted.keys())
        if had.get(key) != wanted.get(key)
    ]
    raise IndexSettingsError(_other_settings(path, attrs, "; ".join(other)))


def _other_settings(path: Path, attrs: dict, which: str) -> str:
    return (
        f"{attrs['name']}: its index was made with other settings: {which}. Run `tapfm index` with "
        f"the new settings to rebuild it, or use another index folder. ({path})"
    )


def _flat(settings: dict) -> dict:
    """Return nested settings with dotted keys: {"grid": {"mpp": 0.5}} becomes {"grid.mpp": 0.5}."""
    flat = {}
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{k}".rstrip("."): v for k, v in inner.items()}
    return flat


def _magnification0(grid: Grid, size0: int) -> float:
    """Return the level-0 magnification from which TRIDENT's formula gives `size0`."""
    magnification0 = grid.magnification * size0 / grid.size
    while grid.size * magnification0 // grid.magnification < size0:  # rounding down by one ulp
        magnification0 = math.nextafter(magnification0, math.inf)
    return magnification0


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _figures(index: TileIndex) -> dict[str, np.ndarray]:
    """Return the measurements of each tile that this index has."""
    figures = {name: getattr(index, name) for name in FIGURES}
    return {name: values for name, values in figures.items() if values is not None}


def _tiles_sha256(coords0: np.ndarray, *figures: np.ndarray) -> str:
    columns = [figure.astype("<f4").tobytes() for figure in figures]
    return _sha256(b"".join([coords0.astype("<i8").tobytes(), *columns]))


def _damaged(path: Path, why) -> str:
    return f"{path.name}: the index is damaged: {why}. Delete {path} and run `tapfm index` again."
