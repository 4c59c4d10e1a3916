"""`tapfm fit`, and with `--continue-from RUN` a run that goes on from another cohort's.

    aggregator and head start from RUN (`model.start_from`)

On features (`data.features_dir`), of one encoder:
    RUN's training regions are replayed (`bag_transforms.replay`); their features are kept in
        RUN/memory.safetensors, so that a later run needs neither RUN's slides nor its features

On slides, where features change as the encoder learns:
    the encoder starts as RUN's adapted one, written to RUN/encoder (`model.weights`)
    strategy `olora` leaves alone what RUN's `lora` or `olora` reads; any other may be taken too

After the last epoch: RUN's figures on its own val and test splits, before and after, printed and in
forgetting.json. Both runs have the same targets. A second `--continue-from` goes on from the run
before it, with that one's memory or directions.

Source: Huang et al. 2023 (ConSlide, arXiv 2308.13324): random regions, a share of each slide;
    CoMEL (2025), without rehearsal, see `adapt.strategies.olora`.
Differs: all slides are at hand when a memory is made, so regions are drawn at once, where a stream
    needs a reservoir; drawn alike from every slide.

Shapes: T tiles of a slide, R regions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slides.errors import CohortError, SlideError
from slides.files import write_text
from slides.seeds import stable_seed
from tapfm.bag_transforms.replay import Memory, save_memory
from tapfm.data.bag import Bag
from tapfm.data.datamodule import SlideData
from tapfm.inference.export import run_export
from tapfm.inference.prediction import predict_all
from tapfm.recipe.best_weights import BEST
from tapfm.settings import SettingsError
from tapfm.slide_model import model as models
from tapfm.tasks import validation_figures
from tapfm.training import fit
from tapfm.training.begun import CONFIG

FLAG, MEMORY, FORGETTING = "--continue-from", "memory.safetensors", "forgetting.json"
ENCODER = "encoder"  # folder in RUN
SHARE, REGIONS, SIDE = 0.2, 1100, 4  # of a slide's regions; of all; tiles a side of a region
SPLITS = ("val", "test")


def run_fit(arguments: Sequence[str]) -> int:
    """Train as the arguments say, going on from another run if they name one; return 0.

    Raises:
        SettingsError: RUN is on features, and has neither them nor a memory.
        StrategyError: RUN is on slides, and its encoder cannot be written.
    """
    run, arguments = take_flag(arguments)
    if run is None:
        return fit.run_fit(arguments)
    config, _ = models.read_model_config(run / BEST)
    old, memory = None, run / MEMORY
    try:
        old = data_of(run)
    except (SettingsError, SlideError, CohortError) as fault:
        if config.features and not memory.exists():
            raise
        print(f"{run}: its own slides are not here, so what is forgotten is not measured: {fault}")
    if config.features:
        if not memory.exists():
            save_memory(regions_of(old), memory)
        spec = json.dumps({"name": "replay", "memory": str(memory)})
        more = ["--model.bag_transforms+", spec]
    else:
        run_export(str(run / BEST), None, run / ENCODER)
        weights = str(run / ENCODER / "model.safetensors")
        more = ["--model.model", config.model, "--model.weights", weights]
    cli = fit.fit([*arguments, "--model.start_from", str(run), *more])
    if old and cli.trainer.is_global_zero:
        print(forgotten(old, run, cli.folder, cli.model.chunk))
    return 0


def take_flag(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the run behind `--continue-from`, or None, and the other arguments.

    Raises:
        SettingsError: no folder of a finished run follows.
    """
    words = [word for each in arguments for word in (
        each.split("=", 1) if each.startswith(f"{FLAG}=") else [each]
    )]  # fmt: skip
    if FLAG not in words:
        return None, list(arguments)
    at = words.index(FLAG)
    run = Path(words[at + 1]).resolve() if at + 1 < len(words) else Path("nothing")
    if not (run / BEST).is_file():
        raise SettingsError(
            f"{FLAG} {run}: there is no {BEST} in it. Name the folder of a finished run."
        )
    return run, words[:at] + words[at + 2 :]


def data_of(run: Path) -> SlideData:
    """Return the data of a run.

    Raises:
        SettingsError, SlideError, CohortError: they are not as they were.
    """
    quiet = ["--trainer.logger", "false", "--trainer.callbacks", "null"]
    return fit.read_config(["--config", str(run / CONFIG), *quiet]).datamodule


def regions_of(data: SlideData) -> Memory:
    """Return the memory of a run: some regions of every training slide."""
    rows = data.rows("train")
    each = max(1, REGIONS // max(1, len(rows)))
    parts, targets = [], []
    for row in rows:
        bag = data.features.bag(row)
        region_T = regions(bag)
        drawn = np.random.default_rng(stable_seed("replay", data.seed, row.slide_id))
        count = int(region_T.max()) + 1
        for number in drawn.permutation(count)[: min(each, max(1, round(SHARE * count)))]:
            parts.append((bag, (region_T == number).nonzero().flatten()))
            targets.append(bag.labels_K)
    unknown = torch.full((1, 2), -1)
    taken = [(bag.places.take(rows_T), bag, rows_T) for bag, rows_T in parts]
    return Memory(
        z_ND=torch.cat([bag.features.z_TD[rows_T] for _, bag, rows_T in taken]),
        score_N=torch.cat([bag.features.score_T[rows_T] for _, bag, rows_T in taken]),
        coords0_N2=torch.cat([
            unknown.expand(len(p), 2) if p.coords0_T2 is None else p.coords0_T2
            for p, *_ in taken
        ]),
        step0_N=torch.cat([
            torch.ones(len(p)).double() if p.grid_px0_T is None else p.grid_px0_T
            for p, *_ in taken
        ]),
        region_N=torch.arange(len(taken)).repeat_interleave(
            torch.tensor([len(p) for p, *_ in taken])
        ),
        target_RY=torch.stack(targets),
        targets=tuple(data.task.targets),
        encoder=data.features_spec["encoder"],
        mpp=data.tiles.mpp,
    )  # fmt: skip


def regions(bag: Bag) -> Tensor:
    """Return the number of each tile's region, (T,) from 0 on: squares of `SIDE` tiles a side.

    Without coordinates, runs of as many tiles.
    """
    if bag.places.coords0_T2 is None or bag.places.grid_px0_T is None:
        return torch.arange(bag.count) // SIDE**2
    cells_T2 = bag.places.lattice() // SIDE
    cells_T3 = torch.cat([bag.places.slide_of_T[:, None], cells_T2], 1)
    return cells_T3.unique(dim=0, return_inverse=True)[1]


def forgotten(data: SlideData, old: Path, new: Path, chunk: int = 1) -> str:
    """Write what the old run's task gained or lost, as forgetting.json; return it as a table."""
    found = {}
    for split in SPLITS:
        if rows := data.rows(split):
            before, after = (figures(data, rows, run / BEST, chunk) for run in (old, new))
            found[split] = {name: [before[name], after[name]] for name in before}
    write_text(new / FORGETTING, json.dumps({"run": str(old), "figures": found}, indent=1) + "\n")
    lines = [f"{old} on its own slides, before and after:", "split  figure  before  after  change"]
    lines += [
        f"{split}  {name}  {before:.3f}  {after:.3f}  {after - before:+.3f}"
        for split, each in found.items()
        for name, (before, after) in each.items()
    ]
    return "\n".join(lines)


def figures(data: SlideData, rows: Sequence, path: Path, chunk: int) -> dict[str, float]:
    """Return the task's figures of a saved model on some slides."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.load(path).to(device)
    found = predict_all(model, data.streamed(rows), chunk, f"{path.parent.name} on earlier slides")
    logits_NK = torch.from_numpy(np.stack([each.logits_K for each in found])).double()
    target_NY = np.stack([each.labels_K for each in found])
    return validation_figures(data.task, target_NY, data.task.predict(logits_NK).numpy())
