"""`tapfm doctor`: checks the installation, and that a model loads as its publisher meant it.

    tapfm doctor                                      versions, machine, OpenSlide
    tapfm doctor --model uni --weights uni.safetensors

With a model, three checks: the weights must fit it; the CLS row that scores a tile must equal the
row of the block's own attention matrix, read from an unfused block; and the printed fingerprint
(`encoders.fingerprint`) tells on any machine whether two people have the same weights.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from tapfm import __version__
from tapfm.encoders.backbones import BackboneError, Encoder, load
from tapfm.encoders.fingerprint import fingerprint, known_tiles
from tapfm.encoders.tail import TOLERANCE

PACKAGES = (
    "torch", "torchvision", "timm", "lightning", "numpy", "zarr", "h5py", "tifffile", "imagecodecs",
    "openslide-python", "openslide-bin",
)  # fmt: skip
CLS_TOLERANCE = 1e-5  # float32 softmax; another row or a missing norm is off by 1e-3 or more
GIB = 2**30

Lines = list[tuple[str, str]]


def run_doctor(model: str | None = None, weights: str | None = None) -> int:
    """Print what was found; return 0 if all is well, 1 if not, 2 if the model did not load."""
    _print("Software", software())
    _print("Machine", machine())
    slides, well = slide_reading()
    _print("Slides", slides)
    if model is not None:
        try:
            encoder = load(model, weights).eval()
        except BackboneError as error:
            print(f"tapfm: {error}", file=sys.stderr)
            return 2
        found, right = examine(encoder)
        _print("Model", found)
        well = well and right
    print("All is well." if well else "Not well: see the lines marked FAILED.")
    return 0 if well else 1


def software() -> Lines:
    """Return versions of the packages that results depend on."""
    lines = [("tapfm", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            lines.append((name, version(name)))
        except PackageNotFoundError:
            lines.append((name, "not installed"))
    return lines


def machine() -> Lines:
    """Return processor, memory and GPUs."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count()
    lines = [("system", f"{platform.system()} {platform.machine()}"), ("cores", str(cores))]
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        lines.append(("memory", f"{memory:.1f} GiB"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        lines.append(("memory", "unknown"))
    for index in range(torch.cuda.device_count()):
        each = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if each.major >= 8 else "no bf16"  # Ampere is the first with it
        lines.append(
            (f"gpu {index}", f"{each.name}, {each.total_memory / GIB:.1f} GiB, CUDA "
             f"{torch.version.cuda}, capability {each.major}.{each.minor}, {bf16}")
        )  # fmt: skip
    return (
        lines if torch.cuda.device_count() else [*lines, ("gpu", "none: training runs on the CPU")]
    )


def slide_reading() -> tuple[Lines, bool]:
    """Return whether OpenSlide loads, opens a new pyramid and reads the right pixels."""
    try:
        import openslide
        import tifffile

        lines = [("openslide library", openslide.__library_version__)]
        pixels = known_tiles(1, 256)[0].permute(1, 2, 0).contiguous().numpy()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "doctor.tif"
            tifffile.imwrite(path, pixels, photometric="rgb", tile=(128, 128))
            with openslide.OpenSlide(path) as slide:
                read = np.asarray(slide.read_region((17, 5), 0, (101, 67)))[..., :3]
        if not np.array_equal(read, pixels[5 : 5 + 67, 17 : 17 + 101]):
            return [*lines, ("read a slide", "FAILED: other pixels than were written")], False
        return [*lines, ("read a slide", "yes, the pixels written")], True
    except Exception as error:  # many kinds: no library, a wrong one, a broken build
        reason = (
            f"FAILED: {type(error).__name__}: {error}. Try: pip install --upgrade openslide-bin"
        )
        return [("openslide library", reason)], False


def examine(encoder: Encoder) -> tuple[Lines, bool]:
    """Return a loaded model's facts and whether all checks passed; leaves it in float64."""
    row, vit = encoder.row, encoder.vit
    count = sum(p.numel() for p in vit.parameters())
    verdict, right = "none: tiles are weighed by learned attention only", True
    if encoder.tap is not None:
        worst = cls_row_error(encoder)
        verdict = f"largest difference {worst:.1e}, at most {CLS_TOLERANCE:.0e} is right"
        right = worst <= CLS_TOLERANCE
        if not right:
            verdict = f"FAILED: {verdict}. The tile score cannot be trusted."
    tail = f"no: {encoder.no_tail}"
    if encoder.tail is not None:
        worst = tail_error(encoder)
        tail = f"yes, differs from the whole block by {worst:.1e}, at most {TOLERANCE:.0e} is right"
        if worst > TOLERANCE:
            tail, right = f"FAILED: {tail}. Features cannot be trusted.", False
    return [
        ("model", f"{row.key}, {row.source}"),
        ("licence", row.licence),
        ("gate", f"accept the licence at {row.page}" if row.gated else "none"),
        ("parameters", f"{count:,}"),
        ("feature", f"{row.feature}, {encoder.dim} numbers a tile, extracted in {row.precision}"),
        ("input", f"{row.tile_px} px at {row.mpp:g} microns per pixel"),
        *([("elsewhere", row.note)] if row.note else []),
        ("CLS row", verdict),
        ("CLS tail", tail),
        ("fingerprint", fingerprint(encoder)),
    ], right


@torch.no_grad()
def cls_row_error(encoder: Encoder) -> float:
    """Return the largest difference of the tap's CLS row from the block's attention matrix."""
    pixels = encoder.pixels(known_tiles(2, encoder.tile_px))
    with encoder.reading():
        encoder.vit.forward_features(pixels)  # the path used in training
    row_CHN = encoder.tap.take_row().softmax(-1)
    attn, caught = encoder.vit.blocks[-1].attn, []
    fused, attn.fused_attn = attn.fused_attn, False
    hook = attn.attn_drop.register_forward_hook(lambda _m, _a, matrix: caught.append(matrix))
    try:
        encoder.vit.forward_features(pixels)  # the whole block
    finally:
        hook.remove()
        attn.fused_attn = fused
    return _worst((row_CHN - caught[0][:, :, 0]).abs().max())


@torch.no_grad()
def tail_error(encoder: Encoder) -> float:
    """Return the largest relative difference of features and scores from a whole last block."""
    tiles = known_tiles(2, encoder.tile_px)
    whole = encoder.read(encoder.vit.forward_features(encoder.pixels(tiles)))
    pairs = zip(encoder(tiles), whole, strict=True)
    return _worst(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())


def _worst(error: torch.Tensor) -> float:
    return error.item() if error == error else float("inf")  # nan would pass every comparison


def _print(title: str, lines: Lines) -> None:
    print(title)
    for name, value in lines:
        print(f"  {name:<18} {value}")
    print()
