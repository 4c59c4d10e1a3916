"""A tiny cohort of real slide files and its config, for tests of whole runs in seconds."""

from pathlib import Path

import h5py
import yaml

from slides.files import file_fingerprint
from tests.conftest import stained_picture, write_pyramid

LABELS = ("EGFR", "KRAS")
SPLITS = ["train"] * 7 + ["val"] * 3 + ["test"] * 4
STEPS = {"encoder_lr": 1e-4, "head_lr": 1e-3, "accumulate": 2}


def write_cohort(folder: Path, **changes) -> Path:
    """Write slides, table and config below `folder`; return the config. `changes` go to `data`.

    The best epoch is saved as it is: tests of the choice after it ask for it.
    """
    (folder / "slides").mkdir(parents=True)
    lines = ["case_id,slide_id,slide_path,split," + ",".join(LABELS)]
    for number, split in enumerate(SPLITS):
        name = f"s{number}.{'svs' if number % 2 else 'tif'}"
        picture = stained_picture(311, 263, seed=number)
        write_pyramid(folder / "slides" / name, picture, 0.5, levels=2)
        second = "" if number == 2 else number // 2 % 2  # one unknown
        lines.append(f"c{number},s{number},slides/{name},{split},{number % 2},{second}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    config = {
        "run_dir": str(folder / "runs"),
        "resume_every": 2,
        "trainer": {"accelerator": "cpu", "max_epochs": 3},
        "model": {
            "model": "demo_vit",
            "chunk": 5,
            "drop_path": 0.1,
            "steps": {**STEPS, "interpolate": []},
        },
        "data": {
            "table": str(folder / "cohort.csv"),
            "index_dir": str(folder / "index"),
            "tiles": {"tile_px": 32, "mpp": 0.5, "tissue": {"min_area_um2": 1000.0}},
            "tiles_per_slide": 11,
            "colour": 0.1,
            "workers": 0,
            **changes,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def spoil(path):
    """Damage half of a slide's bytes where no check looks: its index still accepts the file."""
    data = bytearray(path.read_bytes())
    data[300 : len(data) // 2] = bytes(len(data) // 2 - 300)
    path.write_bytes(data)
    stamp(path)


def stamp(path):
    """Make the slide's index accept the file as it is now."""
    for index in path.parent.parent.rglob(f"{path.stem}_patches.h5"):
        with h5py.File(index, "r+") as file:
            file["coords"].attrs["slide_fingerprint"] = file_fingerprint(path)
