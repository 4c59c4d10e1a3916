"""Training bags of which no label is known teach nothing: they are left out, and counted."""

from math import nan

import pytest

from slides.cohort.table import SlideRow
from tapfm.data.streamed import labelled
from tapfm.training.fit import read_config
from tests.cohorts import write_cohort


def rows(*labels):
    return [
        SlideRow(f"c{n}", f"s{n}", None, "train", None, "", "", y) for n, y in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("names", "labels", "left"),
    [
        (["A", "B"], [(1.0, nan), (nan, nan), (nan, 0.0)], ["s0", "s2"]),
        (["t", "e"], [(5.0, 1.0, 2.0), (nan, nan, 3.0)], ["s0"]),  # survival adds the row's number
        ([], [(), ()], ["s0", "s1"]),
    ],
)
def test_bags_without_a_known_label_are_left_out(names, labels, left):
    assert [row.slide_id for row in labelled(rows(*labels), names)] == left


def test_training_takes_those_with_a_label_and_says_so_once(tmp_path, capsys):
    config = write_cohort(tmp_path, labels=["KRAS"])  # that of s2 is unknown
    table = tmp_path / "cohort.csv"
    lines = table.read_text().splitlines()
    lines[10] = lines[10].rpartition(",")[0] + ","  # and that of s9, which is of validation
    table.write_text("\n".join(lines) + "\n")
    data = read_config(["--config", str(config)]).datamodule
    data.prepare_data()
    trained = {bag.slide_id for bag in data.seen_in_training(1)}
    assert trained == {"s0", "s1", "s3", "s4", "s5", "s6"}
    assert len(data.train_dataloader().dataset) == 6
    assert [bag.slide_id for bag in data.val_dataloader()] == ["s7", "s8", "s9"]
    told = "1 of 7 training bags have no known label: left out\n"
    assert capsys.readouterr().out.count(told) == 1
