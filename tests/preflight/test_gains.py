"""Holds the gains that `tapfm plan` names equal to those that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tapfm.preflight.gains import MEASURED, advice

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "tissue.json"
ROWS = ["8 training patients", "8 training patients: full", "lora", "full"]


@pytest.mark.parametrize(("point", "row"), [*zip(MEASURED, ROWS, strict=True)], ids=ROWS)
def test_the_figures_are_those_of_the_benchmark(point, row):
    row = json.loads(RESULT.read_text())["rows"][row]
    assert row["seeds"] == [0, 1, 2]
    for label, own in (("VESICULAR", point.cleared), ("KARYOMEGALY", point.enlarged)):
        assert [own.value, own.low, own.high] == pytest.approx(row["gain"][label], abs=5.1e-4)


def test_the_advice_names_the_cohorts_patients_and_every_point():
    said = advice(11)
    assert "11 training patients" in said
    for point in MEASURED:
        assert f"{point.learns} with {point.patients} patients of {point.slides} slides" in said
        assert f"{point.cleared.value:+.3f} [{point.cleared.low:+.3f}" in said
