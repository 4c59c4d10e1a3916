"""Tiny random encoders of every make the engine must honour, for the tests that share them."""

from dataclasses import replace

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import nn

from tapfm.encoders.backbones import Backbone, Encoder, build, find

TILE = 32  # 4 x 4 patches of 8 px

MAKES = {
    "1 prefix": {},
    "5 prefix": {"reg_tokens": 4},
    "9 prefix": {"reg_tokens": 8, "no_embed_class": True},
    "layerscale": {"init_values": 0.1},
    "swiglu": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4},
    "qk norm": {"qk_norm": True, "reg_tokens": 4},
    "rope": {"arch": "vit_small_patch16_dinov3", "global_pool": "token"},
    "cls+mean": {"reg_tokens": 4, "feature": "cls+mean"},
}


def tiny_encoder(
    make="5 prefix",
    dtype=torch.float64,
    seed=0,
    recompute=False,
    tail=True,
    compiled=False,
    **extra,
):
    """A 3-block ViT of width 24 with 3 heads, its weights spread so that attention is not flat."""
    kwargs = {**MAKES[make], **extra}
    arch = kwargs.pop("arch", "vit_tiny_patch16_224")
    feature = kwargs.pop("feature", "cls")
    torch.manual_seed(seed)
    vit = timm.create_model(
        arch,
        num_classes=0,
        img_size=TILE,
        patch_size=8,
        num_heads=3,
        **{"depth": 3, "embed_dim": 24, **kwargs},
    )
    for name, parameter in vit.named_parameters():
        if parameter.ndim > 1 and "qkv" in name:
            nn.init.normal_(parameter, std=0.5)
    row = Backbone(
        "tiny", "package", arch, 24, vit.num_prefix_tokens, 0, "", tile_px=TILE, feature=feature
    )
    options = {"recompute": recompute, "tail": tail, "compiled": compiled}
    return Encoder(vit, row, **options).to(dtype)


def tiny_swin():
    """Four stages of a block each, for tiles of 2 x TILE; without a CLS token."""
    torch.manual_seed(0)
    row = replace(find("swin_t"), tile_px=2 * TILE, width=32)
    ones = (1, 1, 1, 1)
    small = {"embed_dim": 4, "depths": ones, "num_heads": ones, "window_size": 2}
    return Encoder(build(row, **small, drop_path_rate=0), row).double()


def random_tiles(tiles, seed=1, side=TILE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, generator=generator)
