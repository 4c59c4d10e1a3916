"""Normalised slides have the reference's colours, and the same pixels wherever they are read.

Slides are painted from known stains, so the true estimate is known; Macenko's transform is checked
against its definition, unmixing by least squares and mixing again, pixel by pixel.
"""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from slides.errors import CohortError, SettingsError, StainError
from slides.streaming import stain
from slides.streaming.settings import index_and_cache
from slides.streaming.stain import (
    LIGHT,
    REFERENCE_MOMENTS,
    REFERENCE_STAINS,
    REFERENCE_STRENGTH,
    StainedSlide,
    macenko,
    macenko_stains,
    refuse_other_stains,
    reinhard,
    reinhard_moments,
)
from tapfm.config import read_source
from tapfm.frozen.features import Extraction, tiles_of
from tapfm.training.fit import read_config
from tests.cohorts import write_cohort
from tests.sources import make_index, make_row

STAINS = np.array([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]])
STAINS /= np.linalg.norm(STAINS, axis=0)


def painted(stains=STAINS, strength=(1.4, 0.8), pixels=40_000, glass=0.3, seed=0):
    """Return (P, 3) uint8 pixels of mixed stains, some of only one stain, and some glass."""
    rng = np.random.default_rng(seed)
    amounts = rng.random((2, pixels)) * np.array(strength)[:, None]
    amounts[1, : pixels // 10] *= 0.02  # nuclei
    amounts[0, pixels // 10 : pixels // 5] *= 0.02  # cytoplasm
    amounts[:, rng.random(pixels) < glass] = 0
    return np.rint(LIGHT * np.exp(-(stains @ amounts).T)).clip(0, 255).astype(np.uint8)


class TestMacenko:
    def test_finds_the_stains_it_was_painted_with(self):
        found, strength = macenko_stains(painted())
        assert (np.sum(found * STAINS, axis=0) > np.cos(np.radians(4))).all()
        assert strength == pytest.approx([1.4, 0.8], rel=0.1)

    @pytest.mark.parametrize("dtype", [np.float32, np.uint8])
    def test_is_unmixing_and_mixing_again(self, dtype):
        rgb = painted()
        found, strength = macenko_stains(rgb)
        density = np.log(LIGHT) - np.log(np.maximum(rgb.astype(float), 1))
        amounts, *_ = np.linalg.lstsq(found, density.T, rcond=None)
        mixed = REFERENCE_STAINS @ (amounts * (REFERENCE_STRENGTH / strength)[:, None])
        expected = (LIGHT * np.exp(-mixed.T)).clip(0, 255)
        got = macenko(rgb)(rgb.astype(dtype))
        assert got.dtype == dtype
        assert np.abs(got - expected).max() < (0.52 if dtype == np.uint8 else 0.02)

    def test_two_scanners_of_one_slide_come_out_alike(self):
        """The same tissue, stained differently, agrees after normalisation and not before."""
        other = np.array([[0.55, 0.2], [0.75, 0.9], [0.37, 0.39]])
        one = painted()
        two = painted(other / np.linalg.norm(other, axis=0), (0.9, 1.1))
        apart = np.abs(one.astype(int) - two).mean()
        close = np.abs(macenko(one)(one).astype(int) - macenko(two)(two)).mean()
        assert close < 0.25 * apart

    def test_glass_stays_glass(self):
        operator = macenko(painted())
        np.testing.assert_array_equal(operator(np.full((2, 2, 3), LIGHT, np.uint8)), LIGHT)
        assert operator(np.full((1, 1, 3), 255, np.uint8)).min() >= LIGHT

    def test_a_reference_slide_is_left_as_it_is(self):
        stains = REFERENCE_STAINS
        rgb = painted(stains, REFERENCE_STRENGTH, glass=0)
        assert np.abs(macenko(rgb)(rgb).astype(int) - rgb).mean() < 6


class TestReinhard:
    def test_moments_become_the_references(self):
        rgb = painted(glass=0).astype(np.float32)
        rgb = rgb[np.log(LIGHT / np.maximum(rgb, 1)).mean(1) > stain.STAINED]
        out = reinhard(rgb)(rgb)
        inside = ((out > 1) & (out < 254)).all(1)  # clipped ones are lost to any method
        opponent = np.log(out[inside] @ stain.LMS.T) @ stain.OPPONENT.T
        assert opponent.mean(0) == pytest.approx(REFERENCE_MOMENTS[0], abs=0.25)
        assert opponent.std(0) == pytest.approx(REFERENCE_MOMENTS[1], rel=0.35)

    def test_is_its_definition(self):
        rgb = painted()
        mean, deviation = reinhard_moments(rgb)
        opponent = np.log(np.maximum(rgb.astype(float), 1) @ stain.LMS.T) @ stain.OPPONENT.T
        moved = (opponent - mean) / deviation * REFERENCE_MOMENTS[1] + REFERENCE_MOMENTS[0]
        light = np.exp(moved @ np.linalg.inv(stain.OPPONENT).T) @ np.linalg.inv(stain.LMS).T
        got = reinhard(rgb)(rgb.astype(np.float32))
        np.testing.assert_allclose(got, light.clip(0, 255), atol=0.1)


@pytest.mark.parametrize("method", [macenko, reinhard])
class TestFaults:
    def test_too_little_stain(self, method):
        with pytest.raises(StainError, match=r"a: only 0 pixels .* leave this slide out"):
            method(np.full((5000, 3), 250, np.uint8), "a")

    def test_one_colour(self, method):
        with pytest.raises(StainError, match=r"a: .* all of one colour"):
            method(np.full((5000, 3), (120, 60, 110), np.uint8), "a")


class Painted:
    """A slide with painted tiles; counts its reads."""

    def __init__(self):
        self.reads = 0

    def read(self, x0, y0, grid):
        self.reads += 1
        return painted(pixels=25, glass=0, seed=x0 + 1000 * y0).reshape(5, 5, 3)

    def close(self):
        self.reads = -1


class TestSlide:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(stain, "FEWEST", 100)

    def test_every_tile_by_one_operator(self):
        index, source = make_index(97), Painted()
        slide = StainedSlide(source, index, "macenko")
        assert source.reads == stain.TILES
        rows = np.linspace(0, 96, stain.TILES).round().astype(int)
        pixels = [source.read(*c, index.grid).reshape(-1, 3) for c in index.coords0[rows].tolist()]
        operator = macenko(np.concatenate(pixels))
        for x0, y0 in index.coords0[:5].tolist():
            expected = operator(source.read(x0, y0, index.grid))
            np.testing.assert_array_equal(slide.read(x0, y0, index.grid), expected)
        again = pickle.loads(pickle.dumps(slide))
        np.testing.assert_array_equal(again.read(5, 5, index.grid), slide.read(5, 5, index.grid))
        with slide:
            pass
        assert source.reads == -1

    def test_other_stains_are_refused_all_at_once(self):
        def row(number, name):
            return replace(make_row(number), stain=name)

        sound = ["", "H&E", "HE", "he", "H and E", "Haematoxylin & Eosin", "hematoxylin eosin"]
        rows = [row(n, name) for n, name in enumerate(sound)]
        refuse_other_stains(rows, "data.stain")
        rows += [row(8, "CD3"), row(9, "PAS")]
        with pytest.raises(CohortError, match=r"data\.stain is for .*slide\.8 \(CD3\), slide\.9"):
            refuse_other_stains(rows, "data.stain")


class TestTheWholeWay:
    """Training, validation, prediction and features use the same normalised tiles."""

    @pytest.fixture
    def cohort(self, tmp_path, monkeypatch):
        monkeypatch.setattr(stain, "FEWEST", 200)
        return write_cohort(tmp_path / "cohort", stain="macenko", tiles_per_slide=None, colour=0.0)

    def test_all_readers_agree(self, cohort):
        data = read_config(["--config", str(cohort)]).datamodule
        index_and_cache(data.source)
        assert read_source([cohort]).stain == "macenko"
        row = data.rows("val")[0]
        streamed = torch.cat(list(data.bag(row).tiles.split(5)))
        source, index = data.tile_source(row)
        with source:
            read = np.stack([source.read(*c, index.grid) for c in index.coords0.tolist()])
        np.testing.assert_array_equal(streamed.permute(0, 2, 3, 1), read)
        plain, _ = replace(data.tile_source, stain=None)(row)
        with plain:
            assert (plain.read(*index.coords0[0].tolist(), index.grid) != read[0]).any()
            expected = StainedSlide(plain, index, "macenko")
            np.testing.assert_array_equal(
                expected.read(*index.coords0[0].tolist(), index.grid), read[0]
            )

    def test_training_differs_by_orientation_alone(self, cohort):
        data = read_config(["--config", str(cohort)]).datamodule
        index_and_cache(data.source)
        bag = next(iter(data.train_dataloader()))
        row = next(r for r in data.cohort.rows if r.slide_id == bag.slide_id)
        streamed = torch.cat(list(data.bag(row).tiles.split(5)))
        one, other = (each.flatten(2).sort().values for each in (bag.tiles, streamed))
        assert torch.equal(one, other)

    def test_other_stains_stop_the_run_before_it_begins(self, cohort):
        table = cohort.parent / "cohort.csv"
        lines = table.read_text().splitlines()
        table.write_text("\n".join([lines[0] + ",stain", *(f"{x},CD8" for x in lines[1:])]))
        keys = ["--config", str(cohort)]
        with pytest.raises(CohortError, match=r"data\.stain .* for 14 slides"):
            read_config(keys).datamodule  # noqa: B018
        spec = yaml.safe_load(cohort.read_text())
        spec["data"] |= {"stain": None, "stain_jitter": 0.1}
        cohort.write_text(yaml.safe_dump(spec))
        with pytest.raises(CohortError, match=r"data\.stain_jitter"):
            read_config(keys).datamodule  # noqa: B018

    def test_an_unknown_method_is_named(self, cohort):
        cohort.write_text(cohort.read_text().replace("macenko", "vahadane"))
        with pytest.raises(SettingsError, match="'vahadane' is none of macenko, reinhard"):
            read_source([cohort])


def test_features_of_other_colours_are_made_anew(tmp_path):
    """A feature file records its normalisation; one with another is not used."""
    from tapfm.encoders import backbones

    encoder = backbones.load("demo_vit", tile_px=32).eval()
    index = make_index(3, grid=tiles_of("demo_vit").grid)
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    plain = Extraction(encoder, "demo", "f1")
    path = tmp_path / "20x" / "features_demo" / "a.h5"
    plain.write(path, tiles, index, stain_free())
    assert plain.fault(path, index) is None
    normalised = replace(plain, stain="macenko")
    assert normalised.fault(path, index) == "of tiles whose stain was normalised by nothing"
    normalised.write(path, tiles, index, stain_free())
    assert plain.fault(path, index) == "of tiles whose stain was normalised by macenko"


def stain_free():
    from slides.tiling.tissue import Tissue

    return Tissue()
