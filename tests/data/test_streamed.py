"""Training slides of which no label is known teach nothing: they are not even indexed."""

import yaml

from tapfm.training.fit import read_config
from tests.cohorts import write_cohort


def blank_second_label(folder, *numbers):
    """Leave the cell of the last label of these slides empty."""
    table = folder / "cohort.csv"
    lines = table.read_text().splitlines()
    for number in numbers:
        lines[number + 1] = lines[number + 1].rpartition(",")[0] + ","
    table.write_text("\n".join(lines) + "\n")


def test_training_slides_without_a_label_are_neither_indexed_nor_encoded_nor_seen(tmp_path):
    config = write_cohort(tmp_path, labels=["KRAS"])  # that of s2 is unknown
    blank_second_label(tmp_path, 9)  # of validation
    data = read_config(["--config", str(config)]).datamodule
    data.prepare_data()
    trained = {bag.slide_id for bag in data.seen_in_training(1)}
    assert trained == {"s0", "s1", "s3", "s4", "s5", "s6"}
    assert len(data.train_dataloader().dataset) == 6
    assert [bag.slide_id for bag in data.val_dataloader()] == ["s7", "s8", "s9"]
    assert {path.name[:2] for path in (tmp_path / "index").rglob("s?_patches.h5")} == {
        *trained, "s7", "s8", "s9"
    }  # fmt: skip
    assert "s2" not in {row.slide_id for row in data.source.rows}


def test_a_slide_of_a_case_with_a_label_is_trained_on(tmp_path):
    config = write_cohort(tmp_path, labels=["KRAS"], bags="case")
    table = tmp_path / "cohort.csv"
    table.write_text(table.read_text().replace("c2,s2", "c3,s2"))
    data = read_config(["--config", str(config)]).datamodule
    assert "s2" in {row.slide_id for row in data.used}
    loose = yaml.safe_load(config.read_text())
    loose["data"]["bags"] = "slide"
    config.write_text(yaml.safe_dump(loose))
    data = read_config(["--config", str(config)]).datamodule
    assert "s2" not in {row.slide_id for row in data.used}
