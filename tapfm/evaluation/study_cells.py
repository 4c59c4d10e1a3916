"""What a study is to run, and one cell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Study:
    """What is to be run; a YAML file with these keys, or flags, which win."""

    config: tuple[str, ...]
    """The cohort's config, and others behind it."""
    out: str
    """Folder of the study."""
    folds: int | None = None
    """Of a cross-validation; None keeps the split of the cohort's table."""
    fold_seed: int = 0
    """Another one is another deal of the cases."""
    preserve_sites: bool = False
    """Keep the cases of a site in one fold."""
    seeds: tuple[int, ...] = (0,)
    """Of weights, order and augmentation."""
    strategies: tuple[str | Mapping[str, Any], ...] = ("full",)
    """Names, names with options, or a config to put behind (`configs/strategies/lean.yaml`)."""
    aggregators: tuple[str, ...] = ("tapfm_gated",)
    """Their names."""
    jobs: int = 1
    """Fits at the same time."""


@dataclass(frozen=True)
class Cell:
    """One fit and its test."""

    fold: int
    seed: int
    arm: str
    """Aggregator and strategy, as the folder is named."""
    folder: Path
    changes: Mapping[str, Any]
    """What goes into cell.yaml."""
    configs: tuple[str, ...]

    def __str__(self) -> str:
        return f"fold {self.fold}, seed {self.seed}, {self.arm}"
