"""The interface of a vision-language model: an image and a text tower with one joint space.

`VisionLanguage` is the pair: tiles and sentences become unit vectors of the same width, and their
cosine measures how well they fit. Both towers are frozen; the text tower stays in eval mode
whatever mode its owner is in, since dropout in a frozen tower is only noise.

The image side is an `Encoder` and a projection of its feature, so files of `tapfm features` can be
used as they are: `joint` projects them.

Shapes: C tiles of a chunk, B texts, L tokens of a text, W their width, D features, d joint width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slides.errors import SettingsError
from tapfm.encoders.backbones import Encoder


class TextError(SettingsError):
    """A text is unusable for this text tower, or the tower is unavailable."""


class TextTower(Protocol):
    """The interface of a text tower; an `nn.Module`."""

    width: int
    """Width W of a token."""
    longest: int
    """Most tokens it takes, including `first` and `last`."""
    first: tuple[int, ...]
    """Ids in front of every text."""
    last: tuple[int, ...]
    """Ids behind every text."""
    pad: int
    """Id that pads shorter texts; it is masked."""

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without `first` and `last`."""

    def table(self, ids: Tensor) -> Tensor:
        """Return input vectors (..., W) of ids, without positions."""

    def forward(self, x_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return joint vectors (B, d) of any length, from input vectors and a mask of tokens."""


class VisionLanguage(nn.Module):
    """An image and a text tower with one joint space, frozen.

    Args:
        name: name in messages and files.
        encoder: the image tower.
        head: maps its feature (C, D) to the joint space (C, d).
        text: the text tower; None if no text is needed any more.
        logit_scale: factor on cosines in its own training.
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
        """Set the image tower's mode, for a strategy's dropout; the rest stays in eval mode."""
        super().train(False)
        self.encoder.train(mode)
        return self

    def joint(self, z_CD: Tensor) -> Tensor:
        """Return the image tower's features as unit vectors (C, d) of the joint space."""
        return F.normalize(self.head(z_CD), dim=-1)

    def encode_image(self, tiles_CP: Tensor, precision: str = "fp32") -> Tensor:
        """Return unit vectors (C, d) of uint8 tiles on any device."""
        return self.joint(self.encoder.encode(tiles_CP, precision)[0])

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, d) of sentences.

        Raises:
            TextError: a text is too long, or has unknown words.
        """
        ids_BL, mask_BL = tokenise(self.text, texts)
        device = next(self.text.parameters()).device
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
        return F.normalize(self.text(self.text.table(ids_BL), mask_BL), dim=-1)


def tokenise(tower: TextTower, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids (B, L) padded to the longest text, and a mask of tokens.

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
    return pad_rows(rows, tower.pad)


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return rows of ids padded to the longest (B, L), and a mask that is True at ids."""
    length = max(len(row) for row in rows)
    ids_BL = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask_BL = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids_BL, mask_BL
