"""Tables of benchmarks/README.md are those of results/, and these those of kept predictions."""

import json

import pytest

from benchmarks import needle, tissue
from benchmarks.record import README, RESULTS


@pytest.mark.parametrize("bench", [needle, tissue], ids=["needle", "tissue"])
def test_readme_has_the_table_of_the_results(bench):
    name = bench.__name__.rpartition(".")[2]
    table = bench.markdown(json.loads((RESULTS / f"{name}.json").read_text()))
    block = README.read_text().partition(f"<!-- {name}:begin -->\n")[2]
    assert block.partition(f"\n<!-- {name}:end -->")[0] == table.rstrip()


def test_results_of_tissue_are_those_of_the_kept_predictions():
    found = json.loads((RESULTS / "tissue.json").read_text())["rows"]
    rows = {
        row: each
        for row, each in tissue.read_rows().items()
        if each["seeds"] == found[row]["seeds"]
    }  # else the older row stands, of more seeds
    assert "full" in rows, "no predictions are kept"
    for row, each in rows.items():
        for key in ("figures", "gain"):
            for label, own in each.get(key, {}).items():
                assert own == pytest.approx(found[row][key][label], abs=1e-6), (row, label)


def test_a_row_of_fewer_seeds_does_not_replace_an_older_one():
    old = {"lora": {"seeds": [0, 1, 2]}, "gone": {"seeds": [0]}}
    new = {"lora": {"seeds": [0, 1]}, "VESICULAR: full": {"seeds": [1]}}
    found = tissue.merged(old, new)
    assert found["lora"] == old["lora"]
    assert list(found) == ["gone", "VESICULAR: full", "lora"]
    assert tissue.merged(old, {"lora": {"seeds": [0, 1, 2], "a": []}})["lora"]["a"] == []
