"""A run that is asked to stop saves, says so, and goes on later as one never stopped."""

import json

import pytest

from slides.files import HOST
from tapfm.cli import main
from tapfm.training.stopping import running
from tests.cohorts import write_cohort
from tests.training.test_fit import tapfm


def asked(number, slides):
    kind = {"class_path": "tests.kill.AskAfter", "init_args": {"slides": slides, "number": number}}
    return ["--trainer.callbacks", json.dumps([kind])]


CODES = [(15, "SIGTERM", 143), (2, "SIGINT", 130), (10, "SIGUSR1", 138)]


@pytest.mark.parametrize(("number", "name", "code"), CODES)
def test_it_stops_after_the_update_and_goes_on_to_the_same_end(tmp_path, number, name, code):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--resume_every", "0"]
    tapfm(*fit, "--name", "whole")
    stopped = tapfm(*fit, "--name", "stopped", *asked(number, 9), check=False)
    assert stopped.returncode == code
    run = tmp_path / "runs" / "stopped"
    said = f"tapfm: {run}: stopped by {name}, unfinished; a resume point was saved."
    assert said in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (run / "unfinished").exists()
    slides = len((run / "metrics.csv").read_text().splitlines()) - 1
    assert slides == 10 + 1, "to the end of an update of two, and a row of validation"
    tested = tapfm("test", "--run", str(run.parent))
    assert f"{run}: this run did not finish" in tested.stdout
    tapfm(*fit, "--name", "stopped")
    assert not (run / "unfinished").exists()
    for file in ("metrics.csv", "best.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "runs" / "whole" / file).read_bytes()


def test_in_a_validation_the_last_resume_point_stands(tmp_path, monkeypatch, capsys):
    import os
    import signal

    from tapfm.training.module import SlideModule

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    step = SlideModule.validation_step

    def asking(self, bag, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, bag, index)

    monkeypatch.setattr(SlideModule, "validation_step", asking)
    config = write_cohort(tmp_path)
    assert main(["fit", "--config", str(config)]) == 143
    assert "its last resume point stands" in capsys.readouterr().err
    for number, handler in before.items():
        assert signal.getsignal(number) == handler, "a program that calls tapfm has its own again"


def test_before_the_first_update_it_stops_at_once(tmp_path, monkeypatch, capsys):
    import os
    import signal

    from tapfm.data.datamodule import SlideData

    monkeypatch.setattr(
        SlideData, "prepare_data", lambda self: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert main(["fit", "--config", str(write_cohort(tmp_path))]) == 143
    assert "stopped by SIGTERM, unfinished" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tapfm_gated" / "unfinished").exists()


def test_a_kill_while_a_resume_point_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    """Without hard links, which not every file system has."""
    monkeypatch.setattr("os.link", None)
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--name", "cut"]
    tapfm(*fit, *asked(15, 13), check=False)
    run = tmp_path / "runs" / "cut"
    (run / "last.ckpt").replace(run / "before.ckpt")
    assert main([*fit, "--model.steps.clip", "0.5"]) == 2, "it is known as the run that it is"
    tapfm(*fit, "--name", "cut")
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3 * 7 + 3


def test_a_damaged_resume_point_is_passed_over_for_the_one_before(tmp_path, capsys):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config)]
    tapfm(*fit, "--name", "whole")
    tapfm(*fit, "--name", "cut", *asked(15, 13), check=False)
    run = tmp_path / "runs" / "cut"
    data = (run / "last.ckpt").read_bytes()
    (run / "last.ckpt").write_bytes(data[: len(data) // 2])
    (run / ".last.ckpt.elsewhere.1.partial").touch()
    left = run / f".best.safetensors.{HOST}.{2**22 - 1}.partial"
    left.touch()
    assert main([*fit, "--name", "cut"]) == 0
    assert f"{run / 'last.ckpt'}: damaged" in capsys.readouterr().out
    assert not left.exists(), "of a process that is no more"
    assert (run / ".last.ckpt.elsewhere.1.partial").exists(), "of another machine: perhaps it runs"
    for file in ("metrics.csv", "best.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "runs" / "whole" / file).read_bytes()
    for name in ("last.ckpt", "before.ckpt"):
        (run / name).write_bytes(b"nothing")
    assert main([*fit, "--name", "cut"]) == 2
    assert "its resume points are damaged. Delete last.ckpt and before" in capsys.readouterr().err


def test_a_resume_point_needs_no_room_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    config = write_cohort(tmp_path)
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1"]) == 0


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    run = tmp_path / "runs" / "tapfm_gated"
    with pytest.raises(KeyError), running(run):
        assert main(fit) == 2
        said = capsys.readouterr().err
        assert f"{run}: another `tapfm fit` is running there ({HOST}, process" in said
        assert not (run / "config.yaml").exists(), "nothing was written there"
        raise KeyError
    assert (run / "unfinished").exists()
    assert main(fit) == 0, "what failed holds nothing"
    assert not (run / "unfinished").exists()
