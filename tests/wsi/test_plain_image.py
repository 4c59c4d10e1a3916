"""A plain picture reads as a slide of one level with the table's resolution, or says why not.

A damaged file is an error: damaged parts are never filled with grey or white.
"""

import pickle

import numpy as np
import pytest
import tifffile
from PIL import Image

from slides.errors import MissingResolutionError, NotASlideError, UnreadableRegionError
from slides.grid import Grid
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi import plain_image as plain
from slides.wsi.reader import Slide
from tests.conftest import stained_picture

PICTURE = stained_picture(601, 433)
WAYS = ["png", "jpg", "tif", "lzw.tif"]


def save(folder, way, picture=PICTURE):
    path = folder / f"a.{way}"
    if way == "jpg":
        pytest.importorskip("simplejpeg")
        Image.fromarray(picture).save(path, quality=95)
    elif way.endswith("tif"):
        tifffile.imwrite(path, picture, compression="lzw" if "lzw" in way else None, rowsperstrip=7)
    else:
        Image.fromarray(picture).save(path)
    return path


@pytest.mark.parametrize("way", WAYS)
class TestEveryKind:
    def test_tiles_are_the_picture(self, tmp_path, way):
        slide = Slide(save(tmp_path, way), mpp=0.5)
        assert (slide.width0, slide.height0, slide.vendor) == (601, 433, plain.VENDOR)
        truth = np.asarray(Image.open(slide.path).convert("RGB"))
        tile = slide.read(100, 50, Grid(97, 0.5))
        np.testing.assert_array_equal(tile, truth[50:147, 100:197])
        copy = pickle.loads(pickle.dumps(slide))
        np.testing.assert_array_equal(copy.read(100, 50, Grid(97, 0.5)), tile)

    def test_outside_is_white(self, tmp_path, way):
        slide = Slide(save(tmp_path, way), mpp=0.5)
        tile = slide.region(580, -10, 64, 64)
        assert (tile[:10] == 255).all()
        assert (tile[:, 21:] == 255).all()
        truth = np.asarray(Image.open(slide.path).convert("RGB"))
        np.testing.assert_array_equal(tile[10:, :21], truth[:54, 580:601])
        for far in ((-500, 0), (5000, 0), (0, -500)):
            assert (slide.region(*far, 64, 64) == 255).all()

    def test_without_mpp_it_says_how(self, tmp_path, way):
        with pytest.raises(MissingResolutionError, match="mpp column"):
            _ = Slide(save(tmp_path, way)).mpp

    def test_is_indexed(self, tmp_path, way):
        index = index_slide(Slide(save(tmp_path, way), mpp=0.5), Grid(64, 0.5), Tissue())
        assert len(index) > 8

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
    def test_cut_short_is_an_error(self, tmp_path, way, share):
        path = save(tmp_path, way)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises((NotASlideError, UnreadableRegionError), match=r"a(.lzw)?: ") as caught:
            Slide(path, mpp=0.5).read(300, 400, Grid(32, 0.5))
        assert "leave this slide out" in str(caught.value)


@pytest.mark.parametrize("way", ["png", "jpg"])
def test_damage_in_the_middle_is_an_error(tmp_path, way):
    path = save(tmp_path, way)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 300] = bytes(300)
    path.write_bytes(raw)
    with pytest.raises(UnreadableRegionError, match=r"a: .*cannot be decoded"):
        Slide(path, mpp=0.5).read(0, 0, Grid(32, 0.5))


def test_grey_and_palette_and_alpha(tmp_path):
    grey = PICTURE[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    tile = Slide(tmp_path / "grey.png", mpp=0.5).read(9, 7, Grid(50, 0.5))
    np.testing.assert_array_equal(tile, np.repeat(grey[7:57, 9:59, None], 3, 2))
    alpha = np.dstack([PICTURE, np.full(grey.shape, 255, np.uint8)])
    alpha[:20, :20, 3] = 0
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    tile = Slide(tmp_path / "alpha.png", mpp=0.5).read(0, 0, Grid(50, 0.5))
    assert (tile[:20, :20] == 255).all()
    np.testing.assert_array_equal(tile[20:], PICTURE[20:50, :50])


def test_what_it_does_not_read(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "deep.tif", PICTURE[..., 0].astype(np.uint16) * 256)
    Image.fromarray(PICTURE).convert("CMYK").save(tmp_path / "ink.jpg")
    for name, kind in (("deep.tif", "kind I;16"), ("ink.jpg", "kind CMYK")):
        with pytest.raises(NotASlideError, match=f"{kind}; 8-bit RGB"):
            _ = Slide(tmp_path / name).width0
    monkeypatch.setattr(plain, "MAX_PIXELS", 1000)
    with pytest.raises(NotASlideError, match=r"601 x 433 pixels, too many.*vips tiffsave"):
        _ = Slide(save(tmp_path, "png")).width0


@pytest.mark.parametrize("way", ["png", "jpg"])
def test_the_limit_is_ours_and_not_pillows(tmp_path, way, monkeypatch):
    """Pillow refuses twice its limit before our sentence with the way out is reached."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    slide = Slide(save(tmp_path, way), mpp=0.5)
    assert slide.read(100, 50, Grid(97, 0.5)).std() > 20
    monkeypatch.setattr(plain, "MAX_PIXELS", 1000)
    with pytest.raises(NotASlideError, match=r"too many.*vips tiffsave"):
        _ = Slide(slide.path).width0
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_the_real_one(shared_data):
    slide = Slide(shared_data / "slides" / "fixtures" / "kidney-48-5.tif", mpp=0.5)
    assert (slide.width0, slide.height0) == (1493, 901)
    truth = np.asarray(Image.open(slide.path))[:901:2, :1493:2]
    shown = slide.thumbnail(mpp=1.0)[0][: truth.shape[0], : truth.shape[1]]
    assert truth.std() > 5
    assert np.abs(shown.astype(int) - truth).mean() < 3
