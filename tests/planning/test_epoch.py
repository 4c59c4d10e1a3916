"""Hours of a run on one card and on many: the simulation against a plain loop, and by hand."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from slides.streaming.order import SlideSampler, epoch_order, paired_order
from tapfm.cli import main
from tapfm.data.streamed import training_order
from tapfm.planning.cards import CARDS, card_named
from tapfm.planning.epoch import Rates, Run, pass_seconds, run_table, simulate, simulate_run
from tapfm.planning.footprint import Cost, Setup
from tapfm.planning.speed import tile_seconds, tiles_per_second, update_seconds
from tests.cohorts import write_cohort

DRAW = np.random.default_rng(0)
SIZES = DRAW.lognormal(6, 0.8, 97).astype(int) + 1
RATES = Rates(0.02, 0.005, update_s=1.5, slide_s=0.3, read_tiles_s=60, average_s=0.4)


def by_hand(sizes, world, rates, accumulate, seed=0):
    """Every process, slide after slide, in plain Python, over the sampler's own turns."""
    samplers = [list(SlideSampler(len(sizes), seed, rank, world)) for rank in range(world)]
    update = rates.update_s + 2 * rates.average_s * (world - 1) / world
    clocks, read = [0.0] * world, [0.0] * world
    for turn in range(len(samplers[0])):
        for rank in range(world):
            tiles = float(sizes[samplers[rank][turn].slide])
            read[rank] += tiles / rates.read_tiles_s
            clocks[rank] = max(clocks[rank], read[rank]) + tiles * rates.forward_s + rates.slide_s
        last = (turn + 1) % accumulate == 0 or turn + 1 == len(samplers[0])
        if last:  # heads are averaged
            clocks = [max(clocks)] * world
        for rank in range(world):
            tiles = float(sizes[samplers[rank][turn].slide])
            clocks[rank] += tiles * (rates.tile_s - rates.forward_s)
        if last:
            clocks = [max(clocks) + update] * world
    return clocks[0]


@pytest.mark.parametrize("world", [1, 2, 8, 64])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_is_that_of_a_plain_loop(world, accumulate):
    found = simulate(SIZES, world, RATES, accumulate)
    assert found.seconds == pytest.approx(by_hand(SIZES, world, RATES, accumulate))
    shares = found.efficiency + found.waiting + found.updating + found.reading
    doubled = -(-len(SIZES) // world) * world - len(SIZES)  # slides that come twice
    assert 0.97 - doubled * SIZES.max() / SIZES.sum() < shares <= 1.001


def test_by_hand():
    """Two cards: 10 and 4 tiles, then 2 and 6; each waits for the larger."""
    order = epoch_order(4, 0, 0)
    sizes = np.empty(4)
    sizes[order] = [10, 4, 2, 6]
    alone = Rates(tile_s=1, forward_s=0.25, update_s=0.5)
    assert simulate(sizes, 2, alone).seconds == 10 + 0.5 + 6 + 0.5
    assert simulate(sizes, 2, alone).waiting == pytest.approx((3 + 2) / 17)
    assert simulate(sizes, 2, alone).efficiency == pytest.approx(11 / 17)
    slow = Rates(tile_s=1, forward_s=0.25, update_s=0, read_tiles_s=0.5)
    assert simulate(sizes, 1, slow).seconds == pytest.approx(22 / 0.5 + 6)


def test_processes_wait_after_each_pass_of_an_updates_last_slide():
    """12 and 10 tiles an update: 10 and a quarter of 2 against 4 and of 6, then the rest of 6."""
    order = epoch_order(4, 0, 0)
    sizes = np.empty(4)
    sizes[order] = [10, 4, 2, 6]
    found = simulate(sizes, 2, Rates(tile_s=1, forward_s=0.25, update_s=0.5), accumulate=2)
    assert found.seconds == 10.5 + 4.5 + 0.5
    assert found.waiting == pytest.approx((5 / 2 + 3 / 2) / 15.5)


def test_parts_of_a_run_by_hand():
    """Epochs; every third slide's tiles in a pass; two passes to choose, over train and val."""
    rates = Rates(tile_s=1, forward_s=0.25, update_s=0.5, slide_s=0.1)
    run = Run([6, 6, 6], [4, 8, 12, 16], [20, 20, 20], epochs=10, validations=5, looks=2)
    assert pass_seconds(run.val_N, 3, rates) == pytest.approx((4 + 16) * 0.25 + 0.2)
    assert pass_seconds(run.val_N, 1, Rates(1, 0.25, 0, read_tiles_s=2)) == pytest.approx(40 / 2)
    epoch, hours = simulate_run(run, 3, rates)
    assert epoch == simulate([6, 6, 6], 3, rates)
    assert hours["training"] == pytest.approx(10 * simulate([6, 6, 6], 3, rates).seconds / 3600)
    assert hours["validation"] == pytest.approx(5 * 5.2 / 3600)
    assert hours["choice"] == pytest.approx(2 * (20 * 0.25 + 0.1 + 5.2) / 3600)
    alone = simulate_run(replace(run, head_first=0.2), 3, rates)[1]
    trained = 8 * epoch.seconds + 2 * (6 * 0.25 + 0.1)
    assert alone == hours | {"training": pytest.approx(trained / 3600)}


def test_one_card_without_updates_wastes_nothing():
    found = simulate(SIZES, 1, Rates(tile_s=0.02, forward_s=0.005, update_s=0))
    assert found.efficiency == pytest.approx(1)
    assert found.seconds == pytest.approx(0.02 * SIZES.sum())


@pytest.mark.parametrize("world", [2, 8])
def test_pairing_by_size_lets_processes_wait_less(world):
    rates = Rates(tile_s=0.02, forward_s=0.005, update_s=0.1)
    plain, paired = (simulate(SIZES, world, rates, paired=pairs) for pairs in (False, True))
    assert paired.waiting < 0.5 * plain.waiting
    assert paired.seconds < 0.9 * plain.seconds


@pytest.mark.parametrize(("n", "world"), [(97, 8), (96, 8), (5, 8), (300, 2), (1, 1)])
def test_a_paired_order_has_every_slide_once_and_changes_with_the_epoch(n, world):
    sizes = DRAW.permutation(n)
    orders = [paired_order(epoch_order(n, 3, e), sizes, world, 3, e) for e in range(2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert np.array_equal(orders[0], paired_order(epoch_order(n, 3, 0), sizes, world, 3, 0))
    if n > 100:
        assert not np.array_equal(*orders)
        rising = np.diff(sizes[orders[0]].reshape(-1, world)[:16, 0])
        assert (rising > 0).any()
        assert (rising < 0).any(), "sizes neither rise nor fall over a window"


def test_a_run_is_paired_by_the_tiles_that_its_slides_give():
    sizes = {f"s{n}": int(size) for n, size in enumerate(DRAW.permutation(40) + 1)}
    rows = [SimpleNamespace(slides=[SimpleNamespace(slide_id=name)]) for name in sizes]
    data = SimpleNamespace(
        balanced=False, paired=True, tiles_per_slide=30, seed=3, place=(0, 4),
        index=lambda slide: range(sizes[slide.slide_id]),
    )  # fmt: skip
    order = training_order(rows, data)(2)
    given = np.minimum([*sizes.values()], 30)
    assert np.array_equal(order, paired_order(epoch_order(40, 3, 2), given, 4, 3, 2))
    spread = np.ptp(given[order].reshape(-1, 4), axis=1)
    assert spread.max() <= 3
    data.paired = False
    assert training_order(rows, data) is None


def test_an_update_costs_what_it_moves():
    cost = Cost(10**9, 10**9, 1, tile=1, casts=1, block=1, flop=1e12, forward_flop=0)
    card = card_named("L4")
    assert tile_seconds(cost, card) == pytest.approx(1 / 55)
    assert update_seconds(Setup("bf16-true", "master"), cost, card) == pytest.approx(0.1)
    assert update_seconds(Setup("bf16-true", "residual"), cost, card) == pytest.approx(0.32)
    offload = update_seconds(Setup("bf16-true", "offload"), cost, card)
    assert offload == pytest.approx(0.02 + 28 / 15)
    speed = tiles_per_second(Setup("bf16-true", "master"), cost, card, bag=100)
    assert speed == pytest.approx(100 / (100 / 55 + 0.1))


def test_a_card_is_found_by_name_and_by_size():
    assert [card_named(card.name) for card in CARDS] == list(CARDS)
    assert card_named("24").name == card_named(None).name == "L4"
    assert card_named("80").name == "H100"


def test_the_table_has_a_row_for_each_number_of_cards():
    run = Run(SIZES.tolist(), [700, 900], [900] * 97, accumulate=8, epochs=10, validations=10)
    text = run_table(run, [1, 8], RATES)
    assert f"97 training slides, {SIZES.sum():,} tiles" in text
    assert "2 validation slides, 1,600 tiles, all of them 10 times; 0 passes" in text
    rows = [row.split() for row in text.splitlines()[4:]]
    for row, gpus, each in zip(rows, (1, 8), (8, 1), strict=True):
        training = simulate(SIZES, gpus, RATES, each).seconds * 10 / 3600
        validation = 10 * (1600 if gpus == 1 else 900) / 60 / 3600
        assert float(row[2]) == pytest.approx(training, abs=0.06)
        assert float(row[3]) == pytest.approx(validation, abs=0.06)
        assert float(row[1]) == pytest.approx(training + validation, abs=0.06)


def test_a_config_is_planned_on_its_own_index(tmp_path, capsys):
    config = str(write_cohort(tmp_path))
    assert main(["plan", "--config", config, "--gpus", "1,2"]) == 2
    assert "no slide of train has tiles" in capsys.readouterr().err
    assert main(["index", "--config", config]) == 0
    capsys.readouterr()
    assert main(["plan", "--config", config, "--gpus", "1,2", "--gpu", "L4"]) == 0
    said = capsys.readouterr().out
    assert "7 training slides, 77 tiles an epoch (11 to 11 a slide), 3 epochs" in said
    assert re.search(r"3 validation slides, \d+ tiles, all of them 3 times; 0 passes", said)
    assert "demo_vit: full, master, chunk 5" in said
    assert "7 training patients. A ViT-S" in said
    merged = tmp_path / "merged.yaml"
    merged.write_text("model: {merge_tokens: 4}\n")
    fewer = ["plan", "--config", config, "--config", str(merged), "--gpus", "1", "--gpu", "L4"]
    assert main(fewer) == 0
    rates = re.compile(r"L4: (\d+) tiles/s")
    assert int(rates.search(capsys.readouterr().out)[1]) > 1.1 * int(rates.search(said)[1])
    chosen = tmp_path / "chosen.yaml"
    steps = "{interpolate: [0, 1], warm_start: true, accumulate: 2}"
    chosen.write_text(f"trainer: {{check_val_every_n_epoch: 2}}\nmodel: {{steps: {steps}}}\n")
    asked = ["plan", "--config", config, "--config", str(chosen), "--gpu", "L4"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "all of them 2 times; 3 passes to choose what is saved" in said, "the last epoch too"
    assert "an update of 2 slides" in said
    assert main(["plan", "--config", config, "--model", "uni"]) == 2
