"""Gives verbs files with bytes changed: clear lines or a right result, soon, in little memory.

    python -m benchmarks.campaign.hostile --tries 200

Slides are those of `benchmarks.fuzz_slides`, read both ways; weights go to `tapfm export`, YAML and
tables to `tapfm index`, h5 files are read as index, coordinates and features.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.campaign.tries import LIMIT_S, arguments, attempt, draw, emptied, numbered, record
from benchmarks.fuzz_slides import fuzz
from tests.cohorts import write_cohort

PIECES = (b"\0", b"\n", b"\x1b[2J", b"\xff\xfe", b"-1", b"nan", b"1e999", b"&a [*a]", b": ",
          b"'", b'"', b"{", b"]", b",", b";", "\u202e".encode(), b"=1+1", b"../",
          b"A" * 300)  # fmt: skip
"""Texts put into a file, beside single bytes."""


def changed(data: bytes, numbers: random.Random, text: bool) -> bytes:
    """Return a damaged copy: bytes flipped, zeroed, doubled, cut, or replaced by odd pieces."""
    raw = bytearray(data)
    for _ in range(numbers.randint(1, 3)):
        at, length = numbers.randrange(len(raw)), numbers.randint(1, 64)
        kind = numbers.randrange(6 if text else 5)
        if kind == 0:
            raw[at] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            raw[at : at + length] = bytes(len(raw[at : at + length]))
        elif kind == 2:
            raw[at:at] = raw[at : at + length]
        elif kind == 3 and not numbers.randrange(4):
            del raw[max(1, at) :]
        elif kind < 5:
            raw[at] = numbers.randrange(256)
        else:
            raw[at : at + numbers.randint(0, 3)] = numbers.choice(PIECES)
    return bytes(raw)


def read_h5(path: Path, slide_path: Path) -> None:
    """Read a file as index, coordinates and features; errors of slides are what is wanted."""
    from slides.errors import SlideError
    from slides.grid import Grid
    from slides.tiling.index_file import read_index
    from slides.tiling.other_tools import read_coordinates
    from slides.tiling.tissue import Tissue
    from slides.wsi.reader import Slide
    from tapfm.data.feature_files import read_slide

    grid, faults = Grid(32, 0.5), 0
    with Slide(slide_path) as slide:
        for read in (
            lambda: read_index(path, grid, Tissue(min_area_um2=1000.0)),
            lambda: read_coordinates(path, slide, grid),
            lambda: read_slide(path.parent, path.stem, lambda: 0.5),
        ):
            try:
                read()
            except SlideError as fault:
                faults += len(str(fault).splitlines()) > 2
    if faults:
        raise AssertionError("an error of many lines")


def attacks(folder: Path) -> dict[str, tuple[Path, bool, list[str], Callable | None]]:
    """Return each kind's sound file, whether it is text, and the verb or call that reads it."""
    config = write_cohort(folder)
    model = folder / "model" / "best.safetensors"
    fit = ["fit", "--config", str(config), "--run_dir", str(folder), "--name", "model"]
    assert attempt([*fit, "--trainer.max_epochs", "1"]).code == 0
    index = ["index", "--config", str(config)]
    h5 = next((folder / "index").rglob("s1_patches.h5"))
    read = partial(read_h5, h5, folder / "slides" / "s1.svs")
    export = ["export", "--model", str(model), "--out", str(folder / "out")]
    return {
        "weights": (model, False, export, None),
        "yaml": (config, True, index, None),
        "tables": (folder / "cohort.csv", True, index, None),
        "h5": (h5, False, ["--help"], read),
    }


def mutate(
    kind: str, attack: tuple, tries: int, seed: int, minutes: float | None = None
) -> Counter:
    """Change a file and have it read, again and again; return how the tries ended."""
    path, text, verb, before = attack
    sound, ends = path.read_bytes(), Counter()
    try:
        for number in numbered(tries, minutes):
            path.write_bytes(changed(sound, draw(seed, kind, number), text))
            end = attempt(verb, limit=4 * LIMIT_S, prepare=before)  # of a busy machine
            ends[end.how] += 1
            if end.how not in ("right", "refused"):
                print(kind, number, end.how, f"{end.seconds:.0f} s", end.said[-800:])
    finally:
        path.write_bytes(sound)
    return ends


def main() -> None:
    """Try and record."""
    flags = arguments(__doc__, 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, attack in attacks(emptied(folder / "cohort")).items():
            if flags.only and kind not in flags.only:
                continue
            ends = mutate(kind, attack, flags.tries, flags.seed, flags.minutes)
            survived = ends["right"] + ends["refused"]
            record(f"hostile: {kind}", ends, survived, flags.seed)
        if not flags.only or "slides" in flags.only:
            start = 1_000_000 * flags.seed
            seeds = (start + number for number in numbered(flags.tries, flags.minutes))
            counts, wrong = fuzz(seeds, folder / "slides")
            survived = sum(counts.values()) - len(wrong)
            record("hostile: slides", Counter(counts), survived, flags.seed)


if __name__ == "__main__":
    main()
