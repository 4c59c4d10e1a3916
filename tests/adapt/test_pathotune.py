"""PathoTune-style prompts: positions of each kind, renewal, and the tile's own prompts.

The contract that every strategy holds (gradients, checkpoint, counts) is in test_adapt.py.
"""

import numpy as np
import pytest
import torch

from tapfm.adapt.strategies import StrategyError, make_strategy, strategy_spec
from tapfm.adapt.strategies.pathotune import text_to_vectors
from tests.tiny import random_tiles, tiny_encoder

WIDTH = 7  # of the text
SPANS = {"task": slice(0, 3), "text": slice(3, 5), "instance": slice(5, 7)}


@pytest.fixture
def text(tmp_path):
    """Two vectors in a file."""
    file = tmp_path / "text.npy"
    np.save(file, np.random.default_rng(0).standard_normal((2, WIDTH)))
    return file


def adapted(make="5 prefix", moved=True, **options):
    encoder = tiny_encoder(make, **({"init_values": 0.1} if make == "rope" else {})).eval()
    torch.manual_seed(5)
    make_strategy({"name": "pathotune", "n": 3, **options}).prepare(encoder.vit)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter += 0.1 * noise
    return encoder.eval()


def trace(encoder, tiles):
    """Return the inputs and outputs of every block, and the input of the last norm."""
    given, made, last = [], [], []
    for block in encoder.vit.blocks:
        block.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
        block.register_forward_hook(lambda _m, _a, out: made.append(out))
    encoder.vit.norm.register_forward_pre_hook(lambda _m, args: last.append(args[0]))
    encoder.vit.forward_features(encoder.pixels(tiles))  # of all tokens
    return given, made, last[0]


@pytest.mark.parametrize("make", ["1 prefix", "5 prefix", "9 prefix", "cls+mean", "rope"])
@pytest.mark.parametrize("renew", [["task"], [], ["task", "text", "instance"], ["instance"]])
def test_each_kind_stands_in_its_place_and_is_renewed_as_asked(make, renew, text):
    encoder, tiles = adapted(make, text=str(text), renew=renew), random_tiles(2)
    prefix, prompts = encoder.vit.num_prefix_tokens, encoder.vit.pathotune
    plain = trace(tiny_encoder(make).eval(), tiles)[0][0]
    instance = prompts.instance.look(encoder.normalise(tiles))
    given, made, last = trace(encoder, tiles)
    assert torch.equal(given[0][:, :prefix], plain[:, :prefix])
    assert torch.equal(given[0][:, prefix + 7 :], plain[:, prefix:])
    for depth, x in enumerate(given):
        assert x.shape[1] == plain.shape[1] + 7
        new = {
            "task": prompts.task.prompts[depth if "task" in renew else 0].expand(2, -1, -1),
            "text": prompts.text.project(prompts.text.vectors_PE).expand(2, -1, -1),
            "instance": instance,
        }
        inside = x[:, prefix : prefix + 7]
        for kind, span in SPANS.items():
            carried = made[depth - 1][:, prefix : prefix + 7][:, span] if depth else None
            wanted = new[kind] if depth == 0 or kind in renew else carried
            assert torch.equal(inside[:, span], wanted), kind
    taken = torch.cat([made[-1][:, :prefix], made[-1][:, prefix + 7 :]], dim=1)
    assert torch.equal(last, taken), "whatever pools the tokens never sees a prompt"


@pytest.mark.parametrize("make", ["5 prefix", "qk norm", "rope"])
def test_the_score_leaves_prompts_out(make):
    encoder, tiles = adapted(make), random_tiles(3)
    prefix, attn, caught = encoder.vit.num_prefix_tokens, encoder.vit.blocks[-1].attn, []
    attn.fused_attn = False
    hook = attn.attn_drop.register_forward_hook(lambda _m, _a, matrix: caught.append(matrix))
    encoder.vit.forward_features(encoder.pixels(tiles))  # the whole block
    hook.remove()
    _, score = encoder(tiles)
    row = caught[0][:, :, 0]
    on_prefix, on_patches = row[..., :prefix].sum(-1), row[..., prefix + 6 :].sum(-1)
    expected = -(on_prefix / (on_prefix + on_patches)).mean(1)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)
    assert (score + row[..., : prefix + 6].sum(-1).mean(1)).abs().min() > 1e-3  # not the same


def test_the_start_is_task_prompts_and_silence(text):
    """Prompts of text and instance are 0 in the first block, for any tile."""
    for options in ({"text": str(text)}, {"parts": ["task", "instance"]}):
        given, _, _ = trace(adapted(moved=False, **options), random_tiles(2))
        silent = given[0][:, 5 + 3 : -16]
        assert silent.shape[1] == (4 if "text" in options else 2)
        assert silent.abs().max() == 0
    bound = (6 / (3 * 8 * 8 + 24)) ** 0.5
    free = adapted(moved=False).vit.pathotune.text.prompts
    assert free.shape == (1, 1, 24)
    assert 0 < free.abs().max() <= bound


@pytest.mark.parametrize("part", ["task", "text", "instance"])
def test_each_kind_is_switched_apart(part, text):
    options = {"text": str(text)} if part == "text" else {}
    encoder = adapted(parts=[part], **options)
    names = {name.split(".")[1] for name, p in encoder.vit.named_parameters() if p.requires_grad}
    assert names == {part}
    moved = encoder(random_tiles(2))[0] - tiny_encoder().eval()(random_tiles(2))[0]
    assert moved.abs().max() > 1e-3


def test_instance_prompts_are_of_the_tile_alone():
    encoder, tiles = adapted(), random_tiles(3)
    prompts = encoder.vit.pathotune.instance.look(encoder.normalise(tiles))
    assert prompts.shape == (3, 2, 24)
    assert (prompts[0] - prompts[1]).abs().max() > 1e-3
    assert (prompts[:, 0] - prompts[:, 1]).abs().max() > 1e-3
    together = encoder(tiles)
    alone = [torch.cat(each) for each in zip(*(encoder(t[None]) for t in tiles), strict=True)]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert encoder.vit.pathotune.instance.prompts_C2D is None  # nothing of the tile is kept


def test_stain_is_the_average_and_structure_the_largest():
    encoder, tiles = adapted(), random_tiles(3)
    part, x = encoder.vit.pathotune.instance, random_tiles(3).double() / 255
    for layer in part.stem:
        x = layer(x)
    assert x.shape == (3, 256, 2, 2)
    stain, structure = x.mean((2, 3)), x.flatten(2).max(2).values
    expected = torch.stack([part.stain(stain), part.structure(structure)], dim=1)
    found = part.look(encoder.normalise(tiles))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # colours are float32
    assert (part.stain(stain) - part.stain(structure)).abs().max() > 1e-3


# the sentence


def test_the_recipe_holds_the_text_when_its_file_is_gone(text):
    vectors = np.load(text)
    strategy = make_strategy({"name": "pathotune", "text": str(text)})
    text.unlink()
    again = make_strategy(strategy_spec(strategy))
    assert again == strategy
    assert np.array_equal(text_to_vectors(again.text), vectors.astype("float32"))


def test_one_vector_is_one_prompt(tmp_path):
    file = tmp_path / "one.npy"
    np.save(file, np.ones(WIDTH, "float64"))
    vit = adapted(text=str(file)).vit
    assert vit.pathotune.text.vectors_PE.shape == (1, WIDTH)
    assert "3 task, 1 text, 2 instance" in make_strategy(
        {"name": "pathotune", "n": 3, "text": str(file)}
    ).describe(vit)
    free = adapted().vit
    assert "1 text (no sentence)" in make_strategy({"name": "pathotune", "n": 3}).describe(free)


def test_another_sentence_is_another_model(tmp_path):
    """The numbers in the file reach the feature."""
    found = []
    for value in (1.0, 2.0):
        np.save(tmp_path / "t.npy", np.full(WIDTH, value))
        found.append(adapted(text=str(tmp_path / "t.npy"))(random_tiles(2))[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "text.npy cannot be read"),
        (b"nothing", "text.npy cannot be read"),
        (np.array([object()]), "text.npy cannot be read"),
        (np.ones((2, 3, 4)), r"no vectors of finite numbers, but float32 \(2, 3, 4\)"),
        (np.array([1.0, np.nan]), "no vectors of finite numbers"),
        (np.ones((0, 3)), "no vectors of finite numbers"),
    ],
    ids=["missing", "no array", "objects", "cube", "nan", "empty"],
)
def test_a_text_that_is_none_is_refused(tmp_path, content, said):
    file = tmp_path / "text.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(StrategyError, match=rf"pathotune: text: .*{said}.*numpy.save"):
        make_strategy({"name": "pathotune", "text": str(file)})


def test_a_text_without_its_part_is_refused(text):
    with pytest.raises(StrategyError, match=r"text is given and parts \['task'\] leaves it out"):
        make_strategy({"name": "pathotune", "text": str(text), "parts": ["task"]})
