"""`tapfm fit`: from a config to trained weights in a run directory.

Lightning's CLI reads the config: the signatures of `SlideModule`, `SlideData` and Trainer are its
schema, `--print_config` prints all of it. A run directory that holds an unfinished run of the same
config is continued; one of another config is refused.
"""

from __future__ import annotations

import logging
import platform
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from slides.errors import SettingsError
from slides.files import write_text
from tapfm import __version__
from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.data.datamodule import SlideData
from tapfm.distributed import part
from tapfm.encoders.backbones import find
from tapfm.planning.footprint import CONTEXT_GIB, Setup
from tapfm.planning.plan import compare, forecast
from tapfm.slide_model.aggregators import aggregator_options, name_of
from tapfm.tasks import validation_figures
from tapfm.training.callbacks import BEST, RESUME, BestWeights, Progress, ResumePoint, RunLog
from tapfm.training.encode_once import EncodeOnce, splits_to_encode
from tapfm.training.module import SlideModule
from tapfm.training.warm_start import WarmStart

CONFIG = "config.yaml"
DESCRIBES_RUN = ("seed_everything", "model", "data")  # what may not change between start and resume


class Cli(LightningCLI):
    """Lightning's CLI with the keys of a run."""

    kinds = SlideModule, SlideData
    verb = "fit"

    def add_arguments_to_parser(self, parser):
        """`run_dir`, `name`, `resume_every`; labels and tile geometry come from the data."""
        self.add_run_arguments(parser)
        parser.link_arguments("data.tiles.tile_px", "model.tile_px")
        parser.link_arguments("data.tiles.mpp", "model.mpp")
        parser.link_arguments("data.label_names", "model.labels", apply_on="instantiate")
        parser.link_arguments("data.task_spec", "model.task", apply_on="instantiate")
        parser.link_arguments("data.features_spec", "model.features", apply_on="instantiate")

    def add_run_arguments(self, parser) -> None:
        """What every task has."""
        parser.add_argument("--run_dir", default="runs/run", help="folder of the cohort's runs")
        parser.add_argument(
            "--name", default=None, help="folder of this run; None: aggregator, strategy"
        )
        parser.add_argument(
            "--resume_every", type=int, default=50, help="slides between resume points"
        )
        parser.link_arguments("seed_everything", "data.seed")
        parser.set_defaults(
            {
                "seed_everything": 0,
                "trainer.max_epochs": 20,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": 1,
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

    def before_instantiate_classes(self) -> None:
        """Nothing is instantiated with an unknown model or strategy; features stay frozen."""
        find(self.config.model.model)
        strategy = strategy_spec(make_strategy(self.config.model.strategy))["name"]
        if self.config.data.get("features_dir") and strategy == "full":
            self.config.model.strategy = "frozen"
        aggregator_options(self.config.model.aggregator)


def read_config(arguments: Sequence[str], kind: type[Cli] = Cli) -> Cli:
    """Model, data and trainer as the arguments say."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips, and what we print ourselves
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():  # Lightning's CLI against newer jsonargparse: not the user's
        warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.cli")
        return kind(
            *kind.kinds,
            args=list(arguments),
            run=False,
            save_config_callback=None,
            trainer_defaults={"callbacks": [Progress()]},
            seed_everything_default=0,
            parser_kwargs={"prog": f"tapfm {kind.verb}", "default_env": False},
        )


def run_fit(arguments: Sequence[str]) -> int:
    """Index what is not indexed, then train. Returns 0."""
    cli = read_config(arguments)
    module, data, folder = cli.model, cli.datamodule, cli.folder
    trainer: L.Trainer = cli.trainer
    resume = (folder / RESUME).exists()
    module.provenance = provenance(data)
    model_config = module.slide_model.model_config
    if name_of(model_config.aggregator) == "hierarchical" and data.bags != "case":
        raise SettingsError(
            "model.aggregator hierarchical weighs the slides of a case, and data.bags is slide: "
            "set data.bags: case, or take tapfm_gated."
        )
    if trainer.is_global_zero:
        prepare_folder(cli)
        print(
            f"{folder}: {encoder_of(module)}; aggregator "
            f"{name_of(model_config.aggregator)}; predicts {', '.join(module.task.targets)}; "
            f"chunks of {module.chunk} tiles in {model_config.precision}"
        )
    trainer.loggers = [TensorBoardLogger(folder, name="", version="tensorboard")]
    best = BestWeights(folder, module.task.monitor)
    trainer.callbacks += [
        RunLog(folder, list(validation_figures(module.task)), module.columns),
        best,
        ResumePoint(folder, cli.config.resume_every),
    ]
    if splits := splits_to_encode(module, data):
        trainer.callbacks.insert(0, EncodeOnce(folder.parent / "frozen", splits))
    if module.steps.warm_start:
        trainer.callbacks.append(WarmStart(best))
    expected = foretell(module) if trainer.strategy.root_device.type == "cuda" else None
    point = {"ckpt_path": folder / RESUME, "weights_only": True} if resume else {}
    trainer.fit(module, datamodule=data, **point)
    part()
    if not trainer.is_global_zero:
        return 0
    if expected:
        print(compare(expected, folder / "memory.csv"))
    print(f"{folder / BEST}: the weights of the best validation {module.task.title}")
    return 0


def encoder_of(module: SlideModule) -> str:
    """Return what a run has for an encoder, and what of it learns, in words."""
    config, encoder = module.slide_model.model_config, module.slide_model.encoder
    if known := config.features:
        made_by = f" of {known['encoder']}" if known["encoder"] else ""
        return f"features{made_by} in {known['folder']}, {known['dim']} a tile, strategy frozen"
    what = module.strategy.describe(encoder.vit)
    return f"{config.model}, {what} at {module.encoder_lr:g}"


def foretell(module: SlideModule) -> dict[str, float] | None:
    """What the run will take of the GPU, said before it begins.

    None for models of other blocks, and for an encoder of which nothing learns.
    """
    model_config, row = module.slide_model.model_config, module.slide_model.encoder.row
    if not row.prefix_tokens or not module.learns:
        return None
    setup = Setup(model_config.precision, module.optimizer, module.recompute, model_config.strategy)
    expected = forecast(row, model_config.tile_px, setup, module.chunk, module.passes.keep)
    peak = max(expected.values()) + CONTEXT_GIB
    print(f"expect {peak:.1f} GiB of GPU memory, whatever the number of tiles")
    return expected


def prepare_folder(cli: Cli) -> None:
    """Make the run's folder and write its config.

    Raises:
        SettingsError: the folder holds a run with another config.
    """
    folder, text = cli.folder, cli.parser.dump(cli.config, skip_unset=False)
    now = yaml.safe_load(text)
    if (folder / CONFIG).exists():
        then = yaml.safe_load((folder / CONFIG).read_text())
        changed = [key for part in DESCRIBES_RUN for key in _changed(then[part], now[part], part)]
        if changed and (folder / RESUME).exists():
            raise SettingsError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}). "
                "Give another --name or --run_dir, or delete that folder to start anew."
            )
    write_text(folder / CONFIG, text)


def provenance(data: SlideData) -> dict[str, Any]:
    """What a saved model says of its making."""
    return {
        "cohort_sha256": data.cohort.sha256,
        "tissue": asdict(data.tiles.tissue),
        "stain": data.tile_source.stain,
        "bags": data.bags,
        "pool": data.pool,
        **program(),
    }


def program() -> dict[str, Any]:
    """Commit and versions of what is running."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "versions": {"tapfm": __version__, "torch": torch.__version__,
                     "lightning": L.__version__, "python": platform.python_version()},
    }  # fmt: skip


def _changed(then: Any, now: Any, key: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [c for k in keys for c in _changed(then.get(k), now.get(k), f"{key}.{k}")]
    return [] if then == now else [f"{key} was {then}, is {now}"]
