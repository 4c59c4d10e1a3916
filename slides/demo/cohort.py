"""The demo cohort: real pyramidal slides on disk, painted from a seed, without downloads.

    <out>/cohort.csv               the table that `cohort.read_cohort` reads
    <out>/slides/<slide_id>.svs    Aperio style: MPP and AppMag in the description
    <out>/slides/<slide_id>.tif    generic pyramid: resolution tags alone
    <out>/truth/<slide_id>.png     0 glass, 1 tissue, 2 tumour, 3 pen; for evaluation only
    <out>/truth/<slide_id>.json    level-0 pixels per truth pixel, true labels, areas

About one case in eight has two slides; cases, not slides, are split. Each label is a trait of the
tumour's cells (`cell_stamps`), the tumour is a minority of the tissue, and sites differ in stain
and glass. A few labels are withheld (blank in the table, true in the json) and a few slides have
pen marks. `plan_demo` decides all of this, as a pure function of the seed; only `write_slide`
writes files. The same seed and library versions give byte-identical files.

Price: 136 slides in about 2 minutes on two cores, about 170 MB on disk.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from slides.demo import SLIDES
from slides.demo.tissue_painter import GLASS, PEN, TISSUE, TUMOUR, Specimen, paint, site_stain
from slides.errors import SettingsError, refuse
from slides.files import replacing, write_text
from slides.progress import progress_bar

LABELS = ("EGFR", "KRAS", "STK11")
PREVALENCE = (0.45, 0.35, 0.17)  # share of positives of each label among its known cases
UNKNOWN_SHARE = 0.06  # share of each label's cases that are withheld
SPLITS = {"train": 0.415, "val": 0.175, "test": 0.41}
SITES = ("ashford", "birchwood", "caldera", "dunmore")
MPPS = (0.25, 0.2527, 0.5, 0.5021)
SLIDES_PER_CASE = 1.13
PEN_SHARE = 0.08
FEWEST = 12  # slides: with fewer, a split cannot hold both classes of every label
MIN_SIDE0 = 4096
TRUTH_UM = 4.0  # side of a truth pixel, rounded to a whole number of level-0 pixels
TILE = 256
JPEG_QUALITY = 88
PEN_COLOURS = ((30, 60, 170), (20, 120, 70), (45, 45, 50))


@dataclass(frozen=True)
class DemoSlide:
    """The plan of one slide."""

    slide_id: str
    """Stem of the slide's files."""
    case_id: str
    """The patient."""
    split: str
    """One of `SPLITS`."""
    site: str
    """One of `SITES`."""
    labels: tuple[int | None, ...]
    """Labels in the table: 0, 1 or None (unknown), in the order of `LABELS`."""
    mpp: float
    """Microns per level-0 pixel."""
    aperio: bool
    """Aperio-style .svs, or generic .tif."""
    pen: bool
    """Pen marks beside the tissue."""
    specimen: Specimen
    """Traits to paint: the true labels, including those withheld as unknown."""

    @property
    def path(self) -> str:
        """Path of the file below the cohort's folder."""
        return f"slides/{self.slide_id}.{'svs' if self.aperio else 'tif'}"


def write_demo(
    out: Path, seed: int = 0, slides: int = SLIDES, workers: int = 2, progress: bool = True
) -> Path:
    """Write the demo cohort and return the path of its table, which is written last.

    Args:
        out: folder, created if missing; finished slides of the same plan and painter are kept,
            other files of the same names are overwritten.
        seed: another seed is another cohort, with other sites and other patients.
        slides: number of slides.
        workers: processes; 0 paints in this one.
        progress: show a progress bar.

    Raises:
        SettingsError: fewer slides than `FEWEST`, or a negative number.
    """
    out = Path(out)
    if workers < 0:
        raise SettingsError(f"--workers is {workers}: give 0 (paints in this process) or more")
    plan = plan_demo(seed, slides)
    for folder in ("slides", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(slide, out) for slide in plan]
    if workers:
        # spawn: forking a process that has run torch can deadlock
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            _exhaust(pool.imap_unordered(_write, jobs), len(jobs), progress)
    else:
        _exhaust(map(_write, jobs), len(jobs), progress)
    table = out / "cohort.csv"
    with replacing(table) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["case_id", "slide_id", "slide_path", "split", "stain", "site", *LABELS])
        for s in plan:
            labels = ["" if y is None else y for y in s.labels]
            rows.writerow([s.case_id, s.slide_id, s.path, s.split, "HE", s.site, *labels])
    return table


def plan_demo(seed: int = 0, slides: int = SLIDES) -> tuple[DemoSlide, ...]:
    """Return the plan of every slide: patients, splits, labels, sites, scanners. Pure."""
    faults = [f"--seed is {seed}: give 0 or more"] * (seed < 0)
    if slides < FEWEST:
        faults.append(
            f"a demo cohort needs at least {FEWEST} slides, so that every split has both classes "
            f"of every label; {slides} were requested"
        )
    refuse(faults, "demo cohort")
    rng = np.random.default_rng([seed, 7100])
    cases = round(slides / SLIDES_PER_CASE)
    doubled = set(rng.permutation(cases)[: slides - cases].tolist())
    stains = [site_stain(seed, k) for k in range(len(SITES))]
    plan: list[DemoSlide] = []
    for split, members in _split_cases(cases, rng).items():
        true, known = _draw_labels(len(members), rng)
        sites = rng.permutation(np.arange(len(members)) % len(SITES))
        for i, case in enumerate(members):
            traits = tuple(int(y) for y in true[i])
            labels = tuple(y if k else None for y, k in zip(traits, known[i], strict=True))
            for letter in "AB" if case in doubled else "A":
                number = len(plan)
                plan.append(
                    DemoSlide(
                        slide_id=f"DEMO-{case:03d}-{letter}",
                        case_id=f"DEMO-{case:03d}",
                        split=split,
                        site=SITES[sites[i]],
                        labels=labels,
                        mpp=MPPS[number % len(MPPS)],
                        aperio=bool(rng.random() < 0.6),
                        pen=bool(rng.random() < PEN_SHARE),
                        specimen=Specimen(
                            seed=seed * 100_003 + number,
                            stain=stains[sites[i]],
                            traits=traits,
                            tissue_mm2=float(rng.uniform(0.34, 0.48)),
                            tumour_fraction=float(rng.uniform(0.30, 0.46)),
                            aspect=float(rng.uniform(0.85, 1.25)),
                        ),
                    )
                )
    return tuple(plan)


def write_slide(slide: DemoSlide, out: Path) -> Path:
    """Paint a slide; write it, its truth mask and the mask's json; return its path."""
    pixels, truth = paint_slide(slide)
    path = Path(out) / slide.path
    _write_pyramid(path, pixels, slide)
    step0 = round(TRUTH_UM / slide.mpp)
    rows, columns = (np.minimum(np.arange(0, n, step0) + step0 // 2, n - 1) for n in truth.shape)
    stem = Path(out) / "truth" / slide.slide_id
    with replacing(stem.with_suffix(".png")) as partial:
        Image.fromarray(truth[np.ix_(rows, columns)]).save(partial, "PNG", optimize=True)
    mm2 = (slide.mpp / 1000) ** 2
    facts = {
        "slide_id": slide.slide_id,
        "downsample": step0,
        "mpp": slide.mpp,
        "width0": truth.shape[1],
        "height0": truth.shape[0],
        "classes": {"glass": GLASS, "tissue": TISSUE, "tumour": TUMOUR, "pen": PEN},
        "tissue_mm2": round(float((truth == TISSUE).sum() + (truth == TUMOUR).sum()) * mm2, 4),
        "tumour_mm2": round(float((truth == TUMOUR).sum()) * mm2, 4),
        "true_labels": dict(zip(LABELS, slide.specimen.traits, strict=True)),
        "painted": _painted(slide),
    }
    write_text(stem.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")  # last: it is done
    return path


def paint_slide(slide: DemoSlide) -> tuple[np.ndarray, np.ndarray]:
    """Return a slide's level 0, (h, w, 3) uint8, and its truth mask, (h, w) uint8."""
    rng = np.random.default_rng([slide.specimen.seed, 7101])
    rgb, classes = paint(slide.specimen, slide.mpp)
    sides0 = [max(MIN_SIDE0, n) + int(rng.integers(1, 600)) for n in classes.shape]
    window = tuple(
        slice(start, start + n)
        for n, side in zip(classes.shape, sides0, strict=True)
        for start in [int(rng.integers(0, side - n))]
    )
    pixels = np.empty((*sides0, 3), np.uint8)
    pixels[:] = slide.specimen.stain.glass
    truth = np.full(sides0, GLASS, np.uint8)
    pixels[window], truth[window] = rgb, classes
    if slide.pen:
        _mark(pixels, truth, slide.mpp, rng)
    return pixels, truth


# ---------------------------------------------------------------------------- plan


def _split_cases(cases: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """Return the case numbers of each split, at least three in each."""
    order = rng.permutation(cases).tolist()
    val, test = (max(3, round(SPLITS[name] * cases)) for name in ("val", "test"))
    train = cases - val - test
    return {
        "train": sorted(order[:train]),
        "val": sorted(order[train : train + val]),
        "test": sorted(order[train + val :]),
    }


def _draw_labels(cases: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return true labels and whether they are known, (cases, labels) each.

    Among the known, the number of positives is the prevalence rounded up, never all and never none:
    a small split keeps both classes of every label.
    """
    true = np.zeros((cases, len(LABELS)), int)
    known = np.ones((cases, len(LABELS)), bool)
    for k, prevalence in enumerate(PREVALENCE):
        order = rng.permutation(cases)
        withheld = round(UNKNOWN_SHARE * cases)
        hidden, shown = order[:withheld], order[withheld:]
        positives = min(max(1, int(np.ceil(prevalence * len(shown)))), len(shown) - 1)
        true[shown[:positives], k] = 1
        true[hidden, k] = rng.random(withheld) < prevalence
        known[hidden, k] = False
    return true, known


# ---------------------------------------------------------------------------- files


def _write(job: tuple[DemoSlide, Path]) -> Path:
    slide, out = job
    try:
        known = json.loads((out / "truth" / f"{slide.slide_id}.json").read_text())["painted"]
    except (OSError, ValueError, LookupError, TypeError):
        known = None
    if known == _painted(slide) and (out / slide.path).exists():
        return out / slide.path
    return write_slide(slide, out)


def _painted(slide: DemoSlide) -> str:
    """Return a hash of a slide's plan and of the program that paints it."""
    digest = hashlib.sha256(repr(slide).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _exhaust(done: Iterable, total: int, progress: bool) -> None:
    for _ in progress_bar(done, "paint", total, unit="slide", disable=not progress):
        pass


def _mark(pixels: np.ndarray, truth: np.ndarray, mpp: float, rng: np.random.Generator) -> None:
    """Draw a pen stroke that bends round part of the tissue, in place."""
    rows, columns = np.nonzero(truth[::16, ::16])
    centre = np.array([columns.mean(), rows.mean()]) * 16
    reach = np.array([np.ptp(columns), np.ptp(rows)]) * 8 + 30 / mpp
    start, sweep = rng.uniform(0, 2 * np.pi), rng.uniform(1.2, 2.6)
    angle = start + np.linspace(0, sweep, 24)
    bend = 1 + 0.05 * np.sin(3 * angle + rng.uniform(0, 6))
    line = centre + reach * (np.stack([np.cos(angle), np.sin(angle)], 1) * bend[:, None])
    step = 4  # the stroke is soft: a quarter of the resolution is enough
    size = (-(-truth.shape[1] // step), -(-truth.shape[0] // step))
    stroke = Image.new("L", size)
    points = [tuple(p) for p in (line / step).tolist()]
    width = int(rng.uniform(45, 75) / mpp / step)
    ImageDraw.Draw(stroke).line(points, fill=255, width=width, joint="curve")
    stroke = stroke.filter(ImageFilter.GaussianBlur(3 / mpp / step))
    box = stroke.point(lambda value: 255 * (value > 8)).getbbox()
    if box is None:
        return
    x0, y0, x1, y1 = (step * b for b in box)
    part = (slice(y0, y1), slice(x0, x1))
    cover = np.asarray(stroke.crop(box).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR))
    cover = cover[: truth[part].shape[0], : truth[part].shape[1]]
    ink = np.array(PEN_COLOURS[rng.integers(len(PEN_COLOURS))], np.float32) / 255
    opacity = rng.uniform(0.75, 0.92) * cover[..., None].astype(np.float32) / 255
    pixels[part] = (pixels[part] * (1 - opacity * (1 - ink))).astype(np.uint8)
    truth[part][cover > 127] = PEN


def _write_pyramid(path: Path, pixels: np.ndarray, slide: DemoSlide) -> None:
    """Write tiled JPEG levels: 1, 4, 16 as Aperio scanners do, or 1, 2, 4, 8."""
    levels = [Image.fromarray(pixels)]
    for _ in range(2 if slide.aperio else 3):
        levels.append(levels[-1].reduce(4 if slide.aperio else 2))
    height0, width0 = pixels.shape[:2]
    power = 40 if slide.mpp < 0.35 else 20
    with replacing(path) as partial, tifffile.TiffWriter(partial) as tiff:
        for level in levels:
            size = f"{width0}x{height0} [0,0 {width0}x{height0}] ({TILE}x{TILE})"
            if level is not levels[0]:
                size += f" -> {level.width}x{level.height}"
            aperio = {
                "description": f"Aperio Image Library v12.0.15\r\n{size} JPEG/RGB Q={JPEG_QUALITY}"
                f"|AppMag = {power}|MPP = {slide.mpp:g}",
            }
            dots_per_cm = 1e4 / (slide.mpp * width0 / level.width)
            generic = {
                "resolution": (dots_per_cm, dots_per_cm),
                "resolutionunit": "CENTIMETER",
                "subfiletype": int(level is not levels[0]),
            }
            tiff.write(
                np.asarray(level),
                tile=(TILE, TILE),
                photometric="rgb",  # the input's; tifffile stores YCbCr
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                metadata=None,
                software=False,
                maxworkers=1,
                **(aperio if slide.aperio else generic),
            )
