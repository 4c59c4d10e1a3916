"""MHIM: the tiles that a teacher finds easy are left out, so that hard ones are learned from.

    a, e' = teacher(tiles)                  a copy of the aggregator that follows it slowly (EMA)
    s_t = max_k sigmoid(c_tk + b_k)         how easy a tile is: its part c of the teacher's logits
    dropped = the ceil(high T) largest s    and, of version 1, the lowest and some at random
    kept, merged = a random split of the rest, `recycle_keep` of it kept
    tokens = cross-attention of `recycle_tokens` queries to the merged tiles
    e = embedding of kept and tokens
    loss = task + consistency * -sum softmax(e' / 0.1) log softmax(e)

Version 2 is the default; `configs/bag_transforms/mhim_v1.yaml` is version 1, which scores tiles by
attention and leaves out half of them and more at random. Those get no gradient, so pass 2 does not
encode them again. Merged tiles get one, unless `recycle_detach` is set.

Over the share `warm_up` of the run nothing is left out, and the teacher is the aggregator itself.
The teacher is of the aggregator alone, never of the encoder. Prediction sees every tile.

Price: a forward pass of the aggregator; its weights a second time.
Condition: tile weights that say something; `score: class` needs a weighted mean of features.
Source: Tang et al. 2023 (MHIM-MIL, arXiv 2307.15254), version 1; Tang et al. 2025 (MHIM-MIL v2,
    arXiv 2509.11526).
Differs: works on features in front of the aggregator's own projection. A tile's part of a logit is
    exact: parts and constants add up to the logit (the authors add one class's bias to every
    class, and drop the normalisation). A sigmoid a label, not a softmax over classes. Tokens start
    as weighted means of tiles, and stand in the places of tiles that were merged. The teacher's
    dropout is off, and buffers follow too. `recycle_keep` is the share that is kept, which the
    authors' option `merge_ratio` is as well, though its help says that it is merged.

Shapes: T tiles, D features, K labels, M tokens, H heads, E head width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tapfm.bag_transforms.contract import BagTransform, Step
from tapfm.data.bag import Moment, Places
from tapfm.settings import SettingsError, refuse, unmet
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet

SCORES = ("class", "attention")
TEACHER_TEMPERATURE = 0.1  # the authors'
HEADS, HEAD_WIDTH, DROPOUT = 8, 64, 0.1  # of the cross-attention, the authors'
QUERY_MOMENTUM = 0.9999
PROBE, CLOSE = 5, 1e-3  # tiles of the check at construction, and how well parts must add up


@dataclass(frozen=True)
class Mhim:
    """Masked hard instance mining with a teacher."""

    score: str = "class"
    """What makes a tile easy: its part of the teacher's logits, or its attention."""
    high: float = 0.03
    """Share of the tiles, those of the highest scores, that is left out."""
    high_drop: float = 1.0
    """Share dropped, at random, of a set of top tiles that is as much larger: 0.5 is half of it."""
    decay: bool = False
    """Whether `high` falls to 0 over the run, on a cosine."""
    low: float = 0.0
    """Share of the tiles, those of the lowest scores, that is left out."""
    random: float = 0.0
    """Share of the other tiles that is left out."""
    recycle_keep: float = 0.8
    """Share of what stays that is kept as tiles; the rest is merged into tokens."""
    recycle_tokens: int = 5
    """Tokens that the rest is merged into; 0 keeps it as tiles."""
    recycle_detach: bool = False
    """Whether merged tiles get no gradient, and are not encoded again."""
    consistency: float = 0.5
    """Weight of the distance between the embeddings of teacher and aggregator."""
    momentum: float = 0.9997
    """Of the teacher's weights, at each update."""
    warm_up: float = 0.1
    """Share of the run before anything is left out."""

    def __post_init__(self):
        shares = {key: getattr(self, key) for key in ("high", "low", "random", "warm_up")}
        faults = unmet(
            *((key, share, "in [0, 1)", 0 <= share < 1) for key, share in shares.items()),
            ("score", self.score, f"one of {', '.join(SCORES)}", self.score in SCORES),
            ("high_drop", self.high_drop, "in (0, 1]", 0 < self.high_drop <= 1),
            ("recycle_keep", self.recycle_keep, "in (0, 1]", 0 < self.recycle_keep <= 1),
            ("recycle_tokens", self.recycle_tokens, "0 or more", self.recycle_tokens >= 0),
            ("consistency", self.consistency, "0 or more", self.consistency >= 0),
            ("momentum", self.momentum, "in [0, 1]", 0 <= self.momentum <= 1),
        )
        refuse(f"model.bag_transforms mhim: {fault}" for fault in faults)

    def build(self, aggregator: Aggregator) -> HardTiles:
        """See `BagTransformOptions`."""
        name = aggregator.key
        if not (aggregator.has_attention or aggregator.learns_weights):
            raise SettingsError(
                f"model.bag_transforms: mhim ranks tiles by their weights, and to {name} all tiles "
                "are alike. Leave it out, or take tapfm_gated."
            )
        if self.score == "class" and not parts_add_up(aggregator):
            raise SettingsError(
                f"model.bag_transforms: mhim with score class needs logits that are a sum over "
                f"tiles, and those of {name} are not. Set score: attention, or take tapfm_gated."
            )
        return HardTiles(self, aggregator)


class HardTiles(BagTransform):
    """The transform; see the file's docstring."""

    columns = ("mhim_consistency",)

    def __init__(self, options: Mhim, aggregator: Aggregator):
        super().__init__()
        self.options = options
        self.student = [aggregator]  # in a list: its parameters are not the transform's
        self.teacher = copy.deepcopy(aggregator).requires_grad_(False).eval()
        self.recycler = None
        if options.recycle_tokens and options.recycle_keep < 1:
            self.recycler = Recycler(len(aggregator.center_D), options.recycle_tokens)
        self.embedding_E: Tensor | None = None
        self.tokens_MD: Tensor | None = None

    def train(self, mode: bool = True) -> HardTiles:
        """Set the mode of all but the teacher, which stays as in prediction."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return the tiles that are kept, and tokens in the places of some that were merged."""
        self.embedding_E = self.tokens_MD = None
        options = self.options
        if moment.progress <= options.warm_up:
            self.teacher.load_state_dict(self.student[0].state_dict())
            if options.warm_up:
                return tiles
        drawn = torch.Generator().manual_seed(moment.seed)
        with torch.no_grad():
            known = replace(tiles, z_TD=tiles.z_TD.detach(), score_T=tiles.score_T.detach())
            output = self.teacher(known)
            self.embedding_E = output.embedding_E
            easy_T = self.easiness(known, output)
        high = options.high
        if options.decay:
            high *= (1 + math.cos(math.pi * moment.progress)) / 2
        rows_T = survivors(easy_T, replace(options, high=high), drawn)
        if self.recycler is None:
            return tiles.take(rows_T.sort().values)
        return self.recycled(tiles, shuffled(rows_T, drawn), drawn)

    def easiness(self, tiles: TileSet, output: SlideOutput) -> Tensor:
        """Return the score (T,) by which the teacher ranks tiles."""
        if self.options.score == "class":
            parts_TK, constant_K = logit_parts(self.teacher, tiles, output)
            return (parts_TK + constant_K).sigmoid().amax(1)
        if output.log_weights is not None and output.log_weights.ndim == 2:
            return votes(output.log_weights, self.options.high, output.weights_T)
        return output.weights_T

    def recycled(self, tiles: TileSet, rows_T: Tensor, drawn: torch.Generator) -> TileSet:
        """Return the first of these rows as they are, and the others merged into tokens."""
        kept = max(1, round(len(rows_T) * self.options.recycle_keep))
        count = min(self.options.recycle_tokens, len(rows_T) - kept)
        if not count:
            return tiles.take(rows_T.sort().values)
        merged_TD = tiles.z_TD[rows_T[kept:]]
        if self.options.recycle_detach:
            merged_TD = merged_TD.detach()
        tokens_MD = self.recycler(merged_TD, count, drawn)
        self.tokens_MD = tokens_MD.detach()
        rows_T, order_T = rows_T[: kept + count].sort()
        at_M = order_T.argsort()[kept:]
        found = tiles.take(rows_T)
        score_T = found.score_T
        if self.options.recycle_detach:
            score_T = score_T.index_copy(0, at_M, score_T[at_M].detach())
        return replace(found, z_TD=found.z_TD.index_copy(0, at_M, tokens_MD), score_T=score_T)

    def term(self, step: Step) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the distance to the teacher's embedding, weighted, and as a figure."""
        own_E = step.output.embedding_E
        if self.embedding_E is None:
            return None, {"mhim_consistency": own_E.new_zeros(())}
        weight = self.options.consistency
        with torch.set_grad_enabled(weight > 0):
            wanted_E = (self.embedding_E / TEACHER_TEMPERATURE).softmax(0)
            apart = -(wanted_E * own_E.log_softmax(0)).sum()
        return (weight * apart if weight else None), {"mhim_consistency": apart}

    @torch.no_grad()
    def after_update(self) -> None:
        """Let the teacher follow the aggregator, and the queries the tokens they made."""
        student = self.student[0]
        for own, other in zip(self.teacher.parameters(), student.parameters(), strict=True):
            own.lerp_(other, 1 - self.options.momentum)
        for own, other in zip(self.teacher.buffers(), student.buffers(), strict=True):
            own.copy_(other)
        if self.tokens_MD is not None:
            queries_MD = self.recycler.queries_MD[: len(self.tokens_MD)]
            queries_MD.lerp_(self.tokens_MD, 1 - QUERY_MOMENTUM)


class Recycler(nn.Module):
    """Merges tiles into tokens by cross-attention of queries that are not trained.

    Args:
        dim: feature width D.
        tokens: number of queries M.
    """

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        inside = HEADS * HEAD_WIDTH
        self.register_buffer("queries_MD", torch.randn(tokens, dim))
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inside, bias=False)
        self.key = nn.Linear(dim, inside, bias=False)
        self.value = nn.Linear(dim, inside, bias=False)
        self.out = nn.Linear(inside, dim)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, z_TD: Tensor, count: int, drawn: torch.Generator) -> Tensor:
        """Return tokens (count, D): means of tiles by attention, and what is learned of them."""
        x_TD = self.norm(z_TD)
        q, k, v = (
            part.unflatten(1, (HEADS, HEAD_WIDTH)).transpose(0, 1)
            for part in (
                self.query(self.norm(self.queries_MD[:count])), self.key(x_TD), self.value(x_TD)
            )
        )  # fmt: skip
        share_HMT = (q @ k.mT / math.sqrt(HEAD_WIDTH)).softmax(-1)
        means_MD = share_HMT.mean(0) @ z_TD
        if self.training:
            stays = torch.rand(share_HMT.shape, generator=drawn) >= DROPOUT
            share_HMT = share_HMT * stays.to(share_HMT) / (1 - DROPOUT)
        return means_MD + self.out((share_HMT @ v).transpose(0, 1).flatten(1))


def survivors(easy_T: Tensor, options: Mhim, drawn: torch.Generator) -> Tensor:
    """Return the rows that stay, one at least, in no order, given how easy tiles are."""
    count = len(easy_T)
    high = min(math.ceil(options.high * count - 1e-9), count - 1)
    top = min(math.ceil(high / options.high_drop), count)
    low = min(int(options.low * count + 1e-9), count - top, count - high - 1)
    order_T = easy_T.argsort(descending=True, stable=True)
    top_T = shuffled(order_T[:top], drawn)
    rest_T = torch.cat([top_T[high:], order_T[top : count - low]])
    gone = min(int(options.random * len(rest_T) + 1e-9), len(rest_T) - 1)
    return shuffled(rest_T, drawn)[gone:] if gone else rest_T


def shuffled(rows_T: Tensor, drawn: torch.Generator) -> Tensor:
    """Return rows in a drawn order."""
    return rows_T[torch.randperm(len(rows_T), generator=drawn).to(rows_T.device)]


def votes(log_KT: Tensor, high: float, weights_T: Tensor) -> Tensor:
    """Return in how many of K rows of attention a tile is among the top `high`; ties by weight."""
    top_KT = log_KT.topk(math.ceil(high * log_KT.shape[1] - 1e-9), dim=1).indices
    chosen_KT = torch.zeros_like(log_KT).scatter(1, top_KT, 1.0)
    return chosen_KT.sum(0) + weights_T / 2


def logit_parts(aggregator: Aggregator, tiles: TileSet, output: SlideOutput):
    """Return the parts (T, K) of tiles in the logits of a weighted mean, and constants (K,).

    logits = head(norm(b)), b = sum_t a_t x_t: parts and constants add up to them.
    """
    norm, head = aggregator.norm, aggregator.head
    x_TD = aggregator.standardised(tiles.z_TD)
    spread = ((output.weights_T @ x_TD).var(correction=0) + norm.eps).sqrt()
    centred_TD = output.weights_T[:, None] * (x_TD - x_TD.mean(1, keepdim=True))
    return (centred_TD / spread * norm.weight) @ head.weight.T, head(norm.bias)


@torch.no_grad()
def parts_add_up(aggregator: Aggregator) -> bool:
    """Return whether `logit_parts` holds for an aggregator, tried on a few tiles."""
    norm, head = getattr(aggregator, "norm", None), getattr(aggregator, "head", None)
    dim = len(aggregator.center_D)
    if not (aggregator.has_attention and aggregator.linear_head) or (
        getattr(norm, "normalized_shape", None) != (dim,)
        or getattr(head, "in_features", None) != dim
    ):
        return False
    drawn = torch.Generator().manual_seed(0)
    places = Places.of([torch.arange(PROBE)[:, None].expand(-1, 2)], [1.0], 0.5)
    like = aggregator.center_D
    z_TD = torch.randn(PROBE, dim, generator=drawn).to(like)
    tiles = TileSet.of(places, z_TD, torch.rand(PROBE, generator=drawn).to(like))
    trial = copy.deepcopy(aggregator).eval()
    output = trial(tiles)
    parts_TK, constant_K = logit_parts(trial, tiles, output)
    return bool(((parts_TK.sum(0) + constant_K - output.logits_K).abs() < CLOSE).all())
