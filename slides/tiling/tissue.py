"""Which pixels of a thumbnail are tissue. Pure functions on arrays: no file is opened here.

Stains absorb some colours more than others; glass, dust, shadows and borders absorb all alike. So
the signal is the *spread* of optical density over the three channels, against the slide's own
white, plus half its mean: the first finds eosin, haematoxylin and DAB brown, the second the nearly
grey stroma of a weak IHC counterstain. A piece that has no colour anywhere is no tissue, however
dark.

Otsu's threshold, with hysteresis: half of it will do beside tissue that is above it. It is clamped
to the range in which it can be right: on a slide that is all tissue, or all glass, Otsu would split
what is one thing. Then pen strokes out, gaps as wide as a fat cell closed, small holes filled,
specks dropped.

`scipy.ndimage` is imported where it is used: it takes 0.3 s, and the command line reads `Tissue`
for its help.

Price: about 0.3 s for a 1000 x 1000 thumbnail.
Source: Otsu 1979 for the threshold; Ruifrok and Johnston 2001 for optical density.
Differs: Otsu on optical density, not on HSV saturation, which is noise where a pixel is dark.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from slides.errors import CoordinatesError, TilingError

WHITE_RANGE = (200.0, 255.0)  # a background darker than this is not glass
SIGNAL_RANGE = (0.035, 0.08)  # glass and JPEG noise stay below the first, faint eosin above it
COLOUR = 0.008  # mean spread of a piece: grey borders and shadows have under 0.004, faint IHC 0.017
SIGNAL_CAP = 0.4  # before Otsu: otherwise a patch of black-brown DAB drags the threshold up
BLACK = 55  # a pixel this dark in all channels, and grey, is a border or a marker, not stain
SMOOTH_UM = 8.0  # standard deviation: nuclei and JPEG grain are smaller, glands larger
WEAK = 0.5  # of the threshold: enough for a pixel joined to tissue that is above it
STRONG_SHARE = 0.05  # of a piece's pixels above the threshold: less is smear or out-of-focus dust
CLOSE_UM = 32.0  # half a fat cell, so fat between its membranes counts as tissue
HOLE_UM2 = 25_000.0  # two tiles: lumens and small tears belong to the tissue around them
PEN_HALO_UM = 48.0  # the pale rim of a stroke
PEN_UM2 = 30_000.0  # a marker's tip is 0.3 mm or wider: smaller red spots are blood
PEN_IS_STAIN = 0.95  # of all that is stained: then it is the stain itself, say a trichrome


@dataclass(frozen=True)
class Tissue:
    """What counts as tissue, and how much of it a tile needs."""

    mpp: float = 8.0
    """Microns per pixel of the thumbnail on which tissue is sought (finer for small tiles)."""
    min_fraction: float = 0.25
    """Share of a tile's area that must be tissue."""
    min_area_um2: float = 10_000.0
    """Pieces smaller than this are dust; the default is nearly one 224 px tile at 0.5 mpp."""
    pen: bool = True
    """Take marker strokes out. Switch it off for stains that are green or pure blue."""
    max_blur: float | None = None
    """Leave out tiles more blurred than this, 0 to 1 (`slides.tiling.focus`). 1 measures and leaves
    none out; None does not measure, since that reads every tile of tissue."""
    masks: str | None = None
    """Folder of masks to take instead of finding tissue (`slides.tiling.masks`):
    `<slide_id>.geojson` or `.png`. Neither `pen` nor `min_area_um2` takes anything out of them."""

    coords: str | None = None
    """Folder of tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose (`slides.tiling.other_tools`),
    to take as they are. Nothing else of these settings goes with it."""

    def __post_init__(self):
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.coords is not None and len(given) > 1:
            given.remove("coords")
            raise CoordinatesError(
                f"tissue.coords takes the tiles as they are in {self.coords}, and "
                f"{', '.join('tissue.' + name for name in given)} would do nothing. Leave "
                f"{'it' if len(given) == 1 else 'them'} out, or coords."
            )
        if not 0.25 <= self.mpp <= 100:
            raise TilingError(f"tissue mpp must be in [0.25, 100], got {self.mpp:g}")
        if not 0 <= self.min_fraction <= 1:
            raise TilingError(f"min_fraction must be in [0, 1], got {self.min_fraction:g}")
        if self.min_area_um2 < 0:
            raise TilingError(f"min_area_um2 must not be negative, got {self.min_area_um2:g}")
        if self.max_blur is not None and not 0 < self.max_blur <= 1:
            raise TilingError(f"max_blur must be in (0, 1] or None, got {self.max_blur:g}")


def tissue_mask(rgb: np.ndarray, tissue: Tissue, mpp: float | None = None) -> np.ndarray:
    """Tissue of a thumbnail, (h, w, 3) uint8 -> (h, w) bool.

    Args:
        rgb: The thumbnail.
        tissue: The settings.
        mpp: What the thumbnail really has, where that is not `tissue.mpp`.
    """
    return tissue_and_pen(rgb, tissue, mpp)[0]


def tissue_and_pen(
    rgb: np.ndarray, tissue: Tissue, mpp: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `tissue_mask`, and beside it the strokes and halo that were taken out, (h, w) bool."""
    mpp = mpp or tissue.mpp
    mask = stained(rgb, mpp)
    pen = _pen_to_remove(rgb, mask, mpp) if tissue.pen else np.zeros_like(mask)
    if pen.any():  # a broad stroke has drawn the threshold up
        mask = stained(rgb, mpp, pen)
    return _tidy(mask & ~pen, mpp, tissue.min_area_um2), pen


def stained(rgb: np.ndarray, mpp: float, pen: np.ndarray | None = None) -> np.ndarray:
    """Pixels that absorb, in pieces that have colour. (h, w, 3) uint8 -> (h, w) bool.

    What is under `pen`, (h, w) bool, is not looked at.
    """
    from scipy import ndimage

    sigma = min(SMOOTH_UM / mpp, min(rgb.shape[:2]) / 16)  # a slide of a few microns: not into one
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
    """(h, w, 3) -> (h, w, 3) float32, against the image's own white and never negative."""
    rgb = rgb.astype(np.float32, copy=False)
    return np.maximum(np.log10(_white(rgb)) - np.log10(np.maximum(rgb, 1)), 0)


def threshold(signal: np.ndarray) -> float:
    """Otsu's threshold of the capped signal, clamped to `SIGNAL_RANGE`."""
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
    """Marker strokes, (h, w, 3) uint8 -> (h, w) bool: green, blue, red and black ink.

    By optical density alone, in which ink and stain differ in *which* channel they leave through:
    green ink passes green, blue ink passes blue and stops nearly all red, red ink passes red and
    stops green and blue alike. Blood comes close to red ink, so red is the strictest.
    """
    return _inks(rgb)[0]


def _inks(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ink beyond doubt, and what may be ink over dense tissue, whose stain adds to it: (h, w) bool.

    On real slides next to nothing of the tissue is of the second kind, so it is ink where it is
    joined to the first.
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
    """Share of each tile that is tissue, (T, 2) corners -> (T,) float64 in [0, 1].

    Exact area: a mask pixel cut by a tile's edge counts by the part inside. Mask pixel (i, j)
    covers [j, j + 1) x [i, i + 1) times `downsample` in level-0 pixels; outside the mask there is
    no tissue.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    low = np.asarray(coords0, dtype=np.float64).reshape(-1, 2) / downsample
    high = low + size0 / downsample

    def up_to(x, y):
        """Area of tissue above and left of a point, linear between the integral's nodes."""
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


def why_empty(rgb: np.ndarray, tissue: Tissue, mpp: float) -> str:
    """Which threshold left no tissue, for the error message of an empty mask."""
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
    """The glass: median colour of the brightest twentieth, (3,), within `WHITE_RANGE`.

    Glass may be yellowish, never green-poor: on a slide without glass the brightest twentieth is
    pale tissue, and taking its pink for white would make all such tissue vanish.
    """
    sample = rgb.reshape(-1, 3)[:: max(1, rgb.shape[0] * rgb.shape[1] // 200_000)]
    light, _ = _extremes(sample)
    white = np.median(sample[light >= np.quantile(light, 0.95)], axis=0)
    white[1] = max(white[1], min(white[0], white[2]))
    return np.clip(white, *WHITE_RANGE).astype(np.float32)


def _pen_to_remove(rgb: np.ndarray, mask: np.ndarray, mpp: float) -> np.ndarray:
    """Strokes and their halo; nothing where nearly all that is stained looks like ink."""
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
    """A float32 copy, channel after channel in memory: all that follows is twice as quick."""
    planes = np.moveaxis(rgb, -1, 0).astype(np.float32, order="C")
    return np.moveaxis(planes, 0, -1)


def _extremes(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest of the three channels; numpy takes six times as long."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    low, high = (each(each(red, green), blue) for each in (np.minimum, np.maximum))
    return low, high


def _tidy(mask: np.ndarray, mpp: float, min_area_um2: float) -> np.ndarray:
    """Close gaps, fill small holes, drop specks. Dust goes first, so it is not joined to tissue."""
    mask = _drop_small(mask, min_area_um2 / 4 / mpp**2)
    radius = CLOSE_UM / mpp
    pad = 1 + round(radius)  # tissue at the border must not shrink when the closing erodes
    grown = _grow(np.pad(mask, pad, mode="edge"), radius)
    mask = ~_grow(~grown, radius)[pad:-pad, pad:-pad]
    holes, areas = _areas(~mask)
    fill = areas < HOLE_UM2 / mpp**2
    for side in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):  # open to the outside: no hole
        fill[side] = False
    mask = mask | fill[holes]
    return _drop_small(mask, min_area_um2 / mpp**2)


def _drop_small(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    pieces, areas = _areas(mask)
    keep = areas >= min_pixels
    keep[0] = False
    return keep[pieces]


def _areas(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces numbered from 1 and their areas in pixels; entry 0 of the areas is no piece."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)
    areas[0] = 0
    return pieces, areas


def _grow(mask: np.ndarray, radius: float) -> np.ndarray:
    """Dilate by a disk, in time that does not depend on its radius."""
    from scipy import ndimage

    if not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask) <= radius
