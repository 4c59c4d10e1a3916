"""Planted traits on real tissue: slides whose labels are known, told by morphology, not by colour.

    python -m benchmarks.tissue_plants --out DIR --seed 0    plant; finished slides are kept
    python -m benchmarks.tissue_plants --check DIR [DIR ...] what tells the labels apart

    DIR/cohort.csv              the table; a case is a patient, labels are a slide's
    DIR/slides/<slide_id>.tif   two levels, JPEG; 672 x 672 px, 36 tiles of 112 px
    DIR/planting.json           seed and strengths
    DIR/tiles.csv               each tile's corner in level-0 pixels, and the traits planted in it

Each window of data/tissue gives four slides, its quarters. Three labels are dealt to a patient's
slides, balanced and independent of each other: KARYOMEGALY, nuclei enlarged by a smooth warp;
VESICULAR, the centres of nuclei cleared of haematoxylin, the rims kept; NOISE, nothing. A positive
has the trait in 60 % of its tiles, there in 80 % of the nuclei.

All else is the same in every slide. Every nucleus that is not enlarged is turned about its centre
by a warp of the same reach and the same displacement; every tile is resampled at half-pixel shifts,
so that the first JPEG's blocks are gone; every tile's mean and deviation of red, green and blue are
set to those of the tissue before planting; no warp crosses a tile's border.

`--check` (`benchmarks.tissue_checks`) writes results/tissue_plants.json and the table between the
markers in README.md when it is given seeds 0, 1 and 2.

Tissue: Pathology Atlas, MIT per repository, Serdar Balci / Memorial Pathology, doi
10.5281/zenodo.6382734.
Price: one core for 5 minutes, 60 MB of disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from benchmarks.nuclei import Nuclei, changes, clear, find_nuclei, hold, warp
from benchmarks.record import RESULTS, facts, rewrite
from benchmarks.tissue_checks import check
from slides.errors import SettingsError
from slides.files import replacing, write_json
from slides.seeds import stable_seed

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TAPFM_DATA", ROOT.parent / "shared" / "data"))
SEEDS = [0, 1, 2]  # of the table in README.md
LABELS = ("KARYOMEGALY", "VESICULAR", "NOISE")
TILE, SIDE = 112, 672
GRID = SIDE // TILE
TILE_SHARE, NUCLEUS_SHARE = 0.6, 0.8
ENLARGEMENT = 1.2  # of a nucleus' diameter
CLEARING = 0.4  # of the haematoxylin at a nucleus' centre
SOFTEN = 0.5  # pixels, deviation of the blur that every slide gets
PAD = 8  # pixels around a window, mirrored
JPEG_QUALITY = 90
VERSION = 2  # of the planting: slides of another are not continued


@dataclass(frozen=True)
class Plan:
    """One slide: a quarter of a window, and its labels."""

    slide_id: str
    window: dict[str, str]
    corner: tuple[int, int]
    """(y, x) in the window's pixels."""
    labels: tuple[int, int, int]
    """In the order of `LABELS`."""


def plan(windows: Sequence[dict[str, str]], seed: int) -> list[Plan]:
    """Return every slide with its labels, balanced and independent within each patient. Pure."""
    of_patient = defaultdict(list)
    for window in windows:
        of_patient[window["patient"]].append(window)
    found = []
    for patient, own in of_patient.items():
        rng = np.random.default_rng(stable_seed("labels", seed, patient))
        dealt = iter(deal(4 * len(own), rng))
        for window in own:
            for quarter, corner in enumerate(product((0, SIDE), repeat=2)):
                slide_id = f"{window['slide_id']}_{quarter}"
                found.append(Plan(slide_id, window, corner, next(dealt)))
    return found


def deal(slides: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return three labels a slide; any two of them show each pair of values equally often.

    Args:
        slides: a multiple of four: whole sets of the eight combinations, and half a set, the
            four of even or of odd sum, which are balanced too.
        rng: decides which half, and the order.
    """
    every = list(product((0, 1), repeat=3))
    parity = int(rng.integers(2))
    half = [each for each in every if sum(each) % 2 == parity]
    dealt = every * (slides // 8) + half * (slides % 8 // 4)
    return [dealt[k] for k in rng.permutation(len(dealt))]


def planted_tiles(slide: Plan, nuclei: Nuclei, seed: int) -> np.ndarray:
    """Return which tiles (GRID * GRID, 2) bear KARYOMEGALY and VESICULAR; none in a negative.

    Tiles of at least three nuclei come first.
    """
    found = np.zeros((GRID * GRID, 2), bool)
    corners = [(y * TILE, x * TILE) for y, x in np.ndindex(GRID, GRID)]
    few = np.array([len(nuclei.inside(corner, TILE)) < 3 for corner in corners])
    for k in range(2):
        rng = np.random.default_rng(stable_seed("tiles", seed, slide.slide_id, LABELS[k]))
        order = rng.permutation(GRID * GRID)
        order = order[np.argsort(few[order], kind="stable")]
        found[order[: round(TILE_SHARE * GRID * GRID)], k] = slide.labels[k]
    return found


def plant(window: np.ndarray, nuclei: Nuclei, slide: Plan, planted: np.ndarray, seed: int):
    """Return a slide, (SIDE, SIDE, 3) uint8.

    Args:
        window: spline coefficients of the padded window, (3, h, w), colours from 0 to 1.
        nuclei: those of the slide.
        slide: the slide's place in the window.
        planted: which tiles bear which trait, (GRID * GRID, 2).
        seed: of the cohort.
    """
    out, still = np.empty((SIDE, SIDE, 3)), halfway(window)
    for tile, (row, column) in enumerate(np.ndindex(GRID, GRID)):
        corner = row * TILE, column * TILE
        own = nuclei.inside(corner, TILE)
        rng = np.random.default_rng(stable_seed("nuclei", seed, slide.slide_id, tile))
        chosen = [chosen_nuclei(len(own), rng) & bears for bears in planted[tile]]
        turn = np.where(rng.random(len(own)) < 0.5, -1, 1)
        size = np.where(chosen[0], ENLARGEMENT, 1.0)
        offset = warp(own, changes(chosen[0], turn, ENLARGEMENT), ENLARGEMENT, TILE)
        top, left = (PAD + a + b for a, b in zip(corner, slide.corner, strict=True))
        y, x = np.mgrid[top : top + TILE, left : left + TILE] + offset + 0.5
        moved = sample(window, y, x)
        cleared = clear(moved, own, CLEARING * chosen[1], size)
        plain, changed = (ndimage.gaussian_filter(each, (SOFTEN, SOFTEN, 0))
                          for each in (still[top:, left:][:TILE, :TILE], cleared))  # fmt: skip
        out[corner[0] :, corner[1] :][:TILE, :TILE] = hold(changed, plain)
    return np.rint(out.clip(0, 1) * 255).astype(np.uint8)


def chosen_nuclei(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return which nuclei of a planted tile bear the trait."""
    return rng.permutation(count) < round(NUCLEUS_SHARE * count)


def coefficients(rgb: np.ndarray) -> np.ndarray:
    """Return cubic spline coefficients (3, h, w) of a window that is mirrored at its borders."""
    padded = np.pad(rgb.astype(float) / 255, ((PAD, PAD), (PAD, PAD), (0, 0)), "symmetric")
    return np.stack([ndimage.spline_filter(padded[..., c]) for c in range(3)])


def sample(window: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return colours (h, w, 3) at places in a window's coefficients, from 0 to 1."""
    # a tile's own part: the whole window's coefficients would be copied for every call
    rows = slice(max(int(y.min()) - 3, 0), int(y.max()) + 5)
    columns = slice(max(int(x.min()) - 3, 0), int(x.max()) + 5)
    at = y - rows.start, x - columns.start
    planes = [ndimage.map_coordinates(each[rows, columns], at, prefilter=False) for each in window]
    return np.stack(planes, -1).clip(0, 1)


def halfway(window: np.ndarray) -> np.ndarray:
    """Return colours (h, w, 3) half a pixel right of and below each pixel but the last two."""
    for _ in range(2):  # a cubic spline's weights there, along one axis and then the other
        a, b, c, d = (np.pad(window, ((0, 0), (1, 2), (0, 0)))[:, k:][:, : window.shape[1]]
                      for k in range(4))  # fmt: skip
        window = ((a + d + 23 * (b + c)) / 48).swapaxes(1, 2)
    return np.moveaxis(window, 0, -1).clip(0, 1)


def write_cohort(out: Path, seed: int) -> Path:
    """Plant missing slides, then write tiles.csv and the table; return the table's path."""
    folder = DATA / "tissue"
    with (folder / "windows.csv").open() as file:
        windows = list(csv.DictReader(file))
    slides, rows = plan(windows, seed), []
    describe(out, seed)
    for window in tqdm(windows, "plant", unit=" windows", mininterval=5):
        with openslide.OpenSlide(folder / "slides" / f"{window['slide_id']}.tif") as slide:
            rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        nuclei, spline = find_nuclei(rgb), None
        for each in (slide for slide in slides if slide.window is window):
            own = nuclei.inside(each.corner, SIDE)
            planted = planted_tiles(each, own, seed)
            path = out / "slides" / f"{each.slide_id}.tif"
            if not path.exists():
                spline = coefficients(rgb) if spline is None else spline
                write_slide(path, plant(spline, own, each, planted, seed), float(window["mpp"]))
            for tile, (row, column) in enumerate(np.ndindex(GRID, GRID)):
                rows.append([each.slide_id, column * TILE, row * TILE, *map(int, planted[tile])])
    write_table(out / "tiles.csv", ["slide_id", "x", "y", "karyomegaly", "vesicular"], rows)
    table = [[s.window["patient"], s.slide_id, f"slides/{s.slide_id}.tif", s.window["split"],
              s.window["mpp"], "HE", s.window["patient"], *s.labels] for s in slides]  # fmt: skip
    columns = ["case_id", "slide_id", "slide_path", "split", "mpp", "stain", "patient", *LABELS]
    return write_table(out / "cohort.csv", columns, table)


def describe(out: Path, seed: int) -> None:
    """Write what is planted to planting.json; refuse a folder in which something else is."""
    own = {"seed": seed, "enlargement": ENLARGEMENT, "clearing": CLEARING, "tiles": TILE_SHARE,
           "nuclei": NUCLEUS_SHARE, "version": VERSION}  # fmt: skip
    (out / "slides").mkdir(parents=True, exist_ok=True)
    path = out / "planting.json"
    if path.exists() and (there := json.loads(path.read_text())) != own:
        raise SettingsError(
            f"{out} holds slides planted otherwise ({there}; asked for: {own}): give another "
            f"--out, or delete the folder"
        )
    path.write_text(json.dumps(own) + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> Path:
    """Write a CSV whole or not at all; return its path."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return path


def write_slide(path: Path, rgb: np.ndarray, mpp: float) -> None:
    """Write a pyramid of two levels, 1 and 4, in JPEG tiles."""
    with replacing(path) as partial, tifffile.TiffWriter(partial) as tiff:
        for ratio in (1, 4):
            tiff.write(
                np.asarray(Image.fromarray(rgb).reduce(ratio)),
                tile=(TILE, TILE),
                photometric="rgb",  # the input's; tifffile stores YCbCr
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                resolution=(1e4 / (mpp * ratio),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=int(ratio > 1),
                metadata=None,
                software=False,
                maxworkers=1,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to plant into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, nargs="+", help="planted folders, one a seed")
    arguments = parser.parse_args()
    if arguments.out is None and arguments.check is None:
        parser.error("give --out to plant, or --check with planted folders")
    if arguments.out:
        print(write_cohort(arguments.out, arguments.seed))
    if arguments.check:
        result = facts("cpu") | {
            "planting": [json.loads((each / "planting.json").read_text())
                         for each in arguments.check],
            "checks": [check(each, LABELS) for each in arguments.check],
        }  # fmt: skip
        print(markdown(result))
        if [each["seed"] for each in result["planting"]] == SEEDS:
            write_json(RESULTS / "tissue_plants.json", result)
            rewrite("tissue_plants", markdown(result))
    return 0


def markdown(result: dict) -> str:
    """Return a row for each kind of numbers and label, mean over seeds."""
    checks = result["checks"]
    parts = list(checks[0]["rgb"][LABELS[0]])
    lines = ["| numbers | label | " + " | ".join(parts) + " |", "|---" * (2 + len(parts)) + "|"]
    for name, of_label in checks[0].items():
        for label in of_label:
            found = ([each[name][label][part] for each in checks] for part in parts)
            cells = (f"{np.mean(each):.3f} ({min(each):.2f} to {max(each):.2f})" for each in found)
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    seeds = ", ".join(str(each["seed"]) for each in result["planting"])
    lines.append(
        f"\nMean over plantings (lowest to highest), seeds {seeds}. {result['machine']}; "
        f"{result['date']}, commit {result['commit']}, torch {result['torch']}, timm "
        f"{result['timm']}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
