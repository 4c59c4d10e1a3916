"""The bag of a case has the tiles of all its slides, in training and prediction.

For two-level weights (`hierarchical`), the reference writes out both levels.
"""

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from slides.cohort.cases import group_by_case
from slides.cohort.table import SlideRow
from slides.errors import CohortError
from slides.streaming.stream import Augment, BagDataset
from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.evaluation.predicted_rows import groups_of
from tapfm.inference.prediction import Prediction, pool_cases
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks import make_task
from tapfm.training.fit import read_config
from tests.bags import tile_set
from tests.cohorts import write_cohort
from tests.tiny import tiny_encoder

NAN = float("nan")


def row(slide, case, *labels):
    return SlideRow(case, slide, None, "train", None, "", "", labels)


def test_what_slides_say_is_said_of_the_case():
    rows = [row("a", "c1", 1.0, NAN), row("b", "c2", 0.0, 0.0), row("d", "c1", NAN, NAN)]
    first, second = group_by_case(rows, ["A", "B"])
    assert (first.slide_id, first.case_id) == ("c1", "c1")
    assert [part.slide_id for part in first.slides] == ["a", "d"]
    assert first.labels[0] == 1
    assert np.isnan(first.labels[1])
    assert second.labels == (0, 0)


def test_slides_that_contradict_each_other_are_named():
    rows = [row("a", "c1", 1.0, 0.0), row("d", "c1", 0.0, NAN), row("e", "c2", 1.0, 1.0)]
    with pytest.raises(CohortError, match="case c1: its slides a, d differ in A: give them one"):
        group_by_case(rows, ["A", "B"])


def test_numbers_of_rows_are_no_labels():
    """Survival adds a number that differs from slide to slide."""
    (case,) = group_by_case(
        [row("a", "c1", 5.0, 1.0, 2.0), row("b", "c1", 5.0, 1.0, 3.0)], ["t", "e"]
    )
    assert case.labels == (5, 1, 2)


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """Return the config of a tiny cohort in which every second case has two slides."""
    folder = tmp_path_factory.mktemp("cases")
    config = write_cohort(folder, bags="case", labels=["KRAS"])
    table = pd.read_csv(folder / "cohort.csv")
    for one, other in ((0, 1), (4, 5), (10, 11)):
        table.loc[other, "case_id"] = table.loc[one, "case_id"]
        table.loc[[one, other], "KRAS"] = table.loc[one, "KRAS"]
    table.to_csv(folder / "cohort.csv", index=False)
    settings = yaml.safe_load(config.read_text())
    settings["model"] |= {"strategy": "norm_only", "drop_path": 0.0}
    config.write_text(yaml.safe_dump(settings))
    return config


@pytest.fixture(scope="module")
def data(paired):
    data = read_config(["--config", str(paired)]).datamodule
    data.prepare_data()
    return data


def test_a_bag_is_its_slides_one_after_the_other(data):
    """Its tiles are those of the slides' own bags, drawn and augmented alike."""
    case = data.rows("train")[0]
    assert [part.slide_id for part in case.slides] == ["s0", "s1"]
    how = {"budget": 7, "seed": 5, "augment": Augment(colour=0.1)}
    whole = BagDataset([case], data.tile_source, **how)[0]
    parts = [BagDataset([part], data.tile_source, **how)[0] for part in case.slides]
    assert torch.equal(whole.tiles, torch.cat([part.tiles for part in parts]))
    np.testing.assert_array_equal(whole.coords0, np.concatenate([p.coords0 for p in parts]))
    assert (whole.slide_id, whole.case_id) == ("c0", "c0")
    assert len(data.rows("train")) == 4, "of five; one has no known label"


def test_streamed_it_is_the_same_tiles_whatever_the_chunks(data):
    case = data.rows("train")[0]
    bag = data.bag(case)
    expected = BagDataset([case], data.tile_source)[0].tiles
    for size in (3, 16, 1000):
        assert torch.equal(torch.cat(list(bag.tiles.split(size))), expected)
    assert bag.count == len(expected)


def two_levels(aggregator, z_TD, score_T, counts):
    """Return logits and weights: an embedding per slide, then each slide's share of the case."""
    embeddings, within = [], []
    for z, s in zip(z_TD.split(counts), score_T.split(counts), strict=True):
        w = torch.softmax((s - s.min()) / (s.max() - s.min()) + aggregator.gate(z), 0)
        within.append(w)
        embeddings.append((w[:, None] * z).sum(0))
    shares = torch.softmax(aggregator.slide_gate(torch.stack(embeddings)), 0)
    case = sum(share * b for share, b in zip(shares, embeddings, strict=True))
    weights = [share * w for share, w in zip(shares, within, strict=True)]
    return aggregator.head(aggregator.norm(case)), torch.cat(weights)


def spread(aggregator):
    """Return gates with trained-looking weights."""
    torch.manual_seed(0)
    for gate in (aggregator.gate, aggregator.slide_gate):
        if gate is not None:
            torch.nn.init.normal_(gate.last.weight)
    return aggregator.double()


def said(aggregator, z_TD, score_T, counts=()):
    output = aggregator(tile_set(z_TD, score_T, counts))
    return output.logits_K, output.weights_T


def test_hierarchical_is_its_two_levels_and_starts_as_the_mean_of_slides():
    torch.manual_seed(1)
    z_TD, score_T = torch.randn(17, 7).double(), torch.rand(17).double()
    counts = (5, 1, 11)
    aggregator = make_aggregator("hierarchical", 7, 2).double()
    weights_T = aggregator(tile_set(z_TD, score_T, counts)).weights_T
    shares = [each.sum().item() for each in weights_T.split(counts)]
    assert shares == pytest.approx([1 / 3] * 3)
    spread(aggregator)
    counts = (6, 11)
    found = said(aggregator, z_TD, score_T, counts)
    torch.testing.assert_close(found, two_levels(aggregator, z_TD, score_T, counts))
    assert found[1].sum().item() == pytest.approx(1)
    assert found[1][:6].sum().item() != pytest.approx(6 / 17, abs=0.01)
    union = make_aggregator("tapfm_gated", 7, 2).double()
    union.load_state_dict(aggregator.state_dict(), strict=False)
    torch.testing.assert_close(said(aggregator, z_TD, score_T), said(union, z_TD, score_T))


@pytest.mark.parametrize("name", ["tapfm_gated", "hierarchical"])
def test_two_passes_over_a_case_are_the_gradient_of_one_graph(data, name):
    case = data.rows("train")[0]
    bag = BagDataset([case], data.tile_source, budget=4)[0]
    tiles, counts = bag.tiles, bag.counts
    assert counts == (4, 4)
    encoder, aggregator = tiny_encoder(), spread(make_aggregator(name, 24, 1))
    z_TD, score_T = encoder.encode(tiles)
    if name == "hierarchical":
        logits_K = two_levels(aggregator, z_TD, score_T, counts)[0]
        assert not torch.allclose(logits_K, said(aggregator, z_TD, score_T, (8,))[0], rtol=1e-3)
    else:
        logits_K = said(aggregator, z_TD, score_T)[0]
    logits_K.sum().backward()
    learners = [*encoder.parameters(), *aggregator.parameters()]
    expected = [p.grad.clone() for p in learners if p.grad is not None]
    for size in (3, 5):  # chunks run over the border of the slides
        encoder.zero_grad()
        aggregator.zero_grad()
        how = {"seed": 0, "device": torch.device("cpu")}
        z_TD, score_T, kept = encode_bag(encoder.encode, tiles.split(size), **how)
        said(aggregator, z_TD, score_T, counts)[0].sum().backward()
        adapt_bag(encoder.encode, tiles.split(size), z_TD.grad, score_T.grad, kept=kept, **how)
        found = [p.grad for p in learners if p.grad is not None]
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def predicted(config, run, case=None, slides=("s10.tif", "s11.svs")):
    """Return what `tapfm predict` writes for two slides, and the folder."""
    out = run / "predicted"
    table = out / "predictions.csv"
    table.unlink(missing_ok=True)  # or its rows would stay
    where = [str(config.parent / "slides" / name) for name in slides]
    more = ["--case", case] if case else []
    verb = ["predict", *where, "--model", str(run / "best.safetensors"), "--out", str(out), *more]
    return main(verb), pd.read_csv(table) if table.exists() else None, out


def test_from_fit_to_test_a_row_is_a_case(paired, capsys):
    fit = ["fit", "--config", str(paired), "--trainer.max_epochs", "1"]
    assert main([*fit, "--name", "union"]) == 0
    ours = ["--model.aggregator", "hierarchical", "--model.steps.head_lr", "0.1",
            "--model.steps.warm_start", "true"]  # fmt: skip
    assert main([*fit, "--name", "slides", *ours]) == 0
    runs = paired.parent / "runs"
    assert main(["test", "--run", str(runs), "--overlays", "4"]) == 0
    tested = {}
    for name in ("union", "slides"):
        code, table, out = predicted(paired, runs / name, "c10")
        assert code == 0
        assert table["slide_id"].tolist() == ["c10"]
        row = pd.read_csv(runs / name / "predictions_test.csv").iloc[0]
        tested[name] = row["p_KRAS"]
        assert table["p_KRAS"][0] == pytest.approx(row["p_KRAS"], abs=2e-6)
        for slide in ("s10", "s11"):
            with (h5py.File(out / f"{slide}_weights.h5") as one,
                  h5py.File(runs / name / "weights_test" / f"{slide}.h5") as other):  # fmt: skip
                np.testing.assert_allclose(one["weights"], other["weights"], rtol=1e-4)
                np.testing.assert_array_equal(one["coords"], other["coords"])
    assert tested["union"] != pytest.approx(tested["slides"], abs=1e-4)
    code, table, _ = predicted(paired, runs / "slides")  # each by itself, as a case of one slide
    assert table["slide_id"].tolist() == ["s10", "s11"]
    assert set(table["p_KRAS"]) - {tested["slides"]}
    capsys.readouterr()
    code, table, _ = predicted(paired, runs / "slides", "c10", ("s10.tif", "gone.svs"))
    assert (code, table) == (2, None)
    assert "c10: one of its slides failed, so it is not predicted" in capsys.readouterr().err
    metrics = pd.read_csv(runs / "union" / "metrics.csv")
    assert sorted(metrics["slide_id"].dropna()) == ["c0", "c3", "c4", "c6"]  # c2 has no label
    for folder in (runs / "union", runs / "frozen" / "frozen_gated_attention"):
        table = pd.read_csv(folder / "predictions_test.csv")
        assert table["slide_id"].tolist() == ["c10", "c12", "c13"]
    sums = {}
    for path in (runs / "union" / "weights_test").glob("*.h5"):
        with h5py.File(path) as file:
            assert len(file["weights"]) == len(file["coords"])
            sums[path.stem] = file["weights"][:].sum()
    assert sums["s10"] + sums["s11"] == pytest.approx(1, abs=1e-5)
    assert 0.01 < sums["s10"] < 0.99
    assert sums["s12"] == pytest.approx(1, abs=1e-5)
    assert len(list((runs / "union" / "overlays_test").glob("*.png"))) == 4


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_logits_of_slides_pooled(pool):
    task = make_task({"name": "multilabel"}, ["A", "B"])
    logits = {"a": [1.0, -2.0], "b": [0.0, 0.0], "d": [3.0, -4.0]}
    rows = [row("a", "c1", 1.0, NAN), row("b", "c2", 0.0, 0.0), row("d", "c1", 1.0, 1.0)]
    slides = [
        Prediction(each.slide_id, each.case_id, np.array(each.labels), np.zeros(2), np.ones(3),
                   np.array(logits[each.slide_id]))
        for each in rows
    ]  # fmt: skip
    first, second = pool_cases(slides, task, pool, group_by_case(rows, ["A", "B"]))
    expected = np.array([2.0, -3.0] if pool == "mean" else [3.0, -2.0])
    np.testing.assert_allclose(first.probs_K, 1 / (1 + np.exp(-expected)))
    assert (first.slide_id, first.labels_K.tolist()) == ("c1", [1, 1])
    np.testing.assert_allclose(second.probs_K, 0.5)


def test_a_case_of_slides_of_several_stains_is_mixed():
    stains = {
        "a": ("c1", "HE"),
        "b": ("c2", "HE"),
        "d": ("c1", "CK7"),
        "e": ("c2", ""),
        "f": ("c3", ""),
    }
    rows = [SlideRow(case, name, None, "test", None, stain, "", ()) for name, (case, stain)
            in stains.items()]  # fmt: skip
    assert groups_of(rows, "stain") == {
        "a": "HE", "b": "HE", "d": "CK7", "e": "", "f": "", "c1": "mixed", "c2": "HE", "c3": ""
    }  # fmt: skip
    same_name = [SlideRow("s1", "s1", None, "test", None, "HE", "", ())]
    assert groups_of(same_name, "stain") == {"s1": "HE"}


def test_bags_of_cases_have_nothing_left_to_pool_and_slides_nothing_to_weigh(paired, capsys):
    assert main(["fit", "--config", str(paired), "--data.pool", "max"]) == 2
    assert "data.pool max is of slides" in capsys.readouterr().err
    of_slides = ["--data.bags", "slide", "--model.aggregator", "hierarchical"]
    assert main(["fit", "--config", str(paired), *of_slides]) == 2
    assert "weighs the slides of a case, and data.bags is slide" in capsys.readouterr().err


def test_slides_are_trained_and_cases_tested(paired):
    """Each row of the table is the mean of its slides' logits."""
    runs = paired.parent / "pooled"
    how = ["--run_dir", str(runs), "--data.bags", "slide", "--data.pool", "mean"]
    fit = ["fit", "--config", str(paired), "--trainer.max_epochs", "1", "--name", "slides"]
    assert main([*fit, *how]) == 0
    assert main(["test", "--run", str(runs), "--overlays", "0"]) == 0
    table = pd.read_csv(runs / "slides" / "predictions_test.csv")
    assert table["slide_id"].tolist() == ["c10", "c12", "c13"]
    assert len(list((runs / "slides" / "weights_test").glob("*.h5"))) == 4
    model = models.load(runs / "slides" / "best.safetensors")
    data = read_config(["--config", str(runs / "slides" / "config.yaml")]).datamodule
    two = [model(data.bag(each), 16).logits_K.item() for each in data.cohort.split("test")[:2]]
    expected = 1 / (1 + np.exp(-np.mean(two)))
    assert table["p_KRAS"][0] == pytest.approx(expected, abs=2e-6)
    code, alone, _ = predicted(paired, runs / "slides", "c10")
    assert code == 0
    assert alone["p_KRAS"].tolist() == [pytest.approx(expected, abs=2e-6)]


def test_a_model_of_slides_says_nothing_of_cases(paired, tmp_path, capsys):
    model_config = models.ModelConfig("demo_vit", "tapfm_gated", ("KRAS",), 32, 0.5)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=32))
    models.save(model, tmp_path / "best.safetensors", bags="slide", pool="union")
    slide, best = str(paired.parent / "slides" / "s10.tif"), str(tmp_path / "best.safetensors")
    assert main(["predict", slide, "--model", best, "--case", "c10"]) == 2
    assert "cannot predict a case of several. Leave --case out" in capsys.readouterr().err
