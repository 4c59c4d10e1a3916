"""A hyperslide is the residual tiles of several slides as one bag; its target is any slide's."""

import math

import pytest
import torch

from slides.errors import SettingsError
from tapfm.bag_transforms import make_bag_transforms
from tapfm.bag_transforms.contract import Step
from tapfm.bag_transforms.packmil import Hyperslide, PackMil, together
from tapfm.data.bag import Moment
from tapfm.regularisers import make_regularisers
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks import learn_task
from tapfm.training.objective import Objective, make_objective
from tests.bags import tile_set

D, NAN = 5, math.nan
TASK = learn_task("multilabel", ["A", "B"], (), [[1, 0], [0, 1]])
TARGETS = torch.tensor([[1.0, 0.0], [0.0, NAN], [0.0, 0.0]])


def slide(count, seed):
    drawn = torch.Generator().manual_seed(seed)
    z_TD = torch.randn(count, D, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD.requires_grad_(), torch.rand(count, generator=drawn, dtype=torch.float64))


PACK = [slide(count, seed) for seed, count in enumerate((11, 7, 13))]


def aggregator(name="gated"):
    torch.manual_seed(3)
    return make_aggregator(name, D, 2).double()


def step_of(learner, tiles, target_Y):
    output, loss = learner(tiles), TASK.loss().double()
    return Step(learner, output, target_Y, loss, TASK.mixed_loss, Moment(0.5, 0, seed=1))


def run(transform, learner, pack=PACK):
    """Return the term and figure of each slide in turn."""
    found = []
    for tiles, target_Y in zip(pack, TARGETS, strict=True):
        changed = transform(tiles, Moment(0.5, 0, seed=len(tiles)))
        found.append(transform.term(step_of(learner, changed, target_Y)))
    return found


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_share_is_that_of_the_main_branch_and_the_branches_do_not_overlap(share):
    """Trap: the authors' option `token_dropout` is the share of the main branch as well."""
    transform = Hyperslide(PackMil(share=share))
    main = transform(PACK[0], Moment(0.5, 0, seed=1))
    assert len(main) == round(11 * share)
    rows = [{tuple(row) for row in part.z_TD.tolist()} for part in (main, transform.residual)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 11
    short = slide(7, 0)
    assert transform(short, Moment(0.5, 0, seed=1)) is short
    assert transform.residual is short, "whole in both"


def test_the_term_by_hand_comes_with_the_last_slide_of_a_pack():
    learner, transform = aggregator(), Hyperslide(PackMil(slides=3, weight=0.2))
    residuals = []
    for tiles in PACK:
        transform(tiles, Moment(0.5, 0, seed=len(tiles)))
        residuals.append(transform.residual.z_TD)
    (none, waits), (also, _), (term, figures) = run(Hyperslide(PackMil(slides=3)), learner)
    assert none is None
    assert also is None
    assert waits["hyperslide_loss"].isnan()
    z_TD = torch.cat(residuals)
    logits_K = learner(tile_set(z_TD, torch.zeros(len(z_TD), dtype=z_TD.dtype))).logits_K
    by_hand = -torch.nn.functional.logsigmoid(logits_K[0])  # A is 1 in one; B is unknown
    assert figures["hyperslide_loss"].item() == pytest.approx(by_hand.item(), abs=1e-10)
    assert term.item() == pytest.approx(0.2 * 3 * by_hand.item(), abs=1e-10)
    PACK[0].z_TD.grad = PACK[2].z_TD.grad = None
    term.backward()
    assert PACK[2].z_TD.grad is not None
    assert PACK[0].z_TD.grad is None, "the others' features are as they were"
    off = Hyperslide(PackMil(slides=3, weight=0.0))
    assert run(off, learner)[-1][0] is None
    assert off.waiting == [], "a new pack begins"


@pytest.mark.parametrize("name", ["gated", "tapfm_gated", "hierarchical", "transmil"])
def test_the_order_of_slides_in_a_pack_does_not_matter(name):
    learner = aggregator(name)
    found = learner(together(PACK)).logits_K
    turned = learner(together([PACK[2], PACK[0], PACK[1]])).logits_K
    torch.testing.assert_close(turned, found, atol=1e-10, rtol=0)
    other = learner(together(PACK[:2])).logits_K
    assert (other - found).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ([0, 0], 0.0), ([0, 1], 1.0), ([1, 1], 1.0), ([1, NAN], 1.0), ([0, NAN], None),
        ([NAN, NAN], None),
    ],
)  # fmt: skip
def test_the_target_of_labels_is_their_or(targets, wanted):
    task = learn_task("multilabel", ["A"], (), [[1], [0]])
    logits_K = torch.tensor([0.7], dtype=torch.float64)
    found = task.mixed_loss(logits_K, torch.tensor(targets)[:, None]).item()
    expected = 0.0 if wanted is None else math.log(1 + math.exp(0.7 * (1 - 2 * wanted)))
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_target_of_classes_is_every_class_that_is_there():
    task = learn_task("multiclass", ["kind"], ("a", "b", "c"), [[0], [1], [2]])
    logits_K = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = task.mixed_loss(logits_K, torch.tensor([[2.0], [0.0], [2.0]])).item()
    wanted = [1, 0, 1]
    each = [
        math.log(1 + math.exp(x * (1 - 2 * y)))
        for x, y in zip(logits_K.tolist(), wanted, strict=True)
    ]
    assert found == pytest.approx(sum(each) / 3, abs=1e-12)
    assert task.mixed_loss(logits_K, torch.tensor([[2.0], [NAN]])).item() == 0


def test_what_waits_is_kept_over_a_resume():
    learner = aggregator()
    whole = run(Hyperslide(PackMil(slides=3)), learner)[-1][0]
    first, second = Hyperslide(PackMil(slides=3)), Hyperslide(PackMil(slides=3))
    for tiles, target_Y in zip(PACK[:2], TARGETS, strict=False):
        changed = first(tiles, Moment(0.5, 0, seed=len(tiles)))
        first.term(step_of(learner, changed, target_Y))
    second.load_state_dict(first.state_dict())
    changed = second(PACK[2], Moment(0.5, 0, seed=13))
    assert torch.equal(second.term(step_of(learner, changed, TARGETS[2]))[0], whole)


def test_the_objective_adds_it_and_other_tasks_are_refused():
    learner = aggregator()
    transforms = make_bag_transforms([{"name": "packmil", "slides": 2}], learner)
    objective = Objective(
        TASK.loss().double(), transforms, make_regularisers([], learner), TASK.mixed_loss
    )
    first, second = (
        objective(learner, tiles, target_Y, Moment(0.5, 0, seed=1))
        for tiles, target_Y in zip(PACK[:2], TARGETS, strict=False)
    )
    assert first.loss == first.figures["train/loss"]
    own = second.figures["train/hyperslide_loss"]
    assert second.loss.item() == pytest.approx((second.figures["train/loss"] + 0.4 * own).item())
    task = learn_task("regression", ["x"], (), [[1], [2]])
    with pytest.raises(SettingsError, match="packmil makes bags of several slides, and regression"):
        make_objective(task.loss(), learner, ["packmil"], None, task=task)
    with pytest.raises(SettingsError, match=r"share must be in \(0, 1\)(.|\n)*slides must"):
        PackMil(share=1.0, slides=1)
