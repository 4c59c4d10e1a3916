"""An image tower and a text tower with one joint space, as PathPT asks for them.

`VisionLanguage` is the pair: tiles and sentences become unit vectors of the same width, and their
cosine says how well they fit. Both towers are frozen; the text tower stays in eval mode whatever
its owner is put in, since dropout in a frozen tower is noise that nothing learns from.

The image side is an `Encoder` and a projection of its feature, so files of `tapfm features` serve
as they are: `joint` takes them the rest of the way.

Shapes: C tiles of a chunk, B texts, L tokens of a text, W their width, D features, d joint width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.encoders.backbones import Encoder


class TextError(ValueError):
    """A text cannot be read by this text tower, or the tower cannot be had."""


class TextTower(Protocol):
    """What prompts ask of a text tower; an `nn.Module`."""

    width: int
    """W, of a token."""
    longest: int
    """Tokens it takes, `first` and `last` among them."""
    first: tuple[int, ...]
    """Ids in front of every text."""
    last: tuple[int, ...]
    """Ids behind every text."""
    pad: int
    """Id that fills shorter texts up; it is masked."""

    def ids(self, text: str) -> list[int]:
        """Of a text alone, without `first` and `last`."""

    def table(self, ids: Tensor) -> Tensor:
        """Their input vectors (..., W), without positions."""

    def forward(self, x_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Input vectors, True where there is a token, to joint vectors (B, d) of any length."""


class VisionLanguage(nn.Module):
    """Both towers.

    Args:
        name: for messages and files.
        encoder: the image tower.
        head: its feature (C, D) to the joint space (C, d).
        text: the text tower; None where nothing is left to be said.
        logit_scale: what cosines were multiplied by in its own training.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        head: nn.Module,
        text: nn.Module | None,
        logit_scale: float,
    ):
        super().__init__()
        self.name, self.encoder, self.head, self.text = name, encoder, head, text
        self.logit_scale = logit_scale
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VisionLanguage:
        """The image tower follows `mode`, for a strategy's dropout; the frozen rest does not."""
        super().train(False)
        self.encoder.train(mode)
        return self

    def joint(self, z_CD: Tensor) -> Tensor:
        """The image tower's features as unit vectors (C, d) of the joint space."""
        return F.normalize(self.head(z_CD), dim=-1)

    def encode_image(self, tiles_CP: Tensor, precision: str = "fp32") -> Tensor:
        """uint8 tiles from anywhere to unit vectors (C, d)."""
        return self.joint(self.encoder.encode(tiles_CP, precision)[0])

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences to unit vectors (B, d).

        Raises:
            TextError: a text is too long, or has words that the tower does not know.
        """
        ids_BL, mask_BL = tokenise(self.text, texts)
        device = next(self.text.parameters()).device
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
        return F.normalize(self.text(self.text.table(ids_BL), mask_BL), dim=-1)


def tokenise(tower: TextTower, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (B, L) padded to the longest text, and where there are tokens.

    Raises:
        TextError: a text is too long, or has words that the tower does not know.
    """
    rows = [[*tower.first, *tower.ids(text), *tower.last] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > tower.longest:
            raise TextError(
                f"{text!r}: {len(row)} tokens, and the text tower takes {tower.longest}. "
                "Shorten it."
            )
    return padded(rows, tower.pad)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as (B, L), filled up behind to the longest; True where there is an id."""
    length = max(len(row) for row in rows)
    ids_BL = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask_BL = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids_BL, mask_BL
