"""Tile features on disk, by slide: those of tapfm, TRIDENT, CLAM and STAMP.

    tapfm, TRIDENT   <slide>.h5            `features` (T, D) or (1, T, D), `coords` with attributes
    CLAM             h5_files/<slide>.h5   `features`, `coords` without attributes
                     pt_files/<slide>.pt   a tensor, no coordinates
    STAMP            <slide>.h5            `feats`, `coords` in micrometres, attributes on the file
    AtlasPatch       <slide>.h5            `features/<encoder>`, one of them; `coords` (T, 5)
    tapfm, TRIDENT   <slide>.h5            `features` (E,) of a slide encoder: as one tile; of
                                           several, each as a tile with places of its own

Coordinates become level-0 pixels. Ours also have `scores` (T,), the raw CLS scores.

Source: the files those programs write (TRIDENT 0.3, CLAM of 2025-04, STAMP of 2026-04, AtlasPatch
1.1); no code of theirs.

Shapes: T tiles of a slide, D features.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from slides.errors import FeatureFileError
from slides.files import damage_as, names_of
from slides.hdf5 import open_h5
from slides.tiling.index_file import must_be_tiles

PLACES = "{}.h5", "h5_files/{}.h5", "pt_files/{}.pt", "{}.pt"
AGAIN = "Extract them again, or leave the slide out (data.on_error: skip)."


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """The features of a slide's tiles, and where the tiles lie."""

    slide_id: str
    path: Path
    writer: str
    """`tapfm`, `TRIDENT`, `CLAM`, `STAMP` or `AtlasPatch`."""
    z_TD: Tensor
    """In the numbers that the file holds."""
    score_T: Tensor | None = None
    """Raw CLS scores, float32; None where the file has none."""
    coords0: np.ndarray | None = None
    """int64 (T, 2) level-0 pixels of the upper left corners; None is unknown."""
    size0: int = 1
    """Side of a tile in level-0 pixels."""
    step0: int = 1
    """Level-0 pixels from a tile of the lattice to the next."""
    encoder: str = ""
    """Name of the encoder, where the file says."""
    own_step0_T: np.ndarray | None = None
    """`step0` of each tile, where they are of several magnifications."""
    of_slide: bool = False
    """Whether it is one vector of the whole slide."""

    def __len__(self) -> int:
        return len(self.z_TD)

    @property
    def step0_T(self) -> np.ndarray:
        """Level-0 pixels from each tile to the next of its lattice, float64."""
        every = self.own_step0_T
        return np.full(len(self), self.step0, np.float64) if every is None else every


def find_file(folder: Path, slide_id: str, slide_path: Path | None = None) -> Path | None:
    """Return the first of a slide's files that is there, one with coordinates before others.

    Files are named by the slide_id, else by the slide's file (`slides.files.names_of`).
    """
    names = names_of(slide_id, slide_path)
    paths = (folder / place.format(name) for name in names for place in PLACES)
    return next((path for path in paths if path.is_file()), None)


def read_slide(
    folder: Path,
    slide_id: str,
    mpp0: Callable[[], float | None],
    slide_path: Path | None = None,
) -> SlideFeatures:
    """Return a slide's features, checked.

    Args:
        folder: as given in `data.features_dir`.
        slide_id: the slide's name.
        mpp0: gives the slide's microns per level-0 pixel, by which STAMP's coordinates are turned
            to pixels; where it gives None, the tiles' own resolution stands for it.
        slide_path: the slide's file, by which its features may be named.

    Raises:
        FeatureFileError: the file is missing, damaged or holds code; a number is not finite, there
            is no tile, or there are more or fewer coordinates than tiles.
    """
    path = find_file(folder, slide_id, slide_path)
    if path is None:
        names = ", ".join(f"{name}.h5 or .pt" for name in names_of(slide_id, slide_path))
        raise FeatureFileError(
            f"{slide_id}: there is no {names} in {folder}, its h5_files or pt_files. "
            "Extract its features, or leave the slide out (data.on_error: skip)."
        )
    with damage_as(lambda why: FeatureFileError(_damaged(slide_id, path, why))):
        found = _tensor(slide_id, path) if path.suffix == ".pt" else _h5(slide_id, path, mpp0)
    found = replace(found, z_TD=found.z_TD[0]) if found.z_TD.ndim == 3 else found
    _check(found)
    return found


def read_scales(
    folders: Sequence[Path],
    slide_id: str,
    mpp0: Callable[[], float | None],
    slide_path: Path | None = None,
) -> SlideFeatures:
    """Return a slide's features of one or several magnifications, a folder each, as one set.

    Size and path are those of the first folder. Vectors of the slide by several slide encoders
    stand apart: a row each, with numbers in columns of its own and 0 in those of the others. So
    attention over the rows weighs the encoders, and a linear layer behind it has its own weights
    for each.

    Args:
        folders: as given in `data.features_dir`.
        slide_id: as in `read_slide`, and so are the others.
        mpp0: the slide's microns per level-0 pixel, when asked.
        slide_path: the slide's file.

    Raises:
        FeatureFileError: as `read_slide`, or of several one has no coordinates or another width,
            or some are of tiles and others of slides.
    """
    first, *more = found = [read_slide(each, slide_id, mpp0, slide_path) for each in folders]
    if not more:
        return first
    if all(each.of_slide for each in found):
        names = [each.encoder or str(each.path.parent.name) for each in found]
        apart = torch.block_diag(*(each.z_TD.float() for each in found))
        return replace(first, z_TD=apart, encoder=", ".join(names))
    for each in found:
        if each.coords0 is None:
            raise FeatureFileError(
                f"{slide_id}: {each.path} has no coordinates, by which tiles of several "
                f"magnifications are laid on each other. {AGAIN}"
            )
        if each.z_TD.shape[1] != first.z_TD.shape[1]:
            raise FeatureFileError(
                f"{slide_id}: {each.path} has {each.z_TD.shape[1]} features a tile, and "
                f"{first.path} has {first.z_TD.shape[1]}. Give features of one encoder."
            )
    scores = [each.score_T for each in found]
    return replace(
        first,
        z_TD=torch.cat([each.z_TD for each in found]),
        score_T=None if any(each is None for each in scores) else torch.cat(scores),
        coords0=np.concatenate([each.coords0 for each in found]),
        own_step0_T=np.concatenate([each.step0_T for each in found]),
    )


def _tensor(slide_id: str, path: Path) -> SlideFeatures:
    """CLAM's pt_files, read without running code."""
    try:
        z_TD = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FeatureFileError(
            f"{slide_id}: {path} is no plain tensor: it is damaged, or holds code or objects, "
            "which are not loaded. Save the tensor alone: torch.save(features, path)."
        ) from error
    if not isinstance(z_TD, Tensor):
        raise ValueError(f"it holds a {type(z_TD).__name__}, not a tensor")
    return SlideFeatures(slide_id, path, "CLAM", z_TD)


def _h5(slide_id: str, path: Path, mpp0: Callable[[], float | None]) -> SlideFeatures:
    """Return an h5's features, whoever wrote it."""
    with open_h5(path) as file:
        stamp = "feats" in file
        values = file["feats" if stamp else "features"]
        named = ""
        if not isinstance(values, h5py.Dataset):  # AtlasPatch's
            sets = [each for each in values.values() if isinstance(each, h5py.Dataset)]
            if len(values) != 1 or not sets:
                there = ", ".join(values) or "none"
                raise ValueError(f"`features` is a group of several encoders' features: {there}")
            named, values = next(iter(values.items()))
        for each in (values, *(file[name] for name in ("coords", "scores") if name in file)):
            must_be_tiles(each)
        facts, on_file = dict(values.attrs), dict(file.attrs)
        attrs, coords = {}, None
        if "coords" in file:
            attrs, coords = dict(file["coords"].attrs), file["coords"][:]
        score = file["scores"][:].astype(np.float32) if "scores" in file else None
        found = SlideFeatures(
            slide_id,
            path,
            "tapfm"
            if "fingerprint" in facts
            else "STAMP"
            if stamp
            else "AtlasPatch"
            if named
            else "CLAM",
            torch.from_numpy(values[:]),
            None if score is None else torch.from_numpy(score),
            encoder=named or str(facts.get("encoder", on_file.get("extractor", ""))),
        )
    if found.z_TD.ndim == 1:  # of the slide, whatever places are beside it
        return replace(found, z_TD=found.z_TD[None], score_T=None, of_slide=True)
    if coords is None:
        return found
    coords = coords.reshape(-1, coords.shape[-1])
    if stamp:
        return _stamp(found, on_file, coords, mpp0)
    coords0 = coords[:, :2].astype(np.int64)
    if named and "patch_size" in on_file:
        return replace(found, coords0=coords0, **_sizes(on_file))
    if "patch_size" in attrs:
        writer = found.writer if found.writer == "tapfm" else "TRIDENT"
        return replace(found, writer=writer, coords0=coords0, **_sizes(attrs))
    step0 = _step(coords0)
    return replace(found, coords0=coords0, size0=step0, step0=step0)


def _sizes(attrs: Mapping[str, Any]) -> dict[str, int]:
    """Return side and step of tiles by TRIDENT's attributes; some versions write floats."""
    size, overlap = int(attrs["patch_size"]), int(attrs.get("overlap", 0))
    size0 = attrs.get("patch_size_level0")
    if size0 is None:
        size0 = size * attrs["level0_magnification"] // attrs["target_magnification"]
    return {"size0": int(size0), "step0": max(1, round(int(size0) * (size - overlap) / size))}


def _stamp(
    found: SlideFeatures,
    attrs: Mapping[str, Any],
    coords: np.ndarray,
    mpp0: Callable[[], float | None],
) -> SlideFeatures:
    """Return STAMP features with level-0 corners; without any if no unit is named."""
    side_um = float(attrs.get("tile_size_um", attrs.get("tile_size", 0)))  # 2.1 renamed it
    if attrs.get("unit") != "um" or not side_um:
        return found
    own = float(attrs.get("mpp", side_um / float(attrs.get("tile_size_px", 224))))
    mpp = mpp0() or own
    coords0 = (coords.astype(np.float64) / mpp).round().astype(np.int64)
    side0 = max(1, round(side_um / mpp))
    return replace(found, coords0=coords0, size0=side0, step0=side0)


def _step(coords0: np.ndarray) -> int:
    """Return the commonest distance of a tile to the next in its row or column, at least 1.

    CLAM lays a lattice of its own over each contour, so the least distance may be of two of them.
    """
    apart = []
    for axis in (0, 1):
        order = np.lexsort([coords0[:, axis], coords0[:, 1 - axis]])
        same_line = np.diff(coords0[order, 1 - axis]) == 0
        apart.append(np.diff(coords0[order, axis])[same_line])
    apart = np.concatenate(apart)
    steps, counts = np.unique(apart[apart > 0], return_counts=True)
    return int(steps[counts.argmax()]) if len(steps) else 1


def _check(found: SlideFeatures) -> None:
    """Refuse features that nothing can be learned of."""
    name, path, z_TD = found.slide_id, found.path, found.z_TD
    if z_TD.ndim != 2 or not z_TD.is_floating_point():
        shape = f"{tuple(z_TD.shape)} of {str(z_TD.dtype).removeprefix('torch.')}"
        raise FeatureFileError(
            f"{name}: {path} holds {shape}, and floats of shape (tiles, features) are needed. "
            f"{AGAIN}"
        )
    if not z_TD.numel():
        raise FeatureFileError(
            f"{name}: {path} holds no tile. Loosen what tiles are chosen by, or leave the slide "
            "out (data.on_error: skip)."
        )
    bad = int((~z_TD.isfinite()).sum())
    if bad:
        half = z_TD.dtype == torch.float16 and not z_TD.isnan().any()
        why = " (float16 ends at 65504: store float32)" if half else ""
        raise FeatureFileError(
            f"{name}: {bad} of the {z_TD.numel()} numbers in {path} are nan or infinite{why}. "
            f"{AGAIN}"
        )
    for what, values in (("coordinates", found.coords0), ("scores", found.score_T)):
        if values is not None and len(values) != len(z_TD):
            raise FeatureFileError(
                f"{name}: {path} holds {len(values)} {what} for {len(z_TD)} tiles. {AGAIN}"
            )
    if found.score_T is not None and not found.score_T.isfinite().all():
        raise FeatureFileError(f"{name}: scores in {path} are nan or infinite. {AGAIN}")


def _damaged(name: str, path: Path, why: str) -> str:
    return (
        f"{name}: {path} is damaged, or no feature file of tapfm, TRIDENT, CLAM or STAMP: {why}. "
        f"{AGAIN}"
    )
