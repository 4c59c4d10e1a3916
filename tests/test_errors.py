"""Settings that cannot be are refused at once: each with its key, the value found and a remedy."""

from pathlib import Path

import pytest

from slides.cache.cohort import cache_cohort
from slides.cohort.labelled_tiles import read_tiles
from slides.cohort.resplit import run_split
from slides.cohort.splits import fixed_split, gather_cases, monte_carlo
from slides.demo.cohort import plan_demo, write_demo
from slides.errors import SettingsError, SplitError, TilingError, refuse, some
from slides.grid import Grid
from slides.streaming.prefetch import Prefetcher
from slides.streaming.settings import Source, TileSettings
from slides.streaming.stream import Augment, BagDataset
from slides.tiling.index import index_cohort
from slides.tiling.tissue import Tissue
from tests.cohort.test_labelled_tiles import SOUND, table


def source(**changed):
    given = {"cache_dir": None, "on_error": "stop", "workers": 0, **changed}
    return Source((), Path("index"), tiles=TileSettings(), **given)


def bags(**changed):
    return BagDataset((), lambda row: None, **changed)


ALL_AT_ONCE = [
    (
        TilingError,
        lambda: Grid(0, 352.8, -1),
        ["data.tiles: 3 faults", "tile size must be .*, got 0", "mpp must be .* got 352.8",
         "overlap must be .* got -1"],
    ),
    (
        TilingError,
        lambda: Tissue(mpp=400, min_fraction=25, min_area_um2=-1.0, max_blur=2.0),
        ["data.tiles.tissue: 4 faults", "tissue.mpp must be .* got 400",
         "tissue.min_fraction must be .* got 25", "tissue.min_area_um2 must be .* got -1",
         "tissue.max_blur must be .* got 2"],
    ),
    (
        SettingsError,
        lambda: source(workers=-1, on_error="ignore", stain="vahadane", cache_gb=5.0),
        ["data: 4 faults", "data.workers must be at least 0, got -1: 0 reads",
         "data.on_error is 'ignore': give stop or skip",
         "data.stain is 'vahadane': give macenko or reinhard, or null",
         "data.cache_gb is 5 and data.cache_dir None"],
    ),
    (
        SettingsError,
        lambda: bags(budget=0, workers=-2, on_error="no", sampling="grid"),
        ["data: 4 faults", "data.tiles_per_slide must be at least 1, got 0: null takes all",
         "data.workers must be .* got -2", "data.on_error is 'no'",
         "data.sampling is 'grid': give"],
    ),
    (
        SettingsError,
        lambda: Augment(colour=1.5, stain=-0.1),
        ["data: 2 faults", "data.colour must be .* got 1.5: 0 is off",
         "data.stain_jitter must be .* got -0.1"],
    ),
    (
        SettingsError,
        lambda: plan_demo(-1, 3),
        ["demo cohort: 2 faults", "; 3 were requested", "--seed is -1: give 0 or more"],
    ),
    (
        SplitError,
        lambda: run_split(Path("t.csv"), Path("o.csv"), folds=3, repeats=2,
                          formats=("patho-bench",), task="regression"),
        ["tapfm split: 3 faults", "give one of --folds, --repeats and --from",
         "leave it out of regression", "--out o.csv is one file"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("error", "build", "lines"), ALL_AT_ONCE)
def test_all_faulty_settings_of_an_object_are_listed_in_one_error(error, build, lines):
    with pytest.raises(error) as caught:
        build()
    for line in lines:
        assert caught.match(line)
    assert len(str(caught.value).splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda folder: write_demo(folder, workers=-1), "--workers is -1: give 0"),
        (lambda folder: Prefetcher().chunks(0, 0), "model.chunk must be at least 1 tile, got 0"),
        (lambda folder: index_cohort((), folder, Grid(), Tissue(), -1), "data.workers .* got -1"),
        (
            lambda folder: cache_cohort((), folder, folder, Grid(), Tissue(), 0, "no"),
            "data.on_error is 'no'",
        ),
    ],
)
def test_one_fault_is_one_line_and_nothing_is_written(build, message, tmp_path):
    with pytest.raises(SettingsError, match=message) as caught:
        build(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_splits_refuse_seeds_repeats_and_shares_by_value(tmp_path):
    cases = gather_cases(list("abcdef"), [""] * 6, [], [[]] * 6)
    with pytest.raises(SplitError, match="seed is -1: give 0 or more"):
        fixed_split(cases, seed=-1)
    with pytest.raises(SplitError, match="0 repeats: give 1 or more"):
        monte_carlo(cases, 0)
    unsplit = [row.rpartition(",")[0] for row in SOUND]
    path = table(tmp_path, unsplit, "path,label,case_id")
    for shares in ((0.8, 0.2), (1.0, -0.1, 0.1), (0.0, 0.0, 0.0)):
        with pytest.raises(SplitError, match=r"data\.fractions is .*: give the shares"):
            read_tiles(path, fractions=shares)


def test_no_fault_raises_nothing_and_another_class_may_be_named():
    refuse([])
    with pytest.raises(SplitError, match=r"^only$"):
        refuse(iter(["only"]), "where", SplitError)


def test_many_values_are_cut_with_their_number():
    assert some(list(range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert some(list(range(48))).endswith("6, 7 and 40 more")
