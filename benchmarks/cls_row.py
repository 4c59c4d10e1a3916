"""The CLS row read by the tap against the block's own attention matrix, under the timm installed.

    python -m benchmarks.cls_row        a table row: largest difference of each family, float32

Run it under each timm to be claimed, `pip install timm==1.0.15` and so on.
"""

from __future__ import annotations

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import nn

from tapfm.backbones import Encoder
from tapfm.doctor import cls_row_error
from tapfm.registry import Backbone

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


def main() -> None:
    cells = []
    for arch, kwargs in FAMILIES.values():
        if not timm.is_model(arch):
            cells.append("not in it")
            continue
        torch.manual_seed(0)
        vit = timm.create_model(arch, num_classes=0, img_size=SIDE, **SIZE, **kwargs)
        for name, parameter in vit.named_parameters():
            if parameter.ndim > 1 and "qkv" in name:
                nn.init.normal_(parameter, std=0.5)  # or attention is flat and any row is right
        row = Backbone("tiny", "package", arch, 24, vit.num_prefix_tokens, 0, "", tile_px=SIDE)
        cells.append(f"{cls_row_error(Encoder(vit, row).eval()):.1e}")
    print("| timm | " + " | ".join(FAMILIES) + " |")
    print("|---" * (len(FAMILIES) + 1) + "|")
    print(f"| {timm.__version__} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
