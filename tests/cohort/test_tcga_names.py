"""TCGA barcodes are parsed: made-up names, and all 1,345 of TCGA-LUAD."""

import csv
from collections import Counter

import pytest

from slides.cohort.tcga_names import SlideName, case_of, is_tumour, parse_slide, site_of

UUID = "d4ff32cd-38cf-40ea-8213-45c2b100ac01"


def test_a_diagnostic_slide():
    name = parse_slide(f"TCGA-05-4244-01Z-00-DX1.{UUID}.svs")
    assert name == SlideName("TCGA-05-4244-01Z-00-DX1", "TCGA-05-4244", "05", "DX1", 1)
    assert name.diagnostic
    assert parse_slide(f"TCGA-05-4244-01Z-00-DX1.{UUID.upper()}.svs") == name


@pytest.mark.parametrize(
    ("barcode", "section"), [("01A-01-TS1", "TS1"), ("11A-00-DX1", "DX1"), ("01A-01-BSB", "BSB")]
)
def test_frozen_and_normal_tissue_is_no_diagnostic_slide(barcode, section):
    name = parse_slide(f"TCGA-MP-A4TI-{barcode}.{UUID}.svs")
    assert (name.section, name.site, name.diagnostic) == (section, "MP", False)


@pytest.mark.parametrize(
    "name",
    ["TCGA-05-4244-01Z-00-DX1.svs", f"TCGA-05-4244-01Z-00-DX1.{UUID}.svs.partial", "C3L-00001.svs"],
)
def test_other_names_are_no_slides_of_tcga(name):
    assert parse_slide(name) is None


@pytest.mark.parametrize(
    ("sample", "case"),
    [
        ("TCGA-05-4244-01A-01D-1105-08", "TCGA-05-4244"),
        ("TCGA-05-4244-01", "TCGA-05-4244"),
        ("TCGA-05-4244", "TCGA-05-4244"),
        ("C3N-00545-22", "C3N-00545"),
        ("tcga-05-4244-01a", "TCGA-05-4244"),
        ("TCGA.05.4244.01", "TCGA-05-4244"),
        ("P-0000001-T01-IM6", "P-0000001"),
        ("GENIE-MSK-P-0000001-T02-IM7", "GENIE-MSK-P-0000001"),
        ("P-1-T01", "P-1-T01"),
        ("patient-7", "patient-7"),
    ],
)
def test_the_case_of_a_sample(sample, case):
    assert case_of(sample) == case
    assert site_of(sample) == ("05" if sample.upper().startswith("TCGA") else "")


def test_which_samples_are_tumours():
    assert [is_tumour(f"TCGA-05-4244-{kind}A") for kind in ("01", "06", "10", "11")] == [1, 1, 0, 0]
    assert is_tumour("TCGA-05-4244")
    assert is_tumour("patient-7")
    assert [is_tumour(f"P-0000001-{kind}-IM6") for kind in ("T01", "N01")] == [True, False]


def test_all_names_of_the_public_table_parse(shared_data):
    with (shared_data / "labels" / "gigapath_LUAD-5-gene_TCGA.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [parse_slide(row["file_name"]) for row in rows]
    assert len(names) == 1345
    assert None not in names
    for row, name in zip(rows, names, strict=True):
        assert (name.case_id, name.slide_id) == (row["case_submitter_id"], row["slide_id"])
    assert Counter(name.section[:2] for name in names) == {"DX": 529, "TS": 476, "BS": 340}
    diagnostic = [name for name in names if name.diagnostic]
    assert (len(diagnostic), len({name.case_id for name in diagnostic})) == (529, 467)
    assert len({name.slide_id for name in diagnostic}) == 529
    assert len({name.site for name in names}) == 33
