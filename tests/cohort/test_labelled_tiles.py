"""Tables and folders of labelled tiles are read as published, with no case in two parts."""

import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from slides.cohort.labelled_tiles import read_tile, read_tiles
from slides.errors import CohortError, SplitError, TileError


def picture(path, side=8, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def table(folder, rows, header="path,label,case_id,split"):
    for row in rows:
        touch(folder, row.split(",")[0])
    (folder / "tiles.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "tiles.csv"


SOUND = ["a.png,x,c0,train", "b.png,y,c1,train", "c.png,x,c2,val", "d.png,y,c3,test"]


class TestTable:
    def test_as_it_stands(self, tmp_path):
        found = read_tiles(table(tmp_path, SOUND))
        assert found.cases_known
        assert found.classes == ("x", "y")
        assert [(r.path.name, r.label, r.case_id, r.part) for r in found.rows] == [
            ("a.png", "x", "c0", "train"),
            ("b.png", "y", "c1", "train"),
            ("c.png", "x", "c2", "val"),
            ("d.png", "y", "c3", "test"),
        ]
        assert found.rows[0].path == tmp_path / "a.png"

    def test_every_fault_in_one_error(self, tmp_path):
        rows = [
            *SOUND,
            "e.png,,c4,train",
            "f.png,x,c5,training",
            "g.png,y,,val",
            "x/../a.png,x,c9,test",  # the picture of row 2
        ]
        (tmp_path / "x").mkdir()
        path = table(tmp_path, rows)
        path.write_text(path.read_text() + "gone.png,x,c6,train\n")
        with pytest.raises(CohortError) as caught:
            read_tiles(path)
        message = str(caught.value)
        assert "5 faults" in message
        for part in ("row 6: label is ''", "row 7: split is 'training'", "row 8: case_id is blank",
                     "row 10: ", "gone.png is no file", "rows 2, 9: picture "):  # fmt: skip
            assert part in message

    def test_a_case_in_two_parts_is_refused(self, tmp_path):
        rows = [*SOUND, "e.png,x,c3,train", "f.png,x,c3,test"]
        with pytest.raises(CohortError, match=r"c3 is in test \(2 tiles\) and train \(1 tiles\)"):
            read_tiles(table(tmp_path, rows))

    def test_a_class_that_cannot_be_learned_is_named(self, tmp_path):
        with pytest.raises(CohortError, match="no tile of z is in train"):
            read_tiles(table(tmp_path, [*SOUND, "e.png,z,c9,test"]))

    def test_a_class_with_the_name_of_the_mean_over_all_is_refused(self, tmp_path):
        with pytest.raises(CohortError, match="class 'macro' has the name of the mean over all"):
            read_tiles(table(tmp_path, [row.replace(",y,", ",macro,") for row in SOUND]))

    def test_columns_are_needed(self, tmp_path):
        with pytest.raises(CohortError, match="column 'label' is missing"):
            read_tiles(table(tmp_path, ["a.png,x"], "path,class"))


class TestFolders:
    def test_parts_classes_and_cases(self, tmp_path):
        """The folders are those of SPIDER's script, with slides below the classes."""
        touch(tmp_path, "train/Fat/s1/0.png", "train/Fat/s2/0.png", "train/Mucus/s3/0.png",
              "train/Mucus/s4/0.png", "test/Fat/s5/0.png", "test/Mucus/s5/1.png",
              "train/Fat/readme.txt")  # fmt: skip
        found = read_tiles(tmp_path, fractions=(0.5, 0.5, 0.1))
        assert found.cases_known
        assert {r.case_id for r in found.part("test")} == {"s5"}
        assert len(found.part("train")) == len(found.part("val")) == 2, "val is dealt from train"
        assert {r.label for r in found.part("train")} == {"Fat", "Mucus"}

    def test_nct_crc_as_it_ships(self, tmp_path):
        for n in range(10):
            touch(
                tmp_path, f"NCT-CRC-HE-100K/ADI/ADI-A{n}.tif", f"NCT-CRC-HE-100K/TUM/TUM-B{n}.tif"
            )
        touch(tmp_path, "CRC-VAL-HE-7K/ADI/ADI-TCGA-C.tif", "CRC-VAL-HE-7K/TUM/TUM-TCGA-D.tif")
        found = read_tiles(tmp_path, fractions=(0.8, 0.2, 0.1), seed=3)
        assert not found.cases_known, "its files name no patient"
        moved = shutil.copytree(tmp_path, tmp_path / "elsewhere")
        assert read_tiles(moved, fractions=(0.8, 0.2, 0.1), seed=3).sha256 == found.sha256
        shutil.rmtree(moved)
        assert {r.path.parent.parent.name for r in found.part("test")} == {"CRC-VAL-HE-7K"}
        for part, count in (("train", 8), ("val", 2)):
            labels = [r.label for r in found.part(part)]
            assert labels.count("ADI") == labels.count("TUM") == count
        assert found.rows != read_tiles(tmp_path, fractions=(0.8, 0.2, 0.1), seed=4).rows
        touch(tmp_path, "NCT-CRC-HE-100K-NONORM/ADI/ADI-A0.tif")
        with pytest.raises(CohortError, match="hold the same tiles"):
            read_tiles(tmp_path)

    def test_ospatch_maps_are_no_classes(self, tmp_path):
        for n in range(4):
            touch(tmp_path, f"trainval/0/{n}.png", f"trainval/1/b{n}.png", f"trainval/non/{n}.png",
                  f"trainval/nuclei/{n}.png")  # fmt: skip
        touch(tmp_path, "test/0/t.png", "test/1/u.png", "test/nuclei/t.png", "split/test.txt")
        found = read_tiles(tmp_path)
        assert found.classes == ("0", "1")
        assert len(found.part("test")) == 2
        assert len(found.rows) == 10

    def test_classes_alone_are_dealt_by_case_named_in_the_file(self, tmp_path):
        rng = np.random.default_rng(0)
        for label in ("x", "y"):
            for case in range(15):
                for n in range(rng.integers(1, 5)):
                    touch(tmp_path, f"{label}/TCGA-{label}{case:02d}_{n}.png")
        for seed in range(5):
            found = read_tiles(tmp_path, r"^(TCGA-...)", seed=seed)
            cases = [{r.case_id for r in found.part(p)} for p in ("train", "val", "test")]
            assert [len(each) for each in cases] == [18, 6, 6]
            assert not cases[0] & cases[1]
            assert not (cases[0] | cases[1]) & cases[2]
            for part in ("train", "val", "test"):  # as many of each class
                of = {r.case_id: r.label for r in found.part(part)}
                assert list(of.values()).count("x") == len(of) / 2

    def test_what_cannot_be_is_refused(self, tmp_path):
        touch(tmp_path, "train/a/0.png", "adenoma/0.png")
        with pytest.raises(CohortError, match="adenoma beside train"):
            read_tiles(tmp_path)
        touch(tmp_path / "two", "a/0.png", "b/1.png")
        with pytest.raises(CohortError, match=r"do not match data\.case_pattern"):
            read_tiles(tmp_path / "two", r"(TCGA)")
        with pytest.raises(CohortError, match="in brackets"):
            read_tiles(tmp_path / "two", r"TCGA")
        with pytest.raises(SplitError, match="2 cases cannot make 3 parts"):
            read_tiles(tmp_path / "two", r"^(.)")
        (tmp_path / "none").mkdir()
        with pytest.raises(CohortError, match="no pictures"):
            read_tiles(tmp_path / "none")


def test_class_weights_are_of_the_training_part_alone(tmp_path):
    rows = [f"x{n}.png,x,c{n},train" for n in range(6)] + [f"y{n}.png,y,d{n},train" for n in (0, 1)]
    rows += [f"v{n}.png,y,e{n},val" for n in range(9)]
    y = ["x"] * 6 + ["y"] * 2
    expected = compute_class_weight("balanced", classes=np.array(["x", "y"]), y=y)
    assert read_tiles(table(tmp_path, rows)).class_weights() == pytest.approx(expected)


class TestReading:
    def test_pixels(self, tmp_path):
        pixels = picture(tmp_path / "a.png")
        assert (read_tile(tmp_path / "a.png", 8) == pixels.transpose(2, 0, 1)).all()

    def test_a_larger_picture_is_averaged(self, tmp_path):
        pixels = picture(tmp_path / "a.tif", side=24)
        means = pixels.reshape(8, 3, 8, 3, 3).mean((1, 3)).transpose(2, 0, 1)
        found = read_tile(tmp_path / "a.tif", 8)
        assert np.abs(found - means).max() < 0.6  # Pillow rounds in fixed point

    def test_a_damaged_jpeg_is_refused_and_a_whole_one_read_as_pillow_does(self, tmp_path):
        path = tmp_path / "a.jpg"
        picture(path, 64)
        whole = np.asarray(Image.open(path)).transpose(2, 0, 1)
        assert (read_tile(path, 64) == whole).all()
        data = path.read_bytes()
        at = len(data) * 2 // 3
        path.write_bytes(data[:at] + bytes(40) + data[at + 40 :])
        assert (np.asarray(Image.open(path)).transpose(2, 0, 1) != whole).any(), "Pillow reads it"
        with pytest.raises(TileError, match=r"a\.jpg: cannot be read as a picture .*Corrupt JPEG"):
            read_tile(path, 64)

    def test_faults_name_the_file(self, tmp_path):
        picture(tmp_path / "a.png", side=12)
        with pytest.raises(TileError, match=r"a.png: 12 x 12 px, but square tiles of 8 px"):
            read_tile(tmp_path / "a.png", 8)
        (tmp_path / "b.png").write_bytes(b"no picture")
        with pytest.raises(TileError, match=r"b.png: cannot be read"):
            read_tile(tmp_path / "b.png", 8)
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "c.tif")
        with pytest.raises(TileError, match=r"c.tif: its pixels are of mode I;16"):
            read_tile(tmp_path / "c.tif", 8)


class TestInTheWild:
    """Folders and tables as people have them."""

    def folders(self, root, parts, classes=("x", "y")):
        for p, part in enumerate(parts):
            for c, kind in enumerate(classes):
                for n in range(2):
                    picture(root / part / kind / f"{p}{n}.png", seed=100 * p + 10 * c + n)
        return root

    def test_classes_that_differ_by_letter_case_are_refused(self, tmp_path):
        with pytest.raises(CohortError, match="'Tumor' and 'tumor' look like one class"):
            read_tiles(self.folders(tmp_path, ("train", "val"), ("Tumor", "normal", "tumor")))

    def test_one_picture_in_two_parts_is_warned_of(self, tmp_path, recwarn):
        root = self.folders(tmp_path, ("train", "val"))
        read_tiles(root)
        assert not recwarn
        shutil.copy(root / "train" / "x" / "00.png", root / "val" / "x" / "copy.png")
        shutil.copy(root / "train" / "y" / "00.png", root / "train" / "y" / "copy.png")
        read_tiles(root)
        (told,) = [str(each.message) for each in recwarn]
        assert "1 tiles are in two parts, the same byte for byte: train/00.png and val/copy" in told

    def test_a_case_under_two_spellings_is_in_two_parts(self, tmp_path):
        rows = [*SOUND, "e.png,x,C00,test"]
        with pytest.raises(
            CohortError, match=r"'c0' and 'C00' look like one.* is in test \(1 tiles"
        ):
            read_tiles(table(tmp_path, rows))

    def test_a_path_of_windows_is_found(self, tmp_path):
        path = table(tmp_path, ["deep/a.png,x,c0,train", *SOUND[1:]])
        path.write_text(path.read_text().replace("deep/a", "deep\\a"))
        assert read_tiles(path).rows[0].path == tmp_path / "deep" / "a.png"
