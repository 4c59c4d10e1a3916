"""Pretrains the demo encoder and writes tapfm/encoders/weights/demo_vit.safetensors.

    python benchmarks/pretrain_demo_encoder.py

Self-supervised: no label and no truth mask is read. Tiles are painted by
`slides.demo.tissue_painter` from seeds and sites that no demo cohort uses; the CLS feature learns
to know a tile again after it was cropped, turned, restained and blurred (SimCLR, NT-Xent). What
survives those changes is the architecture of tissue; what does not, such as fine chromatin and
exact colour, is left to adaptation. Everything follows from `SEED`.

Price: about 10 minutes on two cores, 1 GiB.

Source: Chen et al. 2020, "A simple framework for contrastive learning of visual representations",
    equation 1.

Shapes: B tiles of a batch, D features, S side of a tile.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from slides.demo.tissue_painter import GLASS, Specimen, paint, site_stain
from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.encoders.backbones import Encoder, build, find
from tapfm.training.optim import warmup_cosine

SEED = 20_250_101
SITES = 16
SPECIMENS = 96
TILE, MPP = 112, 0.5
STEPS, BATCH, LR, TEMPERATURE = 240, 160, 1e-3, 0.2
TARGET = Path(__file__).parents[1] / "tapfm" / "encoders" / "weights" / "demo_vit.safetensors"


def main():
    """Paint, train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--specimens", type=int, default=SPECIMENS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    started = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        tiles = torch.cat(
            [torch.from_numpy(t) for t in pool.map(painted_tiles, range(arguments.specimens))]
        )
    print(f"{len(tiles)} tiles painted in {time.perf_counter() - started:.0f} s", flush=True)
    row = find("demo_vit")
    encoder = Encoder(build(row), row)
    train(encoder, tiles, arguments.steps)
    standardise(encoder, tiles[:: max(1, len(tiles) // 2000)])
    facts = {
        "model": row.key,
        "method": "SimCLR on synthetic tissue, benchmarks/pretrain_demo_encoder.py",
        "tile": f"{TILE} px at {MPP} microns per pixel, mean 0.5, std 0.5",
        "steps": str(arguments.steps),
        "batch": str(BATCH),
        "seed": str(SEED),
        "license": "Apache-2.0",
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in encoder.vit.state_dict().items()}
    save_file(state, arguments.out, metadata=facts)
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {size:.1f} MB, {time.perf_counter() - started:.0f} s in all")


def painted_tiles(number: int) -> np.ndarray:
    """Return all tissue tiles of a specimen, uint8 (T, 3, S, S); half painted finer and reduced."""
    rng = np.random.default_rng([SEED, number])
    specimen = Specimen(
        seed=SEED * 1000 + number,
        stain=site_stain(SEED, number % SITES),
        traits=(0, 0, 0),
        tumour_fraction=float(rng.uniform(0.1, 0.4)),
    )
    fine = number % 2 + 1
    rgb, truth = paint(specimen, MPP / fine)
    h, w = (n // (TILE * fine) for n in truth.shape)
    rgb = rgb[: h * TILE * fine, : w * TILE * fine].reshape(h * TILE, fine, w * TILE, fine, 3)
    rgb = rgb.mean((1, 3), dtype=np.float32).round().astype(np.uint8)
    tissue = (truth[: h * TILE * fine, : w * TILE * fine] != GLASS).astype(np.float32)
    tissue = tissue.reshape(h, TILE * fine, w, TILE * fine).mean((1, 3)).ravel() > 0.4
    tiles = rgb.reshape(h, TILE, w, TILE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
    return tiles[tissue]


def train(encoder: Encoder, tiles: Tensor, steps: int) -> None:
    """Minimise NT-Xent between two views of each tile; print the loss."""
    dim = encoder.dim
    project = nn.Sequential(nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64))
    named = [*encoder.named_parameters(), *project.named_parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(named, LR, 0.05), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(warmup_cosine(step / steps, 0.08), 1e-3)
    )
    order, losses, started = torch.empty(0, dtype=torch.long), [], time.perf_counter()
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(tiles))
        batch, order = tiles[order[:BATCH]], order[BATCH:]
        z_2BD = encoder(torch.cat([view(batch), view(batch)]))[0]
        loss = nt_xent(project(z_2BD))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step:4d}  loss {np.mean(losses[-25:]):.3f}  {seconds:5.0f} s", flush=True)


@torch.no_grad()
def standardise(encoder: Encoder, tiles: Tensor) -> None:
    """Fold mean 0 and deviation 1 of each feature over these tiles into the last norm.

    A contrastive encoder's features share a large mean, and differ by little beside it: a new head
    would take as long to see past it as the whole demo trains.
    """
    encoder.eval()
    z_TD = torch.cat([encoder(chunk)[0] for chunk in tiles.split(128)])
    mean_D, std_D = z_TD.mean(0), z_TD.std(0)
    norm = encoder.vit.norm
    norm.bias.copy_((norm.bias - mean_D) / std_D)
    norm.weight.div_(std_D)


def nt_xent(p_2BD: Tensor) -> Tensor:
    """Return the NT-Xent loss: each view must identify its partner among all others."""
    p_2BD = F.normalize(p_2BD, dim=1)
    n = len(p_2BD)
    logits = p_2BD @ p_2BD.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(n).roll(n // 2))


def view(tiles_BP: Tensor) -> Tensor:
    """Return a random view of each tile, 0 to 255: crop, orientation, stain, focus."""
    n = len(tiles_BP)
    zoom, tilt = 0.6 + 0.4 * torch.rand(n), torch.randint(0, 4, (n,)) * (np.pi / 2)
    mirror = torch.randint(0, 2, (n,)) * 2 - 1
    shift = (torch.rand(n, 2) * 2 - 1) * (1 - zoom)[:, None]
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = zoom * tilt.cos() * mirror, -zoom * tilt.sin()
    affine[:, 1, 0], affine[:, 1, 1] = zoom * tilt.sin() * mirror, zoom * tilt.cos()
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(tiles_BP.shape), align_corners=False)
    seen = F.grid_sample(
        tiles_BP.float(), grid, padding_mode="reflection", align_corners=False
    ).clamp(1, 255)
    density = -(seen / 255).log()
    density = density * (0.75 + 0.5 * torch.rand(n, 3, 1, 1)) * (0.8 + 0.4 * torch.rand(n, 1, 1, 1))
    seen = 255 * (-density).exp()
    soft = F.avg_pool2d(F.pad(seen, (4, 4, 4, 4), mode="replicate"), 9, 1)
    return torch.lerp(seen, soft, 0.3 + 0.7 * torch.rand(n, 1, 1, 1))


if __name__ == "__main__":
    main()
