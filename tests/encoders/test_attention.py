"""The score is read off the row that the block itself used.

The reference is the block's own attention matrix, caught where an unfused block drops out of it.
"""

import pytest
import torch
from torch import nn

from tapfm.encoders.attention import ClsTap, NoClsAttentionError, prefix_mass
from tests.tiny import MAKES, random_tiles, tiny_encoder

TILES = 3


def blocks_own_matrix(encoder, tiles):
    """(C, H, N, N) from the last block, unfused."""
    attn = encoder.vit.blocks[-1].attn
    attn.fused_attn, caught = False, []
    hook = attn.attn_drop.register_forward_hook(lambda _m, _a, matrix: caught.append(matrix))
    encoder.vit.forward_features(encoder.normalise(tiles))  # all of it, not the tail alone
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", MAKES)
def test_row_is_the_blocks_own(make, fused):
    encoder = tiny_encoder(make, dtype=torch.float32).eval()
    tiles = random_tiles(TILES)
    for block in encoder.vit.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        encoder.vit.forward_features(encoder.normalise(tiles))
        row = encoder.tap.take_row().softmax(-1)
        matrix = blocks_own_matrix(encoder, tiles)
    assert (row - matrix[:, :, 0]).abs().max() <= 1e-6
    # and it is no other row's, nor a flat one: the test above can fail
    assert (row - matrix[:, :, 1]).abs().max() > 1e-3
    assert row.std() > 1e-3


@pytest.mark.parametrize("make", ["1 prefix", "5 prefix", "9 prefix"])
def test_score_is_the_papers_up_to_an_affine_map(make):
    encoder = tiny_encoder(make)
    tiles, prefix = random_tiles(TILES), encoder.vit.num_prefix_tokens
    score_C = encoder(tiles)[1]
    patches = blocks_own_matrix(encoder, tiles)[:, :, 0, prefix:]
    paper_C = patches.mean((1, 2))  # over heads and patch columns
    torch.testing.assert_close((1 + score_C) / patches.shape[-1], paper_C, rtol=1e-12, atol=0)


def test_prefix_mass_is_a_share():
    logits = torch.randn(2, 3, 11, dtype=torch.float64)
    assert torch.allclose(prefix_mass(logits, 11), torch.ones(2, dtype=torch.float64))
    by_hand = logits.softmax(-1)[..., :5].sum(-1).mean(1)
    torch.testing.assert_close(prefix_mass(logits, 5), by_hand, rtol=1e-12, atol=0)


def test_score_is_float32_under_bf16_autocast():
    encoder = tiny_encoder(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z_CD, score_C = encoder(random_tiles(TILES))
    assert z_CD.dtype == score_C.dtype == torch.float32


def test_a_model_without_cls_is_refused_by_name():
    import timm

    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7)
    with pytest.raises(NoClsAttentionError, match=r"SwinTransformer: .*no CLS attention row"):
        ClsTap(swin)
    with pytest.raises(NoClsAttentionError, match="Linear"):
        ClsTap(nn.Linear(2, 2))
