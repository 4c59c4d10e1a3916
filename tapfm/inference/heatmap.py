"""Heatmaps: tile values on the slide's thumbnail (PNG), and as objects for QuPath (GeoJSON).

`overlay_png` shows the thumbnail beside the same thumbnail under the tiles' colours. Colours are
rank percentiles by default: weights from a softmax span orders of magnitude, so a linear scale
shows a few bright tiles and nothing else. The colour bar names the scale. Ranks do not show size:
`weight_opacity` does, and where attention is flat `effective_text` says so above the picture.

`write_geojson` writes a FeatureCollection of QuPath "tile" objects with measurements (Measure >
Show measurement maps gives the heat map there; QuPath 0.4 or newer). QuPath crops some formats to
the slide's bounds, so corners are level-0 pixels less that offset. A slide with more than 50,000
tiles is written as a .zip with the same file in it, which QuPath opens as well. Ids come from
slide and position alone: writing twice gives the same file, and importing twice the same objects.

Both files are written under a temporary name and renamed.

Source: QuPath's GeoJSON (qupath.github.io, "Importing & exporting annotations").

Shapes: T tiles, H W height and width of the thumbnail.
"""

from __future__ import annotations

import json
import math
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np

from slides.errors import SettingsError
from slides.files import replacing

ZIP_FROM = 50_000  # tiles: some 20 MB of text, above which QuPath is given a .zip
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "tapfm/tile")
COLOURS = "viridis"  # even steps of lightness, legible to the colour-blind and in print
OPACITY = 0.65
SCALES = {"rank": "rank percentile", "linear": "linear scale"}
FLAT = 0.9  # share of effective tiles from which attention is called flat
FULL = 3.0  # times the mean weight from which a tile has its full colour
FAINT = 0.12  # share of that of a tile of no weight, so that it is seen that it was looked at
BAR = 0.25  # share of the picture that a scale bar may take
LETTERS = 11  # letters of a title that fit in an inch


def effective_tiles(weights_T: np.ndarray) -> float:
    """Return the effective number of tiles, 1 / sum w^2 of weights scaled to sum 1: 1 to T."""
    exact_T = weights_T.astype(float)
    return float(exact_T.sum() ** 2 / np.square(exact_T).sum())


def effective_text(weights_T: np.ndarray) -> str:
    """Return the effective tiles in words, with a warning where attention is flat."""
    effective, count = effective_tiles(weights_T), len(weights_T)
    text = f"{effective:.1f} effective of {count} tiles"
    if effective > FLAT * count:
        text += "; ATTENTION IS FLAT: colours are an order of near-equal weights, and tell little"
    return text


def weight_opacity(weights_T: np.ndarray) -> np.ndarray:
    """Return each tile's opacity, 0 to 1, in proportion to its weight up to `FULL` times the mean.

    A slide of equal weights is pale all over, one of few decisive tiles is bare but for these.
    """
    weights_T = np.asarray(weights_T, float)
    share_T = weights_T * len(weights_T) / max(weights_T.sum(), 1e-30) / FULL
    return FAINT + (1 - FAINT) * share_T.clip(0, 1)


def scale_bar(width_px: float, mpp: float) -> tuple[float, str]:
    """Return a round length for a scale bar, in pixels of `mpp` microns, and its text."""
    room = BAR * width_px * mpp
    step = 10.0 ** math.floor(math.log10(room))
    microns = step * max(each for each in (1, 2, 5) if each * step <= room)
    text = f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm"
    return microns / mpp, text


def rank_percentile(values_T: np.ndarray) -> np.ndarray:
    """Return each value's rank percentile, 0 (lowest) to 100; ties share one; nan stays.

    A single value, or values that are all equal, get 50.
    """
    values_T = np.asarray(values_T, float)
    ranked_T = np.full(values_T.shape, np.nan)
    known_T = ~np.isnan(values_T)
    if known_T.any():
        _, group_T, counts = np.unique(values_T[known_T], return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - (counts + 1) / 2  # mean rank of a group of ties, from 0
        last = max(1, known_T.sum() - 1)
        ranked_T[known_T] = 100 * middle[group_T] / last if known_T.sum() > 1 else 50.0
    return ranked_T


def tile_map(
    shape: tuple[int, int],
    downsample: float,
    coords0: np.ndarray,
    size0: int,
    values_T: np.ndarray,
) -> np.ndarray:
    """Return tile values painted at thumbnail resolution.

    Args:
        shape: (H, W) of the thumbnail.
        downsample: level-0 pixels per thumbnail pixel.
        coords0: corners (T, 2), columns x0, y0.
        size0: side of a tile, level-0 pixels.
        values_T: one value a tile; nan paints nothing.

    Returns:
        (H, W) float, the mean where tiles overlap, nan where there is none. Both edges of a tile
        are rounded, so neighbours meet without gap or overlap.
    """
    total, count = np.zeros(shape), np.zeros(shape, np.int32)
    edges_T22 = np.stack([coords0, np.asarray(coords0) + size0], axis=1) / downsample
    edges_T22 = np.floor(edges_T22 + 0.5).astype(int)
    edges_T22[:, 1] = np.maximum(edges_T22[:, 1], edges_T22[:, 0] + 1)  # never thinner than a pixel
    edges_T22 = edges_T22.clip(0, (shape[1], shape[0]))
    for ((left, top), (right, bottom)), value in zip(edges_T22, values_T, strict=True):
        if not math.isnan(value):
            total[top:bottom, left:right] += value
            count[top:bottom, left:right] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def overlay_png(
    thumbnail: np.ndarray,
    downsample: float,
    coords0: np.ndarray,
    size0: int,
    values_T: np.ndarray,
    path: Path,
    *,
    scale: str = "rank",
    label: str = "tile weight",
    title: str | None = None,
    truth: np.ndarray | None = None,
    truth_label: str = "tumour (truth)",
    opacity_T: np.ndarray | None = None,
    mpp0: float | None = None,
    made_by: str = "",
) -> Path:
    """Write the thumbnail, the thumbnail under the tiles' colours, and the colour bar.

    Args:
        thumbnail: uint8 (H, W, 3) of the whole slide.
        downsample: level-0 pixels per thumbnail pixel.
        coords0: corners (T, 2) of the tiles, level-0 pixels.
        size0: side of a tile, level-0 pixels.
        values_T: one value a tile; nan leaves the tile bare.
        path: the PNG; its folder is made.
        scale: "rank" colours by rank percentile, "linear" from the lowest to the highest value.
        label: name of the values, for the colour bar.
        title: above the picture; None is the file's stem.
        truth: a mask of the whole slide at any resolution, drawn as a contour.
        truth_label: name of the contour.
        opacity_T: 0 to 1 a tile; None draws all alike.
        mpp0: microns per level-0 pixel, for a scale bar; None draws none.
        made_by: run and model, below the picture.

    Returns `path`.

    Raises:
        ValueError: an unknown scale (SettingsError), or not one value for each tile.
    """
    values_T = np.asarray(values_T, float)
    _check_lengths(path, coords0, {label: values_T})
    shown_T, low, high = _scaled(values_T, scale)
    (height, width), where = thumbnail.shape[:2], (coords0, size0)
    painted_HW = tile_map((height, width), downsample, *where, shown_T)
    figure, axes, beside = _two_thumbnails(thumbnail)
    alpha = OPACITY if opacity_T is None else _opacity(painted_HW, downsample, where, opacity_T)
    look = {"cmap": COLOURS, "vmin": low, "vmax": high, "alpha": alpha, "interpolation": "nearest"}
    drawn = axes[1].imshow(np.ma.masked_invalid(painted_HW), **look)
    if mpp0:
        _scale_bar(axes[0], width, height, mpp0 * downsample)
    if truth is not None:
        _contour(axes, truth, width, height, truth_label)
    bar = figure.colorbar(drawn, ax=axes[1] if beside else axes, fraction=0.05, pad=0.02)
    how = SCALES[scale] + ", paler: less weight" * (opacity_T is not None)
    bar.set_label(f"{label}, {how}", parse_math=False)  # a $ in a name is no formula
    axes[-1].set_xlabel(made_by, fontsize=8, parse_math=False)
    lines = wrap(path.stem if title is None else title, int(LETTERS * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    return save_figure(figure, path)


def write_geojson(
    path: Path,
    coords0: np.ndarray,
    size0: int,
    measurements: Mapping[str, Sequence[float] | np.ndarray],
    bounds0: Sequence[int] | None = None,
    name: str = "",
) -> Path:
    """Write tiles as QuPath objects.

    Args:
        path: `<slide>.geojson`; its folder is made.
        coords0: corners (T, 2), level-0 pixels of the whole scan.
        size0: side of a tile, level-0 pixels.
        measurements: name to one number a tile; nan is written as "NaN", which QuPath reads.
        bounds0: (x0, y0, ...) of the slide's bounds, subtracted; None if it has none.
        name: the slide's, part of each object's id.

    Returns:
        The file written: `path`, or the same with .zip for more than `ZIP_FROM` tiles.

    Raises:
        ValueError: not one number for each tile, or an infinite one.
    """
    coords0 = np.asarray(coords0, np.int64).reshape(-1, 2)
    columns = {key: np.asarray(values, float) for key, values in measurements.items()}
    _check_lengths(name or path, coords0, columns)
    for key, values_T in columns.items():
        if np.isinf(values_T).any():
            raise ValueError(f"{name or path}: measurement {key!r} is infinite for some tile")
    corners = coords0 - (np.asarray(bounds0[:2], np.int64) if bounds0 is not None else 0)
    lines = _features(coords0, corners, int(size0), columns, name)
    if len(coords0) <= ZIP_FROM:
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        return path
    target = path.with_suffix(".zip")
    with (
        replacing(target) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
        # a fixed date, so that the same tiles give the same bytes
        archive.open(zipfile.ZipInfo(path.name, (1980, 1, 1, 0, 0, 0)), "w") as file,
    ):
        file.writelines(line.encode() for line in lines)
    return target


def save_figure(figure, path: Path) -> Path:
    """Write a matplotlib figure as PNG, atomically."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return path


def _features(
    coords0: np.ndarray, corners: np.ndarray, size0: int, columns: dict[str, np.ndarray], name: str
) -> Iterator[str]:
    """Yield the file line by line, a tile a line, so that it is never all in memory."""
    yield '{"type":"FeatureCollection","features":['
    for row, (x0, y0) in enumerate(corners.tolist()):
        x1, y1 = x0 + size0, y0 + size0
        place = f"{name}/{coords0[row, 0]}/{coords0[row, 1]}/{size0}"
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(NAMESPACE, place)),
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]],
            },
            "properties": {
                "objectType": "tile",
                "measurements": {key: _number(values[row]) for key, values in columns.items()},
            },
        }
        yield ("," if row else "") + "\n" + json.dumps(feature, separators=(",", ":"))
    yield "\n]}\n"


def _number(value: float) -> float | str:
    return "NaN" if math.isnan(value) else float(f"{value:.7g}")  # the digits of a float32


def _two_thumbnails(thumbnail: np.ndarray) -> tuple:
    """Return a figure with the thumbnail twice, its two axes, and whether they are side by side."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    height, width = thumbnail.shape[:2]
    beside = height >= 0.75 * width  # wide slides are stacked
    panel = 5.2  # inches, the long side
    long = max(height, width)
    size = (panel * width / long, panel * height / long)
    figsize = (2 * size[0] + 1.3, size[1] + 0.6) if beside else (size[0] + 1.3, 2 * size[1] + 0.7)
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(*((1, 2) if beside else (2, 1)))
    for axis in axes:
        axis.imshow(thumbnail, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("0.7")
    return figure, axes, beside


def _scaled(values_T: np.ndarray, scale: str) -> tuple[np.ndarray, float, float]:
    """Return values as they are coloured, and the ends of the colour bar."""
    if scale not in SCALES:
        raise SettingsError(f"scale: {scale!r} is none of {', '.join(SCALES)}")
    return (rank_percentile(values_T), 0.0, 100.0) if scale == "rank" else (
        values_T, *_range(values_T)
    )  # fmt: skip


def _opacity(painted_HW, downsample, where, opacity_T) -> np.ndarray:
    """Return the opacity of each pixel of the overlay, (H, W)."""
    shown_HW = tile_map(painted_HW.shape, downsample, *where, np.asarray(opacity_T, float))
    return (0.9 * np.nan_to_num(shown_HW)).clip(0, 1)


def _scale_bar(axis, width: int, height: int, mpp: float) -> None:
    """Draw a scale bar at the lower right, dark on light."""
    from matplotlib.patheffects import Normal, Stroke

    length, text = scale_bar(width, mpp)
    y, edge = 0.96 * height, 0.97 * width
    around = [Stroke(linewidth=5, foreground="white"), Normal()]
    axis.plot([edge - length, edge], [y, y], color="black", linewidth=2, path_effects=around)
    axis.text(
        edge - length / 2, y - 0.015 * height, text, ha="center", va="bottom", fontsize=8,
        path_effects=[Stroke(linewidth=3, foreground="white"), Normal()],
    )  # fmt: skip


def _contour(axes, truth: np.ndarray, width: int, height: int, label: str) -> None:
    """Draw the mask's outline on both pictures, dark on light, legible on either."""
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import Normal, Stroke

    truth = np.asarray(truth) > 0
    if truth.any() and not truth.all():
        # centres of the mask's pixels in the thumbnail's frame, whatever their sizes
        x = (np.arange(truth.shape[1]) + 0.5) * width / truth.shape[1] - 0.5
        y = (np.arange(truth.shape[0]) + 0.5) * height / truth.shape[0] - 0.5
        for axis in axes:
            lines = axis.contour(x, y, truth, levels=[0.5], colors="black", linewidths=1.4)
            lines.set_path_effects([Stroke(linewidth=3, foreground="white"), Normal()])
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    line = Line2D([], [], color="black", linewidth=1.4)
    axes[0].legend([line], [label], loc="lower left", fontsize=8, framealpha=0.9)


def _range(values_T: np.ndarray) -> tuple[float, float]:
    known_T = values_T[~np.isnan(values_T)]
    return (float(known_T.min()), float(known_T.max())) if len(known_T) else (0.0, 1.0)


def _check_lengths(what: object, coords0: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    for key, values_T in columns.items():
        if values_T.shape != (len(coords0),):
            raise ValueError(
                f"{what}: {len(coords0)} tiles, but {key!r} has shape {values_T.shape}; "
                "one number a tile is needed"
            )
