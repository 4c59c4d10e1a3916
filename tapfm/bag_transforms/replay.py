"""Replay: regions of an earlier cohort's slides are trained on beside a new cohort's.

    memory    regions of neighbouring tiles, their features and their slides' targets, in a file
    pseudo    `regions` of them of one target, drawn anew each step, as one bag
    loss      task(tiles) + weight * task(pseudo)

`tapfm fit --continue-from RUN` writes RUN's memory and sets this up (`evaluation.continued`). The
tiles of the new cohort are left as they are.

Price: a forward and backward pass of the aggregator over the pseudo-bag.
Condition: the same targets, and features of the same frozen encoder: those of an encoder that
    learns would no longer be the ones in the memory.
Source: Huang et al. 2023 (ConSlide, arXiv 2308.13324), random regions, reorganised by class.
Differs: one pseudo-bag a step, of a target drawn evenly; no term that compares old and new logits
    (its weight there is 1e-5).

Shapes: N tiles of the memory, R regions, D features, Y numbers of a target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slides.files import replacing
from tapfm.bag_transforms.contract import BagTransform, Step
from tapfm.data.bag import Moment, Places
from tapfm.settings import SettingsError, refuse, unmet
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet


@dataclass(frozen=True)
class Replay:
    """Trains on regions of an earlier cohort as well."""

    memory: str = ""
    """File that `tapfm fit --continue-from` wrote."""
    weight: float = 0.2
    """Factor of the loss of the pseudo-bag."""
    regions: int = 16
    """Regions of a pseudo-bag."""

    def __post_init__(self):
        faults = unmet(
            ("weight", self.weight, "0 or more", self.weight >= 0),
            ("regions", self.regions, "1 or more", self.regions >= 1),
        )
        refuse(f"model.bag_transforms replay: {fault}" for fault in faults)

    def build(self, aggregator: Aggregator) -> Rehearsal:
        """See `BagTransformOptions`."""
        if not self.memory:
            raise SettingsError(
                "model.bag_transforms: replay needs memory: FILE. `tapfm fit --continue-from RUN` "
                "writes one, and names it."
            )
        memory = load_memory(Path(self.memory))
        if memory.z_ND.shape[1] != len(aggregator.center_D):
            raise SettingsError(
                f"model.bag_transforms: replay: {self.memory} is of {memory.z_ND.shape[1]} "
                f"features ({memory.encoder}), and these are {len(aggregator.center_D)}. Take "
                "features of the same encoder."
            )
        return Rehearsal(memory, self)


@dataclass(frozen=True)
class Memory:
    """Regions of an earlier cohort."""

    z_ND: Tensor
    score_N: Tensor
    coords0_N2: Tensor
    """Level-0 pixels; all -1 where they are unknown."""
    step0_N: Tensor
    region_N: Tensor
    """int64 number of each tile's region, rising."""
    target_RY: Tensor
    targets: tuple[str, ...]
    """Names of the targets."""
    encoder: str
    mpp: float

    def bag(self, regions: Tensor) -> TileSet:
        """Return some regions as one bag, each as a slide of it."""
        rows_N = torch.isin(self.region_N, regions).nonzero().flatten()
        _, slide_of_T = self.region_N[rows_N].unique(return_inverse=True)
        known = bool((self.coords0_N2[rows_N] >= 0).all())
        places = Places(
            coords0_T2=self.coords0_N2[rows_N] if known else None,
            slide_of_T=slide_of_T,
            grid_px0_T=self.step0_N[rows_N] if known else None,
            mpp=self.mpp,
        )
        return TileSet.of(places, self.z_ND[rows_N], self.score_N[rows_N])


class Rehearsal(BagTransform):
    """The transform; see the file's docstring."""

    columns = ("replay_loss",)

    def __init__(self, memory: Memory, options: Replay):
        super().__init__()
        self.memory, self.options = memory, options
        self.encoder, self.targets = memory.encoder, memory.targets
        known_R = ~memory.target_RY.isnan().all(1)
        _, group_R = memory.target_RY.nan_to_num(torch.inf).unique(dim=0, return_inverse=True)
        groups = (torch.nonzero((group_R == n) & known_R).flatten() for n in group_R.unique())
        self.groups: Sequence[Tensor] = [group for group in groups if len(group)]

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return the tiles as they are."""
        return tiles

    def term(self, step: Step) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the loss of a pseudo-bag, weighted, and as a figure."""
        drawn, options = torch.Generator().manual_seed(step.moment.seed), self.options
        group_R = self.groups[int(torch.randint(len(self.groups), (1,), generator=drawn))]
        chosen_R = group_R[torch.randperm(len(group_R), generator=drawn)[: options.regions]]
        tiles, like = self.memory.bag(chosen_R), step.output.logits_K
        tiles = replace(tiles, z_TD=tiles.z_TD.to(like), score_T=tiles.score_T.to(like))
        target_Y = self.memory.target_RY[chosen_R[0]].to(step.target_Y)
        with torch.set_grad_enabled(options.weight > 0):
            output = step.aggregator(tiles)
            losses = step.aggregator.losses(output, target_Y, step.task_loss)
            loss = torch.stack([*losses.values()]).sum()
        return (options.weight * loss if options.weight else None), {"replay_loss": loss}


TENSORS = ("z_ND", "score_N", "coords0_N2", "step0_N", "region_N", "target_RY")


def save_memory(memory: Memory, path: Path) -> None:
    """Write a memory; `path` is whole or not there."""
    facts = {"targets": memory.targets, "encoder": memory.encoder, "mpp": memory.mpp}
    state = {name: getattr(memory, name).contiguous() for name in TENSORS}
    with replacing(path) as partial:
        save_file(state, partial, {"replay": json.dumps(facts)})


def load_memory(path: Path) -> Memory:
    """Return a memory that `save_memory` wrote.

    Raises:
        SettingsError: no such file, or another one.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["replay"])
            state = {name: file.get_tensor(name) for name in TENSORS}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SettingsError(
            f"model.bag_transforms: replay: {path} is no memory of a run "
            f"({type(error).__name__}: {error}). `tapfm fit --continue-from RUN` writes one."
        ) from error
    return Memory(**state, **{**facts, "targets": tuple(facts["targets"])})
