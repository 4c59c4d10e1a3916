"""One slide on frozen features: the record, its checks, and how features are standardised.

Shapes: T tiles of a slide, D features, N slides, Y numbers of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slides.errors import SettingsError
from tapfm.data.bag import Places
from tapfm.distributed import gather
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet
from tapfm.tasks import Task


class FitError(SettingsError):
    """Nothing can be fitted to these slides."""


@dataclass(frozen=True)
class FrozenSlide:
    """One slide, or one case, on frozen features."""

    slide_id: str
    case_id: str
    target_Y: Tensor
    """float32: 0, 1, or nan where unknown; for other tasks the target's numbers."""
    tiles: TileSet

    @classmethod
    def of(
        cls, slide_id: str, case_id: str, z_TD: Tensor, target_Y: Tensor,
        score_T: Tensor | None = None, places: Places | None = None,
    ) -> FrozenSlide:  # fmt: skip
        """Return a slide with these features; scores are 0 and places unknown unless given."""
        score_T = z_TD.new_zeros(len(z_TD)) if score_T is None else score_T
        places = places or Places.unknown(len(z_TD))
        return cls(slide_id, case_id, target_Y, TileSet.of(places, z_TD, score_T))

    @property
    def z_TD(self) -> Tensor:
        """Features, a row a tile."""
        return self.tiles.z_TD

    def on(self, device: torch.device) -> TileSet:
        """Return the tiles on a device, as tensors that a backward pass may keep."""
        moved = (each.to(device, non_blocking=True) for each in (self.z_TD, self.tiles.score_T))
        z_TD, score_T = (each.clone() if each.is_inference() else each for each in moved)
        return replace(self.tiles, z_TD=z_TD, score_T=score_T)


def mean_tiles(slides: Sequence[FrozenSlide]) -> list[FrozenSlide]:
    """Return each slide as its mean tile, which varies far less than its tiles do."""
    means = (slide.z_TD.mean(0, keepdim=True) for slide in slides)
    each = zip(slides, means, strict=True)
    return [FrozenSlide.of(s.slide_id, s.case_id, z_1D, s.target_Y) for s, z_1D in each]


def feature_statistics(slides: Sequence[FrozenSlide], shared: bool = False) -> list[Tensor]:
    """Return mean and divisor (D,) of each feature, float32, every slide counting the same.

    The divisor is the standard deviation, or 1 where that is only rounding. Two passes in float64:
    nothing the size of all tiles is made. `shared`: each process gives its own slides.
    """

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        mine = [of(slide.z_TD.double()).mean(0) for slide in slides]
        shares = gather(mine) if shared else [mine]
        return torch.stack([each for share in shares for each in share]).mean(0)

    mean_D = mean(lambda z_TD: z_TD)
    std_D = mean(lambda z_TD: (z_TD - mean_D).square()).sqrt()
    constant = std_D <= 1e-6 * mean_D.abs().clamp(min=1e-6)
    return [mean_D.float(), std_D.masked_fill(constant, 1).float()]


@torch.no_grad()
def standardise(model: Aggregator, mean_D: Tensor, std_D: Tensor) -> Aggregator:
    """Set a slide model's mean and divisor of features; return the model."""
    model.center_D.copy_(mean_D)
    model.scale_D.copy_(std_D)
    return model


def check_slides(train: Sequence[FrozenSlide], val: Sequence[FrozenSlide], task: Task) -> None:
    """Raise a FitError that names the first slide to which nothing can be fitted."""
    if not train or not val:
        raise FitError(
            f"a baseline needs training and validation slides, got {len(train)} and {len(val)}. "
            "Give both splits slides: `tapfm split` deals them."
        )
    dim = train[0].z_TD.shape[-1]
    for slide in [*train, *val]:
        if slide.z_TD.ndim != 2 or not len(slide.z_TD) or slide.z_TD.shape[1] != dim:
            raise FitError(
                f"{slide.slide_id}: features of shape {tuple(slide.z_TD.shape)}, but one tile or "
                f"more of {dim} features is needed. Encode the slide anew."
            )
        if slide.target_Y.shape != (task.width,):
            raise FitError(
                f"{slide.slide_id}: {slide.target_Y.numel()} labels, but {task.width} are named: "
                f"{', '.join(task.targets)}. Give each slide one value per name."
            )
        if not slide.z_TD.isfinite().all():
            raise FitError(
                f"{slide.slide_id}: its features hold nan or infinity. Was it encoded in fp16? "
                "Encode it in bf16 or float32."
            )
