"""Computes the last block for the CLS token alone if the feature is the CLS token.

Nothing behind the last block reads the other tokens. So only k and v are computed for all tokens;
q, attention, projection, LayerScale, MLP and the final norm are computed for one. Features, scores
and all gradients equal those of the whole block, for 2 to 4 % less work, and the score is read off
the very CLS row that the attention uses.

    tail, reason = find_tail(vit, tap)      None and the reason if the block is of another kind
    with tail: vit.forward_features(x)      (C, 1, D); outside of `with` the model is timm's own

How: the forward of this model's last block and of its attention are replaced. Their parts are
called as modules, so whatever strategies hook onto them (LoRA, SSF, bottlenecks, prompts) runs as
in the whole block. Only a fused qkv is taken apart, for q of one token; with hooks it is called
whole.

Price: nothing. Condition: timm's Block or EvaBlock, and an attention with as many k and v as q
    heads. At load, features and scores are compared with the whole block's on synthetic tokens.
Differs: dropout draws for one token instead of all, so its noise has the same distribution and
    other values. Drop-path draws one number a tile, as before.

Shapes: C tiles, N tokens (CLS first), D width, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.encoders.attention import ClsTap

MODELS = ("VisionTransformer", "Eva")
BLOCKS = ("Block", "EvaBlock")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
TOLERANCE = 1e-4  # relative: kernels differ by 1e-6 in float32, another token or head by 1
TILES, PATCHES = 2, 7  # sizes of the check


class ClsTail:
    """A replacement for a model's last block inside `with`: computes the CLS token alone.

    Args:
        vit: a timm VisionTransformer or Eva for which `unfit` returns "".
        tap: its tap, which makes the CLS row and keeps it for the score.
    """

    def __init__(self, vit: nn.Module, tap: ClsTap):
        self.block, self.attn, self.tap, self.on = vit.blocks[-1], tap.attn, tap, False
        # set on the instances, so keys stay timm's; bound, so that a copied model uses its own
        self.block.forward, self.attn.forward = self.forward, self.attend

    def __enter__(self) -> ClsTail:
        self.on = True
        return self

    def __exit__(self, *error: object) -> None:
        self.on = False

    def forward(self, x_CND: Tensor, **given: Any) -> Tensor:
        """Return the CLS token behind the block, (C, 1, D), of all tokens (C, N, D)."""
        block = self.block
        if not self.on:
            return type(block).forward(block, x_CND, **given)
        assert given.get("attn_mask") is None
        assert not given.get("is_causal")  # an encoder gives neither
        rope = {"rope": given["rope"]} if "rope" in given else {}
        x_C1D = x_CND[:, :1]
        found_C1D = block.attn(block.norm1(x_CND), **rope)
        x_C1D = x_C1D + block.drop_path1(self._scaled(1, found_C1D))
        made_C1D = block.mlp(block.norm2(x_C1D))
        return x_C1D + block.drop_path2(self._scaled(2, made_C1D))

    def attend(self, h_CND: Tensor, **given: Any) -> Tensor:
        """Return the attention's output for the CLS token, (C, 1, D)."""
        attn = self.attn
        if not self.on:
            return type(attn).forward(attn, h_CND, **given)
        q_CH1E, k_CHNE, v_CHNE = self._project(h_CND)
        attn.q_norm(q_CH1E), attn.k_norm(k_CHNE)  # the tap sees what comes out
        row_CHN = self.tap.make_row()
        share_CHN = attn.attn_drop(row_CHN.softmax(-1)).to(v_CHNE.dtype)
        x_C1D = (share_CHN[:, :, None] @ v_CHNE).transpose(1, 2).flatten(2)
        if getattr(attn, "norm", None) is not None:
            x_C1D = attn.norm(x_C1D)
        if getattr(attn, "gate", None) is not None:
            x_C1D = x_C1D * attn.gate(h_CND[:, :1]).sigmoid()
        return attn.proj_drop(attn.proj(x_C1D))

    def _project(self, h_CND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the CLS token's q and all tokens' k and v: (C, H, 1 or N, E)."""
        attn, fused = self.attn, getattr(self.attn, "qkv", None)
        if fused is None:
            q, k, v = attn.q_proj(h_CND[:, :1]), attn.k_proj(h_CND), attn.v_proj(h_CND)
        else:
            biases, bias = [getattr(attn, f"{part}_bias", None) for part in "qkv"], fused.bias
            if biases[0] is not None:  # Eva keeps them beside the module
                bias = torch.cat(biases)
            called = biases[0] is None or getattr(attn, "qkv_bias_separate", False)
            if called and (fused._forward_hooks or fused._forward_pre_hooks):
                qkv = fused(h_CND) if bias is fused.bias else fused(h_CND) + bias
                q, k, v = qkv.chunk(3, dim=-1)
                q = q[:, :1]
            else:
                sizes = [fused.out_features // 3, fused.out_features // 3 * 2]
                weight_q, weight_kv = fused.weight.split(sizes)
                bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
                q = F.linear(h_CND[:, :1], weight_q, bias_q)
                k, v = F.linear(h_CND, weight_kv, bias_kv).chunk(2, dim=-1)
        return tuple(part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))

    def _scaled(self, number: int, x_C1D: Tensor) -> Tensor:
        """Apply LayerScale, under either of timm's names, if the block has it."""
        scale = getattr(self.block, f"ls{number}", None)
        if scale is not None:
            return scale(x_C1D)
        gamma_D = getattr(self.block, f"gamma_{number}", None)
        return x_C1D if gamma_D is None else gamma_D * x_C1D


def find_tail(vit: nn.Module, tap: ClsTap) -> tuple[ClsTail | None, str]:
    """Return the tail of a model and "", or None and the reason.

    On the meta device there is nothing to compare: the classes alone decide.
    """
    reason = unfit(vit)
    if reason:
        return None, reason
    tail = ClsTail(vit, tap)
    if not vit.cls_token.is_meta:
        try:
            worst, most = disagreement(vit, tail), tolerance(vit.cls_token.dtype)
            if not worst <= most:  # catches nan too
                reason = f"it differs from the whole block by {worst:.1e}, more than {most:.0e}"
        except (
            AttributeError,
            RuntimeError,
            TypeError,
        ) as error:  # parts with other names or shapes
            reason = f"{type(error).__name__}: {error}"
        if reason:
            del tail.block.forward, tail.attn.forward
    return (None, reason) if reason else (tail, "")


def unfit(vit: nn.Module) -> str:
    """Return why the last block is of an unsupported kind; an empty string if it is supported."""
    attn = vit.blocks[-1].attn
    for part, known in ((vit, MODELS), (vit.blocks[-1], BLOCKS), (attn, ATTENTIONS)):
        if type(part).__name__ not in known or not type(part).__module__.startswith("timm."):
            return f"{type(part).__name__} is none of {', '.join(known)}"
    if getattr(attn, "num_kv_groups", 1) != 1:
        return f"{type(attn).__name__} shares k and v among heads"
    return ""


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative tolerance of the check, wider for weights in half precision."""
    return max(TOLERANCE, 8 * torch.finfo(dtype).eps)


@torch.no_grad()
def disagreement(vit: nn.Module, tail: ClsTail) -> float:
    """Return the largest relative difference of features and scores from the whole block's.

    Measured on a few random tokens of a fixed seed; a block works for any number of tokens.
    """
    # on the CPU, whatever torch's default device is: a generator draws on its own device alone
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    like, tap = vit.cls_token, tail.tap
    tokens = torch.randn(TILES, tap.first_patch + PATCHES, like.shape[-1], **drawn)
    given = {}
    if getattr(vit, "rope", None) is not None:
        width = round(tail.attn.scale**-2)  # head width
        given["rope"] = torch.randn(PATCHES, 2 * width, **drawn).to(like)
    training = vit.training
    vit.eval()
    found = []
    for switch in (False, True):
        tail.on = switch
        z_CD = vit.norm(tail.block(tokens.to(like), **given))[:, 0]
        found.append((z_CD, tap.take_score()))
    tail.on = False
    vit.train(training)
    errors = [_relative(b, a) for a, b in zip(*found, strict=True)]
    return next((error for error in errors if error != error), max(errors))


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
