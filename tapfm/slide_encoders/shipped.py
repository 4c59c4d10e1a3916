"""Slide encoders that come as code with their weights: TITAN, PRISM, CARE.

Their publishers' code is in the folder beside the weights, and `transformers` runs it. tapfm has no
copy of it, and runs it only where a user says so (`--trust-code`). How each is called is a function
here, by the publisher's own example.

    titan   model.encode_slide_from_patch_features(z (1, T, D), level-0 corners (1, T, 2), step)
    prism   model.slide_representations(z (1, T, D))["image_embedding"]
    care    model(z (1, T, D), T (1,), corners in tiles (1, T, 2)).wsi_embedding

Source: the model pages of TITAN, PRISM and CARE, and TRIDENT's calls of them.
Differs: in float32, where TRIDENT computes TITAN and PRISM in float16.

Shapes: T tiles, D features, E numbers of a slide.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.slide_encoders.registry import SlideEncoder


def load_shipped(row: SlideEncoder, folder: Path, trust_code: bool) -> nn.Module:
    """Return a publisher's model from its folder, in eval mode on the CPU.

    Args:
        row: which model.
        folder: of its repository.
        trust_code: whether the folder's code may be run.

    Raises:
        SettingsError: packages are missing, the folder is not that model's, or its code fails.
    """
    files = [path.name for path in sorted(folder.glob("*.py"))] if folder.is_dir() else []
    if not files or not (folder / "config.json").is_file():
        raise SettingsError(
            f"{row.key}: {folder} is not {row.files}. Fetch it from {row.page} ({row.licence}) and "
            "give that folder as --weights."
        )
    if not trust_code:
        raise SettingsError(
            f"{row.key} is its publisher's own code: {', '.join(files)} in {folder} would run on "
            "this machine. Read it, and add --trust-code."
        )
    if missing := [name for name in row.packages if find_spec(name) is None]:
        raise SettingsError(
            f"{row.key}: its publisher's code needs {', '.join(row.packages)}, and "
            f"{', '.join(missing)} cannot be imported. Run: pip install {' '.join(missing)}"
        )
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except Exception as error:  # a publisher's code may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SettingsError(
            f"{row.key}: its publisher's code in {folder} fails: {why}. Run: pip install what it "
            "names, or 'transformers<5', for which these models were written."
        ) from error
    return model.float().eval()


def _titan(model: Any, z_1TD: Tensor, coords0_1T2: Tensor, step0: int) -> Tensor:
    return model.encode_slide_from_patch_features(z_1TD, coords0_1T2, step0)


def _prism(model: Any, z_1TD: Tensor, coords0_1T2: Tensor | None, step0: int) -> Tensor:
    return model.slide_representations(z_1TD)["image_embedding"]


def _care(model: Any, z_1TD: Tensor, coords0_1T2: Tensor, step0: int) -> Tensor:
    count_1 = torch.tensor([z_1TD.shape[1]], device=z_1TD.device)
    return model(z_1TD, count_1, coords0_1T2 // step0).wsi_embedding


CALLS: dict[str, Callable[[Any, Tensor, Tensor | None, int], Tensor]] = {
    "titan": _titan,
    "prism": _prism,
    "care": _care,
}
"""Calls by key: each takes model, features, corners in level-0 pixels and their step."""
