"""Two classes of patterned tiles in folders, and the arguments of a run on them."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32


def write_tiles(root: Path, counts=(("train", 11), ("val", 6), ("test", 6))) -> Path:
    """[part]/[checked|striped]/[case]/[picture], on tints that say nothing of the class."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for part, count in counts:
        for name, pattern in (("checked", x // 4 + y // 4), ("striped", y // 4)):
            for n in range(count):
                folder = root / part / name / f"{part}-{n // 2}-{name}"
                folder.mkdir(parents=True, exist_ok=True)
                dark = 80 * (pattern % 2)[..., None]
                pixels = rng.integers(190, 220, 3) - dark + rng.normal(0, 8, (SIDE, SIDE, 3))
                picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                picture.save(folder / f"{part}-{name}-{n}.png")
    return root


def arguments(tiles: Path, runs: Path, *more: str) -> list[str]:
    """Of `tapfm fit-tiles`: two epochs, batches of 7, on the CPU."""
    return [
        "fit-tiles", "--data.source", str(tiles), "--run_dir", str(runs),
        "--data.tile_px", str(SIDE), "--data.batch", "7", "--data.workers", "0",
        "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--resume_every", "2",
        "--model.steps.head_lr", "1e-3", *more,
    ]  # fmt: skip
