"""Feature extraction beside a plain timm loop on the same tiles: the cost of our wrapping.

    python -m benchmarks.extraction --weights dinov2_vits14.safetensors

Both read tiles from memory and write nothing. They take turns, and processor time of this process
is compared, which other work on the machine hardly affects.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tapfm.encoders.backbones import load
from tapfm.engine.chunked import encode_bag

TILES, CHUNK = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tapped = load(given.model, given.weights).eval()
    plain = load(given.model, given.weights).eval()
    side, mean, std = tapped.tile_px, plain.mean / 255, plain.std / 255
    vit = plain.vit
    for norm in (vit.blocks[-1].attn.q_norm, vit.blocks[-1].attn.k_norm, vit.blocks[-1].attn):
        norm._forward_hooks.clear()
        norm._forward_pre_hooks.clear()  # timm's model as timm made it
    tiles = torch.randint(0, 256, (TILES, 3, side, side), dtype=torch.uint8)

    def ours() -> torch.Tensor:
        chunks = tiles.split(CHUNK)
        return encode_bag(tapped.encode, chunks, seed=0, device=tapped.mean.device)[0]

    @torch.inference_mode()
    def timms() -> torch.Tensor:
        return torch.cat([vit((chunk / 255 - mean) / std) for chunk in tiles.split(CHUNK)])

    assert tapped.row.feature == "cls"
    torch.testing.assert_close(ours().detach(), timms(), rtol=1e-4, atol=1e-4)
    seconds = {ours: [], timms: []}
    for _ in range(given.repeats):
        for run, spent in seconds.items():
            began = time.process_time()
            run()
            spent.append(time.process_time() - began)
    mine, theirs = (statistics.median(seconds[run]) for run in (ours, timms))
    print(
        f"{given.model}: ours {TILES / mine:.2f}, plain timm {TILES / theirs:.2f} tiles per second "
        f"of one core; ratio {theirs / mine:.3f}"
    )


if __name__ == "__main__":
    main()
