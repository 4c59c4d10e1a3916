"""Files that a run writes while it trains: metrics, memory, resume point.

A run killed at any moment and resumed ends with the same weights and the same metrics.csv as one
never killed: the resume point remembers how many rows each file had, and later rows are dropped.
"""

from __future__ import annotations

import csv
import math
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from slides.errors import SettingsError
from slides.files import WriteError, replacing, unwritten
from tapfm.distributed import gather
from tapfm.training.module import DivergedError

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

    def on_fit_start(self, trainer, module) -> None:
        """Begin both files, or cut them back to the resume point; the first process writes them."""
        if not trainer.is_global_zero:
            return
        path, keep = self.metrics.path.with_name("skipped.json"), bool(self.keep["metrics"])
        trainer.datamodule.skipped.write_to(path, keep=keep)
        self.metrics.start(self.keep["metrics"])
        self.memory.start(self.keep["memory"])

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Start the clock of tiles per second."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Write a row in each file, the same to all loggers, and tiles/s to the progress bar."""
        if not outputs:
            return  # the slide was skipped
        figures = {name: float(value) for name, value in outputs.items()}
        for name, optimizer in zip(("lr/head", "lr/encoder"), module.optimizers(), strict=True):
            figures[name] = optimizer.param_groups[0]["lr"]
        speed = batch.count / (time.perf_counter() - self.began)
        cost = {
            f"{phase}_{unit}": value
            for phase, measured in module.meter.take().items()
            for unit, value in measured.items()
        }
        bag = {"tiles": batch.count, "chunk": module.chunk, "tiles_per_s": speed}
        slide = {"slide_id": batch.slide_id}
        rows = gather(({**slide, **figures}, {**slide, **bag, **cost}))
        for learned, _ in rows:
            for name in ("train/loss", "train/head_grad_norm", "train/encoder_grad_norm"):
                if not math.isfinite(learned[name]):
                    raise DivergedError(f"{learned['slide_id']}: {name} is {learned[name]}")
        for number, (learned, spent) in enumerate(rows if trainer.is_global_zero else ()):
            step = (module.slides_seen - 1) * len(rows) + number + 1
            self.metrics.write({"step": step, "epoch": trainer.current_epoch, **learned})
            self.memory.write({"step": step, **spent})
        for logger in trainer.loggers:
            logger.log_metrics({**figures, **cost}, step=module.slides_seen)
        module.log("tiles/s", speed, prog_bar=True, logger=False, batch_size=1)
        module.log("loss", figures["train/loss"], prog_bar=True, logger=False, batch_size=1)

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
        """Return the number of rows of each file when a resume point is saved."""
        return {"metrics": self.metrics.rows, "memory": self.memory.rows}

    def load_state_dict(self, state) -> None:
        """Note how many rows to keep."""
        self.keep = state


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
