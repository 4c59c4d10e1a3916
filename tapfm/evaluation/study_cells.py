"""The settings of a study, and of one cell: one fit and its test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Study:
    """The settings of a study: keys of its YAML file, or flags, which take precedence."""

    config: tuple[str, ...]
    """The cohort's config, and others read after it."""
    out: str
    """Folder of the study."""
    folds: int | None = None
    """Number of folds; None keeps the split of the cohort's table."""
    fold_seed: int = 0
    """Seed of the assignment of cases to folds."""
    preserve_sites: bool = False
    """Keep the cases of a site in one fold."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights, order and augmentation."""
    strategies: tuple[str | Mapping[str, Any], ...] = ("full",)
    """Names, names with options, or a config read last (`configs/strategies/lean.yaml`)."""
    aggregators: tuple[str, ...] = ("tapfm_gated",)
    """Names of aggregators."""
    jobs: int = 1
    """Number of fits at the same time."""
    launcher: str | None = None
    """`local` or `slurm`: each cell is a job (`tapfm.launcher`); None: threads of this process."""
    slurm: tuple[str, ...] = ()
    """For sbatch, KEY=VALUE: partition=gpu."""


@dataclass(frozen=True)
class Cell:
    """One fit and its test."""

    fold: int
    seed: int
    row: str
    """Aggregator and strategy: the folder's name and the row of the table."""
    folder: Path
    changes: Mapping[str, Any]
    """Content of cell.yaml."""
    configs: tuple[str, ...]

    def __str__(self) -> str:
        return f"fold {self.fold}, seed {self.seed}, {self.row}"
