"""Measure how soon the viewer paints a slide of 100,000 x 80,000 pixels.

    python -m benchmarks.viewer [--out FOLDER]

The slide is a pyramid of 512 px JPEG tiles (0.25 microns per pixel), the same few tiles over and
over; 40,000 tiles of the model on it. A real Chromium opens the page of a server just started;
times are from the start of the navigation to the first deep zoom tile drawn, by the browser's
clock. The row goes to results/viewer.csv.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import tifffile
import uvicorn
from PIL import Image

from benchmarks.record import RESULTS, facts, write_rows
from tapfm.viewer.contents import Contents, Shown
from tapfm.viewer.server import listen, make_app
from tests.browser import Browser, find_browser
from tests.conftest import stained_picture

WIDTH, HEIGHT, TILE, SIDE = 100_000, 80_000, 512, 448
PATIENCE = 60  # s


def write_slide(path: Path) -> None:
    """Write the pyramid, from tiles that were compressed once."""
    picture = stained_picture(4 * TILE, 4 * TILE)
    squares = [picture[y : y + TILE, x : x + TILE] for y in range(0, 4 * TILE, TILE)
               for x in range(0, 4 * TILE, TILE)]  # fmt: skip
    packed = []
    for each in squares:
        Image.fromarray(each).save(buffer := io.BytesIO(), "JPEG", quality=80)
        packed.append(buffer.getvalue())
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in range(0, 8, 2):
            width, height = WIDTH >> level, HEIGHT >> level
            count = -(-width // TILE) * -(-height // TILE)
            tiff.write(
                (packed[n % len(packed)] for n in range(count)),
                shape=(height, width, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr",
                subsampling=(2, 2), compression="jpeg", subfiletype=1 if level else 0,
                resolution=(4e4 / 2**level,) * 2, resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip


def write_weights(path: Path) -> int:
    """Write weights of tiles on the whole slide; return their number."""
    x0, y0 = np.meshgrid(np.arange(0, WIDTH - SIDE, SIDE), np.arange(0, HEIGHT - SIDE, SIDE))
    coords0, draw = np.stack([x0.ravel(), y0.ravel()], 1), np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["weights"] = draw.dirichlet(np.ones(len(coords0))).astype(np.float32)
        file["predictions"] = draw.random((len(coords0), 3)).astype(np.float32)
        file.create_dataset("coords", data=coords0).attrs["patch_size_level0"] = SIDE
    return len(coords0)


def first_paint(contents: Contents) -> float:
    """Return seconds from opening the page of a new server to its first deep zoom tile."""
    server = uvicorn.Server(uvicorn.Config(make_app(contents), log_level="error", lifespan="off"))
    listening = listen(0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with Browser(find_browser()) as browser:
            end = time.perf_counter() + PATIENCE
            browser.open(f"http://127.0.0.1:{listening.getsockname()[1]}/")
            while not (drawn := browser.ask("view.state().drawn")):
                assert time.perf_counter() < end, browser.complaints()
                time.sleep(0.2)
            return drawn / 1000
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def main() -> None:
    """Write the slide, open it five times, record the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the slide; a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        slide, weights = Path(folder) / "large.tif", Path(folder) / "large.h5"
        write_slide(slide)
        tiles = write_weights(weights)
        known = {"case": "c", "targets": {}, "predicted": {}, "error": None}
        shown = Shown("large", slide, weights, known)
        contents = Contents("bench", "test", [shown], ("p_a", "p_b", "p_c"), True)
        seconds = sorted(first_paint(contents) for _ in range(5))
        row = {"width": WIDTH, "height": HEIGHT, "tiles": tiles,
               "slide_mb": round(slide.stat().st_size / 1e6),
               "first_paint_s": round(seconds[2], 2), "least_s": round(seconds[0], 2),
               "most_s": round(seconds[-1], 2)}  # fmt: skip
        print(row)
        write_rows(RESULTS / "viewer.csv", [row | facts("cpu")])


if __name__ == "__main__":
    main()
