"""Measures what tells planted slides apart: colour, traces of planting, the frozen encoder.

Run by `python -m benchmarks.tissue_plants --check DIR`. Each row is a logistic regression on a few
numbers a slide, AUROC for each label: fitted on the train patients, on the validation and on the
test patients; and out-of-fold over all patients.

    rgb        mean and deviation of red, green and blue: must be at chance
    traces     energy at the borders of JPEG blocks, fine detail, gradients: must be at chance
    frozen     mean of ViT-S/14 features over tiles: should leave room to improve

Features are kept in DIR/features.npz, with a digest of the slides that they were made from.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openslide
import timm
import torch
from safetensors.torch import load_file
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from timm.models.vision_transformer import checkpoint_filter_fn
from tqdm import tqdm

from benchmarks.needle import WEIGHTS

MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
FOLDS = 5
TILE = 112


def read_tiles(path: Path) -> np.ndarray:
    """Return a slide's tiles, (n, 112, 112, 3) uint8, row by row."""
    with openslide.OpenSlide(path) as slide:
        rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    rows, columns = (side // TILE for side in rgb.shape[:2])
    tiles = rgb.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, TILE, TILE, 3)


def colours(tiles: np.ndarray) -> np.ndarray:
    """Return mean and deviation of red, green and blue over a slide, (6,)."""
    pixels = tiles.reshape(-1, 3).astype(float)
    return np.concatenate([pixels.mean(0), pixels.std(0)])


def traces(tiles: np.ndarray) -> np.ndarray:
    """Return what resampling and encoding could leave in a slide's tiles, means over tiles."""
    grey = tiles.astype(float).mean(-1)
    across, down = (np.abs(np.diff(grey, axis=axis)) for axis in (2, 1))
    border = np.arange(TILE - 1) % 8 == 7
    found = [
        across[:, :, border].mean((1, 2)) / across[:, :, ~border].mean((1, 2)),
        down[:, border].mean((1, 2)) / down[:, ~border].mean((1, 2)),
    ]
    fine = np.stack([ndimage.laplace(each) for each in grey])
    power = np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    radius = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE))
    bands = [power[:, (radius >= low) & (radius < low + 0.125)].sum(1)
             for low in (0.125, 0.25, 0.375)]  # fmt: skip
    found += [np.log(np.abs(fine).mean((1, 2))), np.log(fine.std((1, 2)))]
    found += [np.log(band / power.sum((1, 2))) for band in bands]
    found.append(np.log(np.hypot(across[:, :-1], down[:, :, :-1]).mean((1, 2))))
    return np.stack(found).mean(1)


@torch.no_grad()
def encode(slides: list[Path]) -> np.ndarray:
    """Return the frozen encoder's features of every tile, (slides, n, 384) float32."""
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=TILE, num_classes=0).eval()
    weights = {key: value.float() for key, value in load_file(WEIGHTS).items()}
    vit.load_state_dict(checkpoint_filter_fn(weights, vit))
    mean, sd = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, SD))
    found = []
    for path in tqdm(slides, "encode", unit=" slides", mininterval=10):
        x = torch.from_numpy(read_tiles(path)).permute(0, 3, 1, 2) / 255
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(vit((x - mean) / sd).float().numpy())
    return np.stack(found)


def features(folder: Path, slides: list[Path]) -> dict[str, np.ndarray]:
    """Return each row's numbers, (slides, k), from the folder where the slides are the same."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in slides)).hexdigest()
    kept = folder / "features.npz"
    if kept.exists():
        with np.load(kept) as file:
            if file["digest"] == digest:
                return {name: file[name] for name in ("rgb", "traces", "frozen")}
    tiles = [read_tiles(path) for path in slides]
    found = {"rgb": np.stack([colours(each) for each in tiles]),
             "traces": np.stack([traces(each) for each in tiles]),
             "frozen": encode(slides).mean(1)}  # fmt: skip
    np.savez(kept, digest=digest, **found)
    return found


def check(folder: Path, labels: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return AUROC by row, label and patients (val, test, out-of-fold)."""
    with (folder / "cohort.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = features(folder, [folder / row["slide_path"] for row in rows])
    split, patient = (np.array([row[key] for row in rows]) for key in ("split", "patient"))
    result = {}
    for name, x in numbers.items():
        result[name] = {}
        for label in labels:
            y = np.array([int(row[label]) for row in rows])
            result[name][label] = aurocs(x, y, split, patient)
    return result


def aurocs(
    x: np.ndarray, y: np.ndarray, split: np.ndarray, patient: np.ndarray
) -> dict[str, float]:
    """Return AUROC on the validation and test patients, and out-of-fold over all."""
    score = fitted(x[split == "train"], y[split == "train"])
    found = {part: float(roc_auc_score(y[split == part], score(x[split == part])))
             for part in ("val", "test")}  # fmt: skip
    out = np.zeros(len(y))
    fold = np.unique(patient, return_inverse=True)[1] % FOLDS
    for k in range(FOLDS):
        out[fold == k] = fitted(x[fold != k], y[fold != k])(x[fold == k])
    return found | {"out-of-fold": float(roc_auc_score(y, out))}


def fitted(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the score of a logistic regression on standardised numbers."""
    mean, sd = x.mean(0), x.std(0) + 1e-6
    # many numbers need a stronger penalty
    model = LogisticRegression(C=0.01 if x.shape[1] > 100 else 1.0, max_iter=1000)
    model.fit((x - mean) / sd, y)
    return lambda other: model.decision_function((other - mean) / sd)
