"""What a run tells: before it trains what learns and on how many slides; then how far it is.

The bar, status.json and, where the output is no terminal, a line every half minute say the same:
place in the run, tiles a second, best so far, and the time left of the whole run.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from slides.cohort.counts import count_table
from slides.files import write_json
from tapfm.data.datamodule import SlideData
from tapfm.slide_model.aggregators import name_of
from tapfm.training.callbacks import RunLog
from tapfm.training.module import SlideModule

STATUS, EVERY = "status.json", 30.0  # seconds between two of them
PLURAL = {"slide": "slides", "batch": "batches"}


def announce(folder: Path, module: SlideModule, data: SlideData) -> None:
    """Print what is trained, on how many cases, slides and label values of each split."""
    model_config = module.slide_model.model_config
    print(
        f"{folder}: {encoder_of(module)}; aggregator {name_of(model_config.aggregator)}; predicts "
        f"{', '.join(module.task.targets)}; chunks of {module.chunk} tiles in "
        f"{model_config.precision}"
    )
    table = count_table(data.cohort)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        numbers = (cell.rjust(max(width, 7)) for cell, width in zip(cells, widths[1:], strict=True))
        print(f"  {name.ljust(widths[0])}{''.join(numbers)}")
    if left := len(data.cohort.rows) - len(data.used):
        print(
            f"{left} of {len(data.cohort.split('train'))} training slides have no known label: "
            "left out, neither indexed nor encoded"
        )


def encoder_of(module: SlideModule) -> str:
    """Return what a run has for an encoder, and what of it learns, in words."""
    config, encoder = module.slide_model.model_config, module.slide_model.encoder
    if known := config.features:
        made_by = f" of {known['encoder']}" if known["encoder"] else ""
        return f"features{made_by} in {known['folder']}, {known['dim']} a tile, strategy frozen"
    what = module.strategy.describe(encoder.vit)
    return f"{config.model}, {what} at {module.encoder_lr:g}"


class Clock:
    """What is left of a run in seconds, from the mean time of a training and a validation slide."""

    def __init__(self):
        self.seconds, self.slides = {"train": 0.0, "val": 0.0}, {"train": 0, "val": 0}
        self.last = time.monotonic()

    def start(self) -> None:
        """Begin to measure the next slide."""
        self.last = time.monotonic()

    def took(self, part: str) -> None:
        """Count a slide of `train` or `val`, and begin the next."""
        now = time.monotonic()
        self.seconds[part] += now - self.last
        self.slides[part] += 1
        self.last = now

    def left(self, train: int, val: int) -> float | None:
        """Return seconds for so many slides more; None before the first is done.

        A validation slide that was never seen is taken to last as long as one of training.
        """
        means = {
            part: self.seconds[part] / count if count else None
            for part, count in self.slides.items()
        }
        mean = means["train"] or means["val"]
        if mean is None:
            return None
        return train * mean + val * (mean if means["val"] is None else means["val"])


class RunStatus(Callback):
    """Writes status.json every half minute: place in the run, speed, best so far, time left.

    Where the output is no terminal (a log file, Slurm, CI) it prints the same as a line.

    Args:
        folder: of the run.
        best: has the best figure so far, and its name.
        looks: passes over training and validation slides after the last epoch.
        lines: whether to print lines; None: where the output is no terminal.
        unit: what a step takes: a `slide`, or of tiles a `batch`.
    """

    def __init__(
        self,
        folder: Path,
        best: Any,
        looks: int = 0,
        lines: bool | None = None,
        unit: str = "slide",
    ):
        self.path, self.best, self.looks, self.unit = folder / STATUS, best, looks, unit
        self.lines = not sys.stdout.isatty() if lines is None else lines
        self.clock, self.written, self.tiles, self.begun = Clock(), -math.inf, 0, time.monotonic()
        self.validated = 0  # slides of the validation that is going on

    def on_train_epoch_start(self, trainer, module) -> None:
        """Begin to measure."""
        self.clock.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Count the slide and, if it is time, tell."""
        self.clock.took("train")
        self.tiles += batch.count if batch else 0
        self.tell(trainer, batch_idx + 1, outputs)

    def on_validation_start(self, trainer, module) -> None:
        """Begin to measure."""
        self.validated = 0
        self.clock.start()

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *more) -> None:
        """Count the slide and, if it is time, tell."""
        self.clock.took("val")
        self.validated = batch_idx + 1
        self.tell(trainer, trainer.num_training_batches)

    def on_validation_end(self, trainer, module) -> None:
        """Go on measuring after the figures."""
        self.validated = 0
        self.clock.start()

    def on_fit_end(self, trainer, module) -> None:
        """Tell the end."""
        self.written = -math.inf
        self.tell(trainer, trainer.num_training_batches)

    def seconds_left(self, trainer, done: int) -> float | None:
        """Return seconds to the end of the run, with what is chosen after the last epoch."""
        each, every = trainer.num_training_batches, trainer.check_val_every_n_epoch or 1
        val = sum(trainer.num_val_batches)
        epochs = trainer.max_epochs - trainer.current_epoch - 1
        checks = -(-trainer.max_epochs // every) - trainer.current_epoch // every
        looks = self.looks * (each + val)
        return self.clock.left(
            max(0, epochs * each + each - done), max(0, checks * val - self.validated) + looks
        )

    def facts(self, trainer, done: int, loss: float | None = None) -> dict[str, Any]:
        """Return what status.json holds."""
        best = self.best.best[0]
        return {
            "epoch": min(trainer.current_epoch + 1, trainer.max_epochs),
            "epochs": trainer.max_epochs,
            self.unit: done,
            PLURAL[self.unit]: trainer.num_training_batches,
            "validated": self.validated,
            "loss": loss,
            "tiles_per_s": self.tiles / max(self.clock.seconds["train"], 1e-9),
            "best": {self.best.figure: best} if math.isfinite(best) else None,
            "seconds_left": self.seconds_left(trainer, done),
        }

    def tell(self, trainer, done: int, outputs: Any = None) -> None:
        """Write status.json and print a line, at most every `EVERY` seconds: it waits for a GPU."""
        if not trainer.is_global_zero or time.monotonic() - self.written < EVERY:
            return
        self.written = time.monotonic()
        loss = float(outputs["train/loss"]) if outputs else None
        facts = self.facts(trainer, done, loss)
        write_json(self.path, facts)
        if self.lines:
            print(status_line(facts), flush=True)


def status_line(facts: dict[str, Any]) -> str:
    """Return the facts of a run's status as a line."""
    parts = [f"epoch {facts['epoch']} of {facts['epochs']}"]
    unit = next(unit for unit in PLURAL if unit in facts)
    parts.append(
        f"validation {unit} {facts['validated']}"
        if facts["validated"]
        else f"{unit} {facts[unit]} of {facts[PLURAL[unit]]}"
    )
    if facts["loss"] is not None:
        parts.append(f"loss {facts['loss']:.3f}")
    parts.append(f"{facts['tiles_per_s']:.3g} tiles/s")
    parts += [f"best {name} {value:.3f}" for name, value in (facts["best"] or {}).items()]
    if facts["seconds_left"] is not None:
        parts.append(f"{hours(facts['seconds_left'])} left")
    return ", ".join(parts)


def hours(seconds: float) -> str:
    """Return a time in words: `40 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress(TQDMProgressBar):
    """Lightning's bar without the version number, with the best figure and the run's time left."""

    def get_metrics(self, trainer, module):
        """Return loss, tiles/s, the figure by which weights are chosen, its best, time left."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        log = next((each for each in trainer.callbacks if isinstance(each, RunLog)), None)
        metrics = {**(log.shown if log else {}), **metrics}
        status = next((each for each in trainer.callbacks if isinstance(each, RunStatus)), None)
        if status is not None:
            bar = self.train_progress_bar
            facts = status.facts(trainer, 0 if bar is None else int(bar.n))
            if facts["best"]:
                (metrics["best"],) = facts["best"].values()
            if facts["seconds_left"] is not None:
                metrics["left"] = hours(facts["seconds_left"])
        return metrics
