"""The facts of an open slide, and why its pixels would be wrong though it opens."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide

from slides.wsi.diagnose import bits_a_channel, why_pages_mislead
from slides.wsi.jpeg_colours import mislabelled
from slides.wsi.plain_image import VENDOR as PLAIN
from slides.wsi.pyramid import DROPPED, VENDORS, true_downsample

DARK = 128  # of 255: glass is brighter; a deep slide without such a pixel uses part of its range


@dataclass(frozen=True)
class SlideFacts:
    """Sizes, levels and properties of a slide; kept so that other processes need not reopen it."""

    width0: int
    height0: int
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    """Level-0 pixels per pixel of each level; infinite for a level that is not this slide's."""
    stated_downsamples: tuple[float, ...]
    """The downsamples by which OpenSlide places what it reads."""
    mislabelled: tuple[bool, ...]
    """Whether the JPEG tiles of each level are YCbCr under an RGB tag."""
    bounds0: tuple[int, int, int, int]
    """x0, y0, width, height of the scanned part; the whole slide if the file names none."""
    vendor: str
    properties: dict[str, str]


def read_facts(path: Path, handle: openslide.OpenSlide) -> SlideFacts:
    """Return the facts of an open slide."""
    width0, height0 = handle.dimensions
    keys = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
    bounds = [handle.properties.get(f"openslide.{key}") for key in keys]
    whole = (0, 0, width0, height0)
    vendor = handle.properties.get("openslide.vendor", "unknown")
    stated = tuple(handle.level_downsamples)
    return SlideFacts(
        width0=width0,
        height0=height0,
        level_sizes=tuple(handle.level_dimensions),
        level_downsamples=_downsamples(handle, stated) if vendor in VENDORS else stated,
        stated_downsamples=stated,
        mislabelled=mislabelled(path, vendor, handle.level_dimensions),
        bounds0=tuple(int(b) if b else w for b, w in zip(bounds, whole, strict=True)),
        vendor=vendor,
        properties=_properties(handle),
    )


def why_misread(path: Path, handle: openslide.OpenSlide, facts: SlideFacts) -> str | None:
    """Return why the pixels would be wrong though the file opens, or None.

    Raises:
        OpenSlideError: it cannot be read.
    """
    if facts.vendor not in VENDORS:
        return None
    generic = facts.vendor in ("generic-tiff", PLAIN)
    fault = why_pages_mislead(path, (facts.width0, facts.height0), generic)
    if fault or facts.vendor == PLAIN or (bits := bits_a_channel(path)) <= 8:
        return fault
    level = len(facts.level_sizes) - 1
    brightest = max(
        np.asarray(handle.read_region((x0, y0), level, (32, 32)))[..., :3].max()
        for x0 in range(0, facts.width0, facts.width0 // 8 + 1)
        for y0 in range(0, facts.height0, facts.height0 // 8 + 1)
    )
    if brightest >= DARK:
        return None
    return (
        f"{path} has {bits} bits a channel and uses {brightest / 255:.0%} of their range, as "
        "12-bit values in 16 do: it would be read as black. Convert it to 8 bits"
    )


def _downsamples(handle: openslide.OpenSlide, stated: tuple[float, ...]) -> tuple[float, ...]:
    """Return each level's true downsample, see `slides.wsi.pyramid`."""
    found = [1.0]
    for level, size_r in enumerate(handle.level_dimensions[1:], 1):
        tile_r = [
            int(handle.properties.get(f"openslide.level[{level}].tile-{side}", 0))
            for side in ("width", "height")
        ]
        finer = max(ds for ds in found if ds != DROPPED)
        found.append(true_downsample(handle.dimensions, size_r, stated[level], tile_r, finer))
    return tuple(found)


def _properties(handle: openslide.OpenSlide) -> dict[str, str]:
    """Return all readable properties; a damaged key is skipped."""
    found = {}
    for key in handle.properties:
        with contextlib.suppress(KeyError):
            found[key] = handle.properties[key]
    return found
