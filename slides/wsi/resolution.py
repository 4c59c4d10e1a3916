"""The size of a slide's pixels in microns, found in its properties. A pure function.

Order of trust: the user's table, `openslide.mpp-x`, vendor keys, the TIFF resolution, and last
10 / objective power, with a warning, because "20x" is 0.44 on one scanner and 0.55 on another.
An impossible value counts as missing and is named: 352.8 is a 72 dpi default. Pixels that are not
square are refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from html import unescape

from slides.errors import MissingResolutionError
from slides.grid import MPP_RANGE, UNSCALED_TOLERANCE

POWERS = (20.0, 40.0, 60.0, 63.0, 100.0)  # objectives, which some tables give for mpp
OBLONG = 0.05  # scanners' axes differ by a few per mille
MICRONS = {  # in a unit, as OME and ImageJ write it; u00b5 and u03bc are both signs of micro
    "um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "\\u00b5m": 1.0, "micron": 1.0, "microns": 1.0,
    "micrometer": 1.0, "nm": 1e-3, "\u00e5": 1e-4, "\u212b": 1e-4, "mm": 1e3, "cm": 1e4, "m": 1e6,
    "in": 25400.0, "inch": 25400.0,
}  # fmt: skip


def find_mpp(
    properties: Mapping[str, str], name: str, table_mpp: float | None = None
) -> tuple[float, float, str]:
    """Return microns per level-0 pixel along x and y, and the source they were found in.

    Raises:
        MissingResolutionError: there is no value within `MPP_RANGE`, or the pixels are not square.
    """
    found = [("table", table_mpp, table_mpp)] if table_mpp is not None else _stated(properties)
    absurd = []
    for source, x, y in found:
        is_power = source == "table" and x in POWERS
        if all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in (x, y)) and not is_power:
            if abs(x - y) > OBLONG * min(x, y):
                raise MissingResolutionError(
                    f"{name}: its pixels are {x:g} x {y:g} microns ({source}), and tiles of it "
                    "would be stretched. Make them square when the slide is converted, or, if "
                    "the file is wrong, give mpp in the cohort table."
                )
            return x, y, source
        absurd.append(f"{source} = {x:g}" + ("" if x == y else f" x {y:g}"))
        if is_power:
            absurd[-1] += f" (an objective's power: {x:g}x is about {10 / x:.2g} microns per pixel)"
    power = _number(properties.get("openslide.objective-power") or properties.get("aperio.AppMag"))
    if table_mpp is None and power and MPP_RANGE[0] <= 10 / power <= MPP_RANGE[1]:
        warnings.warn(
            f"{name}: no pixel size in the file; taking 10 / objective power = {10 / power:g} "
            f"microns per pixel, which can be 10 % off. Give mpp in the cohort table if known.",
            stacklevel=2,
        )
        return 10 / power, 10 / power, "objective power"
    listed = f" These values are impossible: {', '.join(absurd)}." if absurd else ""
    raise MissingResolutionError(
        f"{name}: no pixel size between {MPP_RANGE[0]:g} and {MPP_RANGE[1]:g} microns per pixel "
        f"was found.{listed} Give it in the cohort table's mpp column (0.25 for most 40x scans, "
        f"0.5 for most 20x), or leave this slide out."
    )


def stated_otherwise(properties: Mapping[str, str], mpp: float) -> str:
    """Return what the file states if that contradicts `mpp`, as "0.25 (aperio.MPP)"; else ""."""
    for source, x, y in _stated(properties):
        if all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in (x, y)):
            stated = (x + y) / 2
            near = abs(stated - mpp) <= UNSCALED_TOLERANCE * stated
            return "" if near else f"{stated:.4g} ({source})"
    return ""


def _stated(properties: Mapping[str, str]) -> list[tuple[str, float, float]]:
    """Return each resolution that the file states, in order of trust: (source, x, y)."""
    get = properties.get
    layer = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
    pairs = [
        ("openslide.mpp-x", get("openslide.mpp-x"), get("openslide.mpp-y")),
        ("aperio.MPP", get("aperio.MPP"), get("aperio.MPP")),
        ("ventana.ScanRes", get("ventana.ScanRes"), get("ventana.ScanRes")),
        ("mirax", get(layer + "X"), get(layer + "Y")),
    ]
    text = unescape(get("tiff.ImageDescription") or get("openslide.comment") or "")
    pairs.append(("OME PhysicalSizeX", *_ome_sizes(text)))
    described = re.search(r"\bMPP\s*=\s*([\d.]+)", text)
    if described:
        pairs.append(("MPP in the description", described[1], described[1]))
    source, microns = "TIFF resolution", {"centimeter": 1e4, "inch": 25400.0}
    microns = microns.get(get("tiff.ResolutionUnit", ""))
    if microns is None and text.startswith("ImageJ="):  # pixels per unit of its own
        unit = re.search(r"^unit=(.+)$", text, re.MULTILINE)
        source, microns = "ImageJ's unit", unit and MICRONS.get(unit[1].strip().lower())
    dots = [_number(get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if microns and dots[0]:
        pairs.append((source, microns / dots[0], microns / (dots[1] or dots[0])))
    numbers = [(source, _number(x), _number(y)) for source, x, y in pairs]
    return [(source, x, y or x) for source, x, y in numbers if x]


def _ome_sizes(text: str) -> tuple[float | None, float | None]:
    """Return the pixel size in microns that an OME-XML states for its largest image."""
    images = re.findall(r"<Pixels\b[^>]*>", text) or [text]
    attributes = [dict(re.findall(r'\b(\w+)="([^"]+)"', image)) for image in images]
    largest = max(
        attributes,
        key=lambda each: (_number(each.get("SizeX")) or 0) * (_number(each.get("SizeY")) or 0),
    )
    sizes = []
    for axis in "XY":
        factor = MICRONS.get(largest.get(f"PhysicalSize{axis}Unit", "um").lower())
        size = _number(largest.get(f"PhysicalSize{axis}"))
        sizes.append(size * factor if size and factor else None)
    return sizes[0], sizes[1]


def _number(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
