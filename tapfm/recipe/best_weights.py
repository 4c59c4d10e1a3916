"""The weights of a run's best epoch, in a file; later it holds the choice (`saved_model`)."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from tapfm.slide_model import model as models
from tapfm.slide_model.model import adapted_fingerprint

BEST = "best.safetensors"
ADAPTED, CONTROL = "adapted.safetensors", "control.safetensors"
INTERPOLATION = "interpolation.json"


class BestWeights(Callback):
    """Writes best.safetensors, the model of the best validation figure, such as macro AUROC.

    On a small split several epochs may reach the same figure; the lower loss decides then.
    """

    def __init__(self, folder: Path, figure: str = "auroc"):
        self.path, self.best, self.figure = folder / BEST, (-math.inf, -math.inf), figure

    def on_fit_start(self, trainer, module) -> None:
        """Clear away what another run has left, where this one begins anew."""
        if trainer.is_global_zero and not trainer.ckpt_path:
            for name in (BEST, ADAPTED, CONTROL, INTERPOLATION):
                (self.path.parent / name).unlink(missing_ok=True)

    def on_train_start(self, trainer, module) -> None:
        """Take back the choice of a run that had ended, since it goes on."""
        if trainer.is_global_zero:
            take_back_choice(self.path.parent)

    def on_train_epoch_start(self, trainer, module) -> None:
        """Have the last epoch validated, where the schedule ends, however seldom others are."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_validation_end(self, trainer, module) -> None:
        """Save the model if it is the best so far."""
        found = trainer.callback_metrics
        figure, loss = (float(found.get(f"val/{name}", math.nan)) for name in (self.figure, "loss"))
        if trainer.is_global_zero:
            self.offer(module, figure, loss, trainer.current_epoch)

    def offer(self, module, figure: float, loss: float, epoch: int) -> None:
        """Save the model if its figure is the best so far; `epoch` -1 is before the first."""
        score = tuple(-math.inf if math.isnan(value) else value for value in (figure, -loss))
        if score > self.best or not self.path.exists():
            self.best = max(self.best, score)
            facts = {
                f"val_{self.figure}": figure,
                "epoch": epoch,
                "fingerprint": adapted_fingerprint(module.slide_model),
                **module.provenance,
            }
            models.save(module.slide_model, self.path, **facts)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the best figure, and its loss, negated."""
        return {"best": list(self.best)}

    def load_state_dict(self, state) -> None:
        """Put back the best figure."""
        self.best = tuple(state["best"])


def take_back_choice(folder: Path) -> None:
    """Put the best epoch, as it was trained, in the place of the model that was chosen."""
    if (folder / ADAPTED).exists():
        os.replace(folder / ADAPTED, folder / BEST)
    for name in (CONTROL, INTERPOLATION):
        (folder / name).unlink(missing_ok=True)
