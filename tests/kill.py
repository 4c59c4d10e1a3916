"""Callbacks that kill their own process, as a power cut would, or ask it to stop."""

import os
import signal

from lightning.pytorch.callbacks import Callback


class KillAfter(Callback):
    def __init__(self, slides: int):
        self.slides = slides

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.slides_seen == self.slides:
            os.kill(os.getpid(), signal.SIGKILL)


class AskAfter(Callback):
    """Sends a process, or one of several, a signal: 15 is a scheduler's, 2 is Ctrl+C."""

    def __init__(self, slides: int, number: int, rank: int | None = None):
        self.slides, self.number, self.rank = slides, number, rank

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.slides_seen == self.slides and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)
