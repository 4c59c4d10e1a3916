"""Token merging: time of both passes, and how far features and scores move, by tokens merged.

    python -m benchmarks.token_merging [--rounds 3]

DINOv2's ViT-S/14 (12 blocks, 256 patches of a 224 px tile) on real labelled tiles, TAPFM_DATA's
`tiles`. Time is processor time a tile of pass 1 (no graph) and pass 2 (graph and backward), the
fastest of some rounds in turn. Drift is to the features of no merging: mean cosine of a tile's
features, less the mean of all tiles; Spearman correlation of the tiles' CLS scores; and what is
left of the use: AUROC of a linear probe for adenoma, trained on one half of each slide (by place)
and tested on the other.

Writes results/token_merging.csv and the table between the markers in README.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.record import RESULTS, facts, rewrite, write_rows
from tapfm.encoders.backbones import Encoder, load
from tapfm.reports.plain_table import markdown

DATA = Path(os.environ.get("TAPFM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
WEIGHTS = DATA / "weights" / "dinov2_vits14_timm_fp16.safetensors"
COUNTS = (0, 4, 8, 12, 20)
TARGET, REST = "adenoma", ("normal_mucosa", "muscle_stroma")
CHUNK = 16


def read_tiles() -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return pixels, whether each tile is adenoma, and whether it is of the training half."""
    with (DATA / "tiles" / "tiles.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["compartment"] in (TARGET, *REST)]
    pixels = [
        np.asarray(Image.open(DATA / "tiles" / "images" / row["file"]).convert("RGB"))
        for row in rows
    ]
    is_target = np.array([row["compartment"] == TARGET for row in rows])
    place = np.array([float(row["y"]) for row in rows])
    trains = np.zeros(len(rows), bool)
    for each in (TARGET, *REST):
        own = np.array([row["compartment"] == each for row in rows])
        trains |= own & (place < np.median(place[own]))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), is_target, trains


@torch.no_grad()
def features(encoder: Encoder, tiles: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return features and scores."""
    found = [encoder(chunk) for chunk in tiles.split(CHUNK)]
    z_TD, score_T = (torch.cat(each) for each in zip(*found, strict=True))
    return z_TD.numpy(), score_T.numpy()


def seconds(encoder: Encoder, tiles: Tensor) -> tuple[float, float]:
    """Return processor seconds a tile of pass 1 and of pass 2."""
    begun = time.process_time()
    with torch.no_grad():
        encoder(tiles)
    middle = time.process_time()
    z_TD, score_T = encoder(tiles)
    (z_TD.sum() + score_T.sum()).backward()
    encoder.zero_grad()
    return (middle - begun) / len(tiles), (time.process_time() - middle) / len(tiles)


def probe(z_TD: np.ndarray, is_target: np.ndarray, trains: np.ndarray) -> float:
    """Return the AUROC of a linear probe on the half that it was not trained on."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(z_TD[trains], is_target[trains])
    return float(roc_auc_score(is_target[~trains], model.decision_function(z_TD[~trains])))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    tiles, is_target, trains = read_tiles()
    encoders = {n: load("dinov2_vits14", str(WEIGHTS), tile_px=224, merge=n) for n in COUNTS}
    found = {n: features(encoder.eval(), tiles) for n, encoder in encoders.items()}
    took = [
        {n: seconds(encoder, tiles[:CHUNK]) for n, encoder in encoders.items()}
        for _ in range(rounds)
    ]
    plain_TD, plain_T = found[0]
    rows = []
    for n, (z_TD, score_T) in found.items():
        own, other = z_TD - plain_TD.mean(0), plain_TD - plain_TD.mean(0)
        size = np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
        blocks = len(encoders[n].vit.blocks) - 1
        first, second = (min(each[n][k] for each in took) for k in (0, 1))
        rows.append(
            {
                "merged": n, "patches_at_last": 256 - n * blocks, "tiles": len(tiles),
                "pass_1_ms": 1e3 * first, "pass_2_ms": 1e3 * second,
                "cosine": float(((own * other).sum(1) / size).mean()),
                "score_spearman": float(spearmanr(score_T, plain_T).statistic),
                "probe_auroc": probe(z_TD, is_target, trains), **facts("cpu"),
            }
        )  # fmt: skip
    write_rows(RESULTS / "token_merging.csv", rows)
    both = rows[0]["pass_1_ms"] + rows[0]["pass_2_ms"]
    table = [["merged a block", "patches at the last", "pass 1, ms a tile", "pass 2, ms a tile",
              "faster", "cosine", "scores, Spearman", "probe AUROC"]]  # fmt: skip
    for row in rows:
        table.append([
            str(row["merged"]), str(row["patches_at_last"]), f"{row['pass_1_ms']:.0f}",
            f"{row['pass_2_ms']:.0f}", f"{both / (row['pass_1_ms'] + row['pass_2_ms']):.2f} x",
            f"{row['cosine']:.3f}", f"{row['score_spearman']:.3f}", f"{row['probe_auroc']:.3f}",
        ])  # fmt: skip
    rewrite("token_merging", markdown(table))


if __name__ == "__main__":
    main()
