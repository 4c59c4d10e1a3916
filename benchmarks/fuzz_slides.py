"""Thousands of damaged slides: each gives a SlideError or the right pixels, never a crash.

    python -m benchmarks.fuzz_slides --cases 2000

A case is a small sound slide with a few bytes of its header, tag tables or pixels changed, words
set to extreme numbers, or its end cut off: a function of the case's number alone. It is opened,
read and indexed both ways, directly and through OpenSlide alone, in another process, which is ended
after `LIMIT_S`. Right means: what the direct way gives is what OpenSlide gives.

`tests/wsi/test_fuzz.py` runs a few hundred of the same cases.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import resource
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from slides.errors import SlideError, UnreadableRegionError
from slides.grid import Grid
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi.jpeg_stream import DamagedTileError
from slides.wsi.reader import Slide
from slides.wsi.tiff_tags import directories

LIMIT_S = 20.0  # for one case: sound ones take 0.05 s
MEMORY = 6 << 30  # address space of the process that reads: more is a bomb that went off
EXTREMES = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)
GRID = Grid(29, 1.0)
DAMAGED_TILE = "a damaged tile"  # in place of the error's class
REGIONS = ((0, 0, 96, 96), (101, 57, 64, 64), (-9, -7, 50, 50), (280, 200, 90, 90))


def write_seeds(folder: Path) -> list[Path]:
    """Write small sound slides of several formats."""
    import tifffile

    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 240, (34, 46, 3))
    picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)[:263, :359]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, options in {
        "generic.tif": {"compression": "jpeg", "resolution": (20_000, 20_000)},
        "big.tif": {"compression": "jpeg", "resolution": (20_000, 20_000)},
        "lzw.tif": {"compression": "lzw", "resolution": (20_000, 20_000)},
        "aperio.svs": {"compression": "jpeg", "description": "Aperio Image Library v12.0.0 \r\n"
                       "359x263 [0,0 359x263] (64x64) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5000"},
    }.items():  # fmt: skip
        path = folder / name
        with tifffile.TiffWriter(path, bigtiff=name == "big.tif") as tiff:
            for level in (1, 2):
                more = {} if "svs" in name else {"subfiletype": int(level > 1)}
                tiff.write(
                    np.ascontiguousarray(picture[::level, ::level]), tile=(64, 64),
                    photometric="rgb", metadata=None, resolutionunit="CENTIMETER",
                    **options | more,
                )  # fmt: skip
        paths.append(path)
    from PIL import Image

    for name in ("plain.png", "plain.jpg", "plain.tif"):
        Image.fromarray(picture).save(folder / name)
        paths.append(folder / name)
    return paths


def damaged(sound: bytes, spots: np.ndarray, seed: int) -> bytes:
    """Return a damaged copy of a file; most damage is at `spots`, where its tables lie."""
    rng = np.random.default_rng(seed)
    raw = bytearray(sound)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.choice(spots)) if rng.random() < 0.6 else int(rng.integers(len(raw)))
        kind = rng.integers(5)
        if kind == 0:
            raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            word = int(rng.choice(EXTREMES)).to_bytes(4, "little")[: int(rng.choice([1, 2, 4]))]
            raw[at : at + len(word)] = word[: len(raw) - at]
        elif kind == 2:
            length = int(rng.integers(1, 40))
            raw[at : at + length] = bytes(min(length, len(raw) - at))
        elif kind == 3:
            length = int(rng.integers(1, 40))
            source = int(rng.integers(max(1, len(raw) - length)))
            raw[at : at + length] = raw[source : source + length][: len(raw) - at]
        else:
            raw[at : at + 1] = rng.integers(256, size=1, dtype=np.uint8).tobytes()
    if rng.random() < 0.2:
        raw = raw[: int(rng.integers(1, len(raw)))]
    return bytes(raw)


def spots(path: Path, size: int) -> np.ndarray:
    """Return positions of the file's header, and of its directories if it is a TIFF."""
    found = [np.arange(min(size, 600))]
    tail = [reach for _, reach in directories(path)]
    for reach in tail:
        found.append(np.arange(max(0, reach - 700), min(reach, size)))
    return np.concatenate(found)


def read_both_ways(path: Path) -> str:
    """Return `right` or the error's class; raise if anything else happens.

    OpenSlide returns what libjpeg guesses of a damaged tile, which decoding here refuses: from
    there on there is nothing to compare.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, slow = _all_that_is_read(path, True), _all_that_is_read(path, False)
    refused = isinstance(fast[-1], str) and fast[-1] == DAMAGED_TILE
    if refused:
        slow = slow[: len(fast) - 1]
    for one, other in zip(fast, slow, strict=False):
        same = np.array_equal(one, other) if isinstance(one, np.ndarray) else str(one) == str(other)
        if not same:
            raise AssertionError(f"{one!r:.200} directly, {other!r:.200} by OpenSlide")
    if refused:
        return UnreadableRegionError.__name__
    if len(fast) != len(slow):
        raise AssertionError(f"{fast[-1]!r:.200} directly, {slow[-1]!r:.200} by OpenSlide")
    return slow[-1] if isinstance(slow[-1], str) else "right"


def _all_that_is_read(path: Path, direct: bool) -> list:
    """Yield facts, then regions, then tiles, and at the end the class of an error."""
    answer = []
    with Slide(path, mpp=0.5, name="fuzz", direct=direct) as slide:
        try:
            answer.append((slide.width0, slide.height0, slide.level_downsamples))
            slide.check_complete()
            for level, size in enumerate(slide.facts.level_sizes):
                whole = (0, 0, *np.minimum(size, 512).tolist())
                for x0, y0, width, height in (*REGIONS, whole):
                    answer.append(slide.levels.pixels(x0 * 2, y0 * 2, level, width, height))
            answer.append(slide.read(13, 29, GRID))
            answer.append(index_slide(slide, GRID, Tissue(min_area_um2=0)).coords0)
        except SlideError as error:
            damaged_tile = isinstance(error.__cause__, DamagedTileError)
            answer.append(DAMAGED_TILE if damaged_tile else type(error).__name__)
    return answer


def run_case(seeds: list[Path], case: int, folder: Path) -> str:
    """Write damaged file number `case`, read it, and remove it if all is well."""
    seed = seeds[case % len(seeds)]
    raw = seed.read_bytes()
    path = folder / f"{case}{seed.suffix}"
    path.write_bytes(damaged(raw, spots(seed, len(raw)), case))
    outcome = read_both_ways(path)
    path.unlink()
    return outcome


def _worker(seeds: list[Path], folder: Path, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        try:
            pipe.send(run_case(seeds, case, folder))
        except Exception as error:  # what the fuzzing is for
            pipe.send(f"FAULT {type(error).__name__}: {error}"[:400])


def fuzz(
    cases: Iterable[int], folder: Path, limit_s: float = LIMIT_S
) -> tuple[dict, dict[int, str]]:
    """Run cases in a process that may die.

    Returns:
        How often each outcome came, and of each case that went wrong what it did.
    """
    seeds = write_seeds(folder / "seeds")
    counts, wrong = collections.Counter(), {}
    process = pipe = None
    context = multiprocessing.get_context("spawn")
    for case in cases:
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(seeds, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            pipe.recv()  # its imports are done
        pipe.send(case)
        try:
            outcome = pipe.recv() if pipe.poll(limit_s) else "FAULT hang"
        except EOFError:
            process.join()
            outcome = f"FAULT died with {process.exitcode}"
        if outcome.startswith("FAULT"):
            wrong[case] = outcome
            if not process.is_alive() or outcome == "FAULT hang":
                process.kill()
                process = None
        counts[outcome.split(":")[0]] += 1
    if process is not None:
        pipe.send(None)
        process.join()
    return dict(counts), wrong


def main() -> None:
    """Run the cases and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="where files that fail are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        cases = range(arguments.first, arguments.first + arguments.cases)
        counts, wrong = fuzz(cases, folder)
    for outcome, count in sorted(counts.items(), key=lambda each: -each[1]):
        print(f"{count:6d}  {outcome}")
    for case, outcome in wrong.items():
        print(f"case {case}: {outcome}")


if __name__ == "__main__":
    main()
