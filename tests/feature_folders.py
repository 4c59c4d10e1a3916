"""Feature files as each program lays them out, for tests of what reads them."""

import h5py
import numpy as np
import torch

STEP0, SIDE_UM = 112, 56.0  # 0.5 microns per level-0 pixel


def lattice(tiles, columns=3):
    """Corners of tiles on a lattice, level-0 pixels, row by row."""
    number = np.arange(tiles)
    return np.stack([number % columns, number // columns], -1) * STEP0 + np.array([560, 224])


def write_trident(folder, slide_id, z_TD, batch=False, **attrs):
    folder.mkdir(parents=True, exist_ok=True)
    said = {"patch_size": 56, "patch_size_level0": 112.0, "level0_magnification": 40,
            "target_magnification": 20.0, "overlap": 0, "name": slide_id}  # fmt: skip
    with h5py.File(folder / f"{slide_id}.h5", "w") as file:
        features = file.create_dataset("features", data=z_TD[None] if batch else z_TD)
        features.attrs.update(encoder="uni_v1", name=slide_id, savetodir=str(folder))
        coords = file.create_dataset("coords", data=lattice(z_TD.shape[0]))
        coords.attrs.update({**said, **attrs})
    return folder / f"{slide_id}.h5"


def write_trident_batch(folder, slide_id, z_TD):
    return write_trident(folder, slide_id, z_TD, batch=True)


def write_ours(folder, slide_id, z_TD, scores=True):
    path = write_trident(folder, slide_id, z_TD)
    with h5py.File(path, "r+") as file:
        file["features"].attrs.update(fingerprint="0123", precision="fp32")
        if scores:
            file["scores"] = np.linspace(-1, 1, len(z_TD), dtype=np.float32)
    return path


def write_clam(folder, slide_id, z_TD):
    """Two contours, the second's lattice begins within the first's step."""
    inside = folder / "h5_files"
    inside.mkdir(parents=True, exist_ok=True)
    with h5py.File(inside / f"{slide_id}.h5", "w") as file:
        file["features"] = z_TD
        file["coords"] = lattice(len(z_TD)).astype(np.int32)
    return inside / f"{slide_id}.h5"


def write_clam_pt(folder, slide_id, z_TD):
    inside = folder / "pt_files"
    inside.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(z_TD), inside / f"{slide_id}.pt")
    return inside / f"{slide_id}.pt"


def write_atlaspatch(folder, slide_id, z_TD, encoder="lunit_vit_small_patch8_dino"):
    """Coordinates with how each tile was read, facts on the file, a data set an encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide_id}.h5", "w") as file:
        file[f"features/{encoder}"] = z_TD
        read = np.tile([STEP0, STEP0, 0], (len(z_TD), 1))
        file["coords"] = np.concatenate([lattice(len(z_TD)), read], 1).astype(np.int32)
        file.attrs.update(patch_size=56, patch_size_level0=STEP0, level0_magnification=40,
                          target_magnification=20, overlap=0, num_patches=len(z_TD))  # fmt: skip
    return folder / f"{slide_id}.h5"


def write_stamp(folder, slide_id, z_TD):
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide_id}.h5", "w") as file:
        file["feats"] = z_TD.astype(np.float16)
        file["coords"] = (lattice(len(z_TD)) * SIDE_UM / STEP0).astype(np.float32)
        file.attrs.update(extractor="uni-1", unit="um", tile_size_um=SIDE_UM, tile_size_px=224,
                          feat_type="tile")  # fmt: skip
    return folder / f"{slide_id}.h5"
