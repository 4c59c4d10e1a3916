"""Slides for the tests: one that says where its pixels are, small stained ones, and the real ones.

`coordinate_slide` is a pyramid of 1531 x 1193 px (both prime) whose RGB is the level-0 position of
each pixel, so a tile says by itself where it was read. `small_slide` writes stained pyramids in a
tenth of a second. `shared_data` is the folder of real slides; its tests are skipped without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Before torch is loaded, here and in what tests start: models this small gain nothing from a second
# thread, and on a busy machine two that wait for each other take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import tifffile

from tests.browser import NAMES, Browser, find_browser

ROOT = Path(__file__).parent.parent
READERS = ("openslide-bin", "openslide-python", "tifffile", "zarr", "imagecodecs", "simplejpeg",
           "pydicom", "tiffslide", "hs2p")  # fmt: skip


def pytest_report_header() -> str:
    """Return the versions of the programs that slides are read with, ours and others."""
    found = []
    for name in READERS:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"readers: {', '.join(found)}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides, tiles and weights; `TAPFM_DATA` names another."""
    folder = Path(os.environ.get("TAPFM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "slides").is_dir():
        pytest.skip(f"no real slides at {folder}; set TAPFM_DATA to the folder that has them")
    return folder


@pytest.fixture(scope="session")
def browser():
    """A Chromium; tests are skipped without one."""
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path, none of Playwright's")
    with ExitStack() as stack:
        try:
            found = stack.enter_context(Browser(program))
        except (AssertionError, OSError) as error:  # one that may not run here, such as a snap
            pytest.skip(f"{program} does not start: {error}")
        yield found


@dataclass(frozen=True)
class CoordinateSlide:
    """A pyramid whose pixels are their own level-0 position: R, G the low bytes of x0, y0."""

    path: Path
    width0: int = 1531
    height0: int = 1193
    mpp: float = 0.25
    levels: int = 4

    def positions(self, rgb: np.ndarray) -> np.ndarray:
        """What the pixels say: (h, w, 3) -> (h, w, 2), x0 and y0."""
        low, high = rgb[..., :2].astype(int), rgb[..., 2].astype(int)
        return low + 256 * np.stack([high & 15, high >> 4], -1)

    def assert_shows(self, rgb: np.ndarray, x0: int, y0: int, size0: int, within0: float) -> None:
        """Check that a tile shows the square at (x0, y0), each pixel to `within0` level-0 pixels.

        Where a byte wraps within a pixel's reach a mean of codes is no code: those are left out,
        and must be few.
        """
        step0 = size0 / rgb.shape[0]
        centres = (np.arange(rgb.shape[0]) + 0.5) * step0 - 0.5
        truth = np.stack(np.meshgrid(x0 + centres, y0 + centres), -1)
        to_wrap = np.abs((truth + 0.5 + 128) % 256 - 128)
        clear = (to_wrap > 2 * step0 + 1).all(-1) if within0 else np.ones(rgb.shape[:2], bool)
        assert clear.mean() > 0.3, "too few pixels could be judged"
        assert np.abs(self.positions(rgb) - truth)[clear].max() <= within0


def coordinate_code(x0: np.ndarray, y0: np.ndarray) -> np.ndarray:
    """Positions below 4096 as RGB, reversibly."""
    return np.stack([x0 & 255, y0 & 255, (x0 >> 8) | (y0 >> 8) << 4], -1).astype(np.uint8)


@pytest.fixture(scope="session")
def coordinate_slide(tmp_path_factory) -> CoordinateSlide:
    """The slide that says where its pixels are; its levels are 1, 2.001, 4.006 and 8.03."""
    slide = CoordinateSlide(tmp_path_factory.mktemp("coordinates") / "coordinates.tif")
    with tifffile.TiffWriter(slide.path) as tiff:
        for level in range(slide.levels):
            x0, y0 = (
                np.floor((np.arange(side >> level) + 0.5) * side / (side >> level)).astype(int)
                for side in (slide.width0, slide.height0)
            )
            tiff.write(
                coordinate_code(*np.meshgrid(x0, y0)),
                tile=(128, 256),
                photometric="rgb",
                subfiletype=1 if level else 0,
                resolution=(1e4 / slide.mpp / 2**level,) * 2,
                resolutionunit="CENTIMETER",
            )
    return slide


def stained_picture(width: int, height: int, seed: int = 0, tissue: bool = True) -> np.ndarray:
    """Pale glass with one oval of pink tissue and dark nuclei, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    oval = ((x / width - 0.45) / 0.3) ** 2 + ((y / height - 0.55) / 0.35) ** 2 < 1
    picture = np.full((height, width, 3), (243, 242, 244), float)
    if tissue:
        picture[oval] = (214, 160, 200)
        coarse = rng.random((-(-height // 8), -(-width // 8))) < 0.3
        nuclei = np.kron(coarse, np.ones((8, 8)))[:height, :width] > 0
        picture[oval & nuclei] = (96, 62, 140)
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def write_pyramid(
    path: Path, picture: np.ndarray, mpp: float | None, levels: int = 3, power: int | None = None
) -> Path:
    """A tiled JPEG pyramid: Aperio style (resolution in the description) for .svs, else generic."""
    height, width = picture.shape[:2]
    aperio = path.suffix == ".svs"
    said = f"|AppMag = {power}" if power else ""
    said += f"|MPP = {mpp:.4f}" if mpp else ""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            step = 2**level
            options = {}
            if aperio:
                options["description"] = (
                    f"Aperio Image Library v12.0.0 \r\n{width}x{height} [0,0 {width}x{height}] "
                    f"(240x240) JPEG/RGB Q=90{said}"
                )
            elif mpp:
                options["resolution"] = (1e4 / mpp / step,) * 2
                options["resolutionunit"] = "CENTIMETER"
            tiff.write(
                np.ascontiguousarray(picture[step // 2 :: step, step // 2 :: step]),
                tile=(240, 240) if aperio else (256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 90},
                subfiletype=1 if level and not aperio else 0,
                metadata=None,
                **options,
            )
    return path


@pytest.fixture
def small_slide(tmp_path) -> Callable[..., Path]:
    """Writes a stained slide: small_slide("a.svs", mpp=0.2527) -> its path.

    The ending chooses the kind: .svs is Aperio style, .tif is generic. `mpp=None` leaves the
    resolution out; `tissue=False` leaves only glass; `power` is the objective's (Aperio only).
    """

    def write(
        name: str = "small.svs",
        mpp: float | None = 0.5,
        width: int = 1201,
        height: int = 907,
        seed: int = 0,
        tissue: bool = True,
        power: int | None = None,
    ) -> Path:
        picture = stained_picture(width, height, seed, tissue)
        return write_pyramid(tmp_path / name, picture, mpp, power=power)

    return write
