"""Reads tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose, from their files.

    index = read_coordinates(find_coordinates(folder, slide.name), slide)

The result is used like an index of our own. Tiles keep their order, so row n is row n of that
program's features, and their size in level-0 pixels, whatever its nominal magnification; the
resolution follows from that size on this slide. Tiles that cannot be read in exactly that size, and
files of another slide, are refused.

`index_from_coordinates` fits them to the tiles that were asked for, and says how: the same square
in other pixels (CLAM's 512 of a 40x scan are 256 at 20x), or the middle of a square that is a
little larger (TRIDENT's 256 for a model of 224). Corners alone are taken where they are as far
apart as the tiles that were asked for.

    TRIDENT      h5, `coords` (T, 2) with its attributes on the dataset
    CLAM         the same, with `patch_level`; size in pixels of that level
    AtlasPatch   h5, `coords` (T, 5): x, y, width, height, level; attributes on the file
    hs2p         <id>.coordinates.meta.json and, where there are tiles, .coordinates.npz (x, y,
                 tissue_fractions)

Source: files that these programs wrote (TRIDENT 0.3, CLAM, AtlasPatch 1.1, hs2p 6.1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slides.errors import CoordinatesError, NoTissueError
from slides.files import damage_as, file_fingerprint
from slides.grid import MPP_RANGE, UNSCALED_TOLERANCE, Grid
from slides.hdf5 import open_h5
from slides.tiling.index_file import TileIndex, must_be_tiles
from slides.tiling.job_folders import coordinates_sha256, hs2p_parts
from slides.wsi.reader import Slide

LEAST_MIDDLE = 0.75  # of a square's side: with less, most of its tissue would be left out


@dataclass(frozen=True)
class _Found:
    """Contents of a coordinate file. T tiles."""

    writer: str
    coords0: np.ndarray
    size: int
    """Side of a tile in tile pixels."""
    size0: int
    overlap: int
    slide_size0: tuple[int, int] | None
    """Width and height of the slide it was made for; None if not stated."""
    fraction: np.ndarray | None = None


def read_coordinates(path: str | Path, slide: Slide, asked: Grid | None = None) -> TileIndex:
    """Return the index of the tiles in another program's coordinate file.

    Tissue fractions are 1 if the program stores none. `mask_sha256` is the hash of the file.
    `asked` is the tile of corners without a size; with None they are refused.

    Raises:
        CoordinatesError: the file is missing, damaged, of an unknown kind or of another slide, or
            its tiles cannot be read in their size.
        TooCoarseError: its tiles are finer than the scan.
    """
    path = Path(path)
    if not path.is_file():
        raise CoordinatesError(f"{slide.name}: no coordinates at {path}. Correct the path.")
    with damage_as(lambda why: CoordinatesError(_damaged(slide.name, path, why))):
        found = _hs2p(path) if path.suffix in (".npz", ".json") else _h5(path, slide, asked)
    grid = _grid(found, slide, path)
    _of_this_slide(found, slide, path)
    fraction = np.ones(len(found.coords0)) if found.fraction is None else found.fraction
    return TileIndex(
        slide_id=slide.name,
        coords0=found.coords0,
        tissue_fraction=fraction.astype(np.float32),
        grid=grid,
        size0=found.size0,
        width0=slide.width0,
        height0=slide.height0,
        slide_mpp=slide.mpp,
        mpp_source=slide.mpp_source,
        bounds0=slide.bounds0,
        level=slide.level_for(found.size0, found.size),
        tissue_mm2=float("nan"),
        mask_sha256=coordinates_sha256(path),
        fingerprint=file_fingerprint(slide.path),
        file_name=slide.path.name,
        origin=f"{found.writer}: {path.absolute()}",
    )


def index_from_coordinates(path: str | Path, slide: Slide, grid: Grid) -> tuple[TileIndex, str]:
    """Return the tiles of a coordinate file as `grid` reads them, and what was changed for that.

    Raises:
        CoordinatesError: see `read_coordinates`; or the tiles have another size or resolution.
        NoTissueError: there are none.
        SlideError: the slide cannot be read.
    """
    slide.check_complete()
    index, notes = _each_once(read_coordinates(path, slide, grid))
    if other := grid.other_tiles(index.grid):
        index, fitted = _fitted(index, grid, slide, other)
        notes.insert(0, fitted)
    if not len(index):
        raise NoTissueError(f"{slide.name}: no tile in {path}. Choose tiles, or leave it out.")
    slide.read(*index.coords0[len(index) // 2].tolist(), index.grid)  # check that pixels are there
    if over := (index.coords0 + index.size0 > (slide.width0, slide.height0)).any(-1).sum():
        notes.append(f"{over} tiles reach over the slide's edge: white there, black in other tools")
    return index, "; ".join(notes)


def _each_once(index: TileIndex) -> tuple[TileIndex, list[str]]:
    """Return the index with each tile once, and what was left out: CLAM's contours overlap."""
    first = np.sort(np.unique(index.coords0, axis=0, return_index=True)[1])
    if not (twice := len(index) - len(first)):
        return index, []
    kept = {name: getattr(index, name)[first] for name in ("coords0", "tissue_fraction")}
    return replace(index, **kept), [f"{twice} tiles are listed more than once and taken once"]


def _fitted(index: TileIndex, grid: Grid, slide: Slide, other: str) -> tuple[TileIndex, str]:
    """Return the index with the tiles that were asked for, at the same centres, and how.

    Raises:
        CoordinatesError: they are larger than the squares of the file, or much smaller.
    """
    size0, theirs0 = grid.size0(slide.mpp, slide.name), index.size0
    same_scale = abs(index.grid.mpp - grid.mpp) <= UNSCALED_TOLERANCE * grid.mpp
    if not same_scale and abs(size0 - theirs0) <= UNSCALED_TOLERANCE * size0:
        same = replace(grid, mpp=theirs0 * slide.mpp / grid.size)
        if same.size0(slide.mpp) == theirs0:  # not where it would be read unscaled
            note = f"its squares of {theirs0} level-0 pixels are read as {grid.size} px"
            level = slide.level_for(theirs0, grid.size)
            return replace(index, grid=same, level=level), note
    any_scale = index.origin.startswith("CLAM: ")  # its patch_size is not what a model sees
    if not (same_scale or any_scale) or not LEAST_MIDDLE * theirs0 <= size0 <= theirs0:
        raise CoordinatesError(
            f"{slide.name}: its tiles are {theirs0} level-0 pixels made into {index.grid.size}, at "
            f"the scan's {slide.mpp:g} microns per pixel: {other}. Set data.tiles to match them. "
            "Where a job's slides differ in resolution, leave these out (data.on_error: skip, or "
            f"--on-error skip), or index without its coordinates. ({index.origin})"
        )
    middle = replace(
        index,
        coords0=index.coords0 + (theirs0 - size0) // 2,
        grid=replace(grid, overlap=0),
        size0=size0,
        level=slide.level_for(size0, grid.size),
    )
    return middle, f"the middle {size0} of its squares of {theirs0} level-0 pixels are read"


def _h5(path: Path, slide: Slide, asked: Grid | None) -> _Found:
    with open_h5(path) as file:
        shape = must_be_tiles(file["coords"]).shape
        if shape[0] and (len(shape) != 2 or shape[1] < 2):
            raise ValueError(f"`coords` has the shape {shape}, and no x and y in a row")
        on_file, attrs, coords = dict(file.attrs), dict(file["coords"].attrs), file["coords"][:]
    coords0 = coords[:, :2].astype(np.int64) if len(coords) else np.empty((0, 2), np.int64)
    if "patch_level" in attrs:
        return _clam(attrs, coords0, slide)
    if not attrs and "patch_size" not in on_file:
        return _corners_alone(path, coords0, slide, asked)
    atlas = "patch_size" not in attrs
    return _trident(on_file if atlas else attrs, coords0, "AtlasPatch" if atlas else "TRIDENT")


def _corners_alone(path: Path, coords0: np.ndarray, slide: Slide, asked: Grid | None) -> _Found:
    """Return corners without a size with the tiles asked for, if they are as far apart."""
    steps = np.concatenate([np.diff(np.unique(axis)) for axis in coords0.T])
    step0 = int(steps.min()) if len(steps) else 0
    size0 = asked.size0(slide.mpp, slide.name) if asked else 0
    if not asked or abs(step0 - size0) > UNSCALED_TOLERANCE * size0:
        wanted = f" and tiles of {size0} were asked for" if asked else ""
        raise CoordinatesError(
            f"{slide.name}: {path} lacks the size of its tiles, an attribute patch_size of coords. "
            f"Its corners are {step0} level-0 pixels apart{wanted}. Add the attributes, or ask for "
            "tiles of that size."
        )
    return _Found("corners without a size", coords0, asked.size, size0, 0, None)


def _trident(attrs: dict, coords0: np.ndarray, writer: str) -> _Found:
    """Return the contents of a TRIDENT or AtlasPatch file; some versions write floats for ints."""
    size = int(attrs["patch_size"])
    size0 = attrs.get("patch_size_level0")
    if size0 is None:
        size0 = size * attrs["level0_magnification"] // attrs["target_magnification"]
    sides = [attrs.get(f"level0_{side}") for side in ("width", "height")]
    return _Found(
        writer, coords0, size, int(size0), int(attrs.get("overlap", 0)),
        None if None in sides else (int(sides[0]), int(sides[1])),
    )  # fmt: skip


def _clam(attrs: dict, coords0: np.ndarray, slide: Slide) -> _Found:
    """Return the contents of a CLAM file; its `patch_size` is in pixels of `patch_level`."""
    size, level = int(attrs["patch_size"]), int(attrs["patch_level"])
    stated = attrs.get("downsample")
    scale = np.mean(stated) if stated is not None else slide.level_downsamples[level]
    scale = float(scale) * float(attrs.get("custom_downsample", 1))
    whole = attrs.get("level_dim") if level == 0 else None
    return _Found(
        "CLAM", coords0, size, round(size * scale), 0,
        None if whole is None else (int(whole[0]), int(whole[1])),
    )  # fmt: skip


def _hs2p(path: Path) -> _Found:
    """Return the contents of hs2p's files; its tiles always have the requested size."""
    tiles, facts = hs2p_parts(path)
    stated = json.loads(facts.read_text())
    tiling, slide_size0 = stated["tiling"], stated["slide"]["dimensions"]
    coords0, fraction = np.empty((0, 2), np.int64), None
    if tiling["n_tiles"]:
        with np.load(tiles, allow_pickle=False) as arrays:
            coords0 = np.stack([arrays["x"], arrays["y"]], -1).astype(np.int64)
            fraction = arrays["tissue_fractions"]
    if len(coords0) != tiling["n_tiles"]:
        raise ValueError(f"{len(coords0)} tiles where {facts.name} says {tiling['n_tiles']}")
    size, size0 = int(tiling["requested_tile_size_px"]), int(tiling["tile_size_lv0"])
    overlap = round((size0 - tiling["step_px_lv0"]) * size / size0)
    return _Found("hs2p", coords0, size, size0, overlap, tuple(slide_size0), fraction)


def _damaged(name: str, path: Path, why: str) -> str:
    return (
        f"{name}: {path} is damaged, or no coordinate file of TRIDENT, CLAM, AtlasPatch or hs2p: "
        f"{why}. Create it again, or use `tapfm index`."
    )


def _grid(found: _Found, slide: Slide, path: Path) -> Grid:
    """Return the grid on which our reader gives exactly these tiles."""
    if found.size < 1 or found.size0 < 1:
        raise CoordinatesError(
            f"{slide.name}: {path} says its tiles are {found.size0} level-0 pixels made into "
            f"{found.size}; both must be 1 or more. Make the file again."
        )
    mpp = found.size0 * slide.mpp / found.size
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise CoordinatesError(
            f"{slide.name}: {path} has tiles of {found.size0} level-0 pixels made into "
            f"{found.size}: {mpp:g} microns per pixel is no resolution. Make it again."
        )
    grid = Grid(found.size, mpp, min(max(found.overlap, 0), found.size - 1))
    if grid.size0(slide.mpp, slide.name) != found.size0:
        raise CoordinatesError(
            f"{slide.name}: {found.writer}'s tiles are {found.size0} level-0 pixels made into "
            f"{found.size}, within 5 % of the scan's own resolution, where tiles are read unscaled "
            f"here. Choose tiles of {found.size} level-0 pixels there, or use `tapfm index`. "
            f"({path})"
        )
    return grid


def _of_this_slide(found: _Found, slide: Slide, path: Path) -> None:
    here = slide.width0, slide.height0
    if found.slide_size0 not in (None, here):
        raise CoordinatesError(
            f"{slide.name}: {path} was made by {found.writer} for a slide of "
            f"{found.slide_size0[0]} x {found.slide_size0[1]} pixels, this one has {here[0]} x "
            f"{here[1]}. Name the coordinates of this slide."
        )
    outside = ((found.coords0 < 0) | (found.coords0 >= here)).any(-1).sum()
    if outside:
        raise CoordinatesError(
            f"{slide.name}: {outside} of the {len(found.coords0)} tiles in {path} lie outside the "
            f"slide's {here[0]} x {here[1]} pixels: they are of another slide or level. Give this "
            "slide's, in level-0 pixels."
        )
