"""Linear probing first: `model.steps.head_start` gives the slide model a last layer that is solved.

A head that knows nothing sends gradients that spoil the features before they can serve it.
`head_first` lets it learn alone inside the run, an epoch at a time. Here the head's weights are
found as the frozen linear probe's are: a convex problem over the slides' embeddings, no rate and no
epochs. The slides are those of the first epochs, augmented as they will be, and the strength is
chosen on validation by the loss: a probe that a change of colour upsets, or that is too sure of
what it was fitted to, sends no useful gradient. The features are standardised by these slides from
here on, which is what lets a young gate learn: as they come, what all tiles share is many times
what tells one from another.

The outcome is the run's first candidate for its best weights: end to end begins where a linear
probe of the frozen features ends, and is never saved below it.

Price: as many tiles encoded as in an epoch of training; 6 kB of host memory a tile of a ViT-g: 25
    GB for four views of 500 slides of 2,048 tiles, which several processes share.
Source: Kumar et al. 2022 (LP-FT, arXiv 2202.10054).
Differs: what is probed is the slide's embedding, tiles weighed as the fresh aggregator does, and
    behind its LayerNorm.

Shapes: T tiles of a slide, D features, K labels, N slides, Y numbers of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from tqdm import tqdm

from slides.order import stable_seed
from tapfm.aggregators import Aggregator
from tapfm.bag import Bag, SkippedBag
from tapfm.baselines import FeatureBag, divisor, validation_score
from tapfm.callbacks import BestWeights
from tapfm.linear_probe import LinearProbe, fit_linear_probe
from tapfm.processes import gather
from tapfm.tasks import Task

VIEWS = 4  # of each training slide: a forward each, together an epoch's work
MOST_TILES = 2048  # of a slide that are remembered: 12 MB of a ViT-g


@dataclass(frozen=True)
class Remembered(FeatureBag):
    """A slide as the frozen encoder sees it, on the CPU."""

    score_T: Tensor
    counts: tuple[int, ...] = ()
    """Tiles of each of its slides, as in `Bag`."""


class HeadStart(Callback):
    """Before the first slide of a run; a resumed one has had it.

    Of several processes each remembers the tiles of its own slides; slides' embeddings go to all.

    Args:
        best: is given the outcome, as the first that may be best.
    """

    def __init__(self, best: BestWeights):
        self.best = best

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Encode the slides as they are, and solve the last layer."""
        if module.slides_seen:
            return
        data, task = trainer.datamodule, module.task
        train = remember(module, data.seen_in_training(VIEWS), "frozen train")
        val = remember(module, data.val_dataloader(), "frozen val")
        aggregator = module.slide_model.aggregator.cpu()
        standardise(aggregator, train)
        train, val = (embed(aggregator, slides) for slides in (train, val))
        probe = solve_head(aggregator, train, val, task)
        aggregator.load_state_dict(gather(aggregator.state_dict())[0])  # rounding parts processes
        figure, loss = judge(aggregator, val, task)
        aggregator.to(module.device)
        if trainer.is_global_zero:
            print(f"head start: {len(train)} views of slides, {probe.describe()}", flush=True)
            self.best.offer(module, figure, loss, epoch=-1)


def remember(module: L.LightningModule, bags: Iterable[Bag], title: str) -> list[Remembered]:
    """Slides as the encoder sees them now."""
    model, found = module.slide_model, []
    with evaluating(model), tqdm(desc=title, unit=" tiles") as bar:
        for bag in bags:
            with suppress(SkippedBag):
                z_TD, score_T = model.features(bag.tiles, module.chunk)
                drawn = torch.Generator().manual_seed(
                    stable_seed("head start", bag.slide_id) % 2**63
                )
                kept_T = torch.randperm(bag.count, generator=drawn)[:MOST_TILES].sort().values
                z_TD, score_T = z_TD.cpu()[kept_T], score_T.cpu()[kept_T]
                slide_T = torch.arange(len(bag.counts)).repeat_interleave(torch.tensor(bag.counts))
                counts = tuple(n for n in slide_T[kept_T].bincount().tolist() if n)
                slide = bag.slide_id, bag.case_id, z_TD, bag.labels_K
                found.append(Remembered(*slide, score_T, counts))
            bar.update(bag.count)
    return found


@torch.no_grad()
def standardise(aggregator: Aggregator, mine: Sequence[Remembered]) -> None:
    """Let the aggregator bring features to mean 0 and deviation 1 over all processes' slides.

    Every slide counts the same, and a feature that is constant is divided by 1.
    """
    moments = [
        torch.stack([z_TD.mean(0), z_TD.square().mean(0)])
        for z_TD in (slide.z_TD.double() for slide in mine)
    ]
    mean_D, square_D = torch.stack([each for share in gather(moments) for each in share]).mean(0)
    std_D = (square_D - mean_D.square()).clamp_min(0).sqrt()
    aggregator.center_D.copy_(mean_D)
    aggregator.scale_D.copy_(divisor(mean_D, std_D))


@torch.no_grad()
def embed(aggregator: Aggregator, mine: Sequence[Remembered]) -> list[FeatureBag]:
    """The slides of all processes, each as its embedding: bags of one tile."""
    embedded = []
    for slide in mine:
        b_D, _ = aggregator.embed(slide.z_TD, slide.score_T, slide.counts)
        embedded.append(FeatureBag(slide.slide_id, slide.case_id, b_D[None], slide.y_K))
    return sorted((bag for share in gather(embedded) for bag in share), key=lambda b: b.slide_id)


@torch.no_grad()
def solve_head(
    aggregator: Aggregator, train: Sequence[FeatureBag], val: Sequence[FeatureBag], task: Task
) -> LinearProbe:
    """Put a linear probe of the slides' embeddings in the aggregator's head.

    Args:
        aggregator: is changed.
        train: fitted on.
        val: chooses the strength.
        task: what is learned.

    Raises:
        BaselineError: a label has one value only in `train`.
    """
    with torch.enable_grad():
        probe = fit_linear_probe(train, val, task, surest=True)
    weight_KD = probe.weight_KD / probe.std_D
    aggregator.head.weight.copy_(weight_KD)
    aggregator.head.bias.copy_(probe.bias_K - weight_KD @ probe.mean_D)
    return probe


@torch.no_grad()
def judge(aggregator: Aggregator, val: Sequence[FeatureBag], task: Task) -> tuple[float, float]:
    """The task's figure on validation, and the mean loss of a slide, as a run measures them."""
    loss = task.loss().eval()
    logits_NK = aggregator.head(torch.cat([slide.z_TD for slide in val]))
    y_NY = torch.stack([slide.y_K for slide in val])
    figure, _ = validation_score(logits_NK, y_NY, task, loss)
    each_N = [loss(logits_K, y_Y) for logits_K, y_Y in zip(logits_NK, y_NY, strict=True)]
    return figure, float(torch.stack(each_N).mean())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and then as before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
