"""PathoTune-style prompts that learn: free task prompts, one from a sentence, two from the tile.

Three kinds of prompt tokens stand between the prefix tokens and the patches of a frozen model;
`parts` chooses among them.

    task       n free tokens
    text       a sentence about task and stain, as a frozen text model encodes it, through a linear
               layer that learns. The text model runs once and elsewhere: `text` is a .npy file with
               its vector (or several), and the checkpoint holds the numbers
    instance   two tokens of each tile: a small convolutional network on its colours, its output
               averaged (stain) and at its maximum (structure), a linear layer each

Prompts have no position embedding. Kinds in `renew` are replaced before every block; the others
enter once and pass through the blocks. Behind the last block all are taken out, and the tile's
score leaves their columns out: it is computed from the CLS row over prefix and patches,
renormalised. Without a `text` file the text prompt is one more free token, like the task's.

Not the identity at the start: free tokens are random and are attended to. Prompts of a sentence and
of the tile start at 0 but take their share of the attention. No plain timm model computes the same:
there is no `export`, only the small checkpoint.

Price: 1.14 M parameters on a ViT-L, 1.93 M with a text of width 768; 7 % more work a tile; the
graph goes through all blocks.
Condition: a ViT with a CLS token; blocks recomputed by `Encoder(recompute=True)`, if at all, since
timm's own checkpointing would need the tile after it was freed.

Source: Lu et al. 2024 (PathoTune, MICCAI, arXiv 2403.16497) for the three kinds, two instance
    prompts, task prompts of their own for each layer, and RAdam.
Differs: the paper's network for the instance prompts, its sentence, numbers of prompts and where
    text and instance prompts enter are not public to us; those here are our choice, hence "style".

Shapes: C tiles of a chunk, N tokens, P prompts, D width, L blocks, E width of the text's vectors.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tapfm.adapt.pixels import Colours, placed, stem
from tapfm.adapt.surgery import Inserted, StrategyError, hold_prompts, need_vit, new_prompts, share

PARTS = ("task", "text", "instance")  # in the order of their tokens
REFINED = 256  # channels of the network on the tile's colours
INLINE = "data:;base64,"  # a text stored in the model_config itself instead of a file


class FreePrompts(nn.Module):
    """Prompt tokens that learn, equal for all tiles: a set for each block, or for the first."""

    def __init__(self, vit: nn.Module, rows: int, n: int):
        super().__init__()
        self.prompts = new_prompts(vit, rows, n)

    def forward(self, depth: int) -> Tensor:
        """Return the prompts (n, D) of the block at that depth."""
        return self.prompts[depth % len(self.prompts)]


class TextPrompts(nn.Module):
    """A sentence's vectors, projected to the model's width; 0 at the start."""

    def __init__(self, vit: nn.Module, text_PE: np.ndarray):
        super().__init__()
        like = placed(vit)
        vectors_PE = torch.from_numpy(text_PE).to(**like)
        # not saved: the model_config holds it
        self.register_buffer("vectors_PE", vectors_PE, persistent=False)
        self.project = nn.Linear(text_PE.shape[1], vit.embed_dim, **like)
        _silence(self.project)

    def forward(self, _depth: int) -> Tensor:
        """Return the prompts (P, D)."""
        return self.project(self.vectors_PE.to(self.project.weight.dtype))


class InstancePrompts(nn.Module):
    """Two prompts computed from a tile's colours: of its stain and of its structure."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        like = placed(vit)
        self.colours, self.stem = Colours(vit), stem(REFINED, **like)
        self.stain = nn.Linear(REFINED, vit.embed_dim, **like)
        self.structure = nn.Linear(REFINED, vit.embed_dim, **like)
        _silence(self.stain)
        _silence(self.structure)
        self.prompts_C2D: Tensor | None = None
        vit.patch_embed.register_forward_pre_hook(self._see)
        vit.norm.register_forward_pre_hook(self._forget)

    def look(self, tiles_CP: Tensor) -> Tensor:
        """Return prompts (C, 2, D) of normalised tiles."""
        colours_CP = self.colours(tiles_CP).to(self.stain.weight.dtype)
        seen_CRE = self.stem(colours_CP).flatten(2)
        return torch.stack([self.stain(seen_CRE.mean(2)), self.structure(seen_CRE.amax(2))], dim=1)

    def forward(self, _depth: int) -> Tensor:
        """Return prompts (C, 2, D) of the tiles in the current forward pass."""
        return self.prompts_C2D

    def _see(self, _embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.prompts_C2D = self.look(args[0])

    def _forget(self, _norm: nn.Module, _args: tuple[Tensor, ...]) -> None:
        self.prompts_C2D = None  # free it with its graph


class PromptTokens(nn.Module):
    """All prompts of a model, and the hooks that insert them."""

    def __init__(self, vit: nn.Module, kinds: Iterable[tuple[str, nn.Module, int]], renew: set):
        super().__init__()
        self.spans: dict[str, slice] = {}  # columns of each kind
        end = self.prefix = vit.num_prefix_tokens
        for name, kind, n in kinds:
            self.add_module(name, kind)
            self.spans[name] = slice(end, end := end + n)
        self.end, self.renew = end, renew
        for depth, block in enumerate(vit.blocks):
            if depth == 0 or renew & self.spans.keys():
                block.register_forward_pre_hook(partial(self._give, depth))
        hold_prompts(vit, end - self.prefix)

    def _give(self, depth: int, _block: nn.Module, args: tuple) -> tuple:
        x_CND, *rest = args
        pieces = [x_CND[:, : self.prefix]]
        for name, span in self.spans.items():
            if depth == 0 or name in self.renew:
                new = self.get_submodule(name)(depth).to(x_CND.dtype)
                pieces.append(new.expand(x_CND.shape[0], -1, -1))
            else:
                pieces.append(x_CND[:, span])
        pieces.append(x_CND[:, self.end if depth else self.prefix :])
        return torch.cat(pieces, dim=1), *rest


@dataclass(frozen=True)
class PathoTune(Inserted):
    """Trains prompt tokens: free ones, a sentence's and the tile's own."""

    parts: tuple[str, ...] = PARTS
    """Some of task, text, instance."""
    n: int = 10
    """Number of task prompts before each block."""
    text: str = ""
    """A .npy file with a text model's vectors, (E,) or (prompts, E); empty: a free token."""
    renew: tuple[str, ...] = ("task",)
    """Kinds replaced before every block; empty: all enter before the first block only."""
    lr: ClassVar[float] = 1e-3
    scaled: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = "pathotune"
    adds: ClassVar[str] = "prompts"

    def __post_init__(self):
        faults = [
            fault
            for fault, bad in (
                (f"parts must be some of {', '.join(PARTS)}, got {list(self.parts)}",
                 not self.parts or not set(self.parts) <= set(PARTS)),
                (f"n must be 1 or more, got {self.n}", self.n < 1),
                (f"renew must be none or some of {', '.join(PARTS)}, got {list(self.renew)}",
                 not set(self.renew) <= set(PARTS)),
                (f"text is given and parts {list(self.parts)} leaves it out: add text to parts",
                 bool(self.text) and "text" not in self.parts),
            )
            if bad
        ]  # fmt: skip
        if faults:
            raise StrategyError("model.strategy: pathotune: " + "; ".join(faults))
        if self.text and not self.text.startswith(INLINE):
            object.__setattr__(self, "text", vectors_to_text(read_text(Path(self.text))))

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; insert the prompts.

        Raises:
            StrategyError: not a ViT with a CLS token.
        """
        need_vit(vit, "pathotune")
        vit.requires_grad_(False)
        vit.pathotune = PromptTokens(vit, self._kinds(vit), set(self.renew))

    def _kinds(self, vit: nn.Module) -> Iterable[tuple[str, nn.Module, int]]:
        """Yield name, module and number of tokens of each kind of prompt."""
        if "task" in self.parts:
            rows = len(vit.blocks) if "task" in self.renew else 1
            yield "task", FreePrompts(vit, rows, self.n), self.n
        if "text" in self.parts and self.text:
            text_PE = text_to_vectors(self.text)
            yield "text", TextPrompts(vit, text_PE), len(text_PE)
        elif "text" in self.parts:
            yield "text", FreePrompts(vit, 1, 1), 1
        if "instance" in self.parts:
            yield "instance", InstancePrompts(vit), 2

    @staticmethod
    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return RAdam, as in the paper."""
        return torch.optim.RAdam(groups, decoupled_weight_decay=True)

    def describe(self, vit: nn.Module) -> str:
        """Return the number of prompts of each kind and their share of the model as text."""
        spans = vit.pathotune.spans.items()
        counts = [f"{span.stop - span.start} {name}" for name, span in spans]
        if "text" in self.parts and not self.text:
            counts = [f"{each} (no sentence)" if "text" in each else each for each in counts]
        return f"PathoTune-style prompts, {', '.join(counts)}: {share(vit)}"


def read_text(file: Path) -> np.ndarray:
    """Return the vectors (P, E), float32, that a text model made of a sentence.

    Raises:
        StrategyError: no such file, or not one or several vectors of finite floats.
    """
    why = "Save a float array (E,) or (prompts, E) with numpy.save, or leave text out."
    try:
        text_PE = np.atleast_2d(np.load(file, allow_pickle=False)).astype(np.float32)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise StrategyError(
            f"model.strategy: pathotune: text: {file} cannot be read: {reason}. {why}"
        ) from error
    if text_PE.ndim != 2 or not text_PE.size or not np.isfinite(text_PE).all():
        raise StrategyError(
            f"model.strategy: pathotune: text: {file} holds no vectors of finite numbers, but "
            f"{text_PE.dtype} {text_PE.shape}. {why}"
        )
    return text_PE


def vectors_to_text(text_PE: np.ndarray) -> str:
    """Return vectors as text, so that a model_config needs no file beside it."""
    file = io.BytesIO()
    np.save(file, text_PE, allow_pickle=False)
    return INLINE + base64.b64encode(file.getvalue()).decode()


def text_to_vectors(text: str) -> np.ndarray:
    """Return the vectors that `vectors_to_text` encoded."""
    return np.load(io.BytesIO(base64.b64decode(text.removeprefix(INLINE))), allow_pickle=False)


def _silence(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
