# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # The first hour, in Python
# Five functions on a demo cohort of twelve painted slides: a minute or two on a laptop, no GPU.
# Such a cohort shows how it is done, and its figures show nothing.

# %%
from pathlib import Path

import yaml

from slides.demo.cohort import write_demo
from tapfm import features, fit, load_encoder, open_slide, predict

table = write_demo(Path("demo"), slides=12, workers=0, progress=False)
slides = sorted((table.parent / "slides").glob("*.*"))

# %% [markdown]
# ## A slide and its tiles
# Tiles are sized in microns per pixel, and only those with tissue are kept.

# %%
slide = open_slide(slides[0], tile_px=112, mpp=0.5)
print(slide.name, len(slide), "tiles; a tile is", slide.side0, "pixels of the scan")
slide.tile(0).shape

# %% [markdown]
# ## What an encoder makes of it

# %%
found = features(slides[0], "demo_vit")
found.features.shape, found.scores.shape

# %% [markdown]
# ## Training the encoder
# A config holds only what differs from the defaults; `tapfm fit --help` lists all.

# %%
config = {
    "run_dir": "runs",
    "trainer": {"accelerator": "cpu", "max_epochs": 1},
    "model": {"model": "demo_vit", "aggregator": "mean", "steps": {"interpolate": []}},
    "data": {
        "table": str(table),
        "index_dir": "index",
        "tiles": {"tile_px": 112, "mpp": 0.5},
        "tiles_per_slide": 8,
        "workers": 0,
    },
}
Path("config.yaml").write_text(yaml.safe_dump(config))
run = fit("config.yaml", {"trainer.enable_progress_bar": False})

# %% [markdown]
# ## Predicting a slide

# %%
predict(slides[:1], run / "best.safetensors")

# %% [markdown]
# ## The adapted encoder, as a module of torch

# %%
encoder = load_encoder(run / "best.safetensors")
tiles = next(slide.chunks(4))
z, score = encoder(tiles)
z.shape
