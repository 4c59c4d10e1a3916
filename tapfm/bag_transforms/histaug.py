"""HistAug: a slide's features as if its tiles had been turned, mirrored and stained otherwise.

    x = (z - mean) / std, cut into chunks of `width` numbers, each with its place
    tokens = one of each change of theta: mirror, turns, and COLOURS amounts of colour
    blocks: chunks attend to the tokens, then an MLP
    z' = std (x + Linear(norm(chunks))) + mean

One theta is drawn for all tiles of a slide and step, which is what the authors found to help; it is
drawn as it was when the network was fitted. `tapfm histaug` fits a network to an encoder and writes
its file, which `weights` names; it serves features of that encoder alone, and while it is frozen.

Price: a forward pass of the network a step, about that of one block of a ViT a tile.
Condition: a frozen encoder, `data.features_dir` or `model.strategy: frozen`.
Source: HistAug (MICS-Lab 2025, arXiv 2508.14588).
Differs: the changes are those of tapfm's own training augmentation (`slides.streaming.augment`);
    features are standardised, and the last layer adds to them and starts at 0, so that a new
    network changes nothing. The authors' weights are of other changes, and are not read.

Shapes: T tiles, D features, C chunks, W width, M changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slides.files import replacing
from tapfm.bag_transforms.contract import BagTransform
from tapfm.data.bag import Moment
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet

WIDEST, BLOCKS, HEADS, MLP = 128, 12, 8, 4  # the authors'
NARROWEST = 4  # numbers of a head, for what is normalised over them to differ
CLASSES = (2, 4)  # mirrored or not, quarter turns
COLOURS = 5  # haematoxylin, eosin, the third direction, contrast, brightness


@dataclass(frozen=True)
class HistAug:
    """Changes features as an augmentation of the pixels would."""

    weights: str = ""
    """File that `tapfm histaug` wrote."""
    share: float = 0.75
    """Share of steps in which a slide is changed."""

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise SettingsError(
                f"model.bag_transforms histaug: share must be in [0, 1], got {self.share}"
            )

    def build(self, aggregator: Aggregator) -> FeatureAugmentation:
        """See `BagTransformOptions`."""
        if not self.weights:
            raise SettingsError(
                "model.bag_transforms: histaug needs weights: FILE. Write one with `tapfm histaug "
                "--config cohort.yaml --model KEY --out FILE`."
            )
        network, facts = load_network(Path(self.weights))
        if network.dim != len(aggregator.center_D):
            raise SettingsError(
                f"model.bag_transforms: histaug: {self.weights} is of {network.dim} features "
                f"({facts['encoder']}), and these are {len(aggregator.center_D)}. Write one of "
                "this encoder with `tapfm histaug`."
            )
        return FeatureAugmentation(network, facts["encoder"], facts["colour"], self.share)


class FeatureAugmentation(BagTransform):
    """The transform; see the file's docstring.

    Args:
        network: fitted, and not trained on.
        encoder: name of the encoder that it was fitted to.
        colour: largest amount of colour that it was fitted to.
        share: of steps in which a slide is changed.
    """

    def __init__(self, network: FeatureChange, encoder: str, colour: float, share: float):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.encoder, self.colour, self.share = encoder, colour, share

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return all tiles, their features changed alike."""
        drawn = torch.Generator().manual_seed(moment.seed)
        changes = float(torch.rand(1, generator=drawn)) < self.share
        theta = draw_theta(1, self.colour, drawn)
        if not changes:
            return tiles
        theta_TM = theta.to(tiles.z_TD).expand(len(tiles), -1)
        return replace(tiles, z_TD=self.network(tiles.z_TD, theta_TM))


class FeatureChange(nn.Module):
    """The network.

    Args:
        dim: feature width D.
        blocks: number of blocks.
        width: of a chunk, a divisor of D; None is the largest up to `WIDEST`.
    """

    def __init__(self, dim: int, blocks: int = BLOCKS, width: int | None = None):
        super().__init__()
        self.dim, self.depth = dim, blocks
        width = width or max(n for n in range(1, WIDEST + 1) if dim % n == 0)
        self.width = width
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("std_D", torch.ones(dim))
        self.register_buffer("place_CW", sinusoids(dim // width, width), persistent=False)
        self.classes = nn.ModuleList(nn.Embedding(count, width) for count in CLASSES)
        self.amounts = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(COLOURS)
        )
        self.order_MW = nn.Parameter(0.02 * torch.randn(len(CLASSES) + COLOURS, width))
        self.blocks = nn.ModuleList(CrossBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, z_TD: Tensor, theta_TM: Tensor) -> Tensor:
        """Return changed features (T, D), given each tile's changes."""
        x_TD = (z_TD - self.mean_D) / self.std_D
        whole = [e(theta_TM[:, m].long()) for m, e in enumerate(self.classes)]
        part = [e(theta_TM[:, [len(CLASSES) + m]]) for m, e in enumerate(self.amounts)]
        tokens_TMW = torch.stack([*whole, *part], 1) + self.order_MW
        chunks_TCW = x_TD.unflatten(1, (-1, self.width)) + self.place_CW
        for block in self.blocks:
            chunks_TCW = block(chunks_TCW, tokens_TMW)
        return z_TD + self.std_D * self.out(self.norm(chunks_TCW).flatten(1))


class CrossBlock(nn.Module):
    """Chunks attend to tokens of changes, q and k normalised; then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        heads = [n for n in range(1, HEADS + 1) if width % n == 0 and width // n >= NARROWEST]
        self.heads = max(heads, default=1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        each = width // self.heads
        self.q_norm, self.k_norm = nn.LayerNorm(each), nn.LayerNorm(each)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP * width), nn.GELU(), nn.Linear(MLP * width, width)
        )

    def forward(self, x_TCW: Tensor, tokens_TMW: Tensor) -> Tensor:
        """Return the chunks (T, C, W)."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (
                self.query(self.norm1(x_TCW)), self.key(tokens_TMW), self.value(tokens_TMW)
            )
        )  # fmt: skip
        near = self.q_norm(q) @ self.k_norm(k).mT / math.sqrt(q.shape[-1])
        x_TCW = x_TCW + self.proj((near.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x_TCW + self.mlp(self.norm2(x_TCW))


def draw_theta(count: int, colour: float, drawn: torch.Generator) -> Tensor:
    """Return changes (count, M): mirrored (0, 1), turns (0 to 3), and amounts of colour."""
    whole = [torch.randint(0, n, (count, 1), generator=drawn).float() for n in CLASSES]
    amounts = torch.rand(count, COLOURS, generator=drawn) * 2 - 1
    return torch.cat([*whole, colour * amounts], 1)


def sinusoids(count: int, width: int) -> Tensor:
    """Return the places of chunks as sines and cosines, (count, width)."""
    rate_W = torch.exp(-math.log(1e4) * (torch.arange(width) // 2 * 2) / width)
    angle_CW = torch.arange(count)[:, None] * rate_W
    return torch.where(torch.arange(width) % 2 == 0, angle_CW.sin(), angle_CW.cos())


def save_network(network: FeatureChange, path: Path, encoder: str, colour: float) -> None:
    """Write a network, with the encoder and the range of colours that it was fitted to."""
    facts = {"dim": network.dim, "blocks": network.depth, "width": network.width,
             "encoder": encoder, "colour": colour}  # fmt: skip
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial, {"histaug": json.dumps(facts)})


def load_network(path: Path) -> tuple[FeatureChange, dict]:
    """Return a network that `save_network` wrote, and its facts.

    Raises:
        SettingsError: no such file, or another one.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["histaug"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        network = FeatureChange(facts["dim"], facts["blocks"], facts["width"])
        network.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"model.bag_transforms: histaug: {path} is no file of `tapfm histaug` "
            f"({type(error).__name__}: {error}). Write one, or name another."
        ) from error
    return network, facts


def fit_step(network: FeatureChange, z_TD: Tensor, theta_TM: Tensor, wanted_TD: Tensor) -> Tensor:
    """Return the loss: squared error of changed features and, unchanged, of the features as is."""
    same_TM = torch.zeros_like(theta_TM)
    std_D = network.std_D
    changed = (network(z_TD, theta_TM) - wanted_TD) / std_D
    kept = (network(z_TD, same_TM) - z_TD) / std_D
    return changed.square().mean() + kept.square().mean()


def standardise(network: FeatureChange, samples: Sequence[Tensor]) -> None:
    """Take mean and deviation of features (T, D) of some slides."""
    z_TD = torch.cat(list(samples))
    network.mean_D.copy_(z_TD.mean(0))
    network.std_D.copy_(z_TD.std(0, correction=0).clamp(min=1e-6))
