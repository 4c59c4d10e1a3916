"""Published files of Madeleine and MOOZY give the vectors that their own arithmetic gives.

The references are written here, of the files' tensors by their published names, in plain torch.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slides.errors import SettingsError
from tapfm.slide_encoders.opened import open_slide_encoder
from tapfm.slide_encoders.published import is_published, read_published
from tapfm.slide_encoders.registry import find
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.madeleine import Madeleine
from tapfm.slide_model.aggregators.moozy import ROWS, Moozy, slopes
from tests.bags import tile_set
from tests.slide_encoders import twins

T = 11
SMALL = {"dim": 7, "width": 6, "heads": 3, "units": 5}


def aggregator_of(path, dim):
    options, state = read_published(path)
    model = make_aggregator(options, dim, 2).double()
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


def tiles(dim, count=T, counts=()):
    drawn = torch.Generator().manual_seed(0)
    z_TD = torch.randn(count, dim, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD, torch.zeros(count).double(), counts)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"].double(), state[f"{name}.bias"].double())


def norm(state, name, x):
    weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def madeleine_by_hand(state, z, heads):
    """A head at a time; channel w of head h is w * heads + h."""
    below = "wsi_embedders."
    for n in (0, 4, 8):
        z = F.gelu(
            norm(state, f"{below}pre_attn.{n + 1}", linear(state, f"{below}pre_attn.{n}", z))
        )
    pooled = []
    for h in range(heads):
        e, attn = z[:, h::heads], f"{below}attn.{h}."
        gate = torch.tanh(linear(state, f"{attn}attention_a.0", e)) * torch.sigmoid(
            linear(state, f"{attn}attention_b.0", e)
        )
        pooled.append(linear(state, f"{attn}attention_c", gate).softmax(0).T @ e)
    return linear(state, "projector", torch.cat(pooled).T.flatten())


@pytest.mark.parametrize("parallel", [True, False])
def test_madeleine_is_its_own_arithmetic(tmp_path, parallel):
    state = twins.write_madeleine(tmp_path, **SMALL, parallel=parallel)
    found = aggregator_of(tmp_path, 7)(tiles(7))
    expected = madeleine_by_hand(state, tiles(7).z_TD, 3)
    torch.testing.assert_close(found.embedding_E, expected, rtol=0, atol=1e-10)
    other = dict(state)
    name = "wsi_embedders.pre_attn.8.weight"  # heads one after the other, not interleaved
    other[name] = state[name].reshape(6, 3, 6).transpose(0, 1).reshape(18, 6)
    far = madeleine_by_hand(other, tiles(7).z_TD, 3)
    assert (far - expected).abs().max() > 1e-3, "so that the above can fail"


def block_by_hand(state, n, x, heads, bias):
    """One block of MOOZY, by its own names."""
    at = f"blocks.{n}."
    y = norm(state, f"{at}norm1", x)
    q, k, v = (linear(state, f"{at}{each}_proj", y).unflatten(1, (heads, -1)) for each in "qkv")
    if f"{at}q_norm.weight" in state:
        q, k = norm(state, f"{at}q_norm", q), norm(state, f"{at}k_norm", k)
    looked = torch.einsum("nhw,mhw->hnm", q, k) / q.shape[-1] ** 0.5 + bias
    seen = torch.einsum("hnm,mhw->nhw", looked.softmax(-1), v).flatten(1)
    scale = [
        state.get(f"{at}{each}.gamma", torch.ones(1)).double() for each in ("ls_attn", "ls_mlp")
    ]
    x = x + scale[0] * linear(state, f"{at}out_proj", seen)
    y = F.gelu(linear(state, f"{at}fc1", norm(state, f"{at}norm2", x)))
    return x + scale[1] * linear(state, f"{at}fc2", y)


def moozy_by_hand(payload, z, corners0, side0, counts):
    """Level-0 corners, a distance at a time; the first tokens are near to everything."""
    slide, case = payload["teacher_slide_encoder"], payload["case_transformer"]
    heads = payload["slide_encoder_config"]["n_heads"]
    registers = slide["register_tokens"][0].double()
    first, found = 1 + len(registers), []
    for own, corners in zip(z.split(counts), corners0.split(counts), strict=True):
        x = torch.cat([slide["cls_token"][0].double(), registers,
                       F.gelu(linear(slide, "input_proj.0", own))])  # fmt: skip
        bias = torch.zeros(heads, len(x), len(x), dtype=torch.float64)
        for t, one in enumerate(corners.tolist()):
            for u, other in enumerate(corners.tolist()):
                far = np.hypot(one[0] - other[0], one[1] - other[1]) / side0
                bias[:, first + t, first + u] = slide["pos_bias.slopes"][:, 0].double() * far
        for n in range(payload["slide_encoder_config"]["n_layers"]):
            x = block_by_hand(slide, n, x, heads, bias)
        found.append(norm(slide, "norm", x)[0])
    x = torch.cat([case["case_token"][0].double(), torch.stack(found)])
    x = block_by_hand(case, 0, x, heads, 0)
    return norm(case, "norm", x)[0]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_moozy_is_its_own_arithmetic(tmp_path, qk_norm):
    payload = twins.write_moozy(tmp_path / "moozy.pt", dim=7, qk_norm=qk_norm)
    bag = tiles(7, counts=(8, 3))
    found = aggregator_of(tmp_path, 7)(bag)
    expected = moozy_by_hand(payload, bag.z_TD, bag.coords0_T2, 448, (8, 3))
    torch.testing.assert_close(found.embedding_E, expected, rtol=0, atol=1e-10)
    far = moozy_by_hand(payload, bag.z_TD, bag.coords0_T2, 896, (8, 3))
    assert (far - expected).abs().max() > 1e-6, "so that the above can fail"


def test_moozy_in_parts_of_rows_is_moozy_at_once(tmp_path, monkeypatch):
    twins.write_moozy(tmp_path / "moozy.pt", dim=7)
    model, bag = aggregator_of(tmp_path, 7), tiles(7)
    whole = model(bag).embedding_E
    for rows in (1, 3, 5, 7):  # 5 tokens stand in front of the tiles
        monkeypatch.setattr("tapfm.slide_model.aggregators.moozy.ROWS", rows)
        torch.testing.assert_close(model(bag).embedding_E, whole, rtol=0, atol=1e-12)
    assert ROWS > T


def test_the_numbers_of_parameters_are_the_published_ones():
    """5.0 M; 42.83 M and 21.27 M, which with the tile encoder's 21.67 M are 85.77 M."""
    with torch.device("meta"):
        madeleine = Madeleine(512, 4, 512).build(512, 1)
        moozy = Moozy(768, 6, 3, 12, case_scale=1e-5).build(384, 1)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    pretraining, biases = 2048 * 128 + 128, 4
    assert count(madeleine) - count(madeleine.head) + pretraining + biases == 4_996_740
    mask_token = 768
    slide = count(moozy.slide) + count(moozy.project) + mask_token
    assert (slide, count(moozy.case)) == (42_829_056, 21_270_528)
    assert round((slide + count(moozy.case) + 21_670_272) / 1e6, 2) == 85.77


def test_slopes_are_those_of_alibi():
    """8 heads fall from 1/2 to 1/256; 12 add every second of 16."""
    assert slopes(8) == [2.0**-n for n in range(1, 9)]
    assert slopes(12) == slopes(8) + [2.0 ** -(n + 0.5) for n in range(4)]


def test_what_is_no_published_file_is_refused(tmp_path):
    assert not is_published(tmp_path)
    with pytest.raises(SettingsError, match=r"neither Madeleine's folder .* nor moozy.pt"):
        read_published(tmp_path)
    for content in ({"meta": {}}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "moozy.pt")
        with pytest.raises(SettingsError, match="not laid out as its publisher does"):
            read_published(tmp_path)
    torch.save(json.JSONEncoder(), tmp_path / "moozy.pt")
    with pytest.raises(SettingsError, match="it can run code"):
        read_published(tmp_path)
    payload = twins.write_moozy(tmp_path / "moozy.pt")
    payload["teacher_slide_encoder"]["norm.bias"][0] = torch.nan
    torch.save(payload, tmp_path / "moozy.pt")
    with pytest.raises(SettingsError, match=r"slide.norm.bias is not finite"):
        read_published(tmp_path / "moozy.pt")
    twins.write_madeleine(tmp_path / "m", **SMALL)
    with pytest.raises(SettingsError, match=r"moozy: .* holds madeleine. Give moozy.pt"):
        open_slide_encoder(find("moozy"), tmp_path / "m", False)
    (tmp_path / "m" / "model_config.json").write_text('{"activation": "relu"}')
    with pytest.raises(SettingsError, match="its attention is 'relu'"):
        read_published(tmp_path / "m")
