"""A slice of each attack of `benchmarks/campaign`, and that they can see what they look for."""

import os
import signal
from functools import partial

import pytest

from benchmarks.campaign import hostile, kills, scale, syncs, writers
from benchmarks.campaign.tries import attempt, draw
from slides import files
from tapfm import cli
from tests.cohorts import write_cohort


def test_kills_of_an_index_and_an_export_are_made_good(tmp_path):
    ends = kills.kill(tmp_path / "kills", 4, seed=1, only=("index", "export"))
    assert ends == {"same": 4}


def test_a_process_that_waits_for_another_can_be_ended(tmp_path):
    """It waits in torch, where Python hears no signal; the other one never comes."""
    alone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "RANK": "1",
             "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "alone", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "1"}  # fmt: skip
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    end = attempt(
        ["fit", "--config", str(write_cohort(tmp_path / "cohort")), *flags],
        limit=60,
        prepare=partial(os.environ.update, alone),
        kill=(8.0, signal.SIGTERM),
    )
    assert (end.code, end.late) == (-signal.SIGTERM, False), end.said


def test_hostile_tables_yaml_and_weights_are_clear(tmp_path):
    for kind, attack in hostile.attacks(tmp_path / "hostile").items():
        ends = hostile.mutate(kind, attack, 12, seed=1)
        assert ends["right"] + ends["refused"] == 12, (kind, ends)


def test_an_end_says_what_was_wrong_with_it(monkeypatch):
    def bad(arguments):
        if arguments == ["loops"]:
            while True:
                pass
        if arguments == ["grows"]:
            return len(bytearray(3 << 30)) * 0
        raise KeyError("a bug")

    monkeypatch.setattr("benchmarks.campaign.tries.main", bad)
    assert attempt(["raises"]).how == "traceback"
    assert attempt(["loops"], limit=0.5).how == "hang"
    assert attempt(["grows"]).how == "memory"
    monkeypatch.setattr("benchmarks.campaign.tries.main", lambda _: 2)
    assert attempt([]).how == "unclear"
    monkeypatch.setattr("benchmarks.campaign.tries.main", lambda _: 0)
    monkeypatch.setattr("benchmarks.campaign.tries.MEMORY_GB", 0.2)
    assert attempt([]).how == "right", "what it was forked with is not its own"
    monkeypatch.setattr("benchmarks.campaign.tries.main", cli.main)
    assert attempt(["index", "nowhere.svs", "--no-such"]).how == "refused"
    assert draw(1, "a", 2).random() == draw(1, "a", 2).random() != draw(1, "a", 3).random()


def test_many_writers(tmp_path, monkeypatch):
    assert writers.together(tmp_path / "writers", 2, seed=0) == {"kept": 2}


SYNCED = """7 openat(AT_FDCWD, "/r/.a.partial", O_RDONLY) = 5
7 fsync(5) = 0
7 rename("/r/.a.partial", "/r/a") = 0
7 openat(AT_FDCWD, "/r", O_RDONLY) = 5
7 fsync(5) = 0
"""


@pytest.mark.parametrize(
    ("left_out", "says"), [(None, []), (1, "renamed before"), (4, "folder was not synced")]
)
def test_a_rename_that_is_not_synced_is_seen(left_out, says):
    lines = SYNCED.splitlines()
    if left_out is not None:
        del lines[left_out]
    renames, wrong = syncs.unsynced("\n".join(lines), "/r")
    assert renames == 1
    assert wrong == [] if not says else says in wrong[0]


def test_what_killed_processes_left_is_cleared_where_the_next_one_writes(tmp_path):
    left = tmp_path / f".a.csv.{files.HOST}.{2**22 - 1}.partial"
    left.touch()
    files.write_text(tmp_path / "b.txt", "b")
    assert not left.exists()


def test_scale_measures_each_step(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "TESTED", 0)  # a whole `tapfm test`
    rows = scale.measure(tmp_path / "many", 20)
    assert {row["slides"] for row in rows} == {20}
    assert len({row["what"] for row in rows}) == len(rows) == 6
