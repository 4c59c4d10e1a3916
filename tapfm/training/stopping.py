"""Ends a run that is asked to stop: after the update in hand, with a resume point, and a word.

A scheduler sends SIGTERM, or SIGUSR1 some time before (Slurm's --signal), a user presses Ctrl+C
(SIGINT). The first is noted, and the run goes on to the end of its update; then every process saves
and stops at the same step, and the command ends with 128 + the signal's number, as the shell has
it: 143, 138, 130. What follows in a script does not run on half a model. Before the first update
and after the last one, and at a second Ctrl+C, it stops at once.

Until a run is at its end its folder holds a file `unfinished`, which `tapfm test` names. A lock
keeps a second run from writing there at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import lightning as L
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Checkpoint

from slides.errors import SettingsError
from slides.files import HOST
from tapfm.distributed import gather, several
from tapfm.training.callbacks import ResumePoint

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNFINISHED, LOCK = "unfinished", ".lock"


class RunStopped(BaseException):
    """A run was asked to stop, and has. No handler of errors on the way takes it for one."""

    def __init__(self, number: int, folder: Path, saved: bool):
        name = signal.Signals(number).name
        where = "a resume point was saved" if saved else "its last resume point stands"
        super().__init__(
            f"{folder}: stopped by {name}, unfinished; {where}. The same command goes on there."
        )
        self.exit_code = 128 + number


class RunBusy(SettingsError):
    """Another process trains in the same folder."""


class StopOnSignal(Checkpoint):
    """Notes signals to stop, and obeys between updates; the last of the callbacks.

    Args:
        folder: the run's.
        point: saves the resume point.
    """

    def __init__(self, folder: Path, point: ResumePoint):
        self.folder, self.point, self.asked, self.updating = folder, point, 0, False
        self.listens = False

    @contextmanager
    def listening(self, trainer: L.Trainer) -> Iterator[None]:
        """Listen in place of Lightning, whose handler waits for processes that may have gone.

        The handlers from before are put back. Python hears signals in its first thread alone, and
        not while that waits in torch for the other processes to come: till then signals just end
        one of several.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None
        before, heard = {}, signal.SIG_DFL if trainer.world_size > 1 else self.note
        self.listens = threading.current_thread() is threading.main_thread()
        if self.listens:
            before = {number: signal.signal(number, heard) for number in SIGNALS}
        try:
            yield
        finally:
            self.listens = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Listen from now on, when all processes have met."""
        for number in SIGNALS if self.listens else ():
            signal.signal(number, self.note)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Remember the signal; outside of updates, and a second Ctrl+C, are not waited for."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        if not self.updating:
            raise RunStopped(number, self.folder, saved=False)
        print(f"{signal.Signals(number).name}: stopping after this update", flush=True)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Wait for the end of an update from now on."""
        self.updating = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop if any process was asked since the last update; from now on at once."""
        self.updating = False
        if asked := max(gather(self.asked)):
            raise RunStopped(asked, self.folder, saved=False)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Save and stop between updates, all processes together if any was asked."""
        if module.slides_seen % module.steps.accumulate and not trainer.is_last_batch:
            return
        if asked := max(gather(self.asked)):
            saves = not trainer.is_last_batch  # the epoch's end is not complete here
            if saves:
                self.point.save(trainer)
            raise RunStopped(asked, self.folder, saves)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *more) -> None:
        """Stop within a validation, where one process need not wait for others."""
        if self.asked and not several():
            raise RunStopped(self.asked, self.folder, saved=False)


@contextmanager
def running(folder: Path, *, writes: bool = True) -> Iterator[None]:
    """Keep a run's folder to this run, and mark it as unfinished until its end.

    Args:
        folder: the run's.
        writes: whether this process is the one of a run that writes.

    Raises:
        RunBusy: another run is going on there. A run that was killed holds nothing.
    """
    if not writes:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock, mark = FileLock(folder / LOCK), folder / UNFINISHED
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunBusy(
            f"{folder}: another `tapfm fit` is running there ({mark.read_text().strip()}). Wait "
            "for its end, or give another --name or --run_dir."
        ) from None
    try:
        mark.write_text(f"{HOST}, process {os.getpid()}\n")
        yield
        mark.unlink(missing_ok=True)
    finally:
        lock.release()


def warn_if_unfinished(folder: Path) -> None:
    """Print a line if a run's folder is of one that did not reach its end."""
    if (folder / UNFINISHED).exists():
        print(
            f"{folder}: this run did not finish: its best weights so far are used. `tapfm fit` "
            "with the same settings goes on with it."
        )
