"""What the encoder gives without adaptation: two slide models on frozen tile features.

    mean-pool MLP      z averaged over the tiles, then Linear, GELU, Linear
    gated attention    Linear, GELU on each tile, then learned attention (ABMIL)

A run that cannot say whether tuning beats these is not finished, so they are fitted with care: the
same splits, tiles, task and loss as the run, classes weighed even where its balanced draw stands in
for weights, features standardised by the training split, and learning rate, width and epoch chosen
on validation by macro AUROC (or what the task says), validation loss where that ties. Nothing reads
the test split. The same seed gives the same model on one machine.

A third row costs nothing and guards against a shortcut: the same attention on six numbers a tile,
the means and deviations of red, green and blue (`RgbStatistics`). What it can tell, colour alone
tells.

Price: 1 to 4 s for the MLP, 10 to 30 s for attention: 100 bags of 150 tiles, 128 to 1024 features,
    one core of a busy machine.
Source: Sun et al. 2025 (SiMLP, arXiv 2502.20823); Ilse et al. 2018 (ABMIL, arXiv 1802.04712).
Differs: both are standardised and selected as above; attention is per slide, shared by the labels.

Shapes: T tiles of a slide, D features, K labels, N slides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tapfm.data.bag import Places
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.tasks import Task, validation_figures

BATCH = 8  # slides an update: steadier than one, still tens of updates an epoch
WEIGHT_DECAY = 1e-2


class BaselineError(ValueError):
    """Nothing can be fitted to these slides."""


@dataclass(frozen=True)
class FeatureBag:
    """One slide as frozen features."""

    slide_id: str
    case_id: str
    z_TD: Tensor
    """float32, a row a tile."""
    y_K: Tensor
    """float32: 0, 1, or nan where unknown; of other tasks the target's numbers."""


@dataclass(frozen=True)
class Candidate:
    """One point of the small grid that validation chooses from."""

    lr: float
    width: int
    """Hidden units."""


@dataclass(frozen=True)
class Schedule:
    """How long a candidate is trained."""

    epochs: int
    patience: int
    """Epochs without a better validation score after which it stops."""


MEAN_POOL_GRID = (Candidate(1e-3, 64), Candidate(1e-3, 256), Candidate(3e-4, 256))
MEAN_POOL_DROPOUT = 0.25
MEAN_POOL_SCHEDULE = Schedule(epochs=150, patience=40)
# On synthetic bags with one to three planted tiles in ten, 128 units, or a dropout of 0.5 at 64 to
# 128 units, each cost about .05 of macro AUROC.
GATED_GRID = (Candidate(1e-3, 256), Candidate(3e-4, 256), Candidate(1e-4, 256))
GATED_DROPOUT = 0.1
GATED_SCHEDULE = Schedule(epochs=30, patience=8)


class MeanPoolMLP(nn.Module):
    """The mean tile to logits."""

    def __init__(self, dim: int, labels: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, width),
            nn.GELU(),
            nn.Dropout(MEAN_POOL_DROPOUT),
            nn.Linear(width, labels),
        )

    def forward(self, bags: Sequence[Tensor]) -> tuple[Tensor, list[None]]:
        """Logits (N, K) of N bags (T, D); no tile weights."""
        return self.layers(torch.stack([z_TD.mean(0) for z_TD in bags])), [None] * len(bags)


class GatedAttention(nn.Module):
    """Projected tiles to logits through `tapfm.slide_model.aggregators`' learned attention."""

    def __init__(self, dim: int, labels: int, width: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Dropout(GATED_DROPOUT))
        self.aggregator = make_aggregator("gated", width, labels)

    def forward(self, bags: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, K) of N bags (T, D), and the weights (T,) of each one's tiles."""
        counts = [len(z_TD) for z_TD in bags]
        x_TW = self.project(torch.cat(list(bags)))  # one matrix product for all the slides
        slides = [
            self.aggregator(TileSet.of(Places.unknown(len(x_TW)), x_TW, x_TW.new_zeros(len(x_TW))))
            for x_TW in x_TW.split(counts)
        ]
        return torch.stack([s.logits_K for s in slides]), [s.weights_T for s in slides]


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline."""

    model: MeanPoolMLP | GatedAttention
    mean_D: Tensor
    std_D: Tensor
    chosen: Candidate
    epoch: int
    """The epoch kept, from 0."""
    val_score: float
    """Validation macro AUROC (or what the task says) of that epoch; nan where undefined there."""
    task: Task

    @torch.no_grad()
    def predict(self, bag: FeatureBag) -> tuple[Tensor, Tensor | None]:
        """What the task says (P,), and tile weights (T,) if the model has any."""
        logits_K, weights_T = self.logits(bag)
        return self.task.predict(logits_K), weights_T

    @torch.no_grad()
    def logits(self, bag: FeatureBag) -> tuple[Tensor, Tensor | None]:
        """Logits (K,), and tile weights (T,) if the model has any."""
        logits_NK, weights = self.model([(bag.z_TD - self.mean_D) / self.std_D])
        return logits_NK[0], weights[0]

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"chosen on validation: lr {self.chosen.lr:g}, width {self.chosen.width}, "
            f"epoch {self.epoch + 1}, {self.task.title} {self.val_score:.3f}"
        )


def fit_mean_pool_mlp(
    train: Sequence[FeatureBag],
    val: Sequence[FeatureBag],
    task: Task,
    seed: int = 0,
    grid: Sequence[Candidate] = MEAN_POOL_GRID,
    schedule: Schedule = MEAN_POOL_SCHEDULE,
) -> Baseline:
    """The mean-pool MLP.

    Args:
        train: fitted on, and the source of standardisation.
        val: chooses candidate and epoch.
        task: what is learned of them.
        seed: of weights, order and dropout.
        grid: candidates.
        schedule: for each candidate.

    Raises:
        BaselineError: bags are empty or of unequal width, or targets are not the task's.
    """
    check_bags(train, val, task)
    parts = pooled(train), pooled(val)
    with undisturbed(train[0].z_TD.device):
        return _select(MeanPoolMLP, *parts, task, seed, grid, schedule)


def fit_gated_attention(
    train: Sequence[FeatureBag],
    val: Sequence[FeatureBag],
    task: Task,
    seed: int = 0,
    grid: Sequence[Candidate] = GATED_GRID,
    schedule: Schedule = GATED_SCHEDULE,
) -> Baseline:
    """Gated-attention MIL. See `fit_mean_pool_mlp` for the arguments."""
    check_bags(train, val, task)
    with undisturbed(train[0].z_TD.device):
        return _select(GatedAttention, train, val, task, seed, grid, schedule)


def pooled(bags: Sequence[FeatureBag]) -> list[FeatureBag]:
    """Each bag as its mean tile, which varies far less than its tiles: standardise it as that."""
    return [FeatureBag(b.slide_id, b.case_id, b.z_TD.mean(0, keepdim=True), b.y_K) for b in bags]


class RgbStatistics:
    """Six numbers a tile, for `features.Extraction` to keep as it keeps an encoder's."""

    dim, mean = 6, torch.zeros(3)
    row = SimpleNamespace(key="rgb", feature="means and deviations of R, G, B", licence="")

    def encode(self, tiles_CP: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Means and deviations of red, green and blue in [0, 1], (C, 6), and a score of 0.

        Args:
            tiles_CP: uint8 tiles (C, 3, H, W).
            precision: not looked at: it is float32.
        """
        pixels_C3P = tiles_CP.flatten(2).float() / 255
        z_C6 = torch.cat([pixels_C3P.mean(2), pixels_C3P.std(2, correction=0)], dim=1)
        return z_C6, z_C6.new_zeros(len(z_C6))


def _select(
    make: Callable[..., nn.Module],
    train: Sequence[FeatureBag],
    val: Sequence[FeatureBag],
    task: Task,
    seed: int,
    grid: Sequence[Candidate],
    schedule: Schedule,
) -> Baseline:
    """The best epoch of the best candidate."""
    mean_D, std_D = bag_statistics(train)
    train_z, val_z = ([(b.z_TD - mean_D) / std_D for b in split] for split in (train, val))
    train_y, val_y = (torch.stack([bag.y_K for bag in split]) for split in (train, val))
    best: Baseline | None = None
    best_score = (-math.inf, -math.inf)
    for candidate in grid:
        stale = 0
        own_score = (-math.inf, -math.inf)
        loss = task.loss().to(mean_D.device)
        for epoch, model in _epochs(make, train_z, train_y, task, loss, seed, candidate, schedule):
            with torch.no_grad():
                val_logits_NK, _ = model(val_z)
            value, score = validation_score(val_logits_NK, val_y, task, loss)
            stale = 0 if score > own_score else stale + 1
            own_score = max(own_score, score)
            if best is None or score > best_score:
                best_score = score
                best = Baseline(deepcopy(model), mean_D, std_D, candidate, epoch, value, task)
            if stale >= schedule.patience:
                break
    assert best is not None, "an empty grid"
    return best


def _epochs(
    make: Callable[..., nn.Module],
    bags: Sequence[Tensor],
    y_NK: Tensor,
    task: Task,
    loss: nn.Module,
    seed: int,
    candidate: Candidate,
    schedule: Schedule,
) -> Iterator[tuple[int, nn.Module]]:
    """The model after each epoch, ready to predict."""
    torch.manual_seed(seed)
    model = make(bags[0].shape[-1], len(task.labels), candidate.width).to(y_NK.device)
    optimizer = torch.optim.AdamW(model.parameters(), candidate.lr, weight_decay=WEIGHT_DECAY)
    for epoch in range(schedule.epochs):
        model.train()
        loss.train()
        for batch in torch.randperm(len(bags)).split(BATCH):
            logits_NK, _ = model([bags[n] for n in batch])
            optimizer.zero_grad(set_to_none=True)
            loss(logits_NK, y_NK[batch.to(y_NK.device)]).backward()
            optimizer.step()
        loss.eval()
        yield epoch, model.eval()


@torch.no_grad()
def validation_score(
    logits_NK: Tensor, y_NY: Tensor, task: Task, loss: nn.Module
) -> tuple[float, tuple[float, float]]:
    """The task's figure, and what is maximised: that, then minus the loss."""
    said_NP = task.predict(logits_NK.double()).cpu().numpy()
    value = validation_figures(task, y_NY.cpu().numpy(), said_NP)[task.monitor]
    minus_loss = -float(loss(logits_NK, y_NY))
    finite = minus_loss if math.isfinite(minus_loss) else -math.inf
    return value, (0.0 if math.isnan(value) else value, finite)


def bag_statistics(bags: Sequence[FeatureBag]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature, every bag counting the same; a constant one divides by 1.

    Two passes, in float64: nothing the size of all the tiles is made.
    """
    mean_D = torch.stack([bag.z_TD.double().mean(0) for bag in bags]).mean(0)
    spread = [(bag.z_TD.double() - mean_D).square().mean(0) for bag in bags]
    std_D = torch.stack(spread).mean(0).sqrt()
    return mean_D.float(), divisor(mean_D, std_D).float()


def divisor(mean_D: Tensor, std_D: Tensor) -> Tensor:
    """What features are divided by: their deviation, or 1 where that is but rounding."""
    constant = std_D <= 1e-6 * mean_D.abs().clamp(min=1e-6)
    return torch.where(constant, torch.ones_like(std_D), std_D)


def check_bags(train: Sequence[FeatureBag], val: Sequence[FeatureBag], task: Task) -> None:
    """Refuse bags that nothing can be fitted to, by name."""
    if not train or not val:
        raise BaselineError(
            f"a baseline needs training and validation bags, got {len(train)} and {len(val)}"
        )
    dim = train[0].z_TD.shape[-1]
    for bag in [*train, *val]:
        if bag.z_TD.ndim != 2 or not len(bag.z_TD) or bag.z_TD.shape[1] != dim:
            raise BaselineError(
                f"{bag.slide_id}: features of shape {tuple(bag.z_TD.shape)}, but one tile or more "
                f"of {dim} features is needed"
            )
        if bag.y_K.shape != (task.width,):
            raise BaselineError(
                f"{bag.slide_id}: {bag.y_K.numel()} labels, but {task.width} are named: "
                f"{', '.join(task.targets)}"
            )
        if not bag.z_TD.isfinite().all():
            raise BaselineError(
                f"{bag.slide_id}: its features hold nan or infinity. Was it encoded in fp16? "
                "Encode it in bf16 or float32."
            )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """The caller's random numbers are left as they were, and one thread does the work.

    The matrices are small: a second thread saves half the time on an idle machine; on a busy one
    waiting for it can cost ten times as much. And sums keep their order whatever the machine has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
