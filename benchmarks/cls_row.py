"""Compares the last block's CLS row and tail with the block's own, under the installed timm.

    python -m benchmarks.cls_row        a table row each: largest difference of each family

The row is what the tap reads, against the block's own attention matrix, in float32. The tail is
the last block computed for the CLS token alone: features, scores and the gradients of all
parameters and of the tiles against those of the whole block, relative, in float64.

Run it under each supported timm, `pip install timm==1.0.15` and so on.
"""

from __future__ import annotations

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from tapfm.encoders.backbones import Encoder
from tapfm.encoders.fingerprint import known_tiles
from tapfm.encoders.registry import Backbone
from tapfm.planning.doctor import cls_row_error

SIDE, SIZE = 32, {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
VIT, EVA = "vit_tiny_patch16_224", "vit_small_patch16_dinov3"
FAMILIES = {  # as in the registry: UNI; H-optimus; UNI2-h; Virchow2; H0-mini; DINOv3
    "plain, layer scale": (VIT, {"init_values": 0.1}),
    "4 registers": (VIT, {"reg_tokens": 4, "no_embed_class": True}),
    "8 registers, SwiGLU": (
        VIT,
        {"reg_tokens": 8, "no_embed_class": True, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
    ),
    "q and k normalised": (VIT, {"qk_norm": True, "reg_tokens": 4}),
    "RoPE (Eva)": (EVA, {"global_pool": "token"}),
}


def encoder_of(arch: str, kwargs: dict, tail: bool = True) -> Encoder:
    """Return a tiny encoder, always the same."""
    torch.manual_seed(0)
    vit = timm.create_model(arch, num_classes=0, img_size=SIDE, **SIZE, **kwargs)
    for name, parameter in vit.named_parameters():
        if parameter.ndim > 1 and "qkv" in name:
            nn.init.normal_(parameter, std=0.5)  # or attention is flat and any row is right
    row = Backbone("tiny", "package", arch, 24, vit.num_prefix_tokens, 0, "", tile_px=SIDE)
    return Encoder(vit, row, tail=tail).eval()


def answers(encoder: Encoder) -> list[Tensor]:
    """Return features, scores, and the gradients of the tiles and of all parameters."""
    encoder.double()
    tiles = known_tiles(3, SIDE).double().requires_grad_()
    z, score = encoder(tiles)
    (z.sin().sum() + score.cos().sum()).backward()
    return [z, score, tiles.grad, *(p.grad for p in encoder.parameters())]


def tail_difference(arch: str, kwargs: dict) -> float:
    """Return the largest relative difference of everything compared."""
    tail, whole = (encoder_of(arch, kwargs, tail) for tail in (True, False))
    assert tail.tail is not None, tail.no_tail
    pairs = zip(answers(tail), answers(whole), strict=True)
    # a bias of k has no gradient but rounding: nothing to compare it with
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 1e-9)


def main() -> None:
    rows: dict[str, list[str]] = {"row": [], "tail": []}
    for arch, kwargs in FAMILIES.values():
        there = timm.is_model(arch)
        row = f"{cls_row_error(encoder_of(arch, kwargs)):.1e}" if there else "not in it"
        tail = f"{tail_difference(arch, kwargs):.1e}" if there else "not in it"
        rows["row"].append(row)
        rows["tail"].append(tail)
    print("| timm |  | " + " | ".join(FAMILIES) + " |")
    print("|---" * (len(FAMILIES) + 2) + "|")
    for name, cells in rows.items():
        print(f"| {timm.__version__} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
