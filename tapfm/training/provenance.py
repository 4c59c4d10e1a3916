"""What a saved model says of its making: slides, commit, versions."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tapfm import __version__
from tapfm.data.datamodule import SlideData


def provenance(data: SlideData) -> dict[str, Any]:
    """Return what a saved model says of its making."""
    return {
        "cohort_sha256": data.cohort.sha256,
        "tissue": asdict(data.tiles.tissue),
        "stain": data.tile_source.stain,
        "bags": data.bags,
        "pool": data.pool,
        **program(),
    }


def program() -> dict[str, Any]:
    """Return commit and versions of what is running."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "versions": {"tapfm": __version__, "torch": torch.__version__,
                     "lightning": L.__version__, "python": platform.python_version()},
    }  # fmt: skip
