"""One prefetcher reads slide after slide, for features, predictions and heatmaps alike.

What `features`, `predict` and `heatmap` write does not depend on the number of processes or on
reading ahead; a process that dies is an error with the name of its slide.
"""

import os
import signal
from dataclasses import replace

import pytest
import torch
import yaml

from slides.errors import IndexSettingsError, StainError
from slides.streaming import prefetch as crews
from slides.streaming.settings import index_and_cache
from slides.streaming.tile_source import TileSource
from tapfm.cli import main
from tapfm.config import read_source
from tapfm.encoders import backbones
from tapfm.slide_model import model as models
from tapfm.training.fit import read_config
from tests.cohorts import LABELS, write_cohort

SLIDES = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert main(["index", "--config", str(config)]) == 0
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a model with random weights."""
    torch.manual_seed(0)
    model_config = models.ModelConfig("demo_vit", "tapfm_gated", LABELS, 32, 0.5)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=32))
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    models.save(model, path, tissue={"min_area_um2": 1000.0})
    return path


@pytest.fixture
def started(monkeypatch):
    """Return the numbers of workers with which a prefetcher's processes were started."""
    counts, begin = [], crews.Workers.__init__

    def counted(self, slides, size, workers, slots):
        counts.append(workers)
        begin(self, slides, size, workers, slots)

    monkeypatch.setattr(crews.Workers, "__init__", counted)
    return counts


@pytest.mark.parametrize("workers", [0, 2])
def test_each_slide_comes_as_it_does_alone(config, started, workers):
    source = read_source([config])
    tile_source, rows = TileSource.of(source), list(source.rows)[:SLIDES]
    seen = []
    for row, tiles in tile_source.streamed(rows, workers):
        alone = torch.cat(list(tile_source.tiles(row).split(7)))
        assert torch.equal(torch.cat(list(tiles.split(5))), alone)
        seen.append(row)
    assert seen == rows
    assert started == [2] * (workers > 0)


def test_a_case_comes_as_its_slides_one_after_the_other(config):
    source = read_source([config])
    tile_source, (one, other, *_) = TileSource.of(source), source.rows
    case = replace(one, slide_id="c", parts=(one, other))
    ((row, tiles),) = tile_source.streamed([case], 2)
    assert row is case
    alone = torch.cat([part for each in (one, other) for part in tile_source.tiles(each).split(7)])
    assert torch.equal(torch.cat(list(tiles.split(5))), alone)


def written(folder):
    """Return every file's bytes, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(verb, config, saved, workers):
    """Write features of a cohort, or predictions for its slides; return what is written."""
    source = read_source([config])
    out = config.parent / f"{verb}_{workers}"
    what = ["--config", config] if verb == "features" else [r.path for r in source.rows[:SLIDES]]
    model = "demo_vit" if verb == "features" else saved
    command = [verb, *what, "--model", model, "--out", out, "--workers", workers]
    return main([str(each) for each in command]), out


@pytest.mark.parametrize("verb", ["features", "predict", "heatmap"])
def test_processes_are_started_once_and_change_no_byte(config, saved, started, verb):
    code, here = run(verb, config, saved, 0)
    assert code == 0
    assert not started
    code, there = run(verb, config, saved, 2)
    assert code == 0
    assert started == [2]
    # features name the folder they are in
    found = [
        {name: data.replace(b"features_0", b"features_2") for name, data in written(each).items()}
        for each in (here, there)
    ]
    assert len(found[0]) > SLIDES
    assert found[0] == found[1]


@pytest.mark.parametrize("verb", ["features", "predict"])
def test_a_process_that_dies_is_an_error_with_its_slides_name(
    config, saved, verb, monkeypatch, capsys
):
    index_and_cache(read_source([config]))
    opened, parent = TileSource.__call__, os.getpid()

    def deadly(self, row):
        if row.slide_id == "s2" and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(self, row)

    monkeypatch.setattr(TileSource, "__call__", deadly)
    code, out = run(verb, config, saved, 3)
    assert code == 2
    assert "s2: a process that was reading died (SIGKILL)" in capsys.readouterr().err
    paths = out.rglob("features_*/*.h5" if verb == "features" else "*_weights.h5")
    assert sorted(path.stem[:2] for path in paths) == ["s0", "s1"]


def test_a_slide_of_the_same_length_in_anothers_place_is_noticed(tmp_path):
    config = write_cohort(tmp_path)
    assert main(["index", "--config", str(config)]) == 0
    source = read_source([config])
    tile_source, row = TileSource.of(source), source.rows[0]
    pixels = bytearray(row.path.read_bytes())
    pixels[len(pixels) // 2] ^= 1
    row.path.write_bytes(pixels)
    with pytest.raises(IndexSettingsError, match="the slide's file has changed"):
        tile_source.index(row)


def test_an_old_cache_for_which_there_is_no_room_any_more_is_passed_over(tmp_path):
    """With a limit, slides without a valid cache are read from their files."""
    config = write_cohort(tmp_path)
    rows = read_source([config]).rows
    room = {"data": {"cache_dir": str(tmp_path / "cache"), "cache_gb": 1}}
    limited = tmp_path / "limited.yaml"
    limited.write_text(yaml.safe_dump(room))
    assert main(["index", "--config", str(config), "--config", str(limited)]) == 0
    room["data"] |= {"cache_gb": 1e-6, "tiles": {"tissue": {"min_fraction": 0.9}}}
    limited.write_text(yaml.safe_dump(room))
    assert main(["index", "--config", str(config), "--config", str(limited)]) == 0
    tile_source = TileSource.of(read_source([config, limited]))
    for row in rows:
        source, index = tile_source(row)
        assert source.read(*index.coords0[0].tolist(), index.grid).shape == (32, 32, 3)


def test_a_slide_whose_stains_cannot_be_found_is_closed(tmp_path, monkeypatch):
    config = write_cohort(tmp_path)
    assert main(["index", "--config", str(config)]) == 0
    source, closed = read_source([config]), []

    def refuse(*_):
        raise StainError("too pale")

    monkeypatch.setattr("slides.streaming.tile_source.StainedSlide", refuse)
    monkeypatch.setattr("slides.wsi.reader.Slide.close", lambda self: closed.append(self.name))
    with pytest.raises(StainError):
        replace(TileSource.of(source), stain="macenko")(source.rows[0])
    assert closed == [source.rows[0].slide_id]


def test_an_index_that_no_longer_fits_its_slide_is_not_used(tmp_path, capsys):
    """If no new one can be made, the old one stays on disk; training must not use it."""
    config = write_cohort(tmp_path, on_error="skip")
    assert main(["index", "--config", str(config)]) == 0
    table = tmp_path / "cohort.csv"
    header, first, *others = table.read_text().splitlines()
    name = first.split(",")[header.split(",").index("slide_id")]
    lines = [f"{header},mpp", f"{first},3.0", *(f"{line}," for line in others)]
    table.write_text("\n".join(lines) + "\n")
    assert main(["index", "--config", str(config)]) == 0
    assert "1 slides left out" in capsys.readouterr().out
    source = read_source([config])
    tile_source, row = TileSource.of(source), next(r for r in source.rows if r.slide_id == name)
    with pytest.raises(IndexSettingsError, match=rf"{name}: .*now gives mpp 3, it was made with 0"):
        tile_source.index(row)
    data = read_config(["--config", str(config)]).datamodule
    data.prepare_data()
    data.setup("fit")
    assert name in data.skipped
    assert name not in {row.slide_id for row in data.rows("train")}
