"""Finds tissue on a thumbnail. Pure functions on arrays: no file is opened here.

Stains absorb some colours more than others; glass, dust, shadows and borders absorb all alike. So
the signal is the *spread* of optical density over the three channels, against the slide's own
white, plus half its mean: the first finds eosin, haematoxylin and DAB brown, the second the nearly
grey stroma of a weak IHC counterstain. A piece without any colour is not tissue, however dark.

The threshold is Otsu's with hysteresis: half of it is enough next to tissue above it. It is clamped
to a plausible range, since on a slide that is all tissue or all glass Otsu would split one class in
two. Then pen strokes are removed, gaps as wide as a fat cell closed, small holes filled and specks
dropped.

`scipy.ndimage` is imported where it is used: it takes 0.3 s, and the command line reads `Tissue`
for its help.

Price: about 0.3 s for a 1000 x 1000 thumbnail.
Source: Otsu 1979 for the threshold; Ruifrok and Johnston 2001 for optical density.
Differs: Otsu on optical density, not on HSV saturation, which is noise where a pixel is dark.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from slides.errors import CoordinatesError, TilingError, refuse

WHITE_RANGE = (200.0, 255.0)  # a background darker than this is not glass
SIGNAL_RANGE = (0.035, 0.08)  # glass and JPEG noise stay below the first, faint eosin above it
COLOUR = 0.008  # mean spread of a piece: grey borders and shadows have under 0.004, faint IHC 0.017
SIGNAL_CAP = 0.4  # before Otsu: otherwise a patch of black-brown DAB raises the threshold
BLACK = 55  # grey pixels darker than this in all channels are border or marker, not stain
GLASS = 180  # of 255, all channels: glass is brighter, also of a dim scan
SMOOTH_UM = 8.0  # standard deviation: nuclei and JPEG grain are smaller, glands larger
WEAK = 0.5  # of the threshold: enough for a pixel connected to tissue above the threshold
STRONG_SHARE = 0.05  # of a piece's pixels above the threshold: less is smear or out-of-focus dust
CLOSE_UM = 32.0  # half a fat cell, so fat between its membranes counts as tissue
HOLE_UM2 = 25_000.0  # two tiles: lumens and small tears belong to the tissue around them
PEN_HALO_UM = 48.0  # the pale rim of a stroke
PEN_UM2 = 30_000.0  # a marker's tip is 0.3 mm or wider: smaller red spots are blood
PEN_IS_STAIN = 0.95  # of the stained area: more is the stain itself, for example a trichrome


@dataclass(frozen=True)
class Tissue:
    """Settings of the tissue search, and how much tissue a tile needs."""

    mpp: float = 8.0
    """Microns per pixel of the thumbnail that is searched for tissue (finer for small tiles)."""
    min_fraction: float = 0.25
    """Share of a tile's area that must be tissue."""
    min_area_um2: float = 10_000.0
    """Pieces smaller than this are dust; the default is nearly one 224 px tile at 0.5 mpp."""
    pen: bool = True
    """Remove marker strokes. Switch it off for stains that are green or pure blue."""
    max_blur: float | None = None
    """Leave out tiles more blurred than this, 0 to 1 (`slides.tiling.focus`). 1 only measures;
    None does not measure, since measuring reads every tile of tissue."""
    masks: str | None = None
    """Folder of masks to use instead of finding tissue (`slides.tiling.masks`):
    `<slide_id>.geojson` or `.png`. `pen` and `min_area_um2` do not apply to them."""

    coords: str | None = None
    """Folder of tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose (`slides.tiling.other_tools`),
    used as they are. It excludes all other settings of this class."""

    def __post_init__(self):
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.coords is not None and len(given) > 1:
            given.remove("coords")
            raise CoordinatesError(
                f"tissue.coords takes the tiles as they are in {self.coords}, and "
                f"{', '.join('tissue.' + name for name in given)} would do nothing. Leave "
                f"{'it' if len(given) == 1 else 'them'} out, or coords."
            )
        max_blur = 1 if self.max_blur is None else self.max_blur
        checks = (
            ("mpp", 0.25 <= self.mpp <= 100, "in [0.25, 100]; 8 is the default"),
            ("min_fraction", 0 <= self.min_fraction <= 1, "in [0, 1], a share of the tile"),
            ("min_area_um2", self.min_area_um2 >= 0, "0 or more square microns"),
            ("max_blur", 0 < max_blur <= 1, "in (0, 1], or null to measure nothing"),
        )
        faults = [
            f"tissue.{key} must be {allowed}, got {getattr(self, key):g}"
            for key, fine, allowed in checks
            if not fine
        ]
        refuse(faults, "data.tiles.tissue", TilingError)


def tissue_mask(rgb: np.ndarray, tissue: Tissue, mpp: float | None = None) -> np.ndarray:
    """Return the tissue mask of a thumbnail, (h, w) bool.

    Args:
        rgb: The thumbnail, (h, w, 3) uint8.
        tissue: The settings.
        mpp: Microns per pixel of the thumbnail; None is `tissue.mpp`.
    """
    return tissue_and_pen(rgb, tissue, mpp)[0]


def tissue_and_pen(
    rgb: np.ndarray, tissue: Tissue, mpp: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tissue mask and the removed pen strokes with their halo, (h, w) bool each."""
    mpp = mpp or tissue.mpp
    mask = stained(rgb, mpp)
    pen = _pen_to_remove(rgb, mask, mpp) if tissue.pen else np.zeros_like(mask)
    if pen.any():  # a broad stroke raised the threshold: find it again without the stroke
        mask = stained(rgb, mpp, pen)
    return _tidy(mask & ~pen, mpp, tissue.min_area_um2), pen


def stained(rgb: np.ndarray, mpp: float, pen: np.ndarray | None = None) -> np.ndarray:
    """Return which pixels are stained: absorbing, in pieces that have colour. (h, w) bool.

    Pixels under `pen`, (h, w) bool, are ignored.
    """
    from scipy import ndimage

    sigma = min(SMOOTH_UM / mpp, min(rgb.shape[:2]) / 16)  # not wider than a tiny slide
    smooth = _planes(rgb)
    ndimage.gaussian_filter(smooth, (sigma, sigma, 0), truncate=3, output=smooth)
    density = optical_density(smooth)
    low, high = _extremes(density)
    spread = high - low
    red, green, blue = np.moveaxis(density, -1, 0)
    signal = spread + (red + green + blue) / 3 / 2
    signal[_black(smooth)] = 0
    if pen is not None:
        signal[pen] = 0
    strong = threshold(signal)
    pieces, areas = _areas(signal > WEAK * strong)
    pixels = np.maximum(areas, 1)
    colour = np.bincount(pieces.ravel(), weights=spread.ravel()) / pixels
    strong_share = np.bincount(pieces.ravel(), weights=signal.ravel() > strong) / pixels
    return ((colour >= COLOUR) & (strong_share >= STRONG_SHARE) & (areas > 0))[pieces]


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """Return optical density, (h, w, 3) float32, against the image's own white, min 0."""
    rgb = rgb.astype(np.float32, copy=False)
    return np.maximum(np.log10(_white(rgb)) - np.log10(np.maximum(rgb, 1)), 0)


def threshold(signal: np.ndarray) -> float:
    """Return Otsu's threshold of the capped signal, clamped to `SIGNAL_RANGE`."""
    counts, edges = np.histogram(signal, bins=256, range=(0, SIGNAL_CAP))
    counts[-1] += (signal > SIGNAL_CAP).sum()
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.where((below > 0) & (above > 0), below * above * gap**2, 0.0)
    return float(np.clip(edges[1 + int(between.argmax())], *SIGNAL_RANGE))


def pen_mask(rgb: np.ndarray) -> np.ndarray:
    """Return which pixels are green, blue, red or black marker ink, (h, w) bool.

    Ink differs from stain in the ratios of optical density: green ink passes green, blue ink passes
    blue and stops nearly all red, red ink passes red and stops green and blue alike. Blood is close
    to red ink, so the rule for red is the strictest.
    """
    return _inks(rgb)[0]


def _inks(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return certain ink, and possible ink over dense tissue, (h, w) bool each.

    On real slides hardly any tissue looks like the second, so where it touches certain ink it is
    ink.
    """
    from scipy import ndimage

    smooth = _planes(rgb)
    ndimage.uniform_filter(smooth, (3, 3, 1), output=smooth)
    red, green, blue = np.moveaxis(optical_density(smooth), -1, 0)
    green_ink = (red > 0.2) & (green < 0.75 * red) & (green < 0.9 * blue)
    blue_ink = (red > 0.45) & (blue < 0.45 * red) & (green < 0.95 * red)
    red_ink = (green > 0.65) & (blue > 0.7 * green) & (red < 0.25 * green)
    over_green = (red > 0.4) & (green < 0.92 * red) & (green < blue)
    over_blue = (red > 0.7) & (blue < 0.52 * red) & (green < 1.15 * red)
    over_red = (green > 0.8) & (blue > 0.62 * green) & (red < 0.42 * green)
    ink = green_ink | blue_ink | red_ink | _black(smooth)
    return ink, over_green | over_blue | over_red


def tile_fraction(
    mask: np.ndarray, coords0: np.ndarray, size0: int, downsample: float
) -> np.ndarray:
    """Return the share of each tile that is tissue, (T,) float64 in [0, 1].

    The area is exact: a mask pixel cut by a tile's edge counts by its part inside. Mask pixel
    (i, j) covers [j, j + 1) x [i, i + 1) times `downsample` in level-0 pixels; outside the mask
    there is no tissue.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    low = np.asarray(coords0, dtype=np.float64).reshape(-1, 2) / downsample
    high = low + size0 / downsample

    def up_to(x, y):
        """Return the tissue area above and left of a point, linear between the integral's nodes."""
        x, y = np.clip(x, 0, mask.shape[1]), np.clip(y, 0, mask.shape[0])
        j = np.minimum(x.astype(np.int64), mask.shape[1] - 1)
        i = np.minimum(y.astype(np.int64), mask.shape[0] - 1)
        fx, fy = x - j, y - i
        top = integral[i, j] * (1 - fx) + integral[i, j + 1] * fx
        bottom = integral[i + 1, j] * (1 - fx) + integral[i + 1, j + 1] * fx
        return top * (1 - fy) + bottom * fy

    (xl, yl), (xh, yh) = low.T, high.T
    area = up_to(xh, yh) - up_to(xl, yh) - up_to(xh, yl) + up_to(xl, yl)
    return np.clip(area / (size0 / downsample) ** 2, 0, 1)


def why_dark(rgb: np.ndarray) -> str:
    """Return a sentence about a thumbnail that is dark, without glass, as fluorescence; or ""."""
    low, high = _extremes(rgb)
    if (high < BLACK).mean() <= 0.5 or (low >= GLASS).mean() >= 0.01:
        return ""
    return (
        "most of it is dark and nothing is as bright as glass, as in fluorescence: tissue is "
        "sought where stains absorb light, so check its tiles, or leave this slide out"
    )


def why_empty(rgb: np.ndarray, tissue: Tissue, mpp: float) -> str:
    """Return which threshold left no tissue, for an error message."""
    coloured = stained(rgb, mpp)
    if not coloured.any():
        return f"no pixel is stained (optical density below {SIGNAL_RANGE[0]:g}, or grey)"
    largest = _areas(coloured)[1].max() * mpp**2
    if largest < tissue.min_area_um2:
        return (
            f"the largest stained piece is {largest:.0f} square microns, tissue.min_area_um2 asks "
            f"for {tissue.min_area_um2:g}"
        )
    return (
        "what is stained is pen marks (tissue.pen: false keeps them) and pieces under "
        f"tissue.min_area_um2 = {tissue.min_area_um2:g} square microns"
    )


def _white(rgb: np.ndarray) -> np.ndarray:
    """Return the colour of the glass, (3,): the median of the brightest twentieth, clamped.

    Glass may be yellowish but never lacks green: on a slide without glass the brightest twentieth
    is pale tissue, and using its pink as white would lose all such tissue.
    """
    sample = rgb.reshape(-1, 3)[:: max(1, rgb.shape[0] * rgb.shape[1] // 200_000)]
    light, _ = _extremes(sample)
    white = np.median(sample[light >= np.quantile(light, 0.95)], axis=0)
    white[1] = max(white[1], min(white[0], white[2]))
    return np.clip(white, *WHITE_RANGE).astype(np.float32)


def _pen_to_remove(rgb: np.ndarray, mask: np.ndarray, mpp: float) -> np.ndarray:
    """Return pen strokes with their halo; nothing if nearly all stain looks like ink."""
    ink, over_tissue = _inks(rgb)
    strokes, _ = _areas(ink | over_tissue)
    certain = np.bincount(strokes.ravel(), weights=ink.ravel())  # pixels of each
    pen = _grow((certain >= PEN_UM2 / mpp**2)[strokes] & (strokes > 0), PEN_HALO_UM / mpp)
    return pen & ((mask & pen).sum() < PEN_IS_STAIN * mask.sum())


def _black(rgb: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(rgb, -1, 0)
    black = (red < BLACK) & (green < BLACK) & (blue < BLACK)
    low, high = _extremes(rgb[black])
    black[black] = high - low < 0.35 * BLACK
    return black


def _planes(rgb: np.ndarray) -> np.ndarray:
    """Return a float32 copy, stored channel by channel: later steps are twice as fast."""
    planes = np.moveaxis(rgb, -1, 0).astype(np.float32, order="C")
    return np.moveaxis(planes, 0, -1)


def _extremes(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return minimum and maximum of the three channels, six times faster than numpy's."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    low, high = (each(each(red, green), blue) for each in (np.minimum, np.maximum))
    return low, high


def _tidy(mask: np.ndarray, mpp: float, min_area_um2: float) -> np.ndarray:
    """Close gaps, fill small holes, drop specks; dust first, so that it is not joined to tissue."""
    mask = _drop_small(mask, min_area_um2 / 4 / mpp**2)
    radius = CLOSE_UM / mpp
    pad = 1 + round(radius)  # so that closing does not erode tissue at the border
    grown = _grow(np.pad(mask, pad, mode="edge"), radius)
    mask = ~_grow(~grown, radius)[pad:-pad, pad:-pad]
    holes, areas = _areas(~mask)
    fill = areas < HOLE_UM2 / mpp**2
    for side in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):  # touches the border: no hole
        fill[side] = False
    mask = mask | fill[holes]
    return _drop_small(mask, min_area_um2 / mpp**2)


def _drop_small(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    pieces, areas = _areas(mask)
    keep = areas >= min_pixels
    keep[0] = False
    return keep[pieces]


def _areas(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pieces numbered from 1, and their areas in pixels; area 0 is 0."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)
    areas[0] = 0
    return pieces, areas


def _grow(mask: np.ndarray, radius: float) -> np.ndarray:
    """Return the mask dilated by a disk, in time that does not depend on its radius."""
    from scipy import ndimage

    if not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask) <= radius
