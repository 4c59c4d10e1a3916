"""Masks, coordinates, features are found by slide_id and file name, with or without the UUID."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from slides.errors import CoordinatesError, FeatureFileError, MaskError
from slides.files import names_of
from slides.grid import Grid
from slides.tiling.index import index_cohort, index_path, read_index
from slides.tiling.job_folders import find_all, find_coordinates
from slides.tiling.masks import mask_path
from slides.tiling.tissue import Tissue
from tapfm.data.feature_files import find_file, read_slide
from tests.conftest import stained_picture, write_pyramid
from tests.tiling.test_other_tools import trident
from tests.zoo import BARCODE, FILE_NAMES, STEM

GRID = Grid(64, 0.5)
EVERY = pytest.mark.parametrize(("slide_id", "file", "name"), FILE_NAMES)


@EVERY
def test_each_kind_of_file_is_found(slide_id, file, name, tmp_path):
    for ending in ("_patches.h5", ".geojson", ".pt"):
        (tmp_path / f"{name}{ending}").touch()
        (tmp_path / f"another{ending}").touch()
    assert find_coordinates(tmp_path, slide_id, file) == tmp_path / f"{name}_patches.h5"
    assert mask_path(tmp_path, slide_id, file) == tmp_path / f"{name}.geojson"
    assert find_file(tmp_path, slide_id, tmp_path / file) == tmp_path / f"{name}.pt"
    find_all(tmp_path, [(slide_id, tmp_path / file)])


def test_the_slide_id_comes_first():
    assert names_of("a.1", "folder/b.svs") == ("a.1", "b")
    assert names_of(BARCODE, f"{STEM}.svs") == (BARCODE, STEM)
    assert names_of("a.1") == names_of("a.1", "a.1.svs") == ("a.1",)


def test_none_is_an_error_that_lists_the_names(tmp_path):
    for error, find in (
        (CoordinatesError, find_coordinates),
        (MaskError, mask_path),
        (FeatureFileError, lambda folder, *slide: read_slide(folder, slide[0], None, slide[1])),
    ):
        with pytest.raises(error, match=f"^{BARCODE}: .*{STEM}"):
            find(tmp_path, BARCODE, f"{STEM}.svs")
    for kind in (".geojson", ".png"):
        (tmp_path / f"{STEM}{kind}").touch()
    with pytest.raises(MaskError, match=f"{BARCODE}: two masks .*{STEM}.geojson or {STEM}.png"):
        mask_path(tmp_path, BARCODE, f"{STEM}.svs")


@pytest.mark.parametrize("by", ["coords", "masks"])
def test_the_index_is_made_kept_and_made_again(tmp_path, by):
    path = write_pyramid(tmp_path / f"{STEM}.tif", stained_picture(601, 433), 0.5)
    rows = [SimpleNamespace(slide_id=BARCODE, path=path, mpp=None)]
    (tmp_path / "job").mkdir()

    def put(name, number):
        if by == "coords":
            corners = np.arange(number)[:, None] * [64, 0]
            sizes = {"patch_size": 64, "patch_size_level0": 64, "level0_magnification": 20}
            sides = {"level0_width": 601, "level0_height": 433}
            trident(tmp_path / "job" / f"{name}_patches.h5", corners, **sizes, **sides)
        else:
            mask = np.zeros((433, 601), np.uint8)
            mask[:64, : 64 * number] = 1
            Image.fromarray(mask).save(tmp_path / "job" / f"{name}.png")

    def run():
        row = index_cohort(rows, tmp_path / "out", GRID, tissue, progress=False)[0]
        return row["status"], row["tiles"]

    tissue = Tissue(**{by: str(tmp_path / "job")})
    put(STEM, 3)
    assert run() == ("indexed", 3)
    assert run() == ("kept", 3)
    assert len(read_index(index_path(tmp_path / "out", GRID, BARCODE), GRID, tissue)) == 3
    put(STEM, 5)
    assert run() == ("rebuilt", 5)
    put(BARCODE, 4)  # a file of its own name goes before
    assert run() == ("rebuilt", 4)


def test_slides_that_are_renamed_with_their_masks_are_indexed_again(tmp_path):
    path = write_pyramid(tmp_path / "old.tif", stained_picture(601, 433), 0.5)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.ones((433, 601), np.uint8)).save(tmp_path / "masks" / "old.png")
    tissue = Tissue(masks=str(tmp_path / "masks"))
    for name, status in (("old", "indexed"), ("new", "kept")):
        path = path.rename(tmp_path / f"{name}.tif")
        (tmp_path / "masks" / "old.png").rename(tmp_path / "masks" / f"{name}.png")
        row = SimpleNamespace(slide_id="1", path=path, mpp=None)
        assert index_cohort([row], tmp_path, GRID, tissue, progress=False)[0]["status"] == status
