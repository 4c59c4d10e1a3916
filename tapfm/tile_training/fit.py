"""`tapfm fit-tiles`: from labelled tiles to trained weights and a table that says what they gained.

Lightning's CLI reads the config, as for `tapfm fit`: the signatures of `TileModule`, `TileData` and
Trainer are its schema. After training the best weights are set against a linear probe on the
unadapted encoder's features and against RGB statistics, on the same tiles, with intervals. The same
command again goes on where it stopped, and writes the report anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from slides.files import replacing
from slides.grid import Grid
from slides.progress import progress_bar
from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.encoders import backbones
from tapfm.encoders.backbones import find
from tapfm.encoders.fingerprint import state_fingerprint
from tapfm.following import say_next
from tapfm.recipe.best_weights import BEST, BestWeights
from tapfm.settings import SettingsError, faults_of
from tapfm.slide_model import model as models
from tapfm.slide_model.model import SlideModel
from tapfm.tile_training.baselines import Probe, features, fit_probe
from tapfm.tile_training.data import TileData
from tapfm.tile_training.module import TileModule
from tapfm.tile_training.report import TileResult, write_tile_results
from tapfm.training.alternating import check_drop_path, check_precision
from tapfm.training.announce import RunStatus
from tapfm.training.begun import prepare_folder, program
from tapfm.training.callbacks import ResumePoint, RunLog, resume_point
from tapfm.training.fit import Cli, add_tensorboard, read_config
from tapfm.training.optim import Steps
from tapfm.training.stopping import StopOnSignal, running
from tapfm.weights import read_tensors

PROBE, RGB = "frozen, linear probe", "RGB statistics, linear probe"


class TileCli(Cli):
    """Lightning's CLI with the keys of a run on tiles."""

    kinds = TileModule, TileData
    verb = "fit-tiles"
    least: ClassVar = {
        "batch": 1, "colour": 0, "stain_jitter": 0, "scale_jitter": 0, "workers": 0,
    }  # fmt: skip

    def add_arguments_to_parser(self, parser):
        """Add those of any run; take classes and tile geometry from the data."""
        self.add_run_arguments(parser)
        parser.link_arguments("data.tile_px", "model.tile_px")
        parser.link_arguments("data.mpp", "model.mpp")
        parser.link_arguments("data.class_names", "model.labels", apply_on="instantiate")
        parser.link_arguments("data.class_weight", "model.class_weight", apply_on="instantiate")

    @property
    def folder(self) -> Path:
        """The run's own."""
        name = strategy_spec(make_strategy(self.config.model.strategy))["name"]
        return Path(self.config.run_dir) / (self.config.name or name)

    def fill_in(self) -> None:
        """Log every batch; the model's settings have values of their own."""
        if self.config.trainer.log_every_n_steps is None:
            self.config.trainer.log_every_n_steps = 1

    def model_faults(self, model) -> list[str]:
        """Return what is wrong with `model`."""
        faults = faults_of(
            lambda: find(model.model),
            lambda: make_strategy(model.strategy),
            lambda: Steps(**vars(model.steps)),
        )
        if model.steps.warm_start:
            faults.append(
                "model.steps.warm_start is of slides. A classifier of tiles begins as the linear "
                "probe with model.head: probe."
            )
        faults += check_drop_path(model.drop_path)
        return faults + check_precision(model.precision, model.optimizer)

    def data_faults(self, data) -> list[str]:
        """Return what is wrong with `data`."""
        faults = faults_of(lambda: Grid(data.tile_px, data.mpp))
        return [f"data: {fault}" for fault in faults]


class TileLog(RunLog):
    """metrics.csv and memory.csv of a run on tiles; a row a batch."""

    def __init__(self, folder: Path):
        super().__init__(folder, [])
        train = ["loss", "ppcl", "head_grad_norm", "encoder_grad_norm"]
        val = ["loss", "f1", "balanced_accuracy"]
        self.metrics.columns = [
            "step", "epoch", "slide_id", *(f"train/{name}" for name in train),
            "lr/head", "lr/encoder", *(f"val/{name}" for name in val),
        ]  # fmt: skip


def run_fit_tiles(arguments: Sequence[str]) -> int:
    """Fit the baselines, train, report on val and, where there is one, test; return 0.

    Raises:
        SettingsError: several processes were asked for.
    """
    cli = read_config(arguments, TileCli)
    if cli.trainer.world_size > 1:
        raise SettingsError(
            f"fit-tiles trains in one process, and the trainer has {cli.trainer.world_size}. "
            "Set trainer.devices: 1."
        )
    with running(cli.folder):
        fit_and_report(cli)
    return 0


def fit_and_report(cli: TileCli) -> None:
    """Fit the baselines, train, and report."""
    prepare_folder(cli)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probes = fit_probes(cli, frozen_features(cli, device))
    train(cli, probes[PROBE])
    report(cli, probes, device)
    say_next("fit-tiles", {"folder": cli.folder})


@dataclass(frozen=True)
class FrozenProbe:
    """A baseline and its predictions for every tile."""

    probe: Probe
    p_NK: np.ndarray
    """Probabilities, in the table's order."""


def fit_probes(cli: TileCli, frozen: dict[str, Tensor]) -> dict[str, FrozenProbe]:
    """Return the frozen baselines, fitted on train and chosen on val."""
    data, found = cli.datamodule, {}
    y_N = np.array([data.tiles.classes.index(row.label) for row in data.tiles.rows])
    part_N = np.array([row.part for row in data.tiles.rows])
    for title, name in ((RGB, "rgb"), (PROBE, "z")):
        z_ND = frozen[name].numpy()
        parts = ((z_ND[part_N == part], y_N[part_N == part]) for part in ("train", "val"))
        probe = fit_probe(*parts, len(data.tiles.classes), data.class_weight)
        found[title] = FrozenProbe(probe, probe.predict(z_ND))
        print(f"{title}: {probe.describe()}")
    return found


def train(cli: TileCli, frozen: FrozenProbe) -> None:
    """Train to the last epoch, from where an earlier call stopped."""
    module, data, folder = cli.model, cli.datamodule, cli.folder
    trainer: L.Trainer = cli.trainer
    model_config = module.slide_model.model_config
    module.provenance = {"tiles_sha256": data.tiles.sha256, "head": module.head, **program()}
    parts = ", ".join(f"{len(data.tiles.part(part))} {part}" for part in ("train", "val", "test"))
    what = module.strategy.describe(module.slide_model.encoder.vit)
    print(
        f"{folder}: {model_config.model}, {what} "
        f"at {module.encoder_lr:g}; loss {'ce' if module.prototype_loss is None else 'ppcl'}; "
        f"{len(model_config.labels)} classes; tiles: {parts}; batches of {data.batch} in "
        f"{model_config.precision}"
    )
    if module.head == "probe":
        module.start_head(*frozen.probe.linear())
    add_tensorboard(trainer, folder)
    point = ResumePoint(folder, cli.config.resume_minutes, cli.config.resume_every)
    stop = StopOnSignal(folder, point)
    best = BestWeights(folder, "f1")
    status = RunStatus(folder, best, unit="batch")
    trainer.callbacks += [TileLog(folder), best, status, point, stop]
    resume = resume_point(folder)
    begun = {"ckpt_path": resume, "weights_only": True} if resume else {}
    with stop.listening(trainer):
        trainer.fit(module, datamodule=data, **begun)
    print(f"{folder / BEST}: the weights of the best validation macro F1")


def report(cli: TileCli, probes: dict[str, FrozenProbe], device: str) -> None:
    """Report the best weights beside the frozen baselines, on val and test."""
    data, folder = cli.datamodule, cli.folder
    model = models.load(folder / BEST).to(device)
    for split in ("val", "test"):
        rows_N = [n for n, row in enumerate(data.tiles.rows) if row.part == split]
        if not rows_N:
            continue
        arms = [TileResult(title, frozen.p_NK[rows_N]) for title, frozen in probes.items()]
        arms.append(TileResult(f"adapted, {folder.name}", predict_tiles(model, data, split)))
        tiles = [data.tiles.rows[n] for n in rows_N]
        where, known = folder / f"report_{split}", data.tiles.cases_known
        classes = data.tiles.classes
        print(write_tile_results(where, split, classes, tiles, arms, PROBE, cases_known=known))
        print(f"{where}: report.md, metrics_{split}.json, predictions_{split}.csv")


@torch.no_grad()
def predict_tiles(model: SlideModel, data: TileData, split: str) -> np.ndarray:
    """Return probabilities (N, K) of a part's tiles, in their order."""
    batches = progress_bar(data.loader(data.tiles.part(split)), desc=split, unit="batch")
    logits = [model.aggregator(model.encode(batch.tiles_CP)[0]).float() for batch in batches]
    return torch.cat(logits).double().softmax(1).cpu().numpy()


def frozen_features(cli: TileCli, device: str) -> dict[str, Tensor]:
    """Return frozen features of every tile, in the table's order, kept for the cohort's other runs.

    Pictures that were exported anew, even under the same names, are encoded anew.
    """
    data, model_config = cli.datamodule, cli.model.slide_model.model_config
    encoder = backbones.load(
        model_config.model, model_config.weights, tile_px=model_config.tile_px
    ).eval()
    print_of = state_fingerprint(encoder.row, encoder.vit.state_dict(), model_config.tile_px)
    tiles = f"{data.tiles.sha256[:8]}_{data.tiles.files_sha256[:8]}"
    name = f"{encoder.row.key}_{print_of[:8]}_{model_config.precision}_{tiles}"
    path = Path(cli.config.run_dir) / "frozen" / f"{name}.safetensors"
    if not path.exists():
        batches = progress_bar(data.loader(data.tiles.rows), desc="frozen features", unit="batch")
        z_ND, rgb_N6 = features(encoder.to(device), batches, model_config.precision)
        with replacing(path) as partial:
            save_file({"z": z_ND, "rgb": rgb_N6}, partial)
    return read_tensors(path)
