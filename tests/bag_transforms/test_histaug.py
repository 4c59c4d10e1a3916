"""Features change as the pixels' augmentation changes them, all of a slide alike."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from slides.errors import SettingsError
from slides.streaming.augment import Augmentation
from tapfm.bag_transforms.histaug import (
    COLOURS,
    FeatureAugmentation,
    FeatureChange,
    HistAug,
    draw_theta,
    fit_step,
    standardise,
)
from tapfm.cli import main
from tapfm.data.bag import Moment
from tapfm.frozen.augmenter import changed
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks import learn_task
from tapfm.training.objective import make_objective
from tests.bag_transforms.examples import example, network_file
from tests.bags import tile_set
from tests.cohorts import write_cohort
from tests.tiny import random_tiles

D, T, MOMENT = 24, 9, Moment(0.5, 0, seed=3)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(width=None, blocks=1):
    torch.manual_seed(1)
    found = FeatureChange(D, blocks, width).double()
    for name, parameter in found.named_parameters():
        if "norm" in name or name.startswith("out"):
            torch.nn.init.normal_(parameter)  # each takes part
    found.mean_D.copy_(drawn(D, seed=5)), found.std_D.copy_(drawn(D, seed=6).abs() + 0.5)
    return found


def normed(x, weight, bias):
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * weight + bias


def by_hand(model, z_TD, theta_TM):
    """The network of one block in numpy, head by head."""
    p = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    chunks, width, heads = D // 8, 8, 2

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        return normed(x, p[f"{name}.weight"], p[f"{name}.bias"])

    rows = []
    for z, theta in zip(z_TD.numpy(), theta_TM.numpy(), strict=True):
        x = ((z - p["mean_D"]) / p["std_D"]).reshape(chunks, width) + model.place_CW.numpy()
        tokens = [p[f"classes.{m}.weight"][int(theta[m])] for m in range(2)]
        for m in range(COLOURS):
            hidden = linear(f"amounts.{m}.0", theta[2 + m : 3 + m])
            tokens.append(linear(f"amounts.{m}.2", hidden / (1 + np.exp(-hidden))))
        tokens = np.stack(tokens) + p["order_MW"]
        q = linear("blocks.0.query", norm("blocks.0.norm1", x))
        k, v = linear("blocks.0.key", tokens), linear("blocks.0.value", tokens)
        seen = []
        for h in range(heads):
            own = slice(4 * h, 4 * h + 4)
            near = norm("blocks.0.q_norm", q[:, own]) @ norm("blocks.0.k_norm", k[:, own]).T / 2
            share = np.exp(near) / np.exp(near).sum(1, keepdims=True)
            seen.append(share @ v[:, own])
        x = x + linear("blocks.0.proj", np.concatenate(seen, 1))
        hidden = linear("blocks.0.mlp.0", norm("blocks.0.norm2", x))
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = x + linear("blocks.0.mlp.2", gelu)
        rows.append(z + p["std_D"] * linear("out", norm("norm", x).reshape(-1)))
    return np.stack(rows)


def test_the_network_by_hand():
    model, z_TD = network(width=8), drawn(T, D)
    theta = draw_theta(T, 0.2, torch.Generator().manual_seed(0)).double()
    np.testing.assert_allclose(model(z_TD, theta).detach(), by_hand(model, z_TD, theta), atol=1e-10)
    turned = theta.clone()
    turned[:, 1] = (turned[:, 1] + 1) % 4
    assert (model(z_TD, turned) - model(z_TD, theta)).abs().max() > 1e-3


def test_a_new_network_changes_nothing():
    theta = draw_theta(T, 0.2, torch.Generator().manual_seed(0))
    z_TD = drawn(T, D).float()
    assert torch.equal(FeatureChange(D)(z_TD, theta), z_TD)


def test_it_learns_a_change_and_to_leave_alone():
    """Features of a mirrored tile are other features, as of a real encoder."""
    torch.manual_seed(0)
    mix_DD = torch.linalg.qr(torch.randn(D, D))[0]
    z_TD, held_TD = torch.randn(400, D), torch.randn(50, D)
    model, draws = FeatureChange(D, blocks=2), torch.Generator().manual_seed(1)
    standardise(model, [z_TD])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def truth(z_TD, theta):
        return torch.where(theta[:, :1] == 1, z_TD @ mix_DD, z_TD)

    losses = []
    for _ in range(250):
        rows = torch.randint(0, 400, (32,), generator=draws)
        theta = draw_theta(32, 0.2, draws)
        loss = fit_step(model, z_TD[rows], theta, truth(z_TD[rows], theta))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    theta = draw_theta(50, 0.2, draws)
    wanted = truth(held_TD, theta)
    near = cosine_similarity(model(held_TD, theta), wanted).mean()
    assert near > cosine_similarity(held_TD, wanted).mean() + 0.2


def test_draws_in_a_run_are_those_of_the_fit():
    """Trap: the authors' sampler of slides never draws one of the classes that were fitted."""
    thetas = draw_theta(400, 0.2, torch.Generator().manual_seed(0))
    assert set(thetas[:, 0].tolist()) == {0, 1}
    assert set(thetas[:, 1].tolist()) == {0, 1, 2, 3}
    assert 0.19 < thetas[:, 2:].abs().max() <= 0.2
    once = [draw_theta(1, 0.2, torch.Generator().manual_seed(n))[0, 1].item() for n in range(40)]
    assert set(once) == {0, 1, 2, 3}


def test_theta_of_pixels_is_the_training_augmentation():
    tiles = random_tiles(2)
    theta = torch.tensor([[1.0, 3, 0.1, -0.1, 0, 0.05, 0], [0, 0, 0, 0, 0, 0, 0]])
    found = changed(tiles, theta)
    amount = theta[0, 2:].double()
    alone = Augmentation(torch.tensor([3]), torch.tensor([True]), amount)(tiles[:1])
    assert torch.equal(found[:1], alone)
    assert torch.equal(found[1], tiles[1])


def test_all_tiles_of_a_slide_change_alike_and_some_slides_do_not():
    transform = FeatureAugmentation(network(), "tiny", 0.2, share=0.5)
    z_TD = drawn(1, D).expand(T, -1).clone().requires_grad_()
    tiles, unchanged = tile_set(z_TD, torch.zeros(T)), 0
    for seed in range(20):
        found = transform(tiles, replace(MOMENT, seed=seed))
        unchanged += found is tiles
        alike = found.z_TD[:1].expand(T, -1)
        torch.testing.assert_close(found.z_TD, alike, atol=1e-10, rtol=0)
    assert 4 < unchanged < 16
    assert not any(parameter.requires_grad for parameter in transform.parameters())


def test_it_is_refused_where_it_was_not_fitted():
    task, aggregator = (
        learn_task("multilabel", ["A"], (), [[1], [0]]),
        make_aggregator("gated", D, 1),
    )
    spec = [example("histaug", D)]
    for encoder in ("tiny", ""):
        make_objective(task.loss(), aggregator, spec, None, task=task, encoder=encoder)
    for encoder, said in ((None, "change as the encoder learns"), ("uni", "are of uni")):
        with pytest.raises(SettingsError, match=f"frozen features of tiny, and these {said}"):
            make_objective(task.loss(), aggregator, spec, None, task=task, encoder=encoder)
    for options, said in (
        ({}, "needs weights: FILE"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors is no file of `tapfm histaug`"),
        ({"weights": network_file(8)}, r"is of 8 features \(tiny\), and these are 24"),
    ):
        with pytest.raises(SettingsError, match=said):
            HistAug(**options).build(aggregator)


def test_one_command_fits_it_and_a_run_on_a_frozen_encoder_takes_it(tmp_path, capsys):
    config, out = write_cohort(tmp_path), tmp_path / "histaug.safetensors"
    how = ["--steps", "2", "--batch", "4", "--tiles", "40", "--device", "cpu"]
    command = ["histaug", "--config", str(config), "--model", "demo_vit", "--out", str(out), *how]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "features of demo_vit" in said
    assert "cosine to the features of the changed tiles" in said
    change = ["--model.bag_transforms", f"[{{name: histaug, weights: {out}}}]"]
    fit = ["fit", "--config", str(config), *change, "--trainer.max_epochs", "1"]
    fit += ["--model.drop_path", "0"]
    assert main([*fit, "--name", "frozen", "--model.strategy", "frozen"]) == 0
    assert main([*fit, "--name", "learns"]) == 2
    assert "these change as the encoder learns" in capsys.readouterr().err
