"""Any slide encoder as one function of a slide's tiles.

Shapes: T tiles, D features, E numbers of a slide.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tapfm.data.bag import Places
from tapfm.settings import SettingsError
from tapfm.slide_encoders.published import read_published
from tapfm.slide_encoders.registry import SlideEncoder
from tapfm.slide_encoders.shipped import CALLS, load_shipped
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import TileSet

# of our aggregators, and not in the publishers' files
LACKING = {"head.weight", "head.bias", "center_D", "scale_D"}


@dataclass(frozen=True)
class OpenedEncoder:
    """A slide encoder with its weights, on a device."""

    row: SlideEncoder
    model: nn.Module

    @property
    def fingerprint(self) -> str:
        """Return 16 digits of the SHA-256 of all weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if name not in LACKING:
                digest.update(name.encode())
                digest.update(value.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def encode(
        self, z_TD: Tensor, coords0_T2: Tensor | None, step0: int, score_T: Tensor | None = None
    ) -> Tensor:
        """Return a slide's vector (E,), float32 on the CPU.

        Args:
            z_TD: features of its tiles.
            coords0_T2: their corners, level-0 pixels; None where the encoder needs none.
            step0: level-0 pixels from a tile to the next.
            score_T: their CLS scores; 0 unless given.

        Raises:
            SettingsError: what comes back is no vector of its width, or not finite.
        """
        device = next(self.model.parameters()).device
        z_TD = z_TD.float().to(device)
        if self.row.aggregator:
            places = Places.unknown(len(z_TD))
            if self.row.coords:
                places = Places.of([coords0_T2], [step0], 0.5)
            score_T = torch.zeros(len(z_TD)) if score_T is None else score_T
            tiles = TileSet.of(places, z_TD, score_T.to(device))
            found = self.model(tiles).embedding_E[None]
        else:
            where = None if coords0_T2 is None else coords0_T2[None].to(device)
            found = CALLS[self.row.key](self.model, z_TD[None], where, step0)
        shape = tuple(found.shape)
        if shape != (1, self.row.dim) or not found.isfinite().all():
            raise SettingsError(
                f"{self.row.key}: its model gave numbers of shape {shape}, not finite ones of "
                f"shape (1, {self.row.dim}). Give the published weights."
            )
        return found[0].float().cpu()


def open_slide_encoder(row: SlideEncoder, weights: Path, trust_code: bool) -> OpenedEncoder:
    """Return a slide encoder from its publisher's files, in eval mode on the CPU.

    Args:
        row: which.
        weights: its files, see `SlideEncoder.files`.
        trust_code: whether code in them may be run; of some there is none.

    Raises:
        SettingsError: as `load_shipped` and `read_published`, or the files are another encoder's.
    """
    if row.aggregator is None:
        return OpenedEncoder(row, load_shipped(row, weights, trust_code))
    options, state = read_published(weights)
    if options["name"] != row.aggregator:
        raise SettingsError(
            f"{row.key}: {weights} holds {options['name']}. Give {row.files} of {row.page}."
        )
    first = "mlp.0.weight" if row.key == "madeleine" else "project.0.weight"
    model = make_aggregator(options, state[first].shape[1], 1)
    wrong = model.load_state_dict(state, strict=False)
    lacking = set(wrong.missing_keys) - LACKING
    if lacking or wrong.unexpected_keys:
        raise SettingsError(
            f"{row.key}: {weights} lacks {len(lacking)} tensors and has "
            f"{len(wrong.unexpected_keys)} others, first {[*lacking, *wrong.unexpected_keys][0]}. "
            "Fetch it again."
        )
    return OpenedEncoder(row, model.eval())
