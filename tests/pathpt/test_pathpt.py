"""PathPT's parts against values worked out by hand, plain loops and one graph."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tapfm.adapt.strategies import make_strategy
from tapfm.pathpt import pseudo
from tapfm.pathpt.model import PathPT
from tapfm.pathpt.question import Question, TileClass
from tapfm.pathpt.scores import score_difference, score_subtypes
from tapfm.pathpt.spatial import KERNELS, Mixer, PlaceError, compact, places
from tapfm.pathpt.text.prompts import ClassPrompts
from tapfm.pathpt.text.towers import TextError, VisionLanguage, tokenise
from tapfm.pathpt.text.words import WordTower
from tapfm.pathpt.tile_loss import balanced_nll, tile_loss
from tapfm.pathpt.train import ImageTower, LabelledSlide, step, train_pathpt
from tapfm.pathpt.vote import ballot, vote
from tests.tiny import random_tiles, tiny_encoder

WORDS = [
    "a",
    "histopathology",
    "image",
    "of",
    "normal",
    "tissue",
    "tumour",
    "with",
    "vacuoles",
    ".",
]
NAMES = ["normal tissue", "tumour", "tumour with vacuoles"]


def tower(seed=0):
    torch.manual_seed(seed)
    text = WordTower(WORDS).double()
    nn.init.normal_(text.table.weight)  # or every prompt would be nearly the same
    return text.requires_grad_(False).eval()


def scattered(seed=0):
    """Return tiles of two far-apart sections with holes, unordered: vectors (23, 16) and places."""
    generator = torch.Generator().manual_seed(seed)
    cells = [(r, c) for r in range(5) for c in range(4)] + [(1000, 700), (1001, 700), (1004, 707)]
    places_N2 = torch.tensor(cells)[torch.randperm(len(cells), generator=generator)]
    return torch.randn(len(cells), 16, dtype=torch.float64, generator=generator), places_N2


def awake(mixer):
    """Return a mixer whose additions are not 0."""
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixer


# ---------------------------------------------------------------------------- prompts


def test_a_prompt_that_has_learned_nothing_is_the_sentence_it_was_made_of():
    """Context, name and full stop are what the tower would make of the words themselves."""
    text = tower()
    prompts = ClassPrompts(NAMES, 64, text, context=8)
    said = "a histopathology image of " * 2
    ids_KL, mask_KL = tokenise(text, [f"{said}{name} ." for name in NAMES])
    expected = F.normalize(text(text.table(ids_KL), mask_KL), dim=-1)
    torch.testing.assert_close(prompts(text), expected, rtol=0, atol=1e-12)


def test_padding_to_the_longest_class_changes_no_class():
    text = tower()
    together = ClassPrompts(NAMES, 64, text, context=5)
    for k, name in enumerate(NAMES):
        alone = ClassPrompts([name], 64, text, context=5)
        with torch.no_grad():
            alone.context_KnW.copy_(together.context_KnW[k : k + 1])
        torch.testing.assert_close(alone(text)[0], together(text)[k], rtol=0, atol=1e-12)


def test_only_context_and_free_vectors_learn_and_each_class_has_its_own():
    text = tower()
    prompts = ClassPrompts(NAMES, 64, text, "both", "random", context=6).double()
    assert {n: tuple(p.shape) for n, p in prompts.named_parameters()} == {
        "vectors_Kd": (3, 64),
        "context_KnW": (3, 6, 64),
    }
    prompts(text)[1].sum().backward()
    moved_K = prompts.context_KnW.grad.abs().sum((1, 2)) > 0
    assert moved_K.tolist() == [False, True, False]
    assert all(p.grad is None for p in text.parameters())


def test_both_is_the_sum_made_unit_and_embedding_needs_no_tower():
    text = tower()
    both = ClassPrompts(NAMES, 64, text, "both", context=6).double()
    token = ClassPrompts(NAMES, 64, text, "token", context=6).double()
    expected = F.normalize(token(text) + both.vectors_Kd, dim=-1)
    torch.testing.assert_close(both(text), expected, rtol=0, atol=1e-12)
    free = ClassPrompts(NAMES, 7, None, "embedding")
    assert not list(free.buffers())
    torch.testing.assert_close(free(None), F.normalize(free.vectors_Kd, dim=-1))


def test_a_prompt_longer_than_the_tower_and_an_unknown_word_are_named():
    with pytest.raises(TextError, match=r"'tumour with vacuoles': its prompt has 66 tokens, 60 of"):
        ClassPrompts(NAMES[2:], 64, tower(), context=60)
    with pytest.raises(TextError, match="does not know pleural"):
        ClassPrompts(["pleural tumour"], 64, tower())
    with pytest.raises(TextError, match="the text tower takes 64"):
        tokenise(tower(), ["tumour " * 63])


def test_the_text_tower_stays_in_eval_mode_and_frozen():
    encoder = tiny_encoder()
    pair = VisionLanguage("tiny", encoder, nn.Linear(24, 64), WordTower(WORDS), 1.0).train()
    assert pair.encoder.training
    assert not pair.text.training
    assert not pair.head.training
    assert not pair.eval().encoder.training
    assert not any(p.requires_grad for p in pair.parameters())


# ---------------------------------------------------------------------------- mixer


def test_the_mixer_starts_as_the_identity():
    z_Nd, places_N2 = scattered()
    mixed_Nd = Mixer(16).double().eval()(z_Nd, places_N2)
    assert torch.equal(mixed_Nd, z_Nd)


def test_the_order_of_tiles_does_not_matter():
    z_Nd, places_N2 = scattered()
    mixer = awake(Mixer(16)).double().eval()
    order = torch.randperm(len(z_Nd))
    one, other = mixer(z_Nd, places_N2), mixer(z_Nd[order], places_N2[order])
    torch.testing.assert_close(other, one[order], rtol=0, atol=1e-11)
    assert (one - z_Nd).abs().max() > 0.1


def test_neighbours_are_those_of_a_plain_loop_over_true_places():
    """The loop goes over each tile, kernel and offset; far sections and holes are included."""
    z_Nd, places_N2 = scattered()
    mixer = awake(Mixer(16)).double().eval()
    at = {tuple(place): z for place, z in zip(places_N2.tolist(), z_Nd, strict=True)}
    rows = []
    for r, c in places_N2.tolist():
        total = torch.zeros(16, dtype=torch.float64)
        for k, conv in zip(KERNELS, mixer.convs, strict=True):
            seen = conv.bias.clone()
            for dr in range(-(k // 2), k // 2 + 1):
                for dc in range(-(k // 2), k // 2 + 1):
                    if (r + dr, c + dc) in at:
                        tap = conv.weight[:, 0, dr + k // 2, dc + k // 2]
                        seen = seen + tap * at[r + dr, c + dc]
            total = total + F.relu(mixer.near(seen))
        rows.append(mixer.mix(total))
    found = mixer.neighbours(z_Nd, places_N2)
    torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=1e-11)


def test_attention_is_that_of_a_plain_softmax():
    z_Nd, _ = scattered()
    mixer = awake(Mixer(16, heads=4)).double().eval()
    q, k, v = mixer.qkv(mixer.far(z_Nd)).chunk(3, dim=1)
    heads = []
    for h in range(4):
        part = slice(4 * h, 4 * h + 4)
        heads.append((q[:, part] @ k[:, part].T / 2).softmax(1) @ v[:, part])
    expected = mixer.out(torch.cat(heads, dim=1))
    torch.testing.assert_close(mixer.slide(z_Nd), expected, rtol=0, atol=1e-11)


def test_places_of_rounded_corners_and_of_corners_that_collide():
    """At 0.2527 mpp a step is 443.2 pixels, and corners are rounded to whole ones."""
    columns, rows = np.meshgrid(np.arange(40), np.arange(30))
    coords0 = np.stack([columns.ravel(), rows.ravel()], 1) * 443.2 + [1772, 886]
    found = places(coords0.round().astype(int), 443.2)
    assert found.tolist() == np.stack([rows.ravel(), columns.ravel()], 1).tolist()
    with pytest.raises(PlaceError, match="2 tiles are at 1 places of a grid of 100"):
        places(np.array([[0, 0], [30, 0]]), 100)


def test_empty_stretches_are_drawn_together_and_no_closer_than_a_kernel_reaches():
    drawn = compact(torch.tensor([[0, 5], [3, 6], [7, 900], [8, 5]]))
    assert drawn.tolist() == [[0, 0], [3, 1], [7, 5], [8, 0]]


# ---------------------------------------------------------------------------- labels and vote


def test_tile_labels_follow_the_truth_table():
    """Normal and the slide's own subtype are believed, another subtype is a candidate."""
    called = torch.eye(4)  # tiles called 0, 1, 2, 3
    assert pseudo.tile_labels(called, torch.eye(4), 0).tolist() == [0, 1, -1, -1]
    assert pseudo.tile_labels(called, torch.eye(4), 1).tolist() == [0, -2, 2, -2]
    assert pseudo.tile_labels(called, torch.eye(4), 2).tolist() == [0, -3, -3, 3]


@pytest.mark.parametrize(
    ("logits", "expected", "thirds"),
    [
        ([[9, 1, 0, 0], [9, 0, 1, 0], [0, 0, 1, 0]], 1, (0, 3, 0)),  # one tumour tile decides
        ([[9, 1, 0, 0], [9, 1, 0, 0], [9, 0, 0, 1]], 0, (2, 0, 1)),  # none: among tumour classes
        ([[0, 2, 1, 0], [0, 0, 1, 2], [9, 0, 2, 3]], 2, (1, 0, 2)),  # 1 to 1: so a normal one has
        ([[0, 2, 1, 0], [0, 0, 1, 5]], 2, (1.5, 0, 1.5)),  # tied twice: the larger mean probability
        ([[0, 0, 3, 0], [0, 0, 3, 0], [0, 5, 0, 0]], 1, (1, 2, 0)),  # votes, not sums
        ([[0, 0, 3, 0], [0, 0, 3, 0], [0, 50, 0, 0]], 1, (1, 2, 0)),  # however sure
    ],
)
def test_vote_by_hand(logits, expected, thirds):
    """Checks the slide's subtype, and every subtype's share of the deciding votes."""
    logits_NK = torch.tensor(logits, dtype=torch.float32)
    called, share_C = ballot(logits_NK)
    assert called == vote(logits_NK) == expected
    torch.testing.assert_close(share_C, torch.tensor(thirds, dtype=torch.float32) / 3)


def test_prompts_that_call_the_slides_wrong_are_left_out():
    """Each subtype has one right prompt and one that names the other; half of a draw is right."""
    eye = torch.eye(3)
    prompts = [eye[:1], eye[[1, 2]], eye[[2, 1]]]
    slides = [eye[[0, 1, 1]], eye[[0, 2, 2]]]
    chosen = pseudo.select_prompts(prompts, slides, [0, 1], seed=3, draws=40, kept=8)
    torch.testing.assert_close(chosen, eye)
    everything = pseudo.select_prompts(prompts, slides, [0, 1], seed=3, draws=40, kept=40)
    assert (everything - eye).abs().max() > 0.3


def test_balanced_accuracy_counts_classes_not_slides():
    assert pseudo.balanced_accuracy([0, 0, 0, 1], [0, 0, 1, 1]) == pytest.approx((2 / 3 + 1) / 2)


# ---------------------------------------------------------------------------- loss


def test_the_three_parts_by_hand():
    """Chances of (1/2, 1/4, 1/4) and their turns, so every part is a sum of logarithms of 2."""
    half, quarter = np.log(0.5), np.log(0.25)
    logits = torch.tensor(
        [
            [half, quarter, quarter],  # labelled 0: ln 2
            [quarter, half, quarter],  # labelled 0: ln 4
            [quarter, half, quarter],  # labelled 1: ln 2
            [quarter, quarter, half],  # candidate, calls itself 2: not trusted; -ln(1/2)
            [half, quarter, quarter],  # candidate, calls itself 0: trusted; -ln(3/4)
        ],
        dtype=torch.float64,
    )
    labels = torch.tensor([0, 0, 1, -1, -1])
    labelled = ((np.log(2) + np.log(4)) / 2 + np.log(2)) / 2
    candidate = (np.log(2) + np.log(4 / 3)) / 2
    before = tile_loss(logits, labels, 0, trust=False)
    assert before.item() == pytest.approx(labelled + 0.1 * candidate, abs=1e-12)
    after = tile_loss(logits, labels, 0, trust=True)
    assert after.item() == pytest.approx(labelled + 0.1 * candidate + 0.5 * np.log(2), abs=1e-12)


@pytest.mark.parametrize(("classes", "floor"), [(3, 0.55), (6, 1.04), (31, 2.49)])
def test_a_second_softmax_keeps_the_loss_off_zero(classes, floor):
    """The values known of the release: a sure and right model cannot go below them."""
    logits = 1e3 * torch.eye(classes)[:1]
    label = torch.zeros(1, dtype=torch.long)
    assert tile_loss(logits, label, 0, trust=False).item() == 0
    twice = tile_loss(logits, label, 0, trust=False, double_softmax=True)
    assert twice.item() == pytest.approx(floor, abs=0.006)


def test_tiles_of_one_kind_alone_give_a_finite_loss_with_a_gradient():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for labels in ([-2] * 4, [0] * 4):
        loss = tile_loss(logits, torch.tensor(labels), 1, trust=True)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert grad.abs().sum() > 0
    assert balanced_nll(logits[:0], torch.zeros(0, dtype=torch.long)).item() == 0


# ---------------------------------------------------------------------------- end to end


def test_end_to_end_is_the_one_graph_gradient():
    """LoRA, prompts and mixer: two passes in short chunks against plain autograd over all tiles."""
    text = tower()

    def parts():
        torch.manual_seed(1)
        encoder = tiny_encoder()
        make_strategy({"name": "lora", "rank": 2}).prepare(encoder.vit)
        head = nn.Linear(24, 64).double()
        pair = VisionLanguage("tiny", encoder, head, text, 1.0)
        for name, parameter in encoder.vit.named_parameters():  # VisionLanguage froze everything
            parameter.requires_grad_("lora" in name or ".down" in name or ".up" in name)
        torch.manual_seed(2)
        model = PathPT(64, ClassPrompts(NAMES, 64, text, context=4)).double()
        awake(model.mixer)
        for parameter in encoder.vit.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        return pair, model.eval()

    tiles, labels = random_tiles(7), torch.tensor([0, 1, -1, 1, 0, -1, 1])
    places_N2 = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 0], [5, 5], [2, 1], [0, 2]])
    pair, model = parts()
    assert sum(p.requires_grad for p in pair.parameters()) > 0
    slide = LabelledSlide(None, places_N2, labels, 0, tiles)
    image = ImageTower(pair.encode_image, None, torch.device("cpu"), chunk=3)
    loss = step(model, text, slide, trust=True, image=image)

    other, reference = parts()
    z_Nd = other.encode_image(tiles)
    expected = tile_loss(reference(z_Nd, places_N2, reference.prompts(text)), labels, 0, trust=True)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    trained = 0
    for mine, theirs in ((pair, other), (model, reference)):
        for (name, one), two in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12, msg=name)
                trained += mine is pair and bool(one.grad.abs().max() > 1e-9)
    assert trained > 0


def test_training_lowers_the_loss_is_repeatable_and_leaves_the_tower_alone():
    """Tiles of three directions, some of them candidates."""
    text = tower()
    generator = torch.Generator().manual_seed(0)
    truth_N = torch.arange(24) % 3
    z_Nd = F.one_hot(truth_N, 64).double() * 3
    z_Nd = F.normalize(z_Nd + torch.randn(24, 64, dtype=torch.float64, generator=generator), dim=1)
    spots = torch.stack([torch.arange(24) // 5, torch.arange(24) % 5], dim=1)
    slides = []
    for subtype in (0, 1):
        rows = (truth_N == 0) | (truth_N == subtype + 1)
        labels_N = truth_N[rows].clone()
        labels_N[:5] = -(subtype + 1)
        slides.append(LabelledSlide(z_Nd[rows], spots[rows], labels_N, subtype))
    question = Question(
        (TileClass("n"), TileClass("a", where={"X": 1}), TileClass("b", where={"X": 0})),
        ("{}",), context=4, epochs=15, trust_from=0, lr=1e-2,
    )  # fmt: skip
    before = {name: value.clone() for name, value in text.state_dict().items()}

    def trained(seed):
        torch.manual_seed(0)
        model = PathPT(64, ClassPrompts(NAMES, 64, text, "both", context=4)).double()
        torch.manual_seed(99)
        losses = train_pathpt(model, text, slides, question, seed)
        drawn = torch.rand(1)
        return model, losses, drawn

    model, losses, drawn = trained(5)
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    torch.manual_seed(99)
    assert torch.equal(drawn, torch.rand(1)), "the caller's random numbers are left as they were"
    again, same, _ = trained(5)
    assert same == losses
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert trained(6)[1] != losses
    for name, value in text.state_dict().items():
        assert torch.equal(value, before[name])


# ---------------------------------------------------------------------------- scores


def test_scores_are_scikit_learns_on_slides_counted_as_often_as_drawn():
    from sklearn.metrics import balanced_accuracy_score, f1_score

    rng = np.random.default_rng(0)
    truth_S, called_RS = rng.integers(0, 3, 40), rng.integers(0, 3, (2, 40))
    cases = [f"c{n // 2}" for n in range(40)]
    found = score_subtypes(truth_S, called_RS, cases)
    for name, reference in (
        ("balanced_accuracy", balanced_accuracy_score),
        ("weighted_f1", lambda t, c: f1_score(t, c, average="weighted")),
    ):
        expected = np.mean([reference(truth_S, called_S) for called_S in called_RS])
        assert found[name].value == pytest.approx(expected, abs=1e-12)
        assert found[name].low < expected < found[name].high
    same = score_difference(truth_S, called_RS, called_RS, cases)["weighted_f1"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_case_is_drawn_with_all_its_slides():
    """Two cases that are all right or all wrong: a draw of them is 0, 1/2 or 1."""
    truth_S = np.array([0, 1] * 10)
    called_S = np.array([0, 1] * 5 + [1, 0] * 5)
    cases = ["right"] * 10 + ["wrong"] * 10
    found = score_subtypes(truth_S, called_S[None], cases)["balanced_accuracy"]
    assert (found.low, found.value, found.high) == (0, 0.5, 1)
