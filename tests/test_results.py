"""Tables of benchmarks/README.md are those of results/, and these those of kept predictions.

Numbers may differ in their last bits: they are computed on another machine.
"""

import json
import re

import pytest

from benchmarks import needle, tissue, tissue_table
from benchmarks.record import README, RESULTS
from slides.files import write_json


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def leaves(value, *place):
    """Every number and text, with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, *place, key)
    else:
        yield place, value


def same(found, expected):
    assert dict(leaves(found)) == pytest.approx(dict(leaves(expected)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "markdown"), [("needle", needle.markdown), ("tissue", tissue_table.markdown)]
)
def test_readme_has_the_table_of_the_results(name, markdown):
    block = README.read_text().partition(f"<!-- {name}:begin -->\n")[2]
    assert block.partition(f"\n<!-- {name}:end -->")[0] == markdown(results(name)).rstrip()


def test_results_of_tissue_are_those_of_the_kept_predictions():
    found = results("tissue")["rows"]
    rows = {
        row: each
        for row, each in tissue_table.read_rows(tissue.ROWS, tissue.PATIENTS).items()
        if each["seeds"] == found[row]["seeds"]
    }  # else the older row stands, of more seeds
    assert "full" in rows, "no predictions are kept"
    for row, each in rows.items():
        same(each, found[row])


def test_results_of_needle_are_those_of_the_kept_predictions(tmp_path):
    found, path = results("needle"), tmp_path / "needle.json"
    write_json(path, needle.result_of(needle.read_fits(), {}))
    own = json.loads(path.read_text())
    assert "tapfm_gated_lora" in own["arms"], "no predictions are kept"
    for key in ("arms", "tile_auroc"):
        same(own[key], {title: found[key][title] for title in own[key]})
    for key in own.keys() - {"arms", "tile_auroc", "verdicts"}:
        same(own[key], found[key])
    assert words(own["verdicts"]) <= words(found["verdicts"])


def words(verdicts):
    """Return what is said, without the figures."""
    return {re.sub(r"[-+]?[\d.]+", "", each) for each in verdicts}


def test_a_fit_that_kept_less_than_the_whole_change_kept_its_best_epoch_too():
    paths = [path for path in tissue_table.KEPT.glob("*/*.json") if path.name != tissue.FROZEN]
    assert paths
    for path in paths:
        cell = json.loads(path.read_text())
        assert ("best_epoch" in cell) == (cell["interpolation"]["a"] < 1), path


def test_what_the_best_epochs_gain_is_known_of_all_seeds_or_left_out():
    for row, each in results("tissue")["rows"].items():
        if "gain" in each:
            known = (a == 1 or "best_epoch" in seed
                     for a, seed in zip(each["a"], each["by_seed"], strict=True))  # fmt: skip
            assert ("best_epoch_gain" in each) == all(known), row
