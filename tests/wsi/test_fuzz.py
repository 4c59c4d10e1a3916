"""A damaged slide is a SlideError or gives the right pixels: no crash, no hang, no wrong pixel.

OpenSlide's pixels are the right ones; `benchmarks/fuzz_slides.py` makes the cases and reads them in
a process that may die. At the end are the bugs that fuzzing has found, one test each.
"""

import re

import numpy as np
import pytest
import tifffile

from benchmarks import fuzz_slides
from benchmarks.fuzz_slides import fuzz, read_both_ways, write_seeds
from slides.errors import NotASlideError
from slides.wsi import jpeg_tiles as direct
from slides.wsi.reader import Slide


def test_hundreds_of_damaged_slides(tmp_path):
    counts, wrong = fuzz(range(350), tmp_path)
    assert not wrong
    assert sum(counts.values()) == 350
    for outcome in ("right", "NotASlideError", "UnreadableRegionError"):
        assert counts[outcome] > 30, counts


def test_cases_are_the_same_every_time(tmp_path):
    sound = write_seeds(tmp_path)[0].read_bytes()
    spots = np.arange(600)
    first, again, other = (fuzz_slides.damaged(sound, spots, seed) for seed in (5, 5, 6))
    assert first == again != other
    assert first != sound


def test_it_tells_wrong_pixels(tmp_path, monkeypatch):
    """Partner test: direct decoding that is off by one is detected."""
    sound = write_seeds(tmp_path)[0]
    assert read_both_ways(sound) == "right"
    decode = direct.JpegDecoder._decode
    calls = []

    def off(self, grid, number, into=None):
        calls.append(number)
        return decode(self, grid, number, into) + np.uint8(len(calls) > 9)

    monkeypatch.setattr(direct.JpegDecoder, "_decode", off)
    with pytest.raises(AssertionError, match="directly"):
        read_both_ways(sound)


def test_it_tells_a_death_and_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_slides, "_worker", _dies_and_hangs)
    counts, wrong = fuzz(range(3), tmp_path, limit_s=0.5)
    assert re.match("FAULT died with -", wrong[0])
    assert wrong[1] == "FAULT hang"
    assert 2 not in wrong
    assert counts["right"] == 1


def _dies_and_hangs(seeds, folder, pipe):
    import os
    import signal
    import time

    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        if case == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if case == 1:
            time.sleep(60)
        pipe.send("right")


class TestFound:
    def edited(self, path, page, tag, value):
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tiff.pages[page].tags[tag].overwrite(value)
        return path

    @pytest.fixture
    def aperio(self, tmp_path):
        return next(path for path in write_seeds(tmp_path) if path.suffix == ".svs")

    @pytest.mark.parametrize("page", [0, 1])
    def test_a_tile_as_large_as_memory_ended_the_process(self, aperio, page):
        self.edited(aperio, page, "TileWidth", 2**28 + 64)
        with pytest.raises(NotASlideError, match=r"a: .* tiles of 268435520 x 64 pixels, which no"):
            Slide(aperio, name="a").facts  # noqa: B018

    def test_tiles_that_were_never_listed_took_hours(self, aperio):
        self.edited(aperio, 0, "ImageWidth", 7274855)
        with pytest.raises(NotASlideError, match=r"a: .* names 568350 tiles and lists 30"):
            Slide(aperio, name="a").facts  # noqa: B018

    def test_a_tile_missing_at_level_0_is_missing_below(self, aperio):
        """OpenSlide treats an Aperio slide's coarser level as broken there too."""
        with tifffile.TiffFile(aperio) as tiff:
            counts = list(tiff.pages[0].tags["TileByteCounts"].value)
        self.edited(aperio, 0, "TileByteCounts", [*counts[:26], 0, *counts[27:]])
        assert read_both_ways(aperio) == "right"
        with pytest.warns(UserWarning, match="slower"), Slide(aperio) as slide:
            assert slide.decoders[1] == "OpenSlide: tiles are missing from a finer level"

    def test_a_property_with_a_damaged_name_is_no_fault(self, aperio):
        raw = aperio.read_bytes()
        at = raw.index(b"AppMag")
        aperio.write_bytes(raw[:at] + b"\xff\xfe" + raw[at + 2 :])
        assert read_both_ways(aperio) == "right"
