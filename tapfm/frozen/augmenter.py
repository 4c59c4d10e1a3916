"""`tapfm histaug`: fits the network of the bag transform `histaug` to an encoder.

    tiles of the training slides; in each step some, each with its own turn, mirror and colour
    loss = |rho(z, theta) - E(tau(x))|^2 + |rho(z, none) - z|^2         E the encoder, frozen

A tenth of the slides is left out of the fit. On their tiles the command says how near the network's
features come to those of the changed tiles, beside the features as they were, which is what a run
without it trains on: mean cosine, of features less their mean.

Price: a forward pass of the encoder for each tile of a step; tiles in memory.
Source: HistAug (MICS-Lab 2025, arXiv 2508.14588); see `tapfm.bag_transforms.histaug`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slides.cohort.table import SlideRow
from slides.errors import SettingsError
from slides.progress import progress_bar
from slides.streaming.augment import Augmentation
from slides.streaming.settings import Source, index_and_cache
from slides.streaming.tile_source import TileSource
from tapfm.bag_transforms.histaug import (
    CLASSES,
    FeatureChange,
    draw_theta,
    fit_step,
    save_network,
    standardise,
)
from tapfm.encoders.backbones import Encoder
from tapfm.slide_model.plain_encoder import load_encoder

LR, DECAY = 5e-4, 1e-5  # the authors'
HELD_OUT = 10  # one slide of so many


def run_histaug(
    source: Source,
    model: str,
    weights: str | None = None,
    *,
    out: Path,
    steps: int = 2000,
    batch: int = 32,
    tiles: int = 2048,
    colour: float = 0.2,
    seed: int = 0,
    device: str | None = None,
) -> int:
    """Fit a network to an encoder, say how good it is, and write it; return 0.

    Args:
        source: slides and tiles; of a table, the training split is used.
        model: key of a foundation model, or best.safetensors of a run.
        weights: of a key, as in model.weights.
        out: the network's file.
        steps: of training.
        batch: tiles of a step.
        tiles: to train on, the same number of each slide.
        colour: largest change of stains, contrast and brightness: 0.2 is up to a fifth.
        seed: of tiles, changes and the network.
        device: where to; None is CUDA where there is one.

    Raises:
        SettingsError: fewer than two slides.
        SlideError: a slide cannot be read.
    """
    encoder, header, fingerprint = load_encoder(model, weights, source.tiles.tile_px)
    name = f"{encoder.row.key}_{fingerprint[:8]}" if header else encoder.row.key
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = encoder.to(device).requires_grad_(False)
    _, failed = index_and_cache(source)
    rows = [row for row in source.rows if row.slide_id not in failed]
    rows = [row for row in rows if row.split == "train"] or rows
    if len(rows) < 2:
        raise SettingsError(f"histaug: {len(rows)} slides: give two or more, one is held out")
    drawn = torch.Generator().manual_seed(seed)
    slides = some_tiles(source, rows, max(1, tiles // len(rows)), drawn)
    held = max(1, len(slides) // HELD_OUT)
    train_TP, val_TP = torch.cat(slides[held:]), torch.cat(slides[:held])
    torch.manual_seed(seed)
    network = FeatureChange(encoder.dim)
    train_TD = encode(encoder, train_TP, batch)
    standardise(network, [train_TD])
    network.to(device)
    fit(network, encoder, train_TP, train_TD, steps, batch, colour, drawn)
    near, plain = fidelity(network, encoder, val_TP, batch, colour, drawn)
    save_network(network.cpu(), out, name, colour)
    print(
        f"{out}: features of {name}; {len(train_TP)} tiles of {len(rows) - held} slides, {steps} "
        f"steps. On {len(val_TP)} tiles of {held} other slides: cosine to the features of the "
        f"changed tiles {near:.3f}, of the features as they were {plain:.3f}"
    )
    if not near > plain:
        print("the network is no nearer than the features as they were: train it for longer")
    return 0


def some_tiles(
    source: Source, rows: Sequence[SlideRow], count: int, drawn: torch.Generator
) -> list[Tensor]:
    """Return up to `count` tiles (T, 3, S, S) of each slide, in a drawn order of slides."""
    order = torch.randperm(len(rows), generator=drawn).tolist()
    found = []
    for _, tiles in TileSource.of(source).streamed([rows[n] for n in order], source.workers):
        chosen = torch.randperm(tiles.count, generator=drawn)[:count].sort().values
        begun, parts = 0, []
        for chunk in tiles.split(64):
            own = chosen[(chosen >= begun) & (chosen < begun + len(chunk))] - begun
            parts.append(chunk[own])
            begun += len(chunk)
        found.append(torch.cat(parts))
    return found


def fit(
    network: FeatureChange,
    encoder: Encoder,
    tiles_TP: Tensor,
    z_TD: Tensor,
    steps: int,
    batch: int,
    colour: float,
    drawn: torch.Generator,
) -> None:
    """Train the network for some steps, each with drawn tiles and a change of each."""
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=DECAY)
    bar = progress_bar(range(steps), desc="histaug")
    for _ in bar:
        rows = torch.randint(0, len(tiles_TP), (batch,), generator=drawn)
        theta = draw_theta(batch, colour, drawn)
        wanted = encode(encoder, changed(tiles_TP[rows], theta), batch)
        loss = fit_step(
            network, *(each.to(encoder.mean.device) for each in (z_TD[rows], theta, wanted))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def fidelity(
    network: FeatureChange,
    encoder: Encoder,
    tiles_TP: Tensor,
    batch: int,
    colour: float,
    drawn: torch.Generator,
) -> tuple[float, float]:
    """Return the mean cosine of the network's features, and of the old ones, to the true ones."""
    theta = draw_theta(len(tiles_TP), colour, drawn)
    z_TD = encode(encoder, tiles_TP, batch)
    wanted_TD = encode(encoder, changed(tiles_TP, theta), batch)
    device = encoder.mean.device
    said_TD = network(z_TD.to(device), theta.to(device)).cpu()
    mean_D = network.mean_D.cpu()
    wanted_TD, said_TD, z_TD = (each - mean_D for each in (wanted_TD, said_TD, z_TD))
    near = torch.nn.functional.cosine_similarity
    return near(said_TD, wanted_TD).mean().item(), near(z_TD, wanted_TD).mean().item()


@torch.no_grad()
def encode(encoder: Encoder, tiles_TP: Tensor, batch: int) -> Tensor:
    """Return features (T, D) on the CPU."""
    return torch.cat([encoder.encode(chunk)[0].cpu() for chunk in tiles_TP.split(batch)])


def changed(tiles_TP: Tensor, theta_TM: Tensor) -> Tensor:
    """Return tiles mirrored, turned and coloured as theta says, each by itself."""
    found = []
    for tile_P, theta_M in zip(tiles_TP, theta_TM, strict=True):
        mirror, turns, amount_5 = theta_M[:1].bool(), theta_M[1:2].long(), theta_M[len(CLASSES) :]
        found.append(Augmentation(turns, mirror, amount_5.double())(tile_P[None])[0])
    return torch.stack(found)
