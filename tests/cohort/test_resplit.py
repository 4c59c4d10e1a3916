"""`tapfm split` changes only the column `split`, and keeps other tools' splits exactly."""

import csv

import pytest

from slides.cohort.table import read_cohort
from tapfm import cli


@pytest.fixture
def table(tmp_path):
    """Write 30 cases with 37 slides, labels, blanks and an unknown column; return the path."""
    folder = tmp_path / "cohort"
    folder.mkdir()
    lines = ["case_id,slide_id,slide_path,split,EGFR,KRAS"]
    for number in range(37):
        case = number % 30
        (folder / f"{number}.svs").touch()
        kras = "" if case % 7 == 0 else case % 3 // 2
        lines.append(f"TCGA-{10 + case % 9}-00{case:02},s{number},{number}.svs,,{case % 2},{kras}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder / "cohort.csv"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def split(table, out, *options):
    return cli.main(["split", "--table", str(table), "--out", str(out), *options])


def test_one_split_into_a_table(table, tmp_path, capsys):
    out = tmp_path / "elsewhere" / "b.csv"
    assert split(table, out, "--fractions", "0.5", "0.2", "0.3") == 0
    assert "EGFR" in capsys.readouterr().out
    changed = {"split", "slide_path"}
    for before, after in zip(rows(table), rows(out), strict=True):
        assert {k: v for k, v in before.items() if k not in changed} == {
            k: v for k, v in after.items() if k not in changed
        }
    cohort = read_cohort(out, ["EGFR", "KRAS"])  # its slides are found, and no case is in two
    assert [len({r.case_id for r in cohort.split(part)}) for part in ("train", "val", "test")] == [
        15, 6, 9,
    ]  # fmt: skip


def test_folds_in_every_format_say_the_same(table, tmp_path):
    out = tmp_path / "folds"
    formats = ["table", "clam", "clam-bool", "patho-bench"]
    assert split(table, out, "--folds", "3", "--preserve-sites", "--format", *formats) == 0
    for fold in range(3):
        expected = [row["split"] for row in rows(out / f"cohort_{fold}.csv")]
        homes = {}
        for row in rows(out / f"cohort_{fold}.csv"):
            assert homes.setdefault(row["case_id"][5:7], row["split"]) == row["split"]
        for source, options in (
            (f"splits_{fold}.csv", []),
            (f"splits_{fold}_bool.csv", []),
            ("EGFR/k=all.tsv", ["--fold", str(fold)]),
        ):
            back = tmp_path / "back.csv"
            assert split(table, back, "--from", str(out / source), *options) == 0
            assert [row["split"] for row in rows(back)] == expected
    task = (out / "KRAS" / "k=all.tsv").read_text().splitlines()
    assert len(task) == 1 + sum(row["KRAS"] != "" for row in rows(table))


def test_a_file_that_names_slides_by_their_files_and_leaves_some_out(table, tmp_path, capsys):
    given = tmp_path / "splits_0.csv"
    given.write_text(",train,val,test\n0,0,1,2\n1,30,,\n")  # 0 and 30 are one case
    out = tmp_path / "b.csv"
    assert split(table, out, "--from", str(given)) == 0
    assert "27 cases are in no part and left out" in capsys.readouterr().out
    assert [(row["slide_id"], row["split"]) for row in rows(out)] == [
        ("s0", "train"), ("s1", "val"), ("s2", "test"), ("s30", "train"), ("s31", "val"),
        ("s32", "test"),
    ]  # fmt: skip


def test_a_leak_is_refused(table, tmp_path, capsys):
    given = tmp_path / "splits_0.csv"
    given.write_text(",train,val,test\n0,s0,s1,s30\n")
    assert split(table, tmp_path / "b.csv", "--from", str(given)) == 2
    output = capsys.readouterr().err
    assert "case TCGA-10-0000 is in train (s0) and test (s30)" in output
    assert not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "3", "--repeats", "2"], "give one of --folds, --repeats and --from"),
        (["--folds", "3"], "give a folder"),
        (["--format", "clam"], "give a folder"),
        (["--labels", "ALK"], "column 'ALK' is missing"),
        (["--labels", "slide_id"], "column 'slide_id': 37 of 37 rows are "),
        (["--task", "ranking"], "'ranking' is none of multilabel, multiclass"),
        (["--task", "multiclass"], "takes one column of class names, not 2"),
        (["--task", "survival", "--labels", "EGFR"], "--labels TIME EVENT"),
        (["--task", "regression", "--labels", "case_id"], "37 of 37 rows are not numbers"),
        (["--task", "regression", "--format", "patho-bench"], "leave it out of regression"),
    ],
)
def test_what_cannot_be_split_is_refused(table, tmp_path, capsys, options, message):
    assert split(table, tmp_path / "b.csv", *options) == 2
    assert message in capsys.readouterr().err


def test_paths_below_a_folder_of_slides_stay_as_they_are(table, tmp_path):
    out = tmp_path / "elsewhere" / "b.csv"
    assert split(table, out, "--slides-dir", str(table.parent)) == 0
    names = [[row["slide_path"] for row in rows(each)] for each in (table, out)]
    assert names[0] == names[1]


def test_a_name_that_stands_twice_is_refused(table, tmp_path, capsys):
    """Rows of one slide could go to two parts, and one of two columns would be lost."""
    lines = table.read_text().splitlines()
    lines[0] = lines[0].replace("KRAS", "EGFR")
    lines.append(lines[1].replace("TCGA-10-0000", "TCGA-11-0099"))
    table.write_text("\n".join(lines) + "\n")
    assert split(table, tmp_path / "b.csv") == 2
    output = capsys.readouterr().err
    assert "column 'EGFR' appears 2 times" in output
    assert "rows 2, 39: slide_id s0 appears 2 times" in output
    assert not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize(
    ("task", "labels", "output"),
    [
        ("multiclass", ["subtype"], ["LUAD", "LUSC"]),
        ("regression", ["TMB"], ["TMB above 1/3", "TMB above 2/3"]),
        ("survival", ["months", "status"], ["status", "months above 1/2"]),
    ],
)
def test_classes_values_and_times_are_dealt_evenly(table, tmp_path, capsys, task, labels, output):
    lines = table.read_text().splitlines()
    cells = [lines[0] + ",subtype,TMB,months,status"]
    for number, line in enumerate(lines[1:]):
        case = number % 30
        subtype = "" if case == 4 else ("LUAD", "LUSC")[case % 3 == 0]
        status = ("0:LIVING", "1:DECEASED")[case % 2]
        cells.append(f"{line},{subtype},{case * 1.5},{(case * 7) % 30 + 1},{status}")
    table.write_text("\n".join(cells) + "\n")
    out = tmp_path / "folds"
    options = ["--folds", "5", "--task", task, "--labels", *labels]
    assert split(table, out, *options) == 0
    header = capsys.readouterr().out.splitlines()[1]
    assert header.split("cases", 1)[1].split() == " ".join(output).split()
    tested = []
    for fold in range(5):
        there = rows(out / f"cohort_{fold}.csv")
        homes = {}
        for row in there:
            assert homes.setdefault(row["case_id"], row["split"]) == row["split"]
        test = {row["case_id"]: row for row in there if row["split"] == "test"}
        tested += test
        if task == "multiclass":
            assert sum(row["subtype"] == "LUSC" for row in test.values()) == 2
        elif task == "regression":
            values = [float(row["TMB"]) for row in test.values()]
            assert [sum(v < 15 for v in values), sum(v >= 30 for v in values)] == [2, 2]
        else:
            assert sum(row["status"][0] == "1" for row in test.values()) == 3
    assert len(tested) == len(set(tested)) == 30


def test_repeats(table, tmp_path):
    assert split(table, tmp_path / "out", "--repeats", "2") == 0
    one, two = (rows(tmp_path / "out" / f"cohort_{n}.csv") for n in range(2))
    assert [row["split"] for row in one] != [row["split"] for row in two]


def write_table(folder, labels, values, slides=12):
    """Write a cohort of cases with two slides each; `values` is label -> value of slide n."""
    lines = [",".join(["case_id", "slide_id", "slide_path", *labels])]
    for n in range(slides):
        (folder / f"{n}.svs").touch()
        cells = [f"c{n // 2}", f"s{n}", f"{n}.svs", *(str(values[label](n)) for label in labels)]
        lines.append(",".join(cells))
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder / "cohort.csv"


def test_a_label_whose_name_is_no_folders_has_one_of_its_own(tmp_path):
    labels = ("HER2/neu", "HER2:neu", "PD-L1 >= 1 %", "TP53.1")
    table = write_table(tmp_path, labels, dict.fromkeys(labels, lambda n: n // 2 % 2))
    assert split(table, tmp_path / "out", "--folds", "3", "--format", "patho-bench") == 0
    tasks = {path.parent.name: path.read_text() for path in (tmp_path / "out").glob("*/k=all.tsv")}
    assert sorted(tasks) == ["HER2_neu", "HER2_neu_", "PD-L1 _= 1 %", "TP53.1"]
    named = sorted(text.split("\t")[2] for text in tasks.values())
    assert named == sorted(labels)


def test_a_case_whose_slides_differ_is_named_and_not_written_by_case(tmp_path, capsys):
    values = {"KRAS": lambda n: int(n in (3, 4, 5, 8, 9))}  # c1 is 0 and 1
    table = write_table(tmp_path, ("KRAS",), values)
    assert split(table, tmp_path / "out.csv") == 0
    assert "warning: case c1: its slides are 0 and 1 in KRAS\n" in capsys.readouterr().out
    assert split(table, tmp_path / "out", "--format", "patho-bench") == 2
    assert "case c1: its slides are 0 and 1 in KRAS: Patho-Bench" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_of_another_tools_file_that_differ_are_named(tmp_path, capsys):
    table = write_table(tmp_path, ("KRAS",), {"KRAS": lambda n: n // 2 % 2})
    lines = ["case_id\tslide_id\tKRAS\tfold_0"]
    for n in range(12):
        label = {3: 0, 4: "", 5: 1}.get(n, n // 2 % 2)  # c1 of two minds, c2 of another mind
        lines.append(f"c{n // 2}\ts{n}\t{label}\t{('train', 'val', 'test')[n // 2 % 3]}")
    source = tmp_path / "k=all.tsv"
    source.write_text("\n".join(lines) + "\n")
    assert split(table, tmp_path / "out.csv", "--from", str(source)) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "k=all.tsv: case" in line]
    assert [line.partition("case ")[2] for line in told] == [
        "c1 has 1 and 0 in its rows of KRAS (1, 0): the table's is kept",
        "c2 has another value than the table of KRAS (0, 1): the table's is kept",
    ]
    assert {row["KRAS"] for row in rows(tmp_path / "out.csv") if row["case_id"] == "c1"} == {"1"}


def test_a_part_without_positives_is_warned_of_when_it_is_dealt(tmp_path, capsys):
    values = {"ROS1": lambda n: int(n < 2), "KRAS": lambda n: n // 2 % 2}
    table = write_table(tmp_path, ("ROS1", "KRAS"), values, slides=40)
    assert split(table, tmp_path / "out.csv") == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    parts = [row["split"] for row in rows(tmp_path / "out.csv") if row["ROS1"] == "1"]
    bare = [part for part in ("train", "val", "test") if part not in parts]
    assert len(bare) == 2
    assert f"ROS1 has no positive in {bare[0]} and no positive in {bare[1]}. A label" in told


def test_a_case_under_two_spellings_is_not_dealt(tmp_path, capsys):
    table = write_table(tmp_path, ("KRAS",), {"KRAS": lambda n: n // 2 % 2})
    table.write_text(table.read_text().replace("c1,s3", "C01,s3"))
    assert split(table, tmp_path / "out.csv") == 2
    assert "rows 4, 5: 'c1', 'C01' look like one case: spell it" in capsys.readouterr().err


def test_users_words_for_unknown_and_true_and_false(tmp_path, capsys):
    values = {"KRAS": lambda n: "equivocal" if n < 2 else str(n // 2 % 2 == 0).upper()}
    table = write_table(tmp_path, ("KRAS",), values)
    assert split(table, tmp_path / "out.csv") == 2
    assert split(table, tmp_path / "out.csv", "--missing", "Equivocal") == 0
    assert "all        6     2 of 5" in capsys.readouterr().out
