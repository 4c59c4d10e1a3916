"""Files that a run writes while it trains: metrics, memory, resume point.

A run killed at any moment and resumed ends with the same weights and the same metrics.csv as one
never killed: the resume point remembers how many rows each file had, and later rows are dropped.
"""

from __future__ import annotations

import csv
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from slides.errors import SettingsError
from slides.files import WriteError, replacing, unwritten
from tapfm.distributed import gather
from tapfm.training.module import DivergedError

OF_A_BAG = ("slide_id", "tiles", "chunk", "tiles_per_s")  # columns that loggers are not given
RESUME, BEFORE = "last.ckpt", "before.ckpt"  # the last resume point, and the one before it


class CsvLog:
    """A CSV that grows by whole rows and can be cut back to a number of them."""

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.columns, self.rows = path, columns, 0

    def start(self, keep: int = 0) -> None:
        """Write the header, and keep the first `keep` rows of the file there is."""
        lines = self.path.read_text().splitlines(keepends=True)[1 : keep + 1] if keep else []
        with replacing(self.path) as partial:
            partial.write_text(",".join(self.columns) + "\n" + "".join(lines))
        self.rows = len(lines)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; missing columns stay blank."""
        try:
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                cells = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(cells)
        except OSError as error:
            raise WriteError(unwritten(self.path, error)) from error
        self.rows += 1


class RunLog(Callback):
    """Writes metrics.csv and memory.csv, a row a slide.

    metrics.csv holds losses and figures, the same whenever the run is repeated; memory.csv holds
    seconds and memory, which differ.
    """

    def __init__(self, folder: Path, figures: list[str], further: Sequence[str] = ()):
        each = ["loss", *figures]
        train = ["loss", "effective_tiles", "head_grad_norm", "encoder_grad_norm"]
        lr = ["lr/head", "lr/encoder"]
        columns = [
            *(f"train/{name}" for name in train),
            *further,
            *lr,
            *(f"val/{name}" for name in each),
        ]
        self.metrics = CsvLog(folder / "metrics.csv", ["step", "epoch", "slide_id", *columns])
        phases = [f"{phase}_{unit}" for phase in ("encode", "aggregate", "adapt")
                  for unit in ("s", "allocated_gib", "reserved_gib", "rss_gib")]  # fmt: skip
        cost = ["step", "slide_id", "tiles", "chunk", "tiles_per_s", *phases]
        self.memory = CsvLog(folder / "memory.csv", cost)
        self.keep = {"metrics": 0, "memory": 0}
        self.waiting: list[_Slide] = []
        self.shown: dict[str, float] = {}
        """What the progress bar shows of the last slide written."""

    def on_fit_start(self, trainer, module) -> None:
        """Begin both files, or cut them back to the resume point; the first process writes them."""
        self.flush = partial(self.write, trainer, module)
        if not trainer.is_global_zero:
            return
        path, keep = self.metrics.path.with_name("skipped.json"), bool(self.keep["metrics"])
        trainer.datamodule.skipped.write_to(path, keep=keep)
        self.metrics.start(self.keep["metrics"])
        self.memory.start(self.keep["memory"])

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Start the clock of tiles per second at the first slide of some."""
        if not self.waiting:
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Note a slide's figures where they are; write those of `log_every_n_steps` slides."""
        if outputs:  # else the slide was skipped
            rates = [optimizer.param_groups[0]["lr"] for optimizer in module.optimizers()]
            self.waiting.append(
                _Slide(batch, module.slides_seen, module.chunk, rates, outputs, module.meter.take())
            )
        if len(self.waiting) >= trainer.log_every_n_steps or trainer.is_last_batch:
            self.flush()

    def write(self, trainer, module) -> None:
        """Write a row a slide in each file, the same to all loggers.

        The host waits for the device here, once for all slides.

        Raises:
            DivergedError: a loss or gradient is not finite.
        """
        slides, self.waiting = self.waiting, []
        figures = _read([each.outputs for each in slides])
        spent = [each.measured() for each in slides]
        speed = sum(each.batch.count for each in slides) / (time.perf_counter() - self.began)
        mine = [
            each.rows(learned, phases, speed)
            for each, learned, phases in zip(slides, figures, spent, strict=True)
        ]
        shares = gather(mine)
        for turn, each in enumerate(slides):
            rows = [share[turn] for share in shares]
            for learned, _ in rows:
                for name in ("train/loss", "train/head_grad_norm", "train/encoder_grad_norm"):
                    if not math.isfinite(learned[name]):
                        raise DivergedError(f"{learned['slide_id']}: {name} is {learned[name]}")
            for number, (learned, cost) in enumerate(rows if trainer.is_global_zero else ()):
                step = (each.turn - 1) * len(rows) + number + 1
                self.metrics.write({"step": step, "epoch": trainer.current_epoch, **learned})
                self.memory.write({"step": step, **cost})
            numbers = {k: v for row in mine[turn] for k, v in row.items() if k not in OF_A_BAG}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=each.turn)
            self.shown = {"tiles/s": speed, "loss": mine[turn][0]["train/loss"]}

    def on_validation_start(self, trainer, module) -> None:
        """Write what waits in front of the epoch's row."""
        if self.waiting:
            self.flush()

    def on_validation_end(self, trainer, module) -> None:
        """Write the epoch's row."""
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        step = module.slides_seen * trainer.world_size
        if trainer.is_global_zero:
            self.metrics.write({"step": step, "epoch": trainer.current_epoch, **figures})

    def on_fit_end(self, trainer, module) -> None:
        """Write and count the slides that all processes left out."""
        skipped = trainer.datamodule.skipped
        for each in gather(dict(skipped)):
            skipped.note(each)
        if trainer.is_global_zero:
            skipped.write()
            if counts := skipped.summary():
                print(f"left out: {counts}; {skipped.file} has the reasons")

    def state_dict(self) -> dict[str, int]:
        """Write what waits; return the number of rows of each file, for a resume point."""
        if self.waiting:
            self.flush()
        return {"metrics": self.metrics.rows, "memory": self.memory.rows}

    def load_state_dict(self, state) -> None:
        """Note how many rows to keep."""
        self.keep = state


@dataclass
class _Slide:
    """What a slide's rows are made of: its figures are on the device yet."""

    batch: Any
    turn: int
    chunk: int | None
    rates: list[float]
    outputs: dict[str, Tensor]
    measured: Callable[[], dict[str, dict[str, float]]]

    def rows(
        self, learned: dict[str, float], phases: dict[str, dict[str, float]], speed: float
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its rows of metrics.csv and memory.csv, without step and epoch."""
        slide = {"slide_id": self.batch.slide_id}
        cost = {f"{phase}_{unit}": v for phase, each in phases.items() for unit, v in each.items()}
        bag = {"tiles": self.batch.count, "chunk": self.chunk, "tiles_per_s": speed}
        rates = dict(zip(("lr/head", "lr/encoder"), self.rates, strict=True))
        return {**slide, **learned, **rates}, {**slide, **bag, **cost}


def _read(outputs: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Return figures of several slides as numbers, in one copy from the device."""
    every = [value.detach().double() for each in outputs for value in each.values()]
    here = [value for value in every if not value.is_cuda]
    there = [value for value in every if value.is_cuda]
    numbers = {id(value): value.item() for value in here}
    if there:
        copied = torch.stack(there).cpu().tolist()
        numbers |= {id(value): number for value, number in zip(there, copied, strict=True)}
    read = (numbers[id(value)] for value in every)
    return [{name: next(read) for name in each} for each in outputs]


class DirectIO(TorchCheckpointIO):
    """Writes a checkpoint where it is to be, not by way of memory and TMPDIR as Lightning does."""

    def save_checkpoint(self, checkpoint: dict, path: Path, storage_options=None) -> None:
        """Write the file; `ResumePoint.save` gives it its name once it is whole."""
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Path, map_location=None, weights_only=None) -> dict:
        """Return the file's content, mapped: `resume_point` has read it from the disk already."""
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


class ResumePoint(Checkpoint):
    """Writes last.ckpt by the clock or every few slides, and at each epoch's end.

    It is written between updates only, so that no half-summed gradient is lost.

    Args:
        folder: of the run.
        minutes: between resume points within an epoch; 0 is none.
        every: slides between them, instead; 0 goes by the clock.
    """

    def __init__(self, folder: Path, minutes: float, every: int = 0):
        self.path, self.minutes, self.every = folder / RESUME, minutes, every
        self.saved = time.monotonic()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Let Lightning write to the file itself."""
        trainer.strategy.checkpoint_io = DirectIO()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Save if it is time; an epoch's last slide is left to `on_train_epoch_end`."""
        if not outputs:
            return  # the slide was skipped
        trainer.datamodule.trained(batch.turn)
        between_updates = module.slides_seen % module.steps.accumulate == 0
        if between_updates and not trainer.is_last_batch and self.due(module.slides_seen):
            self.save(trainer)

    def due(self, slides: int) -> bool:
        """Return whether it is time; of several processes the first one's clock counts."""
        if self.every or not self.minutes:
            return bool(self.every) and slides % self.every == 0
        return gather(time.monotonic() - self.saved >= 60 * self.minutes)[0]

    def on_train_epoch_end(self, trainer, module) -> None:
        """Save at each epoch's end."""
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the file under another name first, and keep the one before it."""
        if trainer.is_global_zero:
            if self.path.exists():  # killed now, the run goes on from the one before
                self.path.replace(self.path.with_name(BEFORE))
            with replacing(self.path) as partial:
                trainer.save_checkpoint(partial, weights_only=False)
        else:
            trainer.save_checkpoint(self.path, weights_only=False)  # waits for the one that writes
        self.saved = time.monotonic()


def resume_point(folder: Path) -> Path | None:
    """Return a run's last resume point that is whole; None if it has none.

    Raises:
        SettingsError: there are some, and all are damaged.
    """
    there = [folder / name for name in (RESUME, BEFORE) if (folder / name).exists()]
    for path in there:
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            damaged = str(error)
        if damaged is None:
            return path
        print(f"{path}: damaged ({damaged}): going back to the resume point before it", flush=True)
    if there:
        raise SettingsError(
            f"{folder}: its resume points are damaged. Delete "
            f"{' and '.join(path.name for path in there)} to start the run anew, or give another "
            "--name."
        )
    return None
