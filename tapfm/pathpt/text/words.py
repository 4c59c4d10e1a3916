"""The demo's text tower: a small transformer over whole words, aligned with the demo encoder.

It stands in for a real text tower (KEEP's PubMedBERT) so that PathPT runs without a download. Its
weights are in the package; benchmarks/pretrain_demo_text.py made them from captions of painted
tissue, and they hold the image head too.

Limits: it knows only the words of those captions; they describe the very traits that the demo
cohort asks for (on other patients, sites and stains), as a real vision-language model has read of
the subtypes it is asked for. So its zero-shot results are no surprise, and its figures can be
compared only with others on the same features.

Shapes: B texts, L tokens, W width, d joint width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from tapfm.encoders import backbones
from tapfm.encoders.checkpoints import PACKAGED
from tapfm.pathpt.text.towers import TextError, VisionLanguage

FILE = PACKAGED / "demo_text.safetensors"
SPECIAL = ("[pad]", "[begin]", "[end]")
WIDTH, BLOCKS, HEADS, LONGEST, JOINT = 64, 2, 4, 64, 64


class WordTower(nn.Module):
    """A text tower over whole words, to a joint vector.

    Args:
        words: the vocabulary, lower case, the full stop among them.
    """

    width, longest = WIDTH, LONGEST
    pad, first, last = 0, (1,), (2,)

    def __init__(self, words: Sequence[str]):
        super().__init__()
        self.numbers = {word: number for number, word in enumerate((*SPECIAL, *words))}
        self.table = nn.Embedding(len(self.numbers), WIDTH)
        self.positions_LW = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, JOINT)
        nn.init.normal_(self.table.weight, std=0.05)

    def ids(self, text: str) -> list[int]:
        """Return the numbers of words and full stops.

        Raises:
            TextError: an unknown word; the known ones are listed.
        """
        words = re.findall(r"[a-z0-9]+|\.", text.lower())
        unknown = sorted(set(words) - self.numbers.keys())
        if unknown:
            known = ", ".join(list(self.numbers)[len(SPECIAL) :])
            raise TextError(
                f"{text!r}: the demo's text tower does not know {', '.join(unknown)}. "
                f"It knows {known}. Use these words, or another vision-language model."
            )
        return [self.numbers[word] for word in words]

    def forward(self, x_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return joint vectors (B, d), read off the first token."""
        x_BLW = x_BLW + self.positions_LW[: x_BLW.shape[1]]
        for block in self.blocks:
            x_BLW = block(x_BLW, mask_BL[:, None, None])
        return self.out(self.norm(x_BLW[:, 0]))


class Block(nn.Module):
    """A transformer block: attention and MLP, each with pre-norm and residual."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_BLW: Tensor, mask_B11L: Tensor) -> Tensor:
        """Return tokens after attention among unmasked tokens and the MLP."""
        q, k, v = self.qkv(self.norm1(x_BLW)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11L)
        x_BLW = x_BLW + self.proj(seen.transpose(1, 2).flatten(2))
        return x_BLW + self.mlp(self.norm2(x_BLW))


def image_head(dim: int) -> nn.Sequential:
    """Return the projection from the demo encoder's feature to the joint space."""
    return nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, JOINT))


def load_demo() -> VisionLanguage:
    """Return the demo encoder with its text tower, from the package."""
    encoder = backbones.load("demo_vit")
    with safe_open(FILE, "pt") as file:
        facts = file.metadata()
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    text, head = WordTower(json.loads(facts["words"])), image_head(encoder.dim)
    both = nn.ModuleDict({"text": text, "head": head})
    both.load_state_dict(state)
    return VisionLanguage("demo", encoder, head, text, float(facts["logit_scale"]))
