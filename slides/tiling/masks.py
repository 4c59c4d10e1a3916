"""Tissue masks that the user or another program drew: GeoJSON outlines, a mask image or an array.

    <folder>/<slide_id>.geojson    QuPath's export, TRIDENT's contours_geojson, or any GeoJSON
    <folder>/<slide_id>.png        any size, stretched over the slide; non-zero pixels are tissue
    <folder>/<slide_id>.npy        the same as an array (h, w) or (h, w, S), as SlideSegmenter gives
                                   tissue or S cross-sections; of floats, 0.5 and above is tissue

Every polygon in a GeoJSON is tissue, holes are not; points and lines are ignored. QuPath's classes
that end in * are no tissue: `Ignore*` is taken out of it; others, such as `Region*`, and missing
cores of a tissue microarray are left out with a warning. Coordinates are
level-0 pixels. QuPath counts from the corner of the scanned part, which in some formats (MIRAX) is
not the slide's corner: QuPath objects are recognised by `objectType` and shifted back. Outlines
that leave the slide, and pictures of other proportions, belong to another slide and are refused.

A pixel of the mask is tissue where its centre is inside, by the even-odd rule in each polygon.

Price: about 10 ms for 10,000 corners.
Source: RFC 7946 for GeoJSON; QuPath's documentation for `objectType`, its origin and "ignored
    classes".
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slides.errors import MaskError
from slides.files import names_of

IGNORED = "Ignore*"
NOT_TISSUE_MARKS = (b'*"', b'"isMissing"')  # in a file that may hold polygons that are no tissue
KINDS = (".geojson", ".png", ".npy")
OUTSIDE = 0.01  # of the slide's longer side: hand-drawn outlines may run over its edge
PROPORTIONS = 0.02  # allowed difference from the slide's, besides one pixel of rounding


def mask_path(folder: str | Path, slide_id: str, slide_path: str | Path | None = None) -> Path:
    """Return the path of the slide's mask in a folder.

    It is named by its slide_id, else by its file (`slides.files.names_of`).

    Raises:
        MaskError: there is none, or there are two.
    """
    for stem in names_of(slide_id, slide_path):
        every = [Path(folder) / f"{stem}{kind}" for kind in KINDS]
        found = [path for path in every if path.is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            break
    stems = [stem] if found else names_of(slide_id, slide_path)
    names = " or ".join(f"{stem}{kind}" for stem in stems for kind in KINDS)
    raise MaskError(
        f"{slide_id}: {'two masks' if found else 'no mask'} in {Path(folder)}: there must be one, "
        f"{names}. {'Remove one' if found else 'Add it'}, or leave tissue.masks out to have tissue "
        f"found."
    )


def mask_sha256(folder: str | Path, slide_id: str, slide_path: str | Path | None = None) -> str:
    """Return the SHA-256 of the slide's mask, which is part of the index's settings."""
    data = _read_bytes(mask_path(folder, slide_id, slide_path), slide_id)
    if any(mark in data for mark in NOT_TISSUE_MARKS):
        data += b"*"  # not the hash of an index in which these polygons were tissue
    return hashlib.sha256(data).hexdigest()


def read_mask(path: Path, slide, shape: tuple[int, int], downsample: float) -> np.ndarray:
    """Return a slide's mask on its thumbnail's pixels, (h, w) bool.

    Args:
        path: the GeoJSON or the picture.
        slide: the open slide: `name`, `width0`, `height0`, `bounds0`.
        shape: (h, w) of the thumbnail.
        downsample: level-0 pixels per thumbnail pixel.

    Raises:
        MaskError: it cannot be read, belongs to another slide, or has no tissue.
    """
    size0 = slide.width0, slide.height0
    if path.suffix == ".geojson":
        tissue, ignored = geojson_polygons(path, slide.name, slide.bounds0[:2])
        _on_the_slide(tissue + ignored, path, slide.name, size0)
        mask, out = np.zeros(shape, bool), np.zeros(shape, bool)
        for polygons, drawn in ((tissue, mask), (ignored, out)):
            for rings in polygons:
                _fill(drawn, [ring / downsample for ring in rings])
        mask &= ~out
    else:
        mask = _picture(path, slide.name, size0, shape, downsample)
    if not mask.any():
        raise MaskError(
            f"{slide.name}: its mask {path} has no tissue, or none as wide as {downsample:.0f} "
            f"level-0 pixels. Check that it is this slide's and at level 0, or leave this slide "
            f"out."
        )
    return mask


def geojson_polygons(
    path: Path, name: str, origin0: tuple[int, int] = (0, 0)
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Return the polygons that are tissue, and those that QuPath's class `Ignore*` takes out of it.

    Each is a list of rings, the outer one first, (N, 2) float64 level-0 x, y.

    Args:
        path: a Feature, a FeatureCollection, a list of features or a bare geometry.
        name: the slide's name, for errors.
        origin0: QuPath's origin on this slide, in level-0 pixels.

    Raises:
        MaskError: it is not GeoJSON, or has no polygon that is tissue.
    """
    kinds: dict[str, list] = {"": [], IGNORED: []}
    text = _read_bytes(path, name)
    try:
        for feature in _features(json.loads(text)):
            shift = np.array(origin0 if _is_qupath(feature) else (0, 0), float)
            polygons = kinds.setdefault(_not_tissue(feature), [])
            for rings in filter(None, _polygons(feature.get("geometry", feature))):
                polygons.append([_ring(ring) + shift for ring in rings])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MaskError(
            f"{name}: {path} cannot be read as GeoJSON: {type(error).__name__}: {error}. "
            f"Export it again (QuPath: File, Export objects as GeoJSON)."
        ) from error
    tissue, ignored = kinds.pop(""), kinds.pop(IGNORED)
    others = {kind: len(polygons) for kind, polygons in kinds.items() if polygons}
    named = " and ".join(f"{count} of {kind}" for kind, count in others.items())
    if not tissue:
        found = {IGNORED: len(ignored)} | others if ignored else others
        only = ", only " + " and ".join(f"{count} of {kind}" for kind, count in found.items())
        raise MaskError(
            f"{name}: {path} has no polygon of tissue in it{only if found else ''}. Outline the "
            "tissue and export it again, or leave this slide out."
        )
    if named:
        warnings.warn(
            f"{name}: polygons that are not taken for tissue: {named}. Give those that are a class "
            f"without *. ({path})",
            stacklevel=2,
        )
    return tissue, ignored


def _not_tissue(feature: dict) -> str:
    """Return "" if a feature is tissue, else its class of QuPath, or that it is a missing core."""
    properties = feature.get("properties") or {}
    if properties.get("isMissing") is True:
        return "missing cores"
    kind = properties.get("classification") or {}
    names = kind.get("names") or [kind.get("name")] if isinstance(kind, dict) else [kind]
    starred = [name for name in names if isinstance(name, str) and name.endswith("*")]
    return next((each for each in starred if each == IGNORED), starred[0] if starred else "")


def _features(found) -> Iterator[dict]:
    """Yield the features of a parsed GeoJSON file."""
    if isinstance(found, list):
        for each in found:
            yield from _features(each)
    elif found["type"] == "FeatureCollection":
        yield from _features(found["features"])
    else:
        yield found


def _polygons(geometry: dict | None) -> Iterator[list]:
    """Yield the rings of each polygon of a geometry; nothing for points, lines and None."""
    if geometry is None:
        return
    kind = geometry["type"]
    if kind == "Polygon":
        yield geometry["coordinates"]
    elif kind == "MultiPolygon":
        yield from geometry["coordinates"]
    elif kind == "GeometryCollection":
        for each in geometry["geometries"]:
            yield from _polygons(each)
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"a geometry of type {kind!r}")


def _is_qupath(feature: dict) -> bool:
    """Return whether QuPath wrote the feature: by `objectType`, or by its id (version 0.2)."""
    properties = feature.get("properties") or {}
    return "objectType" in properties or str(feature.get("id", "")).startswith("Path")


def _ring(corners: list) -> np.ndarray:
    ring = np.array([corner[:2] for corner in corners], np.float64)
    if ring.ndim != 2 or ring.shape[0] < 3 or not np.isfinite(ring).all():
        raise ValueError(f"a ring of {len(corners)} corners that is no outline")
    return ring


def _on_the_slide(
    polygons: list[list[np.ndarray]], path: Path, name: str, size0: tuple[int, int]
) -> None:
    corners = np.concatenate([ring for rings in polygons for ring in rings])
    low, high = corners.min(0), corners.max(0)
    slack = OUTSIDE * max(size0)
    if (low < -slack).any() or (high > np.array(size0) + slack).any():
        raise MaskError(
            f"{name}: the outlines in {path} reach from ({low[0]:.0f}, {low[1]:.0f}) to "
            f"({high[0]:.0f}, {high[1]:.0f}) and leave the slide's {size0[0]} x {size0[1]} pixels: "
            f"they are of another slide, or not in level-0 pixels. Give this slide's own."
        )


def _fill(mask: np.ndarray, rings: list[np.ndarray]) -> None:
    """Set the pixels of `mask` whose centres lie inside the rings, by the even-odd rule.

    Each edge flips all pixels to its right in the rows it crosses, and the flips are summed up.
    """
    height, width = mask.shape
    corners = np.concatenate(rings)
    left, top = (max(0, math.floor(v)) for v in corners.min(0))
    right, bottom = (
        min(side, math.ceil(v)) for side, v in zip((width, height), corners.max(0), strict=True)
    )
    if left >= right or top >= bottom:
        return
    flips = np.zeros((bottom - top, right - left + 1), np.int64)
    for ring in rings:
        (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, 0).T
        first = np.clip(np.ceil(np.minimum(y1, y2) - 0.5), top, bottom).astype(int)
        count = np.clip(np.ceil(np.maximum(y1, y2) - 0.5), top, bottom).astype(int) - first
        edge = np.repeat(np.arange(len(ring)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        share = (row + 0.5 - y1[edge]) / (y2 - y1)[edge]
        crossing = np.ceil(x1[edge] + share * (x2 - x1)[edge] - 0.5)
        column = np.clip(crossing, left, right).astype(int) - left
        np.add.at(flips, (row - top, column), 1)
    mask[top:bottom, left:right] |= (flips.cumsum(1)[:, :-1] & 1).astype(bool)


def _picture(
    path: Path, name: str, size0: tuple[int, int], shape: tuple[int, int], downsample: float
) -> np.ndarray:
    """Return a mask image on the thumbnail's pixels; each takes the pixel under its centre."""
    from PIL import Image

    try:
        if path.suffix == ".npy":
            values, see_through = np.load(path, allow_pickle=False), False
            if values.ndim not in (2, 3) or values.dtype.kind not in "biuf":
                raise ValueError(f"it holds {values.dtype} of shape {values.shape}, not (h, w, S)")
            values = values >= 0.5 if values.dtype.kind == "f" else values
        else:
            with Image.open(path) as image:
                values = np.asarray(image)  # of a palette image: its indices, not its colours
                see_through = image.mode in ("LA", "RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MaskError(
            f"{name}: the mask {path} cannot be read: {error}. Export it again, smaller if it is "
            f"large: an eighth of the slide's resolution is fine enough."
        ) from error
    height, width = values.shape[:2]
    rounding = PROPORTIONS * width + max(1.0, size0[0] / size0[1])
    if abs(width - height * size0[0] / size0[1]) > rounding:
        raise MaskError(
            f"{name}: the mask {path} is {width} x {height} pixels, the slide {size0[0]} x "
            f"{size0[1]}: other proportions, so it is of another slide. Give this slide's own."
        )
    tissue = values != 0
    if see_through:
        tissue = tissue[..., :-1].any(-1) & tissue[..., -1]
    elif tissue.ndim == 3:
        tissue = tissue.any(-1)
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * downsample / side0 * side, side - 1).astype(int)
        for n, side0, side in zip(shape, size0[::-1], (height, width), strict=True)
    )
    return tissue[np.ix_(rows, columns)]


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = f"its mask {path} cannot be read: {error}"
        raise MaskError(f"{name}: {why}. Copy it again, or leave this slide out.") from error
