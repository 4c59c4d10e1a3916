"""Our pixels and coordinates beside those of other programs' readers, on the zoo and real slides.

    OpenSlide DeepZoom     every tile of the finest level, and where it says it lies
    tifffile + zarr        regions of every level, at the level's own pixels
    CLAM-style reading     `read_region` at the corners and level of an index
    tiffslide              regions of level 0; skipped where it is not installed

Exact where the other decodes with the same library; else within `GREYS`, which is the rounding of
another JPEG decoder's colours. Versions of all readers stand in the header of a test run.
"""

import numpy as np
import openslide
import pytest
import tifffile
import zarr
from openslide.deepzoom import DeepZoomGenerator

from slides.grid import Grid
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tests.zoo import SLIDES

SOUND = ["levels rounded down", "JFIF tiles rightly tagged", "JPEG tiles of true RGB", "16 bits"]
FIXTURES = ["fixtures/CMU-1-Small-Region.svs", "atlas/LNMET_CK.tif"]
GREYS = 2


@pytest.fixture(params=SOUND + FIXTURES)
def path(request, tmp_path):
    """A sound slide: of the zoo, or real."""
    if request.param in SLIDES:
        return SLIDES[request.param].write(tmp_path / "a.tif")
    return request.getfixturevalue("shared_data") / "slides" / request.param


def corners(width, height, side, number=12):
    rng = np.random.default_rng(3)
    return rng.integers(0, (max(1, width - side), max(1, height - side)), (number, 2)).tolist()


def test_deep_zoom(path):
    zoom = DeepZoomGenerator(openslide.OpenSlide(path), tile_size=254, overlap=1)
    finest = zoom.level_count - 1
    columns, rows = zoom.level_tiles[finest]
    places = [(c, r) for c in (0, columns // 2, columns - 1) for r in (0, rows // 2, rows - 1)]
    with Slide(path, mpp=0.5) as slide:
        assert zoom.level_dimensions[finest] == (slide.width0, slide.height0)
        for place in places:
            (x0, y0), level, size = zoom.get_tile_coordinates(finest, place)
            ours = slide.levels.pixels(x0, y0, level, *size)
            np.testing.assert_array_equal(ours, np.asarray(zoom.get_tile(finest, place)))


def test_tifffile_and_zarr(path):
    with Slide(path, mpp=0.5) as slide, tifffile.TiffFile(path) as tiff:
        sizes = {(p.imagewidth, p.imagelength): p for p in tiff.pages if p.is_tiled}
        for level, size in enumerate(slide.facts.level_sizes):
            array = zarr.open(sizes[size].aszarr(), mode="r")
            ds = slide.level_downsamples[level]
            for x_r, y_r in corners(*size, 120):
                if not ((x_r * ds).is_integer() and (y_r * ds).is_integer()):
                    continue  # OpenSlide interpolates there
                ours = slide.levels.pixels(int(x_r * ds), int(y_r * ds), level, 120, 120)
                theirs = np.asarray(array[y_r : y_r + 120, x_r : x_r + 120, :3])
                if theirs.dtype == np.uint16:
                    theirs = theirs >> 8
                ours = ours[: theirs.shape[0], : theirs.shape[1]].astype(int)
                assert np.abs(ours - theirs).max() <= GREYS, (level, x_r, y_r)


def test_clam_style_reading(path):
    """The index gives corner, level and size; a reader that knows no more gets our pixels."""
    with Slide(path, mpp=0.5) as slide, openslide.OpenSlide(path) as theirs:
        index = index_slide(slide, Grid(128, 0.5), Tissue(min_area_um2=1000.0))
        assert (index.level, index.size0) == (0, 128)
        for x0, y0 in index.coords0[:: max(1, len(index) // 12)].tolist():
            region = theirs.read_region((x0, y0), index.level, (128, 128)).convert("RGB")
            np.testing.assert_array_equal(slide.read(x0, y0, index.grid), np.asarray(region))


def test_tiffslide(path):
    reader = pytest.importorskip("tiffslide", reason="pip install 'tapfm[parity]'")
    with Slide(path, mpp=0.5) as slide:
        if "16" in str(tifffile.TiffFile(path).pages[0].dtype):
            pytest.skip("tiffslide does not bring 16 bits to 8")
        theirs = reader.TiffSlide(path)
        for x0, y0 in corners(slide.width0, slide.height0, 200):
            ours = slide.levels.pixels(x0, y0, 0, 200, 200).astype(int)
            region = theirs.read_region((x0, y0), 0, (200, 200), as_array=True)[..., :3]
            assert np.abs(ours - region).max() <= GREYS


def test_a_shift_would_be_seen(path):
    with Slide(path, mpp=0.5) as slide, openslide.OpenSlide(path) as theirs:
        index = index_slide(slide, Grid(128, 0.5), Tissue(min_area_um2=1000.0))
        x0, y0 = index.coords0[len(index) // 2].tolist()
        ours = slide.read(x0, y0, index.grid).astype(int)
        for shift, least in ((1, 0), (6, 2 * GREYS)):  # the zoo's picture is smooth
            region = theirs.read_region((x0 + shift, y0), 0, (128, 128)).convert("RGB")
            assert np.abs(ours - np.asarray(region)).max() > least
