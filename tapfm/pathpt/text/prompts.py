"""Class vectors from prompts that learn: context tokens of each class through a frozen text tower.

A class's prompt is `[begin] context x n, its name, "." [end]`. The context is free vectors in the
tower's token space, a set for each class; name, full stop and special tokens are looked up once in
its frozen token table and kept as buffers. The gradient goes through the whole tower at every step,
so the tower is an argument of every call, and is not saved.

Modes: `token` is the above. `embedding` is a free vector for each class in the feature space,
without a tower, for image towers that have none. `both` is their sum.

Price: n x W numbers a class (24,576 at n = 32, W = 768) and one pass through the tower a step.

Source: PathPT (arXiv 2508.15904); Zhou et al. 2022 (CoOp, arXiv 2109.01134), a separate
    context for each class.
Differs: prompts are padded to the longest of the classes, not to the tower's length, and padding is
    masked; the tower stays in eval mode. Words of the initial context are the tower's own tokens
    of the phrase, as many as needed, rather than words counted before they are cut into tokens.

Shapes: K classes, n context tokens, L tokens of the longest prompt, W width of a token, d joint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.pathpt.text.towers import TextError, TextTower, pad_rows

PHRASE = "a histopathology image of"
MODES = ("token", "embedding", "both")
TOKEN_STD, VECTOR_STD = 0.02, 0.01  # of random context, and of free class vectors

Mode = Literal["token", "embedding", "both"]
Init = Literal["template", "random"]


class ClassPrompts(nn.Module):
    """The K class vectors, of length 1.

    Args:
        names: names of the K classes.
        dim: d, for free vectors.
        text: the frozen tower; None only in mode `embedding`.
        mode: `token`, `embedding` or `both`.
        init: initial context: `template` repeats `PHRASE`, `random` draws it.
        context: n, context tokens.

    Raises:
        TextError: a prompt is too long for the tower, or has an unknown word.
    """

    def __init__(
        self,
        names: Sequence[str],
        dim: int,
        text: TextTower | None,
        mode: Mode = "token",
        init: Init = "template",
        context: int = 32,
    ):
        super().__init__()
        self.mode = mode
        if mode != "token":
            self.vectors_Kd = nn.Parameter(torch.randn(len(names), dim) * VECTOR_STD)
        if mode != "embedding":
            rows = [_name_ids(text, name, context) for name in names]
            ids_KS, mask_KS = pad_rows(rows, text.pad)
            device = next(text.parameters()).device
            with torch.no_grad():
                self.register_buffer("before_FW", text.table(_ids(text.first, device)))
                self.register_buffer("behind_KSW", text.table(ids_KS.to(device)))
            there = torch.ones(len(names), len(text.first) + context, dtype=torch.bool)
            self.register_buffer("mask_KL", torch.cat([there, mask_KS], dim=1).to(device))
            self.context_KnW = nn.Parameter(_context(text, len(names), context, init))

    def forward(self, text: TextTower | None) -> Tensor:
        """Return class vectors (K, d); `text` is the tower they were made with."""
        if self.mode == "embedding":
            return F.normalize(self.vectors_Kd, dim=-1)
        before_KFW = self.before_FW.expand(len(self.context_KnW), -1, -1)
        x_KLW = torch.cat([before_KFW, self.context_KnW, self.behind_KSW], dim=1)
        named_Kd = F.normalize(text(x_KLW, self.mask_KL), dim=-1)
        if self.mode == "token":
            return named_Kd
        return F.normalize(named_Kd + self.vectors_Kd, dim=-1)


def _name_ids(text: TextTower, name: str, context: int) -> list[int]:
    """Return the token ids that follow the context."""
    ids = [*text.ids(f"{name}."), *text.last]
    length = len(text.first) + context + len(ids)
    if length > text.longest:
        raise TextError(
            f"class {name!r}: its prompt has {length} tokens, {context} of them context, and the "
            f"text tower takes {text.longest}. Take fewer context tokens, or a shorter name."
        )
    return ids


def _context(text: TextTower, classes: int, context: int, init: Init) -> Tensor:
    """Return the initial context (K, n, W)."""
    weight = next(text.parameters())
    if init == "random":
        return torch.randn(classes, context, text.width, device=weight.device) * TOKEN_STD
    phrase = text.ids(PHRASE)
    ids = (phrase * (context // len(phrase) + 1))[:context]
    with torch.no_grad():
        return text.table(_ids(ids, weight.device)).expand(classes, -1, -1).clone()


def _ids(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=device)
