"""Every task, from slides on disk to a table: a target that can be seen is learned.

Twenty-four slides whose tissue is the darker, the larger a number v is. Classes, values and times
are made of v; a few are unknown, and of the survival times a third is censored.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tapfm.cli import main
from tapfm.slide_model import model as models
from tapfm.training.callbacks import RunLog
from tests.conftest import stained_picture, write_pyramid

SLIDES = 24
SPLITS = ["train", "train", "val", "test"]
V = np.random.default_rng(3).permutation(SLIDES) / (SLIDES - 1)


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Slides of many tints, and a table with what every task needs."""
    folder = tmp_path_factory.mktemp("painted")
    (folder / "slides").mkdir()
    rows = []
    for n, v in enumerate(V):
        picture = stained_picture(167, 139, seed=n).astype(float)
        tissue = picture.min(2) < 225
        picture[tissue] -= (1 - np.eye(3)[2]) * 90 * v
        path = folder / "slides" / f"s{n}.tif"
        write_pyramid(path, np.clip(picture, 0, 255).astype(np.uint8), 0.5, levels=1)
        rows.append(
            {
                "case_id": f"c{n}",
                "slide_id": f"s{n}",
                "slide_path": f"slides/s{n}.tif",
                "split": SPLITS[n % 4],
                "grade": ("high" if v > 0.5 else "low") if n != 4 else "",
                "stage": ("low", "middle", "top")[min(int(3 * v), 2)],
                **{
                    f"gene{k}": f"{2 ** (k + 3 * v * (-1) ** k) - 1 + 7 * (k % 2):.3f}"
                    for k in range(4)
                },
                "score": f"{50 + 10 * v:.3f}" if n != 5 else "",
                "months": f"{70 - 60 * v:.2f}",
                "status": "0:LIVING" if n % 3 == 0 else "1:DECEASED",
            }
        )
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder


def configure(folder, name, task, labels=None, epochs=4):
    """The config of a run on this table."""
    config = {
        "run_dir": str(folder / "runs" / name),
        "name": "run",
        "resume_every": 0,
        "trainer": {"accelerator": "cpu", "max_epochs": epochs},
        "model": {
            "model": "demo_vit",
            "chunk": 16,
            "strategy": {"name": "last_n", "n": 1},
            "steps": {"encoder_lr": 1e-4, "head_lr": 1e-2, "accumulate": 2},
        },
        "data": {
            "table": str(folder / "cohort.csv"),
            "index_dir": str(folder / "index"),
            "tiles": {"tile_px": 32, "mpp": 0.5, "tissue": {"min_area_um2": 1000.0}},
            "workers": 0,
            "labels": labels,
            "task": task,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(folder, name, task, labels=None, epochs=4):
    """Fit and test; the figures and the run's folder."""
    assert main(["fit", "--config", str(configure(folder, name, task, labels, epochs))]) == 0
    assert main(["test", "--run", str(folder / "runs" / name), "--overlays", "0"]) == 0
    report = folder / "runs" / name / "report_test"
    figures = json.loads((report / "metrics_test.json").read_text())
    assert (report / "report.md").stat().st_size > 500
    assert (report / "curves.png").stat().st_size > 1000
    return figures["arms"], folder / "runs" / name / "run"


def predict(folder, run):
    """A slide of no cohort, by the saved model: the first of the test split."""
    out = run / "predicted"
    best = str(run / "best.safetensors")
    assert main(["predict", str(folder / "slides" / "s3.tif"), "--model", best,
                 "--out", str(out)]) == 0  # fmt: skip
    return pd.read_csv(out / "predictions.csv").iloc[0]


def test_classes(painted):
    arms, run_dir = run(painted, "classes", "multiclass", ["grade"])
    assert main(["index", "--config", str(painted / "classes.yaml")]) == 0
    assert len(arms) == 6, "colour, three frozen rows, the run, and its frozen control"
    assert arms["frozen, linear probe"]["figures"]["macro"]["auroc"]["value"] > 0.85
    ours = arms["end to end, run"]["figures"]["macro"]
    assert ours["auroc"]["value"] > 0.85
    assert ours["balanced_accuracy"]["value"] > 0.7
    frozen = [arm["figures"]["macro"]["auroc"]["value"] for arm in arms.values()]
    assert max(frozen) > 0.85
    model_config, facts = models.read_model_config(run_dir / "best.safetensors")
    assert model_config.labels == ("high", "low")
    assert model_config.task["column"] == "grade"
    assert "val_auroc" in facts
    table = pd.read_csv(run_dir / "predictions_test.csv")
    probs = table[["p_high", "p_low"]]
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    assert set(table["grade"]) == {"low", "high"}
    alone = predict(painted, run_dir)
    assert alone["p_low"] == pytest.approx(table["p_low"][0], abs=1e-5)
    assert pd.isna(alone["grade"])


def test_ordered_classes(painted):
    task = {"name": "ordinal", "order": ["low", "middle", "top"]}
    arms, run_dir = run(painted, "ordered", task, ["stage"])
    ours = arms["end to end, run"]["figures"]["macro"]
    assert ours["kappa"]["value"] > 0.5
    assert ours["class_distance"]["value"] < 0.6
    model_config, _ = models.read_model_config(run_dir / "best.safetensors")
    assert model_config.labels == ("above_low", "above_middle")
    table = pd.read_csv(run_dir / "predictions_test.csv")
    each = [f"p_{name}" for name in ("low", "middle", "top")]
    np.testing.assert_allclose(table[each].sum(1), 1, atol=1e-5)
    assert predict(painted, run_dir)["p_top"] == pytest.approx(table["p_top"][0], abs=1e-5)
    page = (painted / "runs" / "ordered" / "report_test" / "report.html").read_text()
    assert "Confusions" in page


def test_genes(painted):
    genes = [f"gene{k}" for k in range(4)]
    arms, run_dir = run(painted, "genes", {"name": "expression", "log": True}, genes)
    ours = arms["end to end, run"]["figures"]["macro"]
    assert ours["pearson"]["value"] > 0.6
    assert ours["significant"]["value"] > 0
    assert "spearman_over_genes" in ours
    table = pd.read_csv(run_dir / "predictions_test.csv")
    said = predict(painted, run_dir)["predicted_gene2"]
    assert said == pytest.approx(table["predicted_gene2"][0], rel=1e-4)


def test_values(painted):
    arms, run_dir = run(painted, "values", "regression", ["score"], epochs=9)
    ours = arms["end to end, run"]["figures"]["macro"]
    assert ours["r2"]["value"] > 0.5
    assert arms["frozen, linear probe"]["figures"]["macro"]["r2"]["value"] > 0.5
    assert ours["spearman"]["value"] > 0.8
    assert arms["end to end, run"]["r2_difference"]["score"]["draws"] > 1900
    table = pd.read_csv(run_dir / "predictions_test.csv")
    assert table["predicted_score"].between(45, 65).all(), "in the target's own unit"
    assert (table["score"] - table["predicted_score"]).abs().mean() < 3
    assert predict(painted, run_dir)["predicted_score"] == pytest.approx(
        table["predicted_score"][0], abs=1e-3
    )


def test_times(painted):
    task = {"name": "survival", "time": "months", "event": "status", "bins": 3}
    arms, run_dir = run(painted, "times", task)
    assert arms["end to end, run"]["figures"]["all"]["concordance"]["value"] > 0.8
    for row in ("frozen, linear probe", "frozen, mean-pool MLP"):
        assert arms[row]["figures"]["all"]["concordance"]["value"] > 0.6
    model_config, _ = models.read_model_config(run_dir / "best.safetensors")
    table = pd.read_csv(run_dir / "predictions_test.csv")
    known = pd.read_csv(painted / "cohort.csv").query("split == 'train'")
    seen = known[known["status"].str.startswith("1")]["months"]
    edges = model_config.task["edges"]
    np.testing.assert_allclose(edges, np.quantile(seen, [1 / 3, 2 / 3]), rtol=1e-6)
    first, second = (table[f"survival_{edge:g}"] for edge in edges)
    assert ((first <= 1) & (first >= second) & (second >= 0)).all()
    assert predict(painted, run_dir)["risk"] == pytest.approx(table["risk"][0], abs=1e-4)


def test_cox_learns_from_a_bank_of_risks_and_resumes_with_it(painted, monkeypatch):
    """Stopped in its third epoch and continued, it ends as the run that was not stopped."""
    task = {"name": "survival", "time": "months", "event": "status", "loss": "cox"}
    whole, broken = (configure(painted, name, task) for name in ("whole", "broken"))
    assert main(["fit", "--config", str(whole)]) == 0
    run_dir = painted / "runs" / "whole" / "run"
    assert pd.read_csv(run_dir / "metrics.csv")["val/concordance"].max() > 0.8

    real = RunLog.on_train_batch_end

    def stop(self, trainer, module, *others):
        if module.slides_seen == 30:
            raise OSError("the power went")
        real(self, trainer, module, *others)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_train_batch_end", stop)
        with pytest.raises(OSError, match="power"):
            main(["fit", "--config", str(broken)])
    other = painted / "runs" / "broken" / "run"
    point = torch.load(other / "last.ckpt", weights_only=True)
    assert point["state_dict"]["objective.task_loss.bank_M4"][:12].isfinite().all()
    assert main(["fit", "--config", str(broken)]) == 0
    assert (other / "metrics.csv").read_text() == (run_dir / "metrics.csv").read_text()
    one, same = (load_file(each / "best.safetensors") for each in (run_dir, other))
    assert all(torch.equal(one[key], same[key]) for key in one)
