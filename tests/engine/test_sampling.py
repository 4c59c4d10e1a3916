"""A backward of some tiles: right on average, and exact where all are taken."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tapfm.cli import main
from tapfm.engine.chunked import adapt_bag
from tapfm.engine.sampling import ChosenTiles, _chances, cosine, draw_tiles, give, taken
from tests.cohorts import write_cohort
from tests.tiny import random_tiles, tiny_encoder

CPU = torch.device("cpu")
T, D = 40, 24


@pytest.fixture
def grads():
    """Rows of very different size, a few of them 0, as attention leaves them."""
    draw = torch.Generator().manual_seed(0)
    size_T = (2 * torch.randn(T, generator=draw, dtype=torch.float64)).exp()
    size_T[:5] = 0
    z_TD = torch.randn(T, D, generator=draw, dtype=torch.float64) * size_T[:, None]
    return z_TD, torch.randn(T, generator=draw, dtype=torch.float64) * size_T


def estimate(grads, budget, seed):
    """The sum over tiles of each row: what the gradient is linear in."""
    weight_T = draw_tiles(*grads, budget, seed)
    return (grads[0] * weight_T[:, None]).sum(0), weight_T


def test_it_is_right_on_average_and_takes_as_many_as_asked(grads):
    exact = grads[0].sum(0)
    draws = [estimate(grads, budget=8, seed=seed) for seed in range(4000)]
    counts = {int((weight_T > 0).sum()) for _, weight_T in draws}
    assert counts <= {7, 8, 9}
    values = torch.stack([value for value, _ in draws])
    error = values.std(0) / len(draws) ** 0.5
    assert ((values.mean(0) - exact).abs() < 4 * error).all()
    assert all((weight_T[:5] == 0).all() for _, weight_T in draws), "no gradient, no backward"


def test_large_rows_make_it_better_than_equal_chances(grads):
    exact = grads[0].sum(0)

    def spread(rows):
        return float(torch.stack([(r - exact).norm() for r in rows]).square().mean())

    ours = spread([estimate(grads, 8, seed)[0] for seed in range(500)])
    equal = []
    for seed in range(500):
        taken = torch.randperm(T, generator=torch.Generator().manual_seed(seed))[:8]
        equal.append(grads[0][taken].sum(0) * T / 8)
    assert ours < 0.2 * spread(equal)


@pytest.mark.parametrize("budget", [35, 36, 1000])
def test_with_room_for_all_it_is_the_gradient_itself(grads, budget):
    value, weight_T = estimate(grads, budget, seed=1)
    assert torch.equal(weight_T, (grads[0].norm(dim=1) > 0).double())
    assert torch.equal(value, grads[0].sum(0))


def test_chances_by_hand():
    norm_T = torch.tensor([8.0, 1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    assert _chances(norm_T, 2).tolist() == [1.0, 0.25, 0.25, 0.0, 0.5]
    assert _chances(norm_T, 1).tolist() == [x / 12 for x in (8, 1, 1, 0, 2)]
    assert _chances(norm_T, 4).tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert _chances(torch.zeros(3, dtype=torch.float64), 2).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 4, 17])
def test_chosen_tiles(size):
    tiles = random_tiles(17)
    weight_T = (torch.arange(17) % 3 == 1) * 2.0
    for read in (1, 4, 17):
        chunks = list(ChosenTiles(tiles, read, weight_T).split(size))
        assert all(len(chunk) == size for chunk in chunks[:-1])
        assert torch.equal(torch.cat(chunks), tiles[1::3])
    assert not list(ChosenTiles(tiles, 4, torch.zeros(17)).split(size))


def test_chosen_tiles_are_in_memory_a_chunk_at_a_time():
    """What is read ahead of the chunk that is asked for is less than two chunks."""
    tiles, read = random_tiles(40), []

    class Counted:
        def split(self, size):
            for chunk in tiles.split(size):
                read.append(len(chunk))
                yield chunk

    for number, _ in enumerate(ChosenTiles(Counted(), 4, torch.ones(40)).split(4)):
        assert sum(read) <= 4 * (number + 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_that_lie_on_either_side_are_brought_together():
    """Kept tokens wait on the host, the others come from the GPU."""
    chunks = [torch.ones(4, 17, 64, device=device) for device in ("cpu", "cuda", "cuda")]
    given = SimpleNamespace(split=lambda size: chunks)
    together = torch.cat(list(ChosenTiles(given, 4, torch.ones(12)).split(12)))
    assert (together.device.type, len(together)) == ("cpu", 12)


def test_the_encoders_gradient_is_that_of_the_weighed_tiles():
    """Against autograd of the weighed sum over all tiles."""
    tiles, encoder = random_tiles(11), tiny_encoder()
    draw = torch.Generator().manual_seed(3)
    grad_z = torch.randn(11, encoder.dim, generator=draw, dtype=torch.float64)
    grad_s = torch.randn(11, generator=draw, dtype=torch.float64)
    weight_T = draw_tiles(grad_z, grad_s, budget=4, seed=5)
    z, score = encoder(tiles)
    ((z * grad_z).sum(1) + score * grad_s).mul(weight_T).sum().backward()
    expected = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    rows = weight_T > 0
    adapt_bag(
        encoder, ChosenTiles(tiles, 4, weight_T).split(4), (grad_z * weight_T[:, None])[rows],
        (grad_s * weight_T)[rows], seed=0, device=CPU,
    )  # fmt: skip
    for p, gradient in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_cosine_of_what_was_taken_and_given_back():
    """Compared with torch's, of all parameters as one vector; one has no gradient."""
    draw = torch.Generator().manual_seed(0)
    shapes = (5, 7), (3,), (2, 2)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    one, other = (
        [torch.randn(shape, generator=draw) for shape in shapes[:2]] + [None] for _ in range(2)
    )
    for given in (one, other):
        give(parameters, [g if g is None else g.clone() for g in given])
    assert parameters[2].grad is None
    found = taken(parameters)
    assert all(p.grad is None for p in parameters)
    for value, a, b in zip(found[:2], one, other, strict=False):
        torch.testing.assert_close(value, a + b)
    flat = [torch.cat([g.flatten() for g in each[:2]]) for each in (one, other)]
    expected = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert cosine(one, other).item() == pytest.approx(expected.item(), abs=1e-6)
    assert cosine(one, one).item() == pytest.approx(1, abs=1e-6)
    assert cosine([None], [None]).isnan()


@pytest.mark.parametrize("optimizer", ["adamw", "offload"])
def test_a_run_says_how_near_the_drawn_gradient_is(optimizer, tmp_path):
    """Every second slide; 1 where all tiles are drawn, less with a few; the run is the same."""
    fit = ["fit", "--config", str(write_cohort(tmp_path)), "--trainer.max_epochs", "1"]
    fit += ["--model.drop_path", "0", "--model.optimizer", optimizer]
    fit += ["--model.precision", "fp32" if optimizer == "adamw" else "bf16-true"]
    runs = {"quiet": ["3"], "few": ["3", "--model.cosine_every", "2"],
            "all": ["11", "--model.cosine_every", "2"]}  # fmt: skip
    for name, tiles in runs.items():
        assert main([*fit, "--name", name, "--model.backward_tiles", *tiles]) == 0
    logs = {name: pd.read_csv(tmp_path / "runs" / name / "metrics.csv") for name in runs}
    column = "train/sampling_cosine"
    assert column not in logs["quiet"]
    for name in ("few", "all"):
        rows = logs[name][logs[name]["train/loss"].notna()]
        said = rows[column].notna()
        assert said.tolist() == [step % 2 == 0 for step in rows["step"]]
    assert logs["all"][column].dropna().min() > 0.999
    assert 0.1 < logs["few"][column].dropna().min() <= logs["few"][column].dropna().max() < 0.999
    pd.testing.assert_frame_equal(logs["few"].drop(columns=column), logs["quiet"])
    weights = [load_file(tmp_path / "runs" / n / "best.safetensors") for n in ("quiet", "few")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_cosine_of_nothing_is_refused(tmp_path, capsys):
    fit = ["fit", "--config", str(write_cohort(tmp_path)), "--model.cosine_every"]
    assert main([*fit, "2"]) == 2
    assert "takes model.backward_tiles" in capsys.readouterr().err
    assert main([*fit, "0", "--model.backward_tiles", "3"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err
