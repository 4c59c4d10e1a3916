"""Layers of `tapfm.slide_model.layers.blocks`, by torch's own attention."""

from torch.nn import functional as F


def through(layers, x_N1W, heads):
    """Return tokens (N, 1, W) after layers, and the last one's attention (1, H, N, N)."""
    for layer in layers:
        h = layer.norm(x_N1W)
        seen, looked = F.multi_head_attention_forward(
            h, h, h, h.shape[-1], heads, layer.qkv.weight, layer.qkv.bias, None, None, False, 0.0,
            layer.out.weight, layer.out.bias, training=False, average_attn_weights=False,
        )  # fmt: skip
        x_N1W = x_N1W + layer.scale_W * seen
        x_N1W = x_N1W + layer.scale_mlp_W * layer.mlp(layer.norm_mlp(x_N1W))
    return x_N1W, looked
