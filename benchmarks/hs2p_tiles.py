"""Runs hs2p over a cohort table slide by slide, for comparison in benchmarks/indexing.py.

    python -m benchmarks.hs2p_tiles TABLE TILE_PX MPP OUT

By its own published defaults (tissue by hue and saturation), but for the share of a tile that must
be tissue, which is ours. Imports nothing of tapfm, and no torch: its time and memory are its own.
Writes its coordinate files to OUT/tiles and a line a slide, `slide_id,tiles,seconds`, to
OUT/ledger.csv.

Source: hs2p 6.1's documented interface (Apache-2.0), `tile_slide` and `save_tiling_result`.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

from hs2p import (
    MaskSamplingConfig,
    SegmentationConfig,
    SlideSpec,
    TilingConfig,
    save_tiling_result,
    tile_slide,
)

MIN_TISSUE = (
    0.25  # of a tile: `slides.tiling.tissue.Tissue.min_fraction`; hs2p's own default is 0.01
)


def main(table: Path, tile_px: int, mpp: float, out: Path) -> None:
    """Tile every slide of a cohort table."""
    tiling = TilingConfig(
        backend="openslide", requested_spacing_um=mpp, requested_tile_size_px=tile_px,
        tolerance=0.05, overlap=0.0,
    )  # fmt: skip
    masks = MaskSamplingConfig(
        pixel_mapping={"background": (0,), "tissue": (1,)},
        colors={"background": None, "tissue": (157, 219, 129)},
        min_coverage={"tissue": MIN_TISSUE},
    )
    rows = []
    with table.open(newline="") as file:
        for slide in csv.DictReader(file):
            began = time.perf_counter()
            spec = SlideSpec(
                sample_id=slide["slide_id"],
                image_path=table.parent / slide["slide_path"],
                spacing_at_level_0=float(slide["mpp"]) if slide.get("mpp") else None,
            )
            segmentation = SegmentationConfig(method="hsv")
            result = tile_slide(spec, tiling=tiling, segmentation=segmentation, masks=masks)
            save_tiling_result(result, output_dir=out)
            seconds = time.perf_counter() - began
            rows.append((spec.sample_id, result.num_tiles, f"{seconds:.4f}"))
    with (out / "ledger.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", "tiles", "seconds"), *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
