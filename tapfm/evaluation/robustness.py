"""`tapfm test --robustness`: what adapting did to an encoder's robustness, beside its gain.

Each measure is of the adapted run and of the frozen control that it saved:

    cka         linear CKA of the two encoders' features of the same tiles: how far they moved
    drop        what the task's figure loses if every slide's haematoxylin and eosin are changed,
                each by up to a fifth, the same for all tiles of a slide and for both models
    ri, mari    robustness index and its margin-aware form over (class, site): of a tile's
                neighbours of other cases that share either its class or its site, the share of
                class; 1 is robust, .5 is no better than sites. A tile has its slide's class.

Price: two more predictions of the split, and a pass over its pixels that encodes few tiles.
Source: Kornblith et al. 2019 (arXiv 1905.00414), CKA; de Jong et al. 2025 (arXiv 2501.18055), RI;
    package `croma`, which computes RI and MaRI and defines the latter.

Shapes: N slides, P predicted numbers, D features, T tiles of a slide, C tiles of a chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from slides.errors import CohortError
from slides.seeds import stable_seed
from slides.streaming.augment import draw_augmentation, recolour_
from slides.streaming.stain import refuse_other_stains
from tapfm.data.bag import Bag, SkippedBag, Tiles
from tapfm.evaluation.drift import linear_cka
from tapfm.evaluation.predicted_rows import MIXED, by_case, groups_of
from tapfm.inference.prediction import predict_all
from tapfm.recipe.best_weights import BEST
from tapfm.recipe.saved_model import CONTROL
from tapfm.reports.rows import ResultRow
from tapfm.slide_model import model as models
from tapfm.slide_model.model import SlideModel
from tapfm.stats.bootstrap import percentiles, with_point
from tapfm.tasks import Task
from tapfm.training.fit import Cli

STRENGTH = 0.2  # of the stain draw
OF_SLIDE, OF_SPLIT = 64, 8192  # most tiles whose features are compared
NEIGHBOURS = 1, 3, 5, 11, 21, 41  # croma takes the one that tells classes best
DRAWS = 2000


def with_robustness(
    cli: Cli, folder: Path, run: ResultRow, control: ResultRow, split: str, device: str
) -> ResultRow:
    """Return a run's row with the measures; as it is where the frozen encoder was saved.

    Args:
        cli: the cohort and the settings of the runs.
        folder: the run's.
        run: its row.
        control: the row of its control.
        split: to measure on.
        device: to compute on.
    """
    if run.choice["a"] == 0:
        return run
    data, chunk = cli.datamodule, cli.model.chunk
    pair = [models.load(folder / name).to(device).eval() for name in (BEST, CONTROL)]
    facts: dict[str, Any] = {"left_out": {}}
    tiles = sampled_features(pair, data.streamed(data.rows(split)), chunk, len(run.slide_ids))
    facts |= {"cka": linear_cka(*tiles.z_ND), "tiles": len(tiles.cases)}
    site = groups_of(data.cohort.rows, "site")
    target = {row.slide_id: np.array(row.labels, float) for row in data.rows(split)}
    try:
        facts |= indices(data.task, tiles, site, target)
    except IndexLeftOut as reason:
        facts["left_out"]["RI and MaRI"] = str(reason)
    if why := no_stain_draws(data):
        facts["left_out"]["stain draws"] = why
        return replace(run, robustness=facts)
    stained = []
    for model in pair:
        bags = (restained(bag) for bag in data.streamed(data.rows(split)))
        found = predict_all(model, bags, chunk, f"{folder.name} stain draws")
        stained.append({p.slide_id: p.probs_K for p in by_case(data, split, found)})
    return replace(run, robustness=facts | {"drop": drops(data.task, [run, control], stained)})


def no_stain_draws(data) -> str | None:
    """Return why stains cannot be changed; None where they can."""
    if data.tile_source.stain:
        return f"tiles are brought to a common stain (data.stain {data.tile_source.stain})"
    try:
        refuse_other_stains(data.cohort.rows, "a stain draw")
    except CohortError as fault:
        return str(fault).rstrip(".")
    return None


class Restained:
    """Tiles whose haematoxylin and eosin are changed, slide by slide, as they are read."""

    def __init__(self, tiles: Tiles, amount_of: Sequence[Tensor], slide_of_T: Tensor):
        self.tiles, self.amount_of, self.slide_of_T = tiles, amount_of, slide_of_T

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield chunks as the tiles do, changed."""
        first = 0
        for tiles_CP in self.tiles.split(size):
            changed_CP = tiles_CP.clone()
            slide_of_C = self.slide_of_T[first : first + len(tiles_CP)]
            for number in slide_of_C.unique().tolist():
                own_C = slide_of_C == number
                part = changed_CP[own_C]
                recolour_(part, self.amount_of[number])
                changed_CP[own_C] = part
            first += len(tiles_CP)
            yield changed_CP


def restained(bag: Bag) -> Bag:
    """Return a bag under the stain draw of each of its slides, the same at every call."""
    amount_of = []
    for number in range(int(bag.places.slide_of_T[-1]) + 1):
        seed = stable_seed("stain draw", bag.slide_id, number) % 2**63
        drawn = draw_augmentation(1, torch.Generator().manual_seed(seed), stain=STRENGTH)
        amount_of.append(drawn.amount_5)
    return replace(bag, tiles=Restained(bag.tiles, amount_of, bag.places.slide_of_T))


def drops(
    task: Task, rows: Sequence[ResultRow], stained: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, dict]:
    """Return what the task's figure loses under stain draws, with paired intervals.

    Args:
        task: names the figure.
        rows: of the run and of its control, on slides as they are.
        stained: the predictions (P,) of both by slide.

    Returns:
        `run`, `control`, and `more`: of the run less the control's.
    """
    shared = set.intersection(*(set(row.slide_ids) for row in rows), *map(set, stained))
    names = sorted(shared)
    lost = {}
    for kind, row, changed in zip(("run", "control"), rows, stained, strict=True):
        place = {slide: n for n, slide in enumerate(row.slide_ids)}
        order = [place[slide] for slide in names]
        times_BN = with_point([row.case_ids[n] for n in order], DRAWS, 0).astype(float)
        changed_NP = np.stack([changed[slide] for slide in names])
        figure_of = [
            next(iter(task.measure(row.y_NK[order], p_NP, times_BN).values()))[task.monitor]
            for p_NP in (row.p_NK[order], changed_NP)
        ]
        lost[kind] = figure_of[0] - figure_of[1]
    lost["more"] = lost["run"] - lost["control"]
    return {kind: asdict(percentiles(lost_B)) for kind, lost_B in lost.items()}


@dataclass(frozen=True)
class SampledTiles:
    """Features of the same tiles by several encoders, and where the tiles come from."""

    z_ND: list[Tensor]
    """Features by each encoder, on the CPU."""
    slides: list[str]
    cases: list[str]


@torch.no_grad()
def sampled_features(
    pair: Sequence[SlideModel], bags: Iterable[Bag], chunk: int, count: int
) -> SampledTiles:
    """Return features of up to `OF_SLIDE` tiles of each bag, drawn by its name.

    Args:
        pair: the models.
        bags: pixels.
        chunk: tiles on the device at once.
        count: about how many bags there are.
    """
    most = max(1, min(OF_SLIDE, OF_SPLIT // max(1, count)))
    found, slides, cases = [[] for _ in pair], [], []
    for bag in bags:
        with suppress(SkippedBag):
            seed = stable_seed("robustness", bag.slide_id) % 2**63
            drawn_T = torch.randperm(bag.count, generator=torch.Generator().manual_seed(seed))
            kept_T = drawn_T[:most].sort().values
            few = replace(
                bag, tiles=taken(bag.tiles, kept_T, chunk), places=bag.places.take(kept_T)
            )
            for model, z_ND in zip(pair, found, strict=True):
                z_ND.append(model.tiles(few, chunk).z_TD.float().cpu())
            slides += [bag.slide_id] * len(kept_T)
            cases += [bag.case_id] * len(kept_T)
    return SampledTiles([torch.cat(each) for each in found], slides, cases)


def taken(tiles: Tiles, kept_T: Tensor, chunk: int) -> Tensor:
    """Return the tiles of some rows, which rise."""
    first, parts = 0, []
    for tiles_CP in tiles.split(chunk):
        own_T = kept_T[(kept_T >= first) & (kept_T < first + len(tiles_CP))]
        parts.append(tiles_CP[own_T - first].clone())
        first += len(tiles_CP)
    return torch.cat(parts)


class IndexLeftOut(Exception):
    """The reason why RI and MaRI are not given."""


def indices(
    task: Task, tiles: SampledTiles, site: Mapping[str, str], target: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return `ri` and `mari`, each of `run` and `control`, the mean over the columns of classes.

    Args:
        task: says what the columns of a target are.
        tiles: features of the run, then of the control.
        site: of each slide or case; blank or `mixed` is left out.
        target: of each slide or case.

    Raises:
        IndexLeftOut: targets are no classes, there are fewer than two sites or classes, or the
            package is not installed.
    """
    if task.report not in ("labels", "classes"):
        raise IndexLeftOut("they need classes, and this task has none")
    try:
        from croma import RI, MaRI
    except ImportError as error:
        raise IndexLeftOut("package croma is missing: pip install 'tapfm[robustness]'") from error
    of_site = np.array([site.get(slide, "") for slide in tiles.slides])
    known_N = ~np.isin(of_site, ["", MIXED]) & np.array([s in target for s in tiles.slides])
    if len(set(of_site[known_N])) < 2:
        raise IndexLeftOut("the table's column site names fewer than two sites in this split")
    found: dict[str, list[dict[str, float]]] = {"ri": [], "mari": []}
    for k in range(len(task.targets)):
        class_N = np.array([target[s][k] if s in target else np.nan for s in tiles.slides])
        own_N = known_N & ~np.isnan(class_N)
        if len(set(class_N[own_N])) < 2 or len(set(of_site[own_N])) < 2:
            continue
        table = pd.DataFrame({
            "sample_id": np.flatnonzero(own_N).astype(str), "image_path": "",
            "label": class_N[own_N].astype(int).astype(str), "site": of_site[own_N],
            "group_id": np.array(tiles.cases)[own_N],
        })  # fmt: skip
        for kind, index in (("ri", RI), ("mari", MaRI)):
            found[kind].append({
                name: _index(index, z_ND[torch.from_numpy(own_N)].numpy(), table)
                for name, z_ND in zip(("run", "control"), tiles.z_ND, strict=True)
            })  # fmt: skip
    if not found["ri"]:
        raise IndexLeftOut("no label has both classes and two sites in this split")
    return {
        kind: {name: float(np.mean([each[name] for each in columns])) for name in columns[0]}
        for kind, columns in found.items()
    }


def _index(index: Any, z_ND: np.ndarray, table: pd.DataFrame) -> float:
    few = tuple(k for k in NEIGHBOURS if k < len(table))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # of tiles without a neighbour of either kind
        try:
            found = index.compute(z_ND, table, confounder_column="site", k_candidates=few)
        except (RuntimeError, ValueError) as fault:
            raise IndexLeftOut(f"croma: {fault}") from fault
    return float(found.value)
