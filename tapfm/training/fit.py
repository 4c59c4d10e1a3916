"""`tapfm fit`: from a config to trained weights in a run directory.

Lightning's CLI reads the config: the signatures of `SlideModule`, `SlideData` and Trainer are its
schema, `--print_config` prints all of it. A run directory that holds an unfinished run of the same
config is continued; one of another config is refused.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from slides.grid import Grid
from slides.tiling.tissue import Tissue
from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.bag_transforms import BAG_TRANSFORMS
from tapfm.config_lines import with_lines_of
from tapfm.config_paths import localised
from tapfm.data.datamodule import SlideData
from tapfm.distributed import named_loss, part, watch_others
from tapfm.encoders.backbones import find
from tapfm.encoders.pinned import RING
from tapfm.following import say_next
from tapfm.planning.gpu_defaults import fill_in, foretell, say_retries
from tapfm.planning.plan import compare
from tapfm.recipe.best_weights import BEST, BestWeights
from tapfm.recipe.frozen_means import FrozenMeans
from tapfm.recipe.pull_to_start import PullToStart
from tapfm.recipe.saved_model import choose_and_save, looks_to_choose
from tapfm.recipe.solved_head import SolvedHead
from tapfm.recipe.warm_start import WarmStart
from tapfm.recipe.weight_average import WeightAverage
from tapfm.regularisers import REGULARISERS
from tapfm.settings import SettingsError, below, choose, faults_of, refuse
from tapfm.slide_model.aggregators import aggregator_options, name_of
from tapfm.slide_model.model import read_model_config
from tapfm.tasks import validation_figures
from tapfm.training.alternating import (
    check_accelerator,
    check_drop_path,
    check_parallel,
    check_precision,
    check_trainer,
)
from tapfm.training.announce import Progress, RunStatus, announce
from tapfm.training.arguments import argument_faults
from tapfm.training.begun import prepare_folder, provenance
from tapfm.training.callbacks import ResumePoint, RunLog, resume_point
from tapfm.training.encode_once import EncodeOnce, splits_to_encode
from tapfm.training.module import SlideModule
from tapfm.training.old_keys import rename_old_keys
from tapfm.training.optim import Steps
from tapfm.training.passes import check_counts, check_packs
from tapfm.training.stopping import StopOnSignal, running

LIGHTNINGS_OWN = r"lightning\.pytorch\.utilities\._pytree", r"lightning\.fabric\..*\.slurm"
"""Modules whose warnings are of Lightning against torch, and of `srun`, where it is installed."""
SCHEDULE = "precision", "max_epochs", "max_steps", "fast_dev_run"  # keys of trainer
COUNTS = "chunk", "keep_chunks", "backward_tiles", "cosine_every", "pack_chunks"  # of model


class Cli(LightningCLI):
    """Lightning's CLI with the keys of a run."""

    kinds = SlideModule, SlideData
    verb = "fit"
    least: ClassVar = {
        "tiles_per_slide": 1, "views": 1, "colour": 0, "stain_jitter": 0, "scale_jitter": 0,
        "host_gb": 0, "workers": 0,
    }  # fmt: skip
    """The least value of numbers of `data`."""

    def add_arguments_to_parser(self, parser):
        """Add `run_dir`, `name`, `resume_every`; take labels and tile geometry from the data."""
        self.add_run_arguments(parser)
        parser.add_argument(
            "--features", default=None, help="frozen features of all runs; None: <run_dir>/frozen"
        )
        parser.link_arguments("data.tiles.tile_px", "model.tile_px")
        parser.link_arguments("data.tiles.mpp", "model.mpp")
        parser.link_arguments("data.label_names", "model.labels", apply_on="instantiate")
        parser.link_arguments("data.task_spec", "model.task", apply_on="instantiate")
        parser.link_arguments("data.features_spec", "model.features", apply_on="instantiate")

    def add_run_arguments(self, parser) -> None:
        """Add the flags of runs on slides or tiles."""
        add = parser.add_argument
        add("--run_dir", default="runs/run", help="folder of the cohort's runs")
        add("--name", default=None, help="folder of this run; None: aggregator, strategy")
        add(
            "--resume_minutes", type=float, default=5.0, help="between resume points; 0: each epoch"
        )
        add("--resume_every", type=int, default=0, help="slides between them, instead of minutes")
        add(
            "--extend", type=bool, default=False,
            help="go on with a run to another trainer.max_epochs: its schedule is laid anew",
        )  # fmt: skip
        parser.link_arguments("seed_everything", "data.seed")
        parser.set_defaults(
            {
                "seed_everything": 0,
                "trainer.max_epochs": 20,
                "trainer.devices": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": None,  # `gpu_defaults.fill_in`
                "trainer.enable_checkpointing": False,
                "trainer.enable_model_summary": False,
                "trainer.logger": False,
                "trainer.deterministic": "warn",
                "trainer.use_distributed_sampler": False,  # the data module shares slides out
            }
        )

    @property
    def folder(self) -> Path:
        """The run's own."""
        strategy = strategy_spec(make_strategy(self.config.model.strategy))["name"]
        name = name_of(self.config.model.aggregator)
        name += f"_{strategy}" if strategy != "full" else ""
        return Path(self.config.run_dir) / (self.config.name or name)

    def refuse(self, faults: Sequence[str]) -> None:
        """Refuse faults of the settings, if there are any, each with its file and line."""
        refuse(with_lines_of(faults, self.typed), self.verb)

    def parse_arguments(self, parser, args) -> None:
        """Read the arguments, once nothing is wrong with them; say old keys' new names.

        Raises:
            SettingsError: all unknown keys, wrong types and missing files.
        """
        self.typed = args
        located = localised(args)
        self.refuse(argument_faults(parser, located))
        super().parse_arguments(parser, located)
        for line in rename_old_keys(self.config.model):
            rank_zero_only(print)(line)

    def before_instantiate_classes(self) -> None:
        """Refuse what is wrong with the settings, before a slide or a model is looked at.

        An encoder whose features are given stays frozen.

        Raises:
            SettingsError: all that can be known by now.
        """
        config = self.config
        faults = [*self.model_faults(config.model), *self.data_faults(config.data)]
        faults += below(config.data, self.least, "data") + below(
            config, {"resume_every": 0, "resume_minutes": 0}
        )
        faults += check_trainer(**{key: config.trainer[key] for key in SCHEDULE})
        faults += below(config.trainer, {"check_val_every_n_epoch": 1}, "trainer")
        faults += check_accelerator(config.trainer.accelerator)
        faults += check_parallel(config.trainer.strategy)
        self.refuse(faults)
        strategy = strategy_spec(make_strategy(self.config.model.strategy))["name"]
        if self.config.data.get("features_dir") and strategy == "full":
            self.config.model.strategy = "frozen"
        self.fill_in()

    def fill_in(self) -> None:
        """Fill in what the config leaves open, and say what it was."""
        if line := fill_in(self.config, self.folder):
            rank_zero_only(print)(line)

    def model_faults(self, model) -> list[str]:
        """Return what is wrong with `model`."""
        chosen = ((REGULARISERS, "regularisers"), (BAG_TRANSFORMS, "bag_transforms"))
        return [
            *faults_of(
                lambda: find(model.model),
                lambda: aggregator_options(model.aggregator),
                lambda: make_strategy(model.strategy),
                lambda: Steps(**vars(model.steps)),
                *(
                    partial(choose, kinds, spec, f"model.{key}")
                    for kinds, key in chosen
                    for spec in model[key] or ()
                ),
            ),
            *check_counts(**{key: model[key] for key in COUNTS}),
            *check_packs(model.pack_chunks, model.steps.accumulate),
            *check_drop_path(model.drop_path),
            *check_precision(model.precision, model.optimizer),
        ]

    def data_faults(self, data) -> list[str]:
        """Return what is wrong with `data`, alone or beside `model`."""
        tiles = data.tiles
        faults = faults_of(
            lambda: Grid(tiles.tile_px, tiles.mpp, tiles.overlap),
            lambda: Tissue(**vars(tiles.tissue)),
        )
        faults = [f"data.tiles: {fault}" for fault in faults]
        if name_of(self.config.model.aggregator) == "hierarchical" and data.bags != "case":
            faults.append(
                "model.aggregator hierarchical weighs the slides of a case, and data.bags is "
                f"{data.bags}: set data.bags: case, or take tapfm_gated."
            )
        return faults

    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        """Make the trainer, without a progress bar where none is wanted or can be seen.

        Raises:
            SettingsError: what Lightning finds wrong with `trainer`.
        """
        unseen = not sys.stdout.isatty()  # `RunStatus` prints lines
        if self.config.trainer.enable_progress_bar is False or unseen:
            self.trainer_defaults, kwargs = {}, {**kwargs, "enable_progress_bar": False}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            what = " ".join(str(error).split())
            raise SettingsError(f"trainer: {what} Correct that key, or leave it out.") from error


def read_config(arguments: Sequence[str], kind: type[Cli] = Cli) -> Cli:
    """Return model, data and trainer as the arguments say.

    Raises:
        SettingsError: all that is wrong with the arguments.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips, and what we print ourselves
        logging.getLogger(name).setLevel(logging.WARNING)
    for module in LIGHTNINGS_OWN:
        warnings.filterwarnings("ignore", module=module)
    with warnings.catch_warnings():  # Lightning's CLI against newer jsonargparse: not the user's
        warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.cli")
        return kind(
            *kind.kinds,
            args=list(arguments),
            run=False,
            save_config_callback=None,
            trainer_defaults={"callbacks": [Progress()]},
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"tapfm {kind.verb}", "default_env": False, "exit_on_error": False
            },
        )  # fmt: skip


def run_fit(arguments: Sequence[str]) -> int:
    """Index what is not indexed, then train. Returns 0."""
    fit(arguments)
    return 0


def fit(arguments: Sequence[str]) -> Cli:
    """Train as the arguments say, and return what they said."""
    cli = read_config(arguments)
    watch_others(cli.trainer)
    with running(cli.folder, writes=cli.trainer.is_global_zero), named_loss(cli.trainer.world_size):
        train(cli)
    return cli


def train(cli: Cli) -> None:
    """Train to the last epoch, from where an earlier call stopped, and choose what is saved."""
    module, data, folder = cli.model, cli.datamodule, cli.folder
    trainer: L.Trainer = cli.trainer
    # a fifth of an offloaded step, and no number is read before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False
    resume = resume_point(folder)
    module.provenance = provenance(data)
    prepare_folder(cli, writes=trainer.is_global_zero)
    if trainer.is_global_zero:
        announce(folder, module, data)
    add_tensorboard(trainer, folder)
    best = BestWeights(folder, module.task.monitor)
    recipe = recipe_callbacks(module, best)
    point = ResumePoint(folder, cli.config.resume_minutes, cli.config.resume_every)
    stop = StopOnSignal(folder, point)
    trainer.callbacks += [
        *recipe,  # in front: the resume point holds what they made of an update
        RunLog(folder, list(validation_figures(module.task)), module.columns),
        best,
        RunStatus(folder, best, looks_to_choose(module)),
        point,
        stop,
    ]
    if splits := splits_to_encode(module, data):
        shared = Path(cli.config.features or folder.parent / "frozen")
        trainer.callbacks.insert(0, EncodeOnce(shared, splits))
    expected = foretell(module) if trainer.strategy.root_device.type == "cuda" else None
    begun = {"ckpt_path": resume, "weights_only": True} if resume else {}
    try:
        with stop.listening(trainer):
            trainer.fit(module, datamodule=data, **begun)
            if not (folder / BEST).is_file():
                raise SettingsError(
                    f"{folder}: the run ended before an epoch was validated, so no model is chosen "
                    "yet. Give trainer.max_time more, and run the same command: it goes on there."
                )
            save_choice(module, folder, recipe)
    finally:
        RING.release()
    part()
    if not trainer.is_global_zero:
        return
    if expected:
        print(compare(expected, folder / "memory.csv"))
        say_retries()
    print(f"{folder / BEST}: the weights of the best validation {module.task.title}")
    say_next("fit", {"folder": folder})


def recipe_callbacks(module: SlideModule, best: BestWeights) -> list[Callback]:
    """Return the parts of the recipe that `model.steps` asks for."""
    steps, found = module.steps, []
    if steps.warm_start:
        found.append(WarmStart(best))
    if any(each.needs_frozen for each in module.objective.regularisers.values()):
        found.append(FrozenMeans())
    if steps.solve_head:
        found.append(SolvedHead())
    if steps.pull and module.learns:
        found.append(PullToStart(steps.pull))
    if steps.average and module.chooses:
        found.append(WeightAverage(steps.average))
    return found


def save_choice(module: SlideModule, folder: Path, recipe: Sequence[Callback]) -> None:
    """Choose how much of the encoder's change is saved, unless that is done or nothing learned."""
    if not module.chooses or "interpolation" in read_model_config(folder / BEST)[1]:
        return
    module.to(module.trainer.strategy.root_device)
    mean = next((each for each in recipe if isinstance(each, WeightAverage)), None)
    rank_zero_only(print)("choosing how much of the encoder's change is saved", flush=True)
    choice = choose_and_save(module, module.trainer.datamodule, folder, mean)
    for point in choice.curve:
        figure = f"{module.task.title} {point.figure:.3f}"
        rank_zero_only(print)(f"a = {point.a:g}: validation loss {point.loss:.3f}, {figure}")
    rank_zero_only(print)(f"saved: a = {choice.a:g} of the {choice.source}: {choice.reason}")


def add_tensorboard(trainer: L.Trainer, folder: Path) -> None:
    """Log to TensorBoard in the run's folder, beside the loggers that the user asked for."""
    board = TensorBoardLogger(folder, name="", version="tensorboard")
    trainer.loggers = [board, *trainer.loggers]
