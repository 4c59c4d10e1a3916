"""Training of PathPT: a slide a step with all its tiles, on frozen features or end to end.

On frozen features a step is one backward pass. End to end it is the engine's two passes: tile
vectors without a graph, chunk by chunk; the tile loss on its own graph, which gives dL/dz; the
chunks again, with a graph, each with its rows of dL/dz. That is the gradient of one joint graph,
whatever the number of tiles (`engine.chunked`).

A plain loop, as for the frozen baselines: runs are short, so nothing is resumed.

Source: PathPT (arXiv 2508.15904): Adam without weight decay, 20 epochs, warm-up over a tenth of
    them and then a cosine, the last epoch kept.
Differs: the rate changes with every step and is never 0 (the release's whole first epoch is at rate
    0); end to end is our addition.

Shapes: N tiles, C tiles of a chunk, K classes of a tile, d joint width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapfm.data.bag import Tiles
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.pathpt.model import PathPT
from tapfm.pathpt.question import Question
from tapfm.pathpt.text.towers import TextTower
from tapfm.pathpt.tile_loss import tile_loss
from tapfm.training.optim import warmup_cosine

WARMUP = 0.1


@dataclass(frozen=True)
class LabelledSlide:
    """One training slide."""

    z_Nd: Tensor
    """Its tiles, by the frozen image tower."""
    places_N2: Tensor
    labels_N: Tensor
    """Labels from `pseudo.tile_labels`, or true ones."""
    subtype: int
    tiles: Tiles | None = None
    """Its pixels, for training end to end."""


@dataclass(frozen=True)
class ImageTower:
    """The image tower and its optimizer, for training end to end."""

    encode: Callable[[Tensor], Tensor]
    """Maps tiles (C, 3, H, W) to (C, d)."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    chunk: int = 16
    """Tiles at once; affects only memory."""


def step(
    model: PathPT,
    text: TextTower | None,
    slide: LabelledSlide,
    *,
    trust: bool,
    double_softmax: bool = False,
    image: ImageTower | None = None,
    seed: int = 0,
) -> Tensor:
    """Add one slide's gradient to the model's `.grad`, and to a given image tower's.

    Returns:
        The slide's loss.
    """
    z_Nd, kept = slide.z_Nd, []
    if image is not None:

        def encode(tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
            z_Cd = image.encode(tiles_CP)
            return z_Cd, z_Cd.new_zeros(len(z_Cd))  # tiles have no score here

        how = {"seed": seed, "device": image.device}
        z_Nd, _, kept = encode_bag(encode, slide.tiles.split(image.chunk), keep=1, **how)
    logits_NK = model(z_Nd, slide.places_N2, model.prompts(text))
    loss = tile_loss(
        logits_NK, slide.labels_N, slide.subtype, trust=trust, double_softmax=double_softmax
    )
    loss.backward()
    if image is not None:
        adapt_bag(encode, slide.tiles.split(image.chunk), z_Nd.grad, None, kept=kept, **how)
    return loss.detach()


def train_pathpt(
    model: PathPT,
    text: TextTower | None,
    slides: Sequence[LabelledSlide],
    question: Question,
    seed: int,
    image: ImageTower | None = None,
) -> list[float]:
    """Train in place; the model is in eval mode afterwards.

    Args:
        model: prompts and mixer, all trainable.
        text: the frozen text tower; None if class vectors are free.
        slides: the training slides.
        question: epochs, rates and loss.
        seed: seed of order and dropout.
        image: the image tower, to be trained end to end.

    Returns:
        Mean loss of each epoch.
    """
    optimizers = [torch.optim.Adam(model.parameters(), question.lr)]
    optimizers += [image.optimizer] if image else []
    peaks = [[group["lr"] for group in each.param_groups] for each in optimizers]
    steps, done, losses = question.epochs * len(slides), 0, []
    device = image.device if image else slides[0].z_Nd.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        for epoch in range(question.epochs):
            each = []
            for number in torch.randperm(len(slides)).tolist():
                done += 1
                for optimizer, own in zip(optimizers, peaks, strict=True):
                    for group, peak in zip(optimizer.param_groups, own, strict=True):
                        group["lr"] = peak * warmup_cosine(done / steps, WARMUP)
                loss = step(
                    model, text, slides[number], trust=epoch >= question.trust_from,
                    double_softmax=question.double_softmax, image=image, seed=seed * steps + done,
                )  # fmt: skip
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                each.append(loss)
            losses.append(float(torch.stack(each).mean()))
    model.eval()
    return losses
