"""A protein change is read from any of its spellings, or not at all."""

import pytest

from slides.labels.protein_change import protein_change
from slides.labels.variants import change_counts


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("G12D", "G12D"), ("p.G12D", "G12D"), ("P.g12d", "G12D"), ("p.Gly12Asp", "G12D"),
        ("GLY12ASP", "G12D"), ("p.(Gly12Asp)", "G12D"), ("NP_004976.2:p.Gly12Asp", "G12D"),
        ("G12>D", "G12D"), ("L747_P753>S", "L747_P753delinsS"), ("E746_A750del", "E746_A750del"),
        ("p.Glu746_Ala750del", "E746_A750del"), ("p.Glu746del", "E746del"),
        ("p.Leu747_Pro753delinsSer", "L747_P753delinsS"), ("E746_A750del5", "E746_A750del"),
        ("A767_V769dup", "A767_V769dup"), ("D770_N771insSVD", "D770_N771insSVD"),
        ("p.Leu210%3D", "L210="), ("L210L", "L210="), ("Q37X", "Q37*"), ("p.Gln37Ter", "Q37*"),
        ("T125fsX9", "T125fs*9"), ("p.Leu277ProfsTer49", "L277Pfs*49"), ("M1?", "M1?"),
        ("X1010_splice", "X1010_splice"), ("*330Qext*20", "*330Qext*20"), ("promoter", "Promoter"),
    ],
)  # fmt: skip
def test_a_change_is_read(text, change):
    assert protein_change(text) == change
    assert protein_change(change) == change


@pytest.mark.parametrize("text", ["", ".", "NA", "p.?", "c.35G>A", "G12", "MUTATED", "G12C/D", "1"])
def test_what_names_no_change_is_not_guessed(text):
    assert protein_change(text) == ""


@pytest.mark.parametrize(
    ("gene", "change", "hotspot", "truncating"),
    [
        ("KRAS", "p.Gly12Asp", True, False),
        ("KRAS", "A146T", False, False),
        ("KRAS", "G12X", None, True),  # any residue, or a stop in older notation
        ("KRAS", "c.35G>A", None, None),
        ("KRAS", "MUTATED", None, None),
        ("EGFR", "L747_P753>S", True, False),
        ("EGFR", "L210L", False, False),
        ("EGFR", "c.1A>T fs", None, True),
    ],
)
def test_a_rule_counts_a_change_or_says_that_it_cannot_tell(gene, change, hotspot, truncating):
    assert change_counts(gene, "hotspot", change) is hotspot
    assert change_counts(gene, "truncating", change) is truncating
    assert change_counts(gene, "nonsynonymous", change) is (change != "L210L")
