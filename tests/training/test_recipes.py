"""Recipes are settings for a situation; early stopping is Lightning's own and ends a run well."""

import pandas as pd
import pytest
import yaml

from tapfm.cli import main
from tapfm.training.fit import read_config
from tests.cohorts import write_cohort
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_sets_each_of_its_keys_beside_a_cohort(recipe, tmp_path):
    config = write_cohort(tmp_path)
    given = yaml.safe_load(recipe.read_text())
    words = ["--config", str(config), "--config", recipe.stem, "--print_config"]
    if recipe.stem == "survival":  # its columns are not in this table
        words = words[:-1]
        with pytest.raises(ValueError, match="os_months"):
            read_config(words)
        return
    with pytest.raises(SystemExit) as end:
        read_config(words)
    assert end.value.code == 0
    assert set(given) <= {"trainer", "model", "data"}


def test_a_run_that_stops_early_ends_as_one_that_does_not(tmp_path):
    config = write_cohort(tmp_path)
    many = ["--trainer.max_epochs", "30", "--model.steps.head_lr", "0.3"]  # too high to go on well
    assert main(["fit", "--config", str(config), "--config", "quick_look", *many]) == 0
    run = tmp_path / "runs" / "tapfm_gated_frozen"
    epochs = pd.read_csv(run / "metrics.csv")["epoch"].max() + 1
    assert 6 <= epochs < 30
    assert (run / "best.safetensors").is_file()
    assert not (run / "unfinished").exists()
