"""Two processes, a slide each, learn what one learns that takes two slides an update."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from slides.streaming.order import SlideSampler, epoch_order
from tapfm.cli import main
from tapfm.distributed import ProcessLost, how_it_ended, named_loss
from tapfm.encoders.checkpoints import PACKAGED
from tests.cohorts import SPLITS, spoil, write_cohort

TAPFM = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]


def settings(folder, **data):
    """A cohort, no noise, one epoch of 8 slides (the first one twice)."""
    config = write_cohort(folder, **data)
    text = yaml.safe_load(config.read_text())
    text["model"]["drop_path"] = 0.0
    text["trainer"]["max_epochs"] = 2
    config.write_text(yaml.safe_dump(text))
    return config


def together(config, *arguments, check=True, codes=(0, 0)):
    """`tapfm fit` as torchrun starts it, in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in ("0", "1"):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test", "RANK": rank,
            "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *arguments]
        command = [*TAPFM, "fit", "--config", str(config), *flags]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=Path.cwd(), **pipe))
    said = [process.communicate(timeout=240)[0] for process in running]
    if check:
        assert [process.returncode for process in running] == [*codes], "\n".join(said)
    return said


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model.precision", "bf16-true", "--model.optimizer", "master"],
        ["--model.steps.warm_start", "true"],
        ["--model.backward_tiles", "4"],
    ],
    ids=["fp32", "masters", "head start", "few tiles"],
)
def test_two_processes_are_one_that_takes_two_slides_an_update(tmp_path, options):
    config = settings(tmp_path)
    lines = (tmp_path / "cohort.csv").read_text().splitlines()
    (tmp_path / "cohort.csv").write_text("\n".join(lines[:1] + lines[2:]) + "\n")  # 6 to train on
    one = ["--name", "one", "--model.steps.accumulate", "2"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would round bfloat16 another way
    command = [*TAPFM, "fit", "--config", str(config), *one, *options]
    subprocess.run(command, env=one_thread, check=True, capture_output=True)
    two = ["--name", "two", "--model.steps.accumulate", "1"]
    together(config, *two, *options)

    runs = tmp_path / "runs"
    alone, shared = (load_file(runs / name / "best.safetensors") for name in ("one", "two"))
    assert alone.keys() == shared.keys()
    start = load_file(PACKAGED / "demo_vit.safetensors")
    moved = 0
    for key, value in alone.items():
        if key.endswith("qkv.bias"):  # softmax does not see k's: AdamW turns its rounding to steps
            value, shared[key] = (torch.cat(each.chunk(3)[::2]) for each in (value, shared[key]))
        if "bf16-true" not in options:
            attention = "gate" in key and "--model.steps.warm_start" in options  # 50 epochs more
            assert torch.allclose(value, shared[key], rtol=0, atol=2e-5 if attention else 1e-6), key
        else:  # a hair decides how bfloat16 is rounded, and then all that follows
            step = 2**-7 if value.dtype == torch.bfloat16 else 0.05
            near = torch.isclose(value, shared[key], rtol=step, atol=1e-6)
            assert near.float().mean() > 0.95, key
        base = start.get(key.removeprefix("encoder.vit."), value)
        if base.shape == value.shape:
            moved += not torch.allclose(value.float(), base.float(), atol=1e-6)
    # of so few slides the head start may stay the best; what follows is in the figures below
    assert moved > 20 or "--model.steps.warm_start" in options

    alone, shared = (pd.read_csv(runs / name / "metrics.csv") for name in ("one", "two"))
    assert alone["slide_id"].fillna("").tolist() == shared["slide_id"].fillna("").tolist()
    assert alone["step"].tolist() == shared["step"].tolist()
    for column in ("train/loss", "val/loss", "val/auroc"):
        known = alone[column].notna()
        assert (known == shared[column].notna()).all()
        rough = 1e-2 if "bf16-true" in options else 1e-4 if moved == 0 else 1e-5
        assert alone[column][known].to_numpy() == pytest.approx(
            shared[column][known].to_numpy(), rel=rough
        )
    assert len(pd.read_csv(runs / "two" / "memory.csv")) == 12


def test_a_broken_slide_stops_all_of_them_and_is_named(tmp_path):
    config = settings(tmp_path, on_error="skip", workers=0)
    assert main(["index", "--config", str(config)]) == 0
    spoil(tmp_path / "slides" / "s1.svs")
    said = together(config, check=False)
    assert any("s1" in each and "take it out of the table" in each for each in said), said


@pytest.mark.parametrize(("n", "world"), [(7, 2), (6, 3), (1, 1), (5, 4)])
def test_processes_share_an_epoch(n, world):
    samplers = [SlideSampler(n, seed=3, rank=rank, world=world) for rank in range(world)]
    turns = [list(sampler) for sampler in samplers]
    assert len({len(each) for each in turns}) == 1 == len({len(each) for each in samplers})
    assert len(turns[0]) == len(samplers[0])
    seen = [turn.slide for group in zip(*turns, strict=True) for turn in group]
    assert seen[:n] == epoch_order(n, 3, 0).tolist()
    assert seen[n:] == seen[: len(seen) - n], "turns left over are the order's first slides again"
    half = len(turns[0]) // 2
    if half:
        for sampler, each in zip(samplers, turns, strict=True):
            sampler.trained(each[half - 1])
            assert list(sampler) == each[half:]
        assert len({str(sampler.state_dict()) for sampler in samplers}) == 1
    for sampler, each in zip(samplers, turns, strict=True):
        sampler.trained(each[-1])
        assert (sampler.epoch, sampler.start) == (1, 0)


def test_another_number_of_processes_is_refused_on_resume():
    state = SlideSampler(len(SPLITS), world=2).state_dict()
    with pytest.raises(ValueError, match=r"processes = 2, this run has 1.*devices"):
        SlideSampler(len(SPLITS)).load_state_dict(state)


def asked(slides, number, rank):
    options = {"slides": slides, "number": number, "rank": rank}
    return ["--trainer.callbacks", json.dumps([{"class_path": "tests.kill.AskAfter",
                                                "init_args": options}])]  # fmt: skip


def test_one_process_is_asked_to_stop_and_both_do_at_the_same_step(tmp_path):
    config = settings(tmp_path)
    said = together(config, "--name", "stopped", *asked(2, 15, rank=1), codes=(143, 143))
    assert all("stopped by SIGTERM, unfinished; a resume point was saved" in each for each in said)
    assert not any("Traceback" in each for each in said)
    point = torch.load(tmp_path / "runs" / "stopped" / "last.ckpt", weights_only=True)
    assert point["slides_seen"] == 2
    said = together(config, "--name", "lost", *asked(3, 9, rank=1), codes=(1, -9))
    assert "another process of this run has ended, see its message: this run stops" in said[0]
    assert "Traceback" not in said[0]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (-9, "process 1 was ended by SIGKILL: perhaps out of memory"),
        (-15, "process 1 was ended by SIGTERM"),
        (2, "process 1 has ended with exit code 2, see its message"),
    ],
)
def test_how_a_process_ended_is_said(code, says):
    assert how_it_ended("process 1", code) == says


def test_only_broken_connections_are_lost_processes():
    with pytest.raises(ProcessLost, match="another process"), named_loss(2):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1")
    for processes, error in ((1, "Connection closed by peer"), (2, "shapes do not match")):
        with pytest.raises(RuntimeError, match=error) as caught, named_loss(processes):
            raise RuntimeError(error)
        assert type(caught.value) is RuntimeError
