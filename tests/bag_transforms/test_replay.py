"""Regions of an earlier cohort are trained on beside a new one's, and less of it is forgotten."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from slides.errors import SettingsError
from tapfm.bag_transforms.contract import Step
from tapfm.bag_transforms.replay import Rehearsal, Replay, load_memory
from tapfm.cli import main
from tapfm.data.bag import Moment, Places
from tapfm.evaluation.continued import regions, take_flag
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks import learn_task
from tapfm.training.objective import Objective, make_objective
from tests.bag_transforms.examples import example, memory, memory_file
from tests.bags import bag_of, tile_set
from tests.feature_folders import write_ours

D = 5
TASK = learn_task("multilabel", ["A", "B", "C"], (), [[1, 0, 1], [0, 1, 0]])


def learner(name="gated"):
    torch.manual_seed(1)
    return make_aggregator(name, D, 3)


def term(transform, model, seed=0):
    tiles = tile_set(torch.zeros(2, D), torch.zeros(2))
    moment = Moment(0.5, 0, seed=seed)
    assert transform(tiles, moment) is tiles
    return transform.term(Step(model, model(tiles), torch.zeros(3), TASK.loss(), None, moment))


@pytest.mark.parametrize("name", ["gated", "dsmil", "transmil", "hierarchical"])
def test_the_term_is_the_loss_of_regions_of_one_target_by_hand(name):
    """The two targets come in turn; the region of which nothing is known never comes."""
    model, kept = learner(name), memory(D)
    transform = Rehearsal(kept, Replay(regions=2, weight=0.3))
    assert [group.tolist() for group in transform.groups] == [[0, 2, 4], [1, 3]]
    seen = set()
    for seed in range(30):
        found, figures = term(transform, model, seed)
        losses = {}
        for pair in ((0, 2), (0, 4), (2, 4), (1, 3)):
            tiles = kept.bag(torch.tensor(pair))
            assert len(tiles) == 8
            assert tiles.slide_of_T.tolist() == [0] * 4 + [1] * 4
            target_Y = kept.target_RY[pair[0]]
            each = model.losses(model(tiles), target_Y, TASK.loss())
            losses[pair] = sum(each.values()).item()
        (pair,) = [
            p for p, v in losses.items() if v == pytest.approx(figures["replay_loss"].item())
        ]
        seen.add(pair)
        assert found.item() == pytest.approx(0.3 * losses[pair], rel=1e-5)
    assert seen == {(0, 2), (0, 4), (2, 4), (1, 3)}
    off, figures = term(Rehearsal(kept, Replay(weight=0.0)), model)
    assert off is None
    assert figures["replay_loss"] > 0


def test_a_region_is_a_square_of_neighbours_of_one_slide():
    bag = bag_of(torch.zeros(50, 3, 1, 1), (30, 20))
    region_T, cells_T2 = regions(bag), bag.places.lattice()
    for number in region_T.unique():
        own = region_T == number
        assert len(bag.places.slide_of_T[own].unique()) == 1
        span_2 = cells_T2[own].amax(0) - cells_T2[own].amin(0)
        assert (span_2 < 4).all()
    assert int(region_T.max()) + 1 == len(region_T.unique()) == 4 + 2
    unknown = replace(bag, places=Places.unknown(50))
    assert regions(unknown).bincount().tolist() == [16, 16, 16, 2]


def bags(turn, count=40, seed=0):
    """Slides whose label is told by a direction, which `turn` sets."""
    rng = np.random.default_rng(seed)
    way = np.array([math.cos(turn), math.sin(turn), 0, 0, 0])
    found = []
    for n in range(count):
        z = rng.normal(size=(8, D)) + 2 * (2 * (n % 2) - 1) * way
        found.append(
            (tile_set(torch.tensor(z).float(), torch.zeros(8)), torch.tensor([n % 2.0] * 3))
        )
    return found


def test_less_is_forgotten_than_without():
    """A second cohort is told by another direction: with replay the first loss stays lower."""
    first, second = bags(0.0), bags(math.pi / 2, seed=1)
    kept = memory(D, regions=20, tiles=8)
    kept = replace(
        kept, z_ND=torch.cat([tiles.z_TD for tiles, _ in first[:20]]),
        target_RY=torch.stack([y for _, y in first[:20]]), score_N=torch.zeros(160),
    )  # fmt: skip
    ends = {}
    for weight in (0.0, 1.0):
        model = learner()
        for cohort, transforms in (
            (first, {}), (second, {"replay": Rehearsal(kept, Replay(weight=weight, regions=4))})
        ):  # fmt: skip
            objective = Objective(
                TASK.loss(), torch.nn.ModuleDict(transforms), torch.nn.ModuleDict()
            )
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
            for n, (tiles, target_Y) in enumerate(cohort * 2):
                optimizer.zero_grad()
                objective(model, tiles, target_Y, Moment(0.5, 0, seed=n)).loss.backward()
                optimizer.step()
        with torch.no_grad():
            losses = [TASK.loss()(model(tiles).logits_K, y) for tiles, y in first[20:]]
        ends[weight] = torch.stack(losses).mean().item()
    assert ends[1.0] < 0.7 * ends[0.0]


def test_it_is_refused_where_it_cannot_serve():
    aggregator, spec = learner(), [example("replay", D)]
    make_objective(TASK.loss(), aggregator, spec, None, task=TASK, encoder="tiny")
    with pytest.raises(SettingsError, match="frozen features of tiny, and these change"):
        make_objective(TASK.loss(), aggregator, spec, None, task=TASK)
    other = learn_task("multilabel", ["A", "X", "C"], (), [[1, 0, 1], [0, 1, 0]])
    with pytest.raises(SettingsError, match=r"replay trains on A, B, C as well, and .* A, X, C"):
        make_objective(other.loss(), aggregator, spec, None, task=other, encoder="tiny")
    for options, said in (
        ({}, "replay needs memory: FILE"),
        ({"memory": "nowhere"}, "nowhere is no memory of a run"),
        ({"memory": memory_file(8)}, r"is of 8 features \(tiny\), and these are 5"),
    ):
        with pytest.raises(SettingsError, match=said):
            Replay(**options).build(aggregator)


def test_the_flag_is_taken_out_wherever_it_stands(tmp_path):
    (tmp_path / "best.safetensors").touch()
    for given in (["--continue-from", str(tmp_path)], [f"--continue-from={tmp_path}"]):
        assert take_flag(["--a", "1", *given, "--b"]) == (tmp_path, ["--a", "1", "--b"])
    assert take_flag(["--a=--b", "1"]) == (None, ["--a=--b", "1"])
    for given in (["--continue-from"], ["--continue-from", str(tmp_path / "none")]):
        with pytest.raises(SettingsError, match=r"there is no best.safetensors in it"):
            take_flag(given)


def write_site(folder, name, turn):
    """A table and features of a site, and the config of a run on them."""
    rows = []
    for n, (tiles, target) in enumerate(bags(turn, count=16, seed=len(name))):
        slide = f"{name}{n}"
        write_ours(folder / name, slide, tiles.z_TD.numpy().astype(np.float32))
        split = ["train", "train", "val", "test"][n // 2 % 4]
        rows.append([slide, slide, f"{slide}.svs", split, 0.5, int(target[0])])
    columns = ["case_id", "slide_id", "slide_path", "split", "mpp", "A"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / f"{name}.csv", index=False)
    config = {
        "run_dir": str(folder / "runs"), "name": name,
        "trainer": {"accelerator": "cpu", "max_epochs": 6},
        "model": {"aggregator": "gated", "steps": {"head_lr": 3e-2}},
        "data": {"table": str(folder / f"{name}.csv"), "features_dir": str(folder / name),
                 "tiles": {"tile_px": 112, "mpp": 0.5}, "workers": 0},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return str(folder / f"{name}.yaml")


def test_a_run_goes_on_from_another_and_says_what_was_forgotten(tmp_path, capsys):
    first, second = (write_site(tmp_path, *each) for each in (("first", 0.0), ("second", 2.5)))
    assert main(["fit", "--config", first]) == 0
    old, new = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    assert main(["fit", "--config", second, "--continue-from", str(old)]) == 0
    said = capsys.readouterr().out
    assert f"aggregator from {old}; new: nothing" in said
    assert f"{old} on its own slides, before and after" in said
    kept = load_memory(old / "memory.safetensors")
    assert kept.encoder == "uni_v1"
    assert kept.targets == ("A",)
    assert len(kept.target_RY) == 8, "one region, the whole of each of 8 small slides"
    found = json.loads((new / "forgetting.json").read_text())["figures"]
    assert set(found) == {"val", "test"}
    assert found["val"]["auroc"][0] == 1, "the first run knew its own slides"
    metrics = pd.read_csv(new / "metrics.csv")
    assert metrics["train/replay_loss"].dropna().gt(0).all()
    config = yaml.safe_load((new / "config.yaml").read_text())
    assert config["model"]["start_from"] == str(old)
    assert main(["fit", "--config", second, "--continue-from", str(old / "none")]) == 2
