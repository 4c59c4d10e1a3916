"""Labels from mutations: which cases are mutated, not mutated, or unknown.

A case is 0 only if it was profiled. A rule counts the same mutations in a MAF, plain or packed, and
in a matrix. The public sources of TCGA-LUAD give known counts and known disagreements.
"""

import csv
import gzip
import math
import tarfile
import zipfile

import pytest

from slides.cohort.tcga_names import parse_slide
from slides.errors import LabelError
from slides.labels.mutations import Disagreement, disagreements, read_calls, read_profiled
from slides.labels.variants import NONSYNONYMOUS, RULES, SILENT, change_counts, row_counts

GENES = ("EGFR", "KRAS", "STK11", "TP53")
MAF = """#version 2.4
Hugo_Symbol\tVariant_Classification\tTumor_Sample_Barcode\tHGVSp_Short\tMutation_Status
EGFR\tMissense_Mutation\tTCGA-05-0001-01A-01D-1105-08\tp.L858R\tSomatic
EGFR\tSilent\tTCGA-05-0002-01A-01D-1105-08\tp.L210=\tSomatic
EGFR\tMissense_Mutation\tTCGA-05-0003-01A-01D-1105-08\tp.R222L\t
EGFR\tMissense_Mutation\tTCGA-05-0004-11A-01D-1105-08\tp.L858R\tSomatic
TTN\tMissense_Mutation\tTCGA-05-0005-01A-01D-1105-08\tp."quoted\tSomatic
EGFR\tMissense_Mutation\tTCGA-05-0005-01A-01D-1105-08\tp.L858R\tGermline
STK11\tNonsense_Mutation\tTCGA-05-0001-01A-01D-1105-08\tp.Q37*\tSomatic
TERT\t5'Flank\tTCGA-05-0002-06A-01D-1105-08\t\tSomatic
EGFR\t5'Flank\tTCGA-05-0002-01A-01D-1105-08\t\tSomatic
"""
MATRIX = (
    "STUDY_ID\tSAMPLE_ID\tEGFR\tKRAS\tSTK11\n"
    "luad\tTCGA-05-0001-01\tL858R T790M\tNS\tQ37*\n"
    "luad\tTCGA-05-0002-01\tL210=\tWT\tWT\n"
    "luad\tTCGA-05-0003-01\tE746_A750del\tG12C\tL277Pfs*49\n"
    "luad\tTCGA-05-0003-02\tWT\tWT\tNS\n"
    "luad\tTCGA-05-0004-11\tL858R\tG12C\tWT\n"
)
TABLE = (
    "file_name,case_submitter_id,is_ffpe,EGFR,KRAS,LKB1\n"
    "a.svs,TCGA-05-0001,True,True,False,False\n"
    "b.svs,TCGA-05-0001,True,True,False,False\n"
    "c.svs,TCGA-05-0002,True,False,False,False\n"
    "d.svs,TCGA-05-0003,True,False,True,False\n"
)


@pytest.fixture
def write(tmp_path):
    def write(text, name="mutations.txt", packed=False):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return path

    return write


def values(calls, gene):
    """Return {last digits of a case: value} of the known cases, such as {"1": 1.0}."""
    return {case[-1]: calls.value(case, gene) for case in sorted(calls.cases)}


@pytest.mark.parametrize("packed", [False, True])
def test_a_maf_alone_proves_who_was_profiled_by_their_mutations(write, packed):
    calls = read_calls(write(MAF, packed=packed), dict.fromkeys(["EGFR", "TERT"], RULES[0]))
    assert values(calls, "EGFR") == {"1": 1, "2": 0, "3": 1, "5": 0}
    assert values(calls, "TERT") == {"1": 0, "2": 1, "3": 0, "5": 0}
    assert math.isnan(calls.value("TCGA-05-0006", "EGFR"))
    assert calls.kind == "MAF"
    assert "sequenced or not" in calls.profiled
    assert len(calls.sha256) == 64


def test_files_of_one_case_each_are_read_joined(tmp_path, write):
    """The file is that of `cat *.maf.gz`: several gzips, each with comments and header."""
    comment, header, *rows = MAF.splitlines(keepends=True)
    joined = tmp_path / "joined.maf.gz"
    joined.write_bytes(b"".join(gzip.compress((comment + header + r).encode()) for r in rows))
    rules = dict.fromkeys(["EGFR", "TERT"], "nonsynonymous")
    assert read_calls(joined, rules).cases == read_calls(write(MAF), rules).cases


@pytest.mark.parametrize(
    "text",
    [
        "TCGA-05-0001-01\nTCGA-05-0006-01\n\n",
        "stable_id: luad\ncase_list_ids: TCGA-05-0001-01\tTCGA-05-0006-01\tTCGA-05-0007-11\n",
    ],
)
def test_a_list_of_the_profiled_makes_zeros_of_those_without_a_row(write, text):
    listed = write(text, "cases_sequenced.txt")
    assert read_profiled(listed) == {"TCGA-05-0001", "TCGA-05-0006"}
    calls = read_calls(write(MAF), {"EGFR": "nonsynonymous"}, listed)
    assert values(calls, "EGFR") == {"1": 1, "2": 0, "3": 1, "5": 0, "6": 0}
    assert calls.count("EGFR", ["TCGA-05-0001", "TCGA-05-0006", "TCGA-05-0007"]) == (1, 1, 1)


@pytest.mark.parametrize("word", ["sequenced_samples", "sequenced samples"])
def test_a_maf_that_names_the_sequenced_needs_no_list(write, word):
    """cBioPortal's own MAFs begin so; without it, a case without a mutation is unknown."""
    said = f"#{word}: TCGA-05-0001-01 TCGA-05-0006-01\tTCGA-05-0007-11\n"
    calls = read_calls(write(said + MAF), {"EGFR": "nonsynonymous"})
    assert values(calls, "EGFR") == {"1": 1, "2": 0, "3": 1, "5": 0, "6": 0}
    assert "names as sequenced" in calls.profiled


def test_a_maf_that_r_wrote_has_quotes_round_all_text(write):
    rows = MAF.partition("\n")[2]
    quoted = "\n".join("\t".join(f'"{cell}"' for cell in row.split("\t"))
                       for row in rows.splitlines())  # fmt: skip
    rules = dict.fromkeys(["EGFR", "TERT"], "nonsynonymous")
    assert read_calls(write(quoted + "\n"), rules).cases == read_calls(write(MAF), rules).cases


def test_a_class_with_a_space_is_that_class(write):
    spaced = MAF.replace("Missense_Mutation", "Missense Mutation")
    assert spaced != MAF
    rules = dict.fromkeys(["EGFR", "TERT"], "nonsynonymous")
    assert read_calls(write(spaced), rules).cases == read_calls(write(MAF), rules).cases


def test_alterations_across_samples_are_a_matrix_of_their_mutations(write):
    """cBioPortal's download of a query; an amplification is no mutation."""
    rows = [
        "Study ID\tSample ID\tPatient ID\tAltered\tEGFR\tEGFR: MUT\tEGFR: AMP",
        "luad\tTCGA-05-0001-01\tTCGA-05-0001\t1\tMUT: L858R;\tL858R\tno alteration",
        "luad\tTCGA-05-0002-01\tTCGA-05-0002\t1\tAMP;\tno alteration\tAMP",
        "luad\tTCGA-05-0003-01\tTCGA-05-0003\t0\tnot profiled\tnot profiled\tnot profiled",
    ]
    calls = read_calls(write("\n".join(rows) + "\n"), {"EGFR": "nonsynonymous"})
    assert calls.kind == "cBioPortal matrix"
    assert [calls.value(f"TCGA-05-000{n}", "EGFR") for n in (1, 2)] == [1.0, 0.0]
    assert math.isnan(calls.value("TCGA-05-0003", "EGFR"))


def test_a_matrix_says_who_was_profiled_gene_by_gene(write):
    calls = read_calls(write(MATRIX), dict.fromkeys(["EGFR", "KRAS", "STK11"], "nonsynonymous"))
    assert values(calls, "EGFR") == {"1": 1, "2": 0, "3": 1}
    kras = values(calls, "KRAS")
    assert math.isnan(kras.pop("1"))
    assert kras == {"2": 0, "3": 1}
    assert calls.count("KRAS") == (1, 1, 1)
    assert values(calls, "STK11") == {"1": 1, "2": 0, "3": 1}


@pytest.mark.parametrize("cell", ["", "NS", "NA", "NaN", "n/a", "unknown"])
def test_an_unknown_cell_of_a_matrix_is_unknown_however_it_is_written(write, cell):
    calls = read_calls(write(MATRIX.replace("\tNS", f"\t{cell}")), {"KRAS": "hotspot"})
    assert calls.count("KRAS") == (1, 1, 1)


@pytest.mark.parametrize("cell", ["L858R,T790M", "L858R; T790M", "T790M  L858R"])
def test_changes_of_a_cell_may_be_parted_by_commas(write, cell):
    calls = read_calls(write(MATRIX.replace("L858R T790M", cell)), {"EGFR": "hotspot"})
    assert values(calls, "EGFR") == {"1": 1, "2": 0, "3": 1}


def test_a_change_without_a_name_counts_where_every_change_does_and_is_else_unknown(write):
    path = write(MATRIX.replace("L858R T790M", "MUTATED").replace("WT", "wt"))
    assert values(read_calls(path, {"EGFR": "nonsynonymous"}), "EGFR") == {"1": 1, "2": 0, "3": 1}
    hot = values(read_calls(path, {"EGFR": "hotspot"}), "EGFR")
    assert math.isnan(hot.pop("1"))
    assert hot == {"2": 0, "3": 1}


def test_a_cell_that_is_no_change_is_named_with_its_row(write):
    with pytest.raises(LabelError, match="row 3: EGFR is 'no mutation': write protein changes"):
        read_calls(write(MATRIX.replace("L210=", "no mutation")), {"EGFR": "nonsynonymous"})


def test_a_matrix_of_0_and_1_says_who_is_mutated_and_who_is_not(write):
    text = "SAMPLE_ID\tKRAS\tEGFR\n" + "".join(
        f"P{n}\t{cell}\n"
        for n, cell in enumerate(["0\t1", "1\t0", "0.0\tTRUE", "True\tfalse", "1\twt", "0\t"])
    )
    calls = read_calls(write(text), dict.fromkeys(["KRAS", "EGFR"], "nonsynonymous"))
    assert values(calls, "KRAS") == {"0": 0, "1": 1, "2": 0, "3": 1, "4": 1, "5": 0}
    egfr = values(calls, "EGFR")
    assert math.isnan(egfr.pop("5"))
    assert egfr == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 0}
    hot = read_calls(write(text), {"KRAS": "hotspot"})
    assert hot.count("KRAS") == (0, 3, 3), "a 1 does not say which change it is"
    assert hot.notes == ("KRAS: 3 cells do not tell whether the rule hotspot counts them: unknown",)


@pytest.mark.parametrize(
    ("status", "validation", "counted"),
    [
        ("Somatic", "Untested", True), ("", "", True), ("Unknown", "Unknown", True),
        ("None", "", False), ("REDACTED", "", False), ("LOH", "Valid", False),
        ("Somatic", "Invalid", False), ("Somatic", "Redacted", False), ("", "wildtype", False),
    ],
)  # fmt: skip
def test_a_row_that_denies_its_mutation_makes_nobody_positive(write, status, validation, counted):
    head, row = MAF.splitlines()[1:3]
    text = f"{head}\tValidation_Status\n{row.removesuffix('Somatic')}{status}\t{validation}\n"
    other = row.replace("0001", "0002")  # so that the file lists the gene at all
    calls = read_calls(write(text + other + "\t\n"), {"EGFR": "nonsynonymous"})
    assert values(calls, "EGFR") == {"1": counted, "2": 1}
    assert len(calls.notes) == 1 - counted


def test_rows_without_a_sample_are_no_case_and_counted(write):
    text = MAF + "".join(
        f"EGFR\tMissense_Mutation\t{name}\tp.L858R\tSomatic\n" for name in ("", "NA", "Unknown")
    )
    calls = read_calls(write(text), {"EGFR": "nonsynonymous"})
    assert calls.cases == read_calls(write(MAF), {"EGFR": "nonsynonymous"}).cases
    assert "3 rows name no sample and are left out: rows 12, 13, 14" in calls.notes
    matrix = read_calls(write(MATRIX + "luad\t\tL858R\tWT\tWT\n"), {"EGFR": "hotspot"})
    assert matrix.cases == read_calls(write(MATRIX), {"EGFR": "hotspot"}).cases
    listed = write("TCGA-05-0001-01\nNA\n", "who.txt")
    assert read_profiled(listed) == {"TCGA-05-0001"}


def test_rows_may_lack_blank_cells_at_their_end(write):
    short = MAF.replace("\t\tSomatic", "").replace("p.R222L\t\n", "p.R222L\n")
    assert short != MAF
    rules = dict.fromkeys(["EGFR", "TERT"], "nonsynonymous")
    assert read_calls(write(short), rules).cases == read_calls(write(MAF), rules).cases


@pytest.mark.parametrize("kind", ["Unknown", "NA", "Indel", "", "Quiet"])
def test_a_class_that_is_not_known_makes_that_label_unknown_and_no_other(write, kind):
    text = MAF.replace("EGFR\tSilent", f"EGFR\t{kind}")
    calls = read_calls(write(text), {"EGFR": "nonsynonymous", "STK11": "truncating"})
    known = values(calls, "EGFR")
    assert math.isnan(known.pop("2"))
    assert known == {"1": 1, "3": 1, "5": 0}
    assert values(calls, "STK11") == {"1": 1, "2": 0, "3": 0, "5": 0}
    assert f"Variant_Classification {kind!r} (1 rows" in calls.notes[1]
    assert read_calls(write(text), {"EGFR": "listed"}).value("TCGA-05-0002", "EGFR") == 1
    lower = MAF.replace("Missense_Mutation", "missense_mutation")
    assert values(read_calls(write(lower), {"EGFR": "nonsynonymous"}), "EGFR")["1"] == 1


@pytest.mark.parametrize("change", ["", ".", "NA", "p.?", "c.2573T>G", "p.L858"])
def test_a_hotspot_whose_change_is_not_given_is_unknown_and_never_0(write, change):
    rules = {"EGFR": "hotspot"}
    known = values(read_calls(write(MAF.replace("p.R222L", change)), rules), "EGFR")
    assert math.isnan(known.pop("3"))
    assert known == {"1": 1, "2": 0, "5": 0}
    twice = MAF.replace("0003", "0001").replace("p.R222L", change)
    assert values(read_calls(write(twice), rules), "EGFR")["1"] == 1, "another row counts"


@pytest.mark.parametrize("change", ["p.Leu858Arg", "NP_005219.2:p.Leu858Arg", "p.(Leu858Arg)"])
def test_a_hotspot_is_read_in_three_letters_and_in_other_columns(write, change):
    text = MAF.replace("p.L858R", change)
    assert values(read_calls(write(text), {"EGFR": "hotspot"}), "EGFR")["1"] == 1
    text = text.replace("HGVSp_Short", "HGVSp")
    assert values(read_calls(write(text), {"EGFR": "hotspot"}), "EGFR")["1"] == 1


def test_two_samples_of_a_patient_of_msk_are_one_case(write):
    text = "SAMPLE_ID\tKRAS\n" + "P-0000001-T01-IM6\tWT\nP-0000001-T02-IM7\tG12D\n"
    calls = read_calls(write(text + "P-0000002-N01-IM6\tG12D\n"), {"KRAS": "hotspot"})
    assert dict(calls.cases) == {"P-0000001": {"KRAS": True}}


def test_archives_are_named_as_what_they_are(write, tmp_path):
    path = write(MAF)
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as tar:
        tar.add(path, "m.txt")
    with pytest.raises(LabelError, match=r"m.tar.gz: a tar archive. Unpack it \(tar -xf\)"):
        read_calls(tmp_path / "m.tar.gz", {"EGFR": "listed"})
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as packed:
        packed.write(path, "m.txt")
    with pytest.raises(LabelError, match="a zip archive"):
        read_calls(tmp_path / "m.zip", {"EGFR": "listed"})


def test_an_allele_longer_than_most_is_read(write):
    path = write(MAF + f"KRAS\tMissense_Mutation\tTCGA-05-0009-01A\t{'A' * 200_000}\tSomatic\n")
    assert read_calls(path, {"KRAS": "nonsynonymous"}).count("KRAS")[0] == 1


def test_false_everywhere_in_the_public_table_is_unknown_unless_told_otherwise(write, tmp_path):
    path, rules = write(TABLE), {"EGFR": "nonsynonymous", "KRAS": "nonsynonymous"}
    assert read_calls(path, rules).count("EGFR") == (1, 1, 1)
    assert set(read_calls(path, rules).rules.values()) == {"as published"}
    assert read_calls(path, rules, "all").count("EGFR") == (1, 2, 0)
    listed = write("TCGA-05-0002\nTCGA-05-0009\n", "listed.txt")
    calls = read_calls(path, rules, listed)
    assert calls.count("EGFR") == (1, 2, 0)
    assert "TCGA-05-0009" not in calls.cases, "sequenced or not, the table does not have it"


@pytest.mark.parametrize(
    ("gene", "kind", "change", "counted"),
    [
        ("EGFR", "Missense_Mutation", "L858R", {"nonsynonymous", "hotspot"}),
        ("EGFR", "In_Frame_Del", "E746_A750del", {"nonsynonymous", "hotspot"}),
        ("EGFR", "In_Frame_Del", "L747_A750delinsP", {"nonsynonymous", "hotspot"}),
        ("EGFR", "In_Frame_Del", "E709_T710delinsD", {"nonsynonymous"}),
        ("EGFR", "Missense_Mutation", "R222L", {"nonsynonymous"}),
        ("EGFR", "Splice_Region", "L210=", set()),
        ("KRAS", "Missense_Mutation", "G12C", {"nonsynonymous", "hotspot"}),
        ("KRAS", "Missense_Mutation", "A146T", {"nonsynonymous"}),
        ("BRAF", "Frame_Shift_Ins", "L277Pfs*49", {"nonsynonymous", "truncating"}),
        ("BRAF", "Splice_Site", "X1010_splice", {"nonsynonymous", "truncating"}),
        ("BRAF", "Nonstop_Mutation", "*330Qext*20", {"nonsynonymous", "truncating"}),
        ("BRAF", "Translation_Start_Site", "M1?", {"nonsynonymous"}),
    ],
)
def test_what_a_rule_counts_is_the_same_from_a_row_and_from_a_cell(gene, kind, change, counted):
    for rule in RULES:
        expected = rule in counted | {"listed"}
        assert row_counts(gene, rule, kind, change) == expected
        assert change_counts(gene, rule, change) == expected


def test_the_promoter_of_tert_counts_and_no_other():
    assert row_counts("TERT", "nonsynonymous", "5'Flank", "")
    assert row_counts("TERT", "hotspot", "5'Flank", "")
    assert not row_counts("TERT", "truncating", "5'Flank", "")
    assert not row_counts("TERT", "nonsynonymous", "5'UTR", "")
    assert not row_counts("EGFR", "nonsynonymous", "5'Flank", "")


def test_no_class_is_both_counted_and_silent():
    assert not NONSYNONYMOUS & SILENT


def test_two_sources_are_compared_where_both_know(write):
    rules = dict.fromkeys(["EGFR", "KRAS"], "nonsynonymous")
    one = read_calls(write(MATRIX, "a.tsv"), rules)
    two = read_calls(write(TABLE, "b.csv"), rules, "all")
    cases = [f"TCGA-05-000{n}" for n in range(1, 9)]
    assert disagreements(one, two, cases) == [
        Disagreement("EGFR", 3, 1, 0),
        Disagreement("KRAS", 2, 0, 0),
    ]
    assert disagreements(two, one, cases)[0] == Disagreement("EGFR", 3, 0, 1)


@pytest.mark.parametrize(
    ("text", "rules", "profiled", "message"),
    [
        (MAF, {"EGFR": "missense"}, None, "rule 'missense' is none of nonsynonymous, trunc"),
        (MAF, {"TTN": "hotspot"}, None, "TTN: there is no hotspot list for it .*BRAF, EGFR"),
        (MAF, {"LKB1": "listed"}, None, "LKB1: the file lists no mutation .*STK11, not LKB1"),
        (TABLE, {"LKB1": "listed"}, None, "LKB1: the file lists no mutation"),
        (MATRIX, {"LKB1": "listed"}, None, "LKB1: there is no such column"),
        (TABLE, {"EGFR": "truncating"}, None, "no protein changes, so no rule for EGFR"),
        (TABLE.replace("True,False,False\nb", "yes,False,False\nb"), {"EGFR": "listed"}, None,
         "row 2: EGFR is 'yes', not True or False"),
        (MAF.replace("HGVSp_Short", "Change"), {"EGFR": "hotspot"}, None, "HGVSp_Short is missing"),
        (MATRIX.replace("L858R T790M", "2"), {"EGFR": "listed"}, None, "row 2: EGFR is '2'"),
        ("\n".join(MAF.splitlines()[:2]), {"EGFR": "listed"}, None, "header alone, and no row"),
        ("version https://git-lfs.github.com/spec/v1\n", {"EGFR": "listed"}, None, "git lfs pull"),
        ("<!DOCTYPE html>\n", {"EGFR": "listed"}, None, "a web page, not a table"),
        (MAF + "EGFR\tMiss", {"EGFR": "listed"}, None, "row 12: 2 cells of 5: the file is cut"),
        (MATRIX[:-20], {"EGFR": "listed"}, None, "row 6: 2 cells of 5|row 6: 4 cells of 5"),
        ("sample,gene\n1,2\n", {"EGFR": "listed"}, None, "its columns are sample, gene. Give"),
        ("", {"EGFR": "listed"}, None, "empty"),
        (MAF, {"EGFR": "listed"}, "TCGA-99-0001\n", "none of its 1 cases is in"),
        (MAF, {"EGFR": "listed"}, "a b\n", "a line reads 'a b'"),
        (MAF, {"EGFR": "listed"}, "\n", "names no sample"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_used_says_why(write, text, rules, profiled, message):
    path = write(text)
    with pytest.raises(LabelError, match=message):
        read_calls(path, rules, profiled and write(profiled, "listed.txt"))


def test_all_faults_at_once_and_files_that_are_not_there(write, tmp_path):
    with pytest.raises(LabelError, match=r"2 faults\n.*LKB1.*\n.*ERBB9"):
        read_calls(write(MATRIX), {"LKB1": "listed", "ERBB9": "listed"})
    with pytest.raises(LabelError, match="No such file"):
        read_calls(tmp_path / "nowhere.txt", {"EGFR": "listed"})
    path = tmp_path / "cut.maf.gz"
    path.write_bytes(gzip.compress(MAF.encode())[:-9])
    with pytest.raises(LabelError, match=r"broken gzip.*Download it again"):
        read_calls(path, {"EGFR": "listed"})


class TestPublicSources:
    """TCGA-LUAD: the 467 patients with diagnostic slides."""

    @pytest.fixture
    def read(self, shared_data):
        labels = shared_data / "labels"
        public = labels / "gigapath_LUAD-5-gene_TCGA.csv"
        with public.open(newline="") as file:
            names = [parse_slide(row["file_name"]) for row in csv.DictReader(file)]
        cases = {name.case_id for name in names if name.diagnostic}

        def read(rule, profiled):
            rules = dict.fromkeys(GENES, rule)
            matrix = labels / "tcga_luad_mutations_cbioportal.tsv"
            return read_calls(matrix, rules), read_calls(public, rules, profiled), cases

        return read

    def test_counts(self, read):
        matrix, public, cases = read("listed", "all")
        assert [public.count(gene, cases)[0] for gene in GENES] == [58, 130, 64, 222]
        assert [public.count(gene, cases)[2] for gene in GENES] == [0, 0, 0, 0]
        assert [matrix.count(gene, cases) for gene in GENES] == [
            (58, 403, 6), (145, 316, 6), (71, 390, 6), (239, 222, 6),
        ]  # fmt: skip

    def test_disagreements_as_both_files_stand(self, read):
        rows = disagreements(*read("listed", "all"))
        assert [(r.gene, r.shared, r.only_first, r.only_second) for r in rows] == [
            ("EGFR", 461, 6, 3), ("KRAS", 461, 16, 1), ("STK11", 461, 16, 9), ("TP53", 461, 26, 6),
        ]  # fmt: skip

    def test_the_default_rule_counts_no_change_that_spares_the_protein(self, read):
        """Eight patients have only `T125=` or `Q331=` in TP53, one only `L210=` in EGFR."""
        rows = disagreements(*read("nonsynonymous", "all"))
        assert [r.only_first for r in rows] == [5, 16, 16, 18]

    def test_70_patients_without_any_mutation_are_unknown(self, read):
        _, public, cases = read("nonsynonymous", None)
        assert public.count("EGFR", cases) == (58, 339, 70)
