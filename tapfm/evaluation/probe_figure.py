"""The result of `tapfm probe` for each part of the encoder, and its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tapfm.reports.figures import TRAINED, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EncoderPart:
    """Gradient, weight norm and drift of one part of the encoder."""

    name: str
    """`front` (patches, tokens, positions), `block 0` and so on, `norm` (and a head, if any)."""
    parameters: int
    weight_norm: float
    gradient_norm: float
    """Mean gradient norm over slides."""
    relative: float
    """Gradient norm over weight norm, mean over slides."""
    drift: float
    """1 - linear CKA of the CLS token behind a block; nan for other parts."""


def probe_figure(found: Sequence[EncoderPart], last: int) -> Figure:
    """Return a figure of gradient over weight and, below it, drift, by part.

    Args:
        found: the parts, in the order of the forward pass.
        last: how many of the last blocks are suggested; they are shaded.
    """
    figure, axes = panels(2, across=1)
    blocks = range(len(found) - 2)
    apart = math.ceil(len(blocks) / 12)  # blocks between two tick labels
    ends = (-1.5 * apart, blocks[-1] + 1.5 * apart)  # drawn apart: front and norm are no blocks
    for axis, title, values, colour, marker in (
        (axes[0], "gradient norm / weight norm", [p.relative for p in found], TRAINED[0], "o"),
        (axes[1], "drift of CLS, 1 - linear CKA", [p.drift for p in found], TRAINED[1], "s"),
    ):
        axis.axvspan(blocks[-last] - 0.5, blocks[-1] + 0.5, color="0.93", zorder=0)
        look = {"color": colour, "marker": marker, "markersize": 4.5}
        axis.plot(blocks, values[1:-1], linewidth=1.5, **look)
        axis.plot(ends, [values[0], values[-1]], linewidth=0, **look)
        if max((v for v in values if not math.isnan(v)), default=0) > 0:
            axis.set_yscale("log")
        axis.set_xlim(ends[0] - apart / 2, ends[1] + apart / 2)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([ends[0], *blocks[::apart], ends[1]],
                        ["front", *blocks[::apart], "norm"], fontsize=8)  # fmt: skip
    axes[0].text(blocks[-1] + 0.4, 0.97, f"last {last}", ha="right", va="top", color="0.3",
                 transform=axes[0].get_xaxis_transform(), fontsize=9)  # fmt: skip
    axes[1].set_xlabel(
        "block; front: patches, tokens and positions; norm: the final one", fontsize=9
    )
    return figure
