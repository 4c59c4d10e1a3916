"""The program on a card, without one (`tests.card`): it runs, waits seldom, and gives back.

What a real card refuses is refused here: tensors of two devices in one operation, a generator of
another device. What it makes the host wait for is counted, slide by slide.
"""

import csv
from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tapfm.cli import main
from tapfm.encoders.pinned import RING, upload
from tapfm.encoders.tail import find_tail
from tapfm.engine.chunked import chunk_rng
from tapfm.engine.frozen_prefix import find_frozen_prefix
from tapfm.engine.master_weights import MasterAdamW
from tapfm.training.fit import read_config, train
from tests.card import PretendCard
from tests.cohorts import write_cohort
from tests.tiny import random_tiles, tiny_encoder

SEEN = {"event"}  # of work that was given to the card several chunks ago
RUNS = {
    "whole": ["--model.precision", "fp32", "--model.optimizer", "adamw"],
    "offload": ["--model.precision", "bf16-true", "--model.optimizer", "offload",
                "--model.strategy", "{name: last_n, n: 2}", "--model.drop_path", "0",
                "--model.steps.accumulate", "1"],
    "few": ["--model.drop_path", "0", "--model.backward_tiles", "4", "--model.precision", "fp32",
            "--model.optimizer", "adamw"],
}  # fmt: skip


class Waits(Callback):
    """Keeps what the host waited for in each training slide, the callbacks' waits among it."""

    def __init__(self, card):
        self.card, self.slides = card, []

    def on_train_batch_start(self, *_):
        self.slides.append([])
        self.card.ledger.waits = self.slides[-1]

    def on_validation_start(self, *_):
        self.card.ledger.waits = []


def run(config, *flags):
    """Return what trains on four slides."""
    cli = read_config(["--config", str(config), "--trainer.max_epochs", "1", "--resume_every", "0",
                       "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1",
                       "--trainer.enable_progress_bar", "false", *flags])  # fmt: skip
    return cli


def rows(cli):
    with (cli.folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module", params=RUNS)
def trained(request, config):
    """A run on the pretend card, and the same one on the CPU."""
    RING.release()
    found, flags = {"name": request.param}, [*RUNS[request.param], "--model.chunk", "5"]
    with PretendCard() as card:
        cli = run(config, "--trainer.accelerator", "gpu", "--name", f"{request.param}_gpu",
                  "--trainer.log_every_n_steps", "2", *flags)  # fmt: skip
        cli.trainer.callbacks.append(waits := Waits(card))
        train(cli)
        found |= {"slides": waits.slides, "locked": card.locked, "card": rows(cli)}
    cli = run(config, "--name", f"{request.param}_cpu", *flags)
    train(cli)
    return found | {"cpu": rows(cli), "folder": cli.folder}


def test_a_run_on_a_card_learns_what_it_learns_on_the_cpu(trained):
    """Row for row: each chunk draws from its own seed on either."""
    assert len(trained["card"]) == 5  # four slides and a validation
    assert trained["card"] == trained["cpu"]


def test_the_host_waits_once_a_log_interval(trained):
    """And for each chunk of kept tokens, and where few tiles are drawn, which the host does."""
    hard = [Counter(each for each in slide if each not in SEEN) for slide in trained["slides"]]
    chunks = 3  # of 11 tiles, 5 at once
    budget = {"whole": 0, "offload": chunks, "few": 1}[trained["name"]]
    for number, slide in enumerate(hard):
        logs = number % 2 == 1
        tells = number == 0  # status.json, then every half minute
        assert slide.total() <= budget + logs + tells, (number, slide)
    assert sum(hard, Counter()).total() >= 2, "something is counted"


def test_little_memory_is_locked(trained):
    """A few chunks, or a few of the largest weight: not whole slides."""
    chunk, weight = 5 * 3 * 32 * 32, 4 * 512 * 128
    assert 0 < trained["locked"] <= 4 * 4 * max(chunk, weight)


def test_predictions_and_features_on_a_card_are_those_of_the_cpu(config, tmp_path):
    slides = [str(path) for path in sorted((config.parent / "slides").iterdir())[:2]]
    model = config.parent / "runs" / "whole_cpu" / "best.safetensors"
    if not model.exists():
        train(run(config, "--name", "whole_cpu", *RUNS["whole"], "--model.chunk", "5"))
    found = {}
    for device in ("cpu", "cuda"):
        with PretendCard() if device == "cuda" else chunk_rng(0, 0, torch.device("cpu")):
            where = tmp_path / device
            flags = ["--chunk", "5", "--workers", "0", "--device", device]
            assert main(["predict", *slides, "--model", str(model), "--out", str(where),
                         *flags]) == 0  # fmt: skip
            assert main(["features", *slides, "--model", str(model), "--out", str(where),
                         "--precision", "fp32", *flags]) == 0  # fmt: skip
        found[device] = (
            (where / "predictions.csv").read_text(),
            [path.read_bytes() for path in sorted(where.rglob("features_*/*.h5"))],
        )
    assert found["cpu"][0] == found["cuda"][0]
    assert len(found["cpu"][1]) == len(found["cuda"][1]) == 2


def test_generators_are_restored_on_both_sides():
    """By a chunk's draws, and by the check of the frozen prefix."""
    with PretendCard() as card:
        encoder = tiny_encoder(dtype=torch.float32).to("cuda")
        encoder.vit.blocks[0].requires_grad_(False)
        for parameter in (*encoder.vit.patch_embed.parameters(), encoder.vit.pos_embed,
                          encoder.vit.cls_token, encoder.vit.reg_token):  # fmt: skip
            parameter.requires_grad_(False)
        before = torch.get_rng_state(), card.ledger.random
        with chunk_rng(3, 1, torch.device("cuda", 0)):
            one = torch.rand(4, device="cuda")
        with chunk_rng(3, 1, torch.device("cuda", 0)):
            assert torch.equal(torch.rand(4, device="cuda"), one)
        assert find_frozen_prefix(encoder).first == 1
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(card.ledger.random, before[1])
        torch.rand(4, device="cuda")
        assert not torch.equal(card.ledger.random, before[1]), "the card's own state is watched"


def test_the_tail_is_found_where_the_default_device_is_a_card():
    with PretendCard(), torch.device("cuda"):
        encoder = tiny_encoder(dtype=torch.float32)
        assert encoder.vit.cls_token.is_cuda
        assert (encoder.no_tail, find_tail(encoder.vit, encoder.tap)[1]) == ("", "")


def test_offloaded_gradients_wait_in_the_ring_and_not_in_memory_of_their_own():
    """Every weight's update is that of an update on the CPU; four buffers serve for all."""
    shapes = [(7, 5), (64, 3), (11,), (5, 5), (64, 64), (3,)]
    draw = torch.Generator().manual_seed(0)
    start, grads = ([torch.randn(s, generator=draw) for s in shapes] for _ in range(2))

    def update(device):
        weights = [torch.nn.Parameter(w.to(device)) for w in start]
        optimizer = MasterAdamW([{"params": weights, "lr": 1e-2}], "offload")
        for _ in range(3):
            for stand_in, grad in zip(optimizer.kept, grads, strict=True):
                stand_in.grad = grad.to(device)
            optimizer.step()
        return [weight.detach().cpu() for weight in weights]

    expected = update("cpu")
    RING.release()
    with PretendCard() as card:
        assert all(torch.equal(a, b) for a, b in zip(update("cuda"), expected, strict=True))
        assert card.locked <= 4 * 4 * (36 + 192 + 4096)  # it grew three times
    RING.release()


def test_a_buffer_is_not_reused_before_its_copy_is_over():
    with PretendCard() as card:
        RING.release()
        device = torch.device("cuda", 0)
        chunks = [upload(random_tiles(2, seed=n), device) for n in range(4)]
        assert "event" not in card.waits
        chunks.append(upload(random_tiles(2, seed=4), device))
        assert card.waits == ["event"]
        for number, chunk in enumerate(chunks):
            assert torch.equal(chunk.cpu(), random_tiles(2, seed=number))
    RING.release()


def test_the_pretend_card_refuses_what_a_card_refuses():
    with PretendCard() as card:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there.device.type, here.device.type, there.is_cuda) == ("cuda", "cpu", True)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + torch.tensor(2.0)).is_cuda, "numbers go with either"
        for waits in (there.sum().item, there.cpu, (there > 0).nonzero, (there > 0).tolist):
            card.waits.clear()
            waits()
            assert len(card.waits) == 1
        there = waits = None
        assert card.live == 0
