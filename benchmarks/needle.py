"""The needle cohort: real tissue, known tiles, the whole pipeline, real weights.

    python -m benchmarks.needle            prepare, train end to end, compare on the val split

90 slides of 40 real H&E tiles; in a positive, 2 to 6 tiles come from an adenoma's head. One
patient carries that class and its borders were drawn by eye, so this measures the trainer and is no
clinical claim; the RGB row says how much colour alone gives. Tiles: Pathology Atlas, CC BY 4.0,
Serdar Balci / Memorial Pathology, doi 10.5281/zenodo.6382734.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path

import h5py
import numpy as np

from tapfm.cli import main as tapfm

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TAPFM_DATA", ROOT.parent / "shared" / "data"))
CONFIG = ROOT / "configs" / "cohorts" / "needle.yaml"
TABLE = ROOT / "data" / "needle" / "cohort.csv"
WEIGHTS = DATA / "weights" / "dinov2_vits14_timm_fp16.safetensors"


def prepare() -> None:
    """The cohort's table in our columns. Each slide is its own case: sources are mixed in all."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with (DATA / "needle" / "slides.csv").open() as file, TABLE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["case_id", "slide_id", "slide_path", "split", "ADENOMA"])
        for row in csv.DictReader(file):
            path = (DATA / "needle" / "slides" / f"{row['slide_id']}.tif").resolve()
            writer.writerow([row["slide_id"], row["slide_id"], path, row["split"], row["label"]])


def tile_auroc(run: Path) -> float:
    """Do tile weights find the planted tiles? Mean AUROC over positive val slides."""
    from tapfm.metrics import auroc

    truth: dict[str, dict[tuple[int, int], int]] = {}
    with (DATA / "needle" / "tiles.csv").open() as file:
        for row in csv.DictReader(file):
            place = int(row["x"]), int(row["y"])
            truth.setdefault(row["slide_id"], {})[place] = int(row["target"])
    each = []
    for path in sorted((run / "weights_val").glob("*.h5")):
        with h5py.File(path) as file:
            weights, coords = file["weights"][:], file["coords"][:]
        target = np.array([truth[path.stem][tuple(xy)] for xy in coords.tolist()], float)
        if target.any():
            each.append(auroc(target, weights))
    return float(np.mean(each))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "needle")
    parser.add_argument("--arms", nargs="+", default=["tapfm_gated"])
    parser.add_argument("--seed", type=int, default=0)
    known, further = parser.parse_known_args()
    prepare()
    common = ["--config", str(CONFIG), "--run_dir", str(known.run), "--model.weights", str(WEIGHTS)]
    result = {}
    for arm in known.arms:
        began = time.perf_counter()
        code = tapfm(
            ["fit", *common, "--seed_everything", str(known.seed), "--model.aggregator", arm]
            + further
        )
        if code:
            return code
        result[arm] = {"fit_s": time.perf_counter() - began}
    code = tapfm(["test", "--run", str(known.run), "--split", "val"])
    for arm in known.arms:
        result[arm]["tile_auroc"] = tile_auroc(known.run / arm)
    (known.run / "needle.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
