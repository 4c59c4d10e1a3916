"""CLAM's, Patho-Bench's and STAMP's split files are read and written, and leaks refused."""

import io
import json

import pandas as pd
import pytest
import yaml

from slides.cohort.split_files import (
    clam_bool_text,
    clam_text,
    find_slide,
    patho_bench_texts,
    read_split,
    slide_names,
    stamp_text,
)
from slides.errors import SplitError

CASE_OF = {"001": "a", "002": "a", "003": "b", "004": "c", "005": "d", "006": "e"}
SPLIT = {"a": "train", "b": "train", "c": "val", "d": "test"}  # e is in no part


@pytest.fixture
def write(tmp_path):
    def write(text, name="splits_0.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_clam_reads_what_is_written():
    """Reads like CLAM: pandas, dtype str, blanks dropped, first column as index."""
    frame = pd.read_csv(io.StringIO(clam_text(CASE_OF, SPLIT)), dtype=str, index_col=0)
    assert list(frame.columns) == ["train", "val", "test"]
    assert {part: frame[part].dropna().tolist() for part in frame} == {
        "train": ["001", "002", "003"], "val": ["004"], "test": ["005"],
    }  # fmt: skip
    frame = pd.read_csv(io.StringIO(clam_bool_text(CASE_OF, SPLIT)), index_col=0, dtype={0: str})
    assert frame.dtypes.tolist() == [bool] * 3
    assert frame.sum().tolist() == [3, 1, 1]


def test_patho_bench_reads_what_is_written():
    values = {"001": 1, "002": 1, "003": 0, "004": None, "005": 0, "006": 0}
    other = dict.fromkeys("abcde", "test")
    files = patho_bench_texts(CASE_OF, [SPLIT, other], "EGFR", values)
    frame = pd.read_csv(io.StringIO(files["k=all.tsv"]), sep="\t", dtype={"slide_id": str})
    assert list(frame.columns) == ["case_id", "slide_id", "EGFR", "fold_0", "fold_1"]
    assert frame["slide_id"].tolist() == ["001", "002", "003", "005", "006"]
    assert frame["fold_0"].fillna("").tolist() == ["train", "train", "train", "test", ""]
    config = yaml.safe_load(files["config.yaml"])
    assert (config["task_col"], config["sample_col"]) == ("EGFR", "case_id")
    assert config["label_dict"] == {0: "0", 1: "1"}


def test_each_form_is_read_back(write):
    values = dict.fromkeys(CASE_OF, 1)
    task = patho_bench_texts(CASE_OF, [{}, SPLIT], "EGFR", values)["k=all.tsv"]
    assert read_split(write(clam_text(CASE_OF, SPLIT)), CASE_OF) == SPLIT
    assert read_split(write(clam_bool_text(CASE_OF, SPLIT)), CASE_OF) == SPLIT
    assert read_split(write(task, "k=all.tsv"), CASE_OF, fold=1) == SPLIT


class TestStamp:
    SPLITS = '{"splits": [{"train_patients": ["a", "b"], "test_patients": ["d"]}]}'

    def test_cases_are_read_by_fold(self, write):
        other = {"a": "test", "b": "train", "c": "train", "d": "train"}
        text = stamp_text([SPLIT, other])
        assert read_split(write(text, "splits.json"), CASE_OF, fold=1) == other
        trains = {case: "test" if part == "test" else "train" for case, part in SPLIT.items()}
        assert read_split(write(text, "splits.json"), CASE_OF) == trains

    def test_as_stamp_writes_it(self, write):
        found = read_split(write(self.SPLITS, "splits.json"), CASE_OF)
        assert found == {"a": "train", "b": "train", "d": "test"}
        assert json.loads(stamp_text([found]))["splits"][0] == {
            "train_patients": ["a", "b"], "test_patients": ["d"],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("old", "new", "fold", "message"),
        [
            ("", "", 1, "it has 1 folds, from 0: fold 1 is not one"),
            ('"d"', '"a"', 0, "case a is in train .* and test"),
            ('"d"', '"z"', 0, "1 slides are not in the cohort: z"),
            ("splits", "folds", 0, "no splits of STAMP .*splits.json"),
            ("}]}", "", 0, "no splits of STAMP"),
        ],
    )
    def test_what_it_cannot_be_is_said(self, old, new, fold, message, write):
        with pytest.raises(SplitError, match=message):
            read_split(write(self.SPLITS.replace(old, new), "splits.json"), CASE_OF, fold)


def test_a_file_of_train_and_test_only(write):
    assert read_split(write(",train,test\n0,001,005\n1,003,\n"), CASE_OF) == {
        "a": "train", "b": "train", "d": "test",
    }  # fmt: skip


NAMES = slide_names(
    [("s1", "a/s1.ome.tif", "a"), ("s2", "x.svs", "b"), ("103", "103.svs", "c"), ("s4", "", "d"),
     ("s5", "e/x.svs", "e")]
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("s1", "a"), ("s1.tif", "a"), ("s1.ome.tif", "a"), ("a\\s1.ome.tif", "a"), ("s1.h5", "a"),
        ("features/s1.pt", "a"), ("103.0", "c"), ("103.svs", "c"), ("s4.SVS", "d"),
        ("x.svs", None), ("x", None),  # of two cases
        ("s1.tif.bak", None), ("10", None),
    ],
)  # fmt: skip
def test_a_slide_is_named_by_its_id_or_its_file(name, case):
    found = find_slide(name, NAMES)
    assert NAMES.get(found) == case


def test_a_split_that_names_files_is_read(write):
    assert read_split(write(",train,val,test\n0,s1.tif,s2.svs,103.0\n"), NAMES) == {
        "a": "train", "b": "val", "c": "test",
    }  # fmt: skip
    text = "case_id;slide_id;fold_0\na;s1.tif;train\nb;s2;val\n"
    assert read_split(write(text), NAMES) == {"a": "train", "b": "val"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",train,val,test\n0,001,002,005\n", r"case a is in train \(001\) and val \(002\)"),
        (",train,val,test\n001,True,True,False\n", "row 2: 001 is in train and val"),
        (",train,val,test\n001,True,False,False\n002,False,False,True\n", "case a is in train"),
        ("case_id\tslide_id\tfold_0\na\t001\ttrain\na\t002\ttest\n", "case a is in train"),
        ("case_id\tslide_id\tfold_0\na\t001\ttrian\n", "row 2: 001 is in 'trian'"),
        (",train,val,test\n0,777,004,005\n", "1 slides are not in the cohort: 777"),
        ("case_id\tslide_id\tfold_0\na\t001\ttrain\na\t00", "row 3 is cut off"),
        ("slide_id,label\n001,1\n", "Give a CLAM split .* a Patho-Bench k=all.tsv .*fold_0"),
        ("", "its columns are"),
    ],
)
def test_a_leak_or_a_strange_file_is_refused(write, text, message):
    with pytest.raises(SplitError, match=message):
        read_split(write(text), CASE_OF)


def test_all_faults_at_once(write, tmp_path):
    with pytest.raises(SplitError, match=r"2 faults\n.*777.*\n.*case a"):
        read_split(write(",train,val,test\n0,001,002,777\n"), CASE_OF)
    with pytest.raises(SplitError, match="no readable split"):
        read_split(tmp_path / "nowhere.csv", CASE_OF)
