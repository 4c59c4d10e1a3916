"""The stand-in for the encoder in a model on features, whoever extracted them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from tapfm.settings import SettingsError

MODEL = "features"
"""Key of the foundation model in such a model's config."""


class FeatureEncoder(nn.Module):
    """The width of features and whether they have scores, by the names that `Encoder` has.

    Args:
        features: `ModelConfig.features`.
    """

    compiled, merging = False, None

    def __init__(self, features: Mapping[str, Any]):
        super().__init__()
        self.vit, self.dim, self.features = nn.Module(), int(features["dim"]), features
        self.row = SimpleNamespace(key=MODEL, prefix_tokens=0, licence="")

    def require_score(self, asked_by: str) -> None:
        """Refuse an aggregator of CLS scores where features come without.

        Raises:
            SettingsError: they do.
        """
        if not self.features["scores"]:
            raise SettingsError(
                f"{asked_by} weighs tiles by the encoder's CLS score, and the features in "
                f"{self.features['folder']} have no scores. Extract them with `tapfm features`, "
                "which keeps scores, or take model.aggregator: gated."
            )

    def require_coords(self, asked_by: str) -> None:
        """Refuse an aggregator of coordinates where features come without.

        Raises:
            SettingsError: they do.
        """
        if not self.features["coords"]:
            raise SettingsError(
                f"{asked_by} looks at where tiles lie, and the features in "
                f"{self.features['folder']} have no coordinates. Give files with coordinates, or "
                "take model.aggregator: gated."
            )

    def encode(self, tiles_CP: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Fail: there is no encoder.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(
            "the model was trained on features (data.features_dir) and has no encoder to read "
            "tiles with. Give it bags of features."
        )

    def sized(self, encode: Callable, chunk: int) -> Callable:
        """Return `encode` as it is; see `Encoder.sized`."""
        return encode


def need_encoder(path: Path, features: Mapping[str, Any] | None) -> None:
    """Refuse a saved model on features where pixels are to be read.

    Raises:
        SettingsError: it is one.
    """
    if features:
        raise SettingsError(
            f"{path}: was trained on features ({features.get('folder')}) and has no encoder, so it "
            "can neither read slides nor be exported. Use `tapfm test`, or train from slides."
        )


def check_features(features: Mapping[str, Any] | None, strategy: str, **of_encoder: Any) -> list:
    """Return what is wrong with a model's options where features stand in the encoder's place.

    Args:
        features: of the data; None where there is an encoder.
        strategy: its name.
        of_encoder: options of the encoder, each with whether it was set.
    """
    if features is None:
        return []
    faults = []
    if strategy != "frozen":
        faults.append(
            f"model.strategy {strategy} trains an encoder, and with data.features_dir there is "
            "none. Take model.strategy: frozen, or leave features_dir out."
        )
    if given := [f"model.{name}" for name, was_set in of_encoder.items() if was_set]:
        faults.append(
            f"{', '.join(given)}: options of an encoder, and with data.features_dir there is none. "
            "Leave each at its default, or leave features_dir out."
        )
    return faults
