"""A run tells how far it is: time left is arithmetic, status.json and the lines say the same."""

import json
from types import SimpleNamespace

import pytest

from tapfm.cli import main
from tapfm.training import announce
from tapfm.training.announce import Clock, RunStatus, hours, status_line
from tests.cohorts import write_cohort


@pytest.fixture
def clock(monkeypatch):
    """A clock that was shown three training slides of 2 s and two of validation of 5 s."""
    now = [100.0]
    monkeypatch.setattr(announce.time, "monotonic", lambda: now[0])
    made = Clock()
    assert made.left(3, 4) is None
    for part, seconds in [("train", 2.0)] * 3 + [("val", 5.0)] * 2:
        if part == "val" and not made.slides["val"]:
            assert made.left(3, 4) == 14, "never validated: as long as training"
        now[0] += seconds
        made.took(part)
    now[0] += 1000  # a pause between
    made.start()
    return made


def test_time_left_is_the_mean_of_each_kind_of_slide(clock):
    assert clock.left(10, 4) == 10 * 2 + 4 * 5
    assert clock.left(0, 0) == 0


def test_what_is_left_counts_epochs_validations_and_what_is_chosen_after(clock, tmp_path):
    best = SimpleNamespace(best=(0.75, -1.0), figure="auroc")
    status = RunStatus(tmp_path, best, looks=2)
    status.clock, status.tiles = clock, 60
    trainer = SimpleNamespace(num_training_batches=8, num_val_batches=[3], max_epochs=6,
                              current_epoch=1, check_val_every_n_epoch=3)  # fmt: skip
    train, val = 4 * 8 + (8 - 5), 2 * 3  # epochs 3 to 6, the rest of this; after epochs 3 and 6
    looks = 2 * (8 + 3)  # of all slides, as validation sees them
    assert status.seconds_left(trainer, 5) == 2 * train + 5 * (val + looks)
    facts = status.facts(trainer, 5, 0.5)
    assert facts["best"] == {"auroc": 0.75}
    assert facts["tiles_per_s"] == 10
    line = status_line(facts)
    assert line.startswith("epoch 2 of 6, slide 5 of 8, loss 0.500, 10 tiles/s, best auroc 0.750, ")
    assert line.endswith(" left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (119, "2 min"), (89 * 60, "89 min"), (3.1 * 3600, "3 h 06 min")],
)
def test_times_in_words(seconds, text):
    assert hours(seconds) == text


def test_a_log_file_gets_lines_and_no_frames_of_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(announce, "EVERY", 0.0)
    config = write_cohort(tmp_path)
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "2"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 * (7 + 3) + 1, "a slide each, and the end"
    assert lines[0].startswith("epoch 1 of 2, slide 1 of 7, loss ")
    assert "best auroc" in lines[-1]
    assert lines[-1].endswith("0 s left")
    assert "\r" not in said
    assert "Epoch 0" not in said
    facts = json.loads((tmp_path / "runs" / "tapfm_gated" / "status.json").read_text())
    assert (facts["epoch"], facts["epochs"], facts["slides"]) == (2, 2, 7)
    assert facts["seconds_left"] == 0
