"""`tapfm.plan` says what fits before a run, without GPU and weights.

Three anchors: our own earlier table of activations and peaks (measured with a separate script on
the same timm models), what a real forward on the CPU really holds, and a choice that can be checked
by hand.
"""

import dataclasses
import functools

import pytest
import torch

from tapfm import plan as planning
from tapfm.backbones import BackboneError, Encoder, build, find
from tapfm.memory import saved_bytes
from tapfm.plan import PHASES, Cost, PlanError, held, make_plan, peaks, plan_table

MIB = 2**20

# Our earlier table: activations of a tile in MiB and GFLOP of its forward (fp32 weights, bf16
# autocast, nothing recomputed), and peak GiB at chunk 16 without and with recomputation.
TABLE = {
    "uni": (186, 123.1, 9.0, 6.0),
    "virchow2": (465, 340.1, 19.0, 11.5),
    "uni2_h": (425, 370.9, 19.2, 12.3),
    "h_optimus_0": (696, 608.3, 31.1, 19.4),
    "gigapath": (526, 456.2, 28.3, 19.1),
}


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Counting takes seconds for a large model, and is the same for every card."""
    patch, memory = pytest.MonkeyPatch(), {}

    def remember(name, count):
        def cached(row, tile_px, **scheme):
            key = name, row.key, tile_px, *scheme.values()
            if key not in memory:
                memory[key] = count(row, tile_px, **scheme)
            return memory[key]

        patch.setattr(planning, name, cached)

    remember("held", planning.held)
    remember("forward_flops", planning.forward_flops)
    yield
    patch.undo()


@functools.cache
def planned(model, gpu_gib=24.0, chunk=None):
    return make_plan(find(model), gpu_gib=gpu_gib, chunk=chunk)


def option(plan, precision, recompute):
    (found,) = (o for o in plan.options if (o.precision, o.recompute) == (precision, recompute))
    return found


@pytest.mark.parametrize("model", TABLE)
def test_peaks_are_those_of_the_earlier_table(model):
    """Within 10 %. With recomputation ours is 7 to 9 % higher: that table let go of the cast
    copies of the weights, which autocast keeps until the forward ends."""
    _, gflop, plain, recomputed = TABLE[model]
    plan = planned(model, gpu_gib=80.0, chunk=16)
    assert plan.parameters == find(model).parameters
    bf16 = option(plan, "bf16", False)
    assert max(bf16.peak_gib.values()) == pytest.approx(plain, rel=0.02)
    assert bf16.tflop == pytest.approx(4 * gflop / 1000, rel=0.001)
    again = option(plan, "bf16", True).tflop * 1000 / gflop
    assert 4.95 < again < 5  # every block but the last is computed once more
    peak = max(option(plan, "bf16", True).peak_gib.values())
    assert recomputed <= peak <= 1.1 * recomputed


@pytest.mark.parametrize("model", ["uni", "h_optimus_0"])
def test_activations_are_those_of_the_earlier_table(model):
    mib, gflop, _, _ = TABLE[model]
    row = find(model)
    tile, casts = planning.held(row, None, bf16=True, recompute=False)
    assert tile / MIB == pytest.approx(mib, rel=0.01)
    assert casts == pytest.approx(2 * row.parameters, rel=0.01)
    assert planning.forward_flops(row, None) / 1e9 == pytest.approx(gflop, rel=0.001)


def test_attention_is_counted_as_fused(monkeypatch):
    """Where there is no GPU torch would take the kernel that keeps every map: 45 % more for UNI."""
    row = find("uni")
    monkeypatch.setattr(planning, "FusedAttention", _nothing)
    tile, _ = held(row, None, bf16=True, recompute=False)
    assert tile / MIB > 1.3 * TABLE["uni"][0]


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("recompute", [False, True])
def test_a_real_forward_holds_what_was_planned(recompute):
    row, tiles = find("demo_vit"), 5
    encoder = Encoder(build(row), row, recompute=recompute)
    pixels = torch.zeros(tiles, 3, row.tile_px, row.tile_px, dtype=torch.uint8)
    real = saved_bytes(lambda: encoder(pixels), but=encoder.parameters())
    tile, rest = held(row, None, bf16=False, recompute=recompute)
    assert tiles * tile + rest == pytest.approx(real, rel=1e-3)
    other, _ = held(row, None, bf16=False, recompute=not recompute)
    assert abs(other - tile) > 0.3 * tile  # so the line above can fail


def test_peaks_by_hand():
    """10 parameters-GiB of each kind, counted on the fingers."""
    row = find("uni")
    cost = Cost(tile=2**30, casts=3 * 2**30, block=2**29, recompute=False)
    peak = peaks(row, 2**30, cost, chunk=4)
    assert tuple(peak) == PHASES
    assert peak["encode"] == pytest.approx(0.9 + 12 + (4 + 3) + 3 + 2)  # (what is kept)
    assert peak["adapt"] == pytest.approx(0.9 + 16 + 4 + 3 + 2)
    assert peak["step"] == pytest.approx(0.9 + 16)
    peak = peaks(row, 2**30, dataclasses.replace(cost, recompute=True), chunk=4)
    assert peak["encode"] == pytest.approx(0.9 + 12 + 4 + 3 + 2)
    assert peak["adapt"] == pytest.approx(0.9 + 16 + 4 + 3)


def test_the_chunk_is_the_largest_that_fits():
    plan = planned("uni", gpu_gib=12.0)
    chosen = plan.choice
    assert 1 < chosen.chunk < 64
    assert max(chosen.peak_gib.values()) <= plan.usable_gib
    more = planned("uni", gpu_gib=12.0, chunk=chosen.chunk + 1)
    assert option(more, chosen.precision, chosen.recompute).chunk == 0


@pytest.mark.parametrize(
    ("model", "gpu_gib", "choice"),
    [
        ("uni", 24.0, ("bf16", False)),
        ("uni", 8.0, ("bf16", False)),
        ("uni", 7.0, ("bf16", True)),
        ("uni", 6.1, ("fp32", True)),
        ("uni", 5.0, None),
        ("h_optimus_0", 24.0, ("bf16", True)),
        ("h_optimus_0", 80.0, ("bf16", False)),
        ("h_optimus_0", 16.0, None),
    ],
)
def test_choice(model, gpu_gib, choice):
    plan = planned(model, gpu_gib)
    chosen = plan.choice and (plan.choice.precision, plan.choice.recompute)
    assert chosen == choice
    text = plan_table(plan)
    assert plan.reason in text
    if choice:
        assert f"--model.chunk {plan.choice.chunk}" in text
    else:
        assert "nothing fits" in text
        assert "Take a card of" in text


def test_the_card_that_is_named_is_large_enough():
    """And one GiB less is not."""
    plan = planned("h_optimus_0", 16.0)
    card = int(plan.reason.split("Take a card of ")[1].split()[0])
    assert planned("h_optimus_0", float(card)).choice
    assert planned("h_optimus_0", float(card - 1)).choice is None


def test_usable_memory_is_that_of_real_cards():
    usable = {24: 23.3, 16: 15.4, 12: 11.5, 8: 7.6}  # the earlier table's limits
    for gpu_gib, expected in usable.items():
        assert planned("demo_vit", float(gpu_gib)).usable_gib == pytest.approx(expected, abs=0.05)


def test_a_larger_tile_takes_more():
    row = find("demo_vit")
    larger = make_plan(row, gpu_gib=24, tile_px=224, chunk=7)
    assert larger.tile_px == 224
    assert larger.choice.peak_gib["adapt"] > planned("demo_vit", chunk=7).choice.peak_gib["adapt"]


@pytest.mark.parametrize("gpu_gib", [0.0, -1.0, float("nan"), float("inf")])
def test_a_card_of_no_size_is_refused(gpu_gib):
    with pytest.raises(PlanError, match="such as 24"):
        make_plan(find("demo_vit"), gpu_gib=gpu_gib)


def test_other_faults():
    with pytest.raises(PlanError, match="1 tile or more"):
        make_plan(find("demo_vit"), gpu_gib=24, chunk=0)
    with pytest.raises(BackboneError, match="16 px patch"):
        make_plan(find("demo_vit"), gpu_gib=24, tile_px=113)


def test_nothing_is_left_switched_on():
    planned("demo_vit")
    assert not torch.is_autocast_enabled("cuda")
    assert torch.zeros(1).item() == 0.0  # no fake tensors either


def test_run_plan_prints(capsys):
    assert planning.run_plan("demo-vit", 24, None) == 0
    assert "Train with: --model.precision bf16" in capsys.readouterr().out
    assert planning.run_plan("demo-vit", 0.5, None) == 1
    assert "nothing fits" in capsys.readouterr().out
