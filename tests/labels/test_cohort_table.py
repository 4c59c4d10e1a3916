"""`tapfm labels` makes a readable cohort from a GDC download and published mutations.

The stand-in has TCGA-LUAD's real file names, UUIDs and labels; only the pixels are synthetic, and
the manifest has their true sizes and md5. As in practice it has three faults: one slide is damaged,
one is missing, and one patient was not profiled.
"""

import csv
import hashlib
import json
import math

import pytest
import yaml

from slides.cohort.table import SPLITS, read_cohort
from slides.cohort.tcga_names import parse_slide
from slides.errors import LabelError
from slides.labels.cohort_table import parse_genes
from tapfm import cli
from tapfm.reports.html.label_record import label_record, label_tables
from tests.conftest import ROOT, stained_picture, write_pyramid

GENES = ("EGFR", "KRAS", "STK11", "TP53")
UNPROFILED = "TCGA-38-4629"  # in the slide table, not in cBioPortal's matrix


@pytest.fixture(scope="module")
def stand_in(shared_data, tmp_path_factory):
    """Return a download of 60 diagnostic and 5 frozen slides, in gdc-client's layout."""
    with (shared_data / "labels" / "gigapath_LUAD-5-gene_TCGA.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {row["id"]: parse_slide(row["file_name"]) for row in rows}
    diagnostic = [row for row in rows if names[row["id"]].diagnostic]
    first = [row for row in diagnostic if row["case_submitter_id"] == UNPROFILED][:1]
    chosen = first + [row for row in diagnostic if row not in first][: 60 - len(first)]
    frozen = [row for row in rows if not names[row["id"]].diagnostic][:5]

    folder = tmp_path_factory.mktemp("tcga") / "slides"
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    picture = stained_picture(131, 127)
    for number, row in enumerate(chosen + frozen):
        path = folder / row["id"] / row["file_name"]
        path.parent.mkdir(parents=True)
        picture[:16, :16] = 3 * number  # a whole JPEG block: no two files are alike
        write_pyramid(path, picture, 0.5, levels=1)
        data = path.read_bytes()
        md5 = hashlib.md5(data).hexdigest()
        lines.append(f"{row['id']}\t{row['file_name']}\t{md5}\t{len(data)}\treleased")
    (folder.parent / "manifest.txt").write_text("\n".join(lines) + "\n")
    return folder, [folder / row["id"] / row["file_name"] for row in chosen]


@pytest.fixture
def run(stand_in, shared_data, tmp_path, capsys):
    """Run `tapfm labels` on the stand-in; return exit code, output and the table's path."""

    def run(*options):
        out = tmp_path / "cohort.csv"
        matrix = shared_data / "labels" / "tcga_luad_mutations_cbioportal.tsv"
        manifest = stand_in[0].parent / "manifest.txt"
        code = cli.main(
            ["labels", "--mutations", str(matrix), "--genes", *GENES, "--manifest", str(manifest),
             "--slides", str(stand_in[0]), "--out", str(out), *options]
        )  # fmt: skip
        output = capsys.readouterr()
        return code, output.out, output.err, out

    return run


@pytest.fixture
def damaged(stand_in):
    """Flip a byte of one slide and move another away; undo both afterwards."""
    flipped, gone = stand_in[1][7], stand_in[1][11]
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    gone.rename(gone.with_suffix(".away"))
    yield flipped, gone
    flipped.write_bytes(data)
    gone.with_suffix(".away").rename(gone)


def test_a_whole_download_becomes_a_cohort(run, stand_in):
    code, output, _, out = run()
    assert code == 0
    assert "65 files, 60 diagnostic slides; left out: " in output
    assert "60 slides whole by size and md5" in output
    assert f"1 cases not profiled, labels blank: {UNPROFILED}" in output
    cohort = read_cohort(out, GENES, both_classes=())
    assert {row.path.resolve() for row in cohort.rows} == set(stand_in[1])
    assert {row.split for row in cohort.rows} == set(SPLITS)
    for row in cohort.rows:
        assert row.slide_id == row.path.name.split(".")[0]
        assert row.case_id == row.slide_id[:12]
        assert row.site == row.case_id[5:7]
        assert all(map(math.isnan, row.labels)) == (row.case_id == UNPROFILED)
    again = out.read_bytes()
    assert "0 of the files hashed now" in run()[1]
    assert out.read_bytes() == again


def test_labels_are_those_of_the_matrix(run, shared_data):
    out = run()[3]
    with (shared_data / "labels" / "tcga_luad_mutations_cbioportal.tsv").open() as file:
        matrix = {row["SAMPLE_ID"][:12]: row for row in csv.DictReader(file, delimiter="\t")}
    rows = read_cohort(out, GENES, both_classes=()).rows
    assert sum(row.labels[1] == 1 for row in rows) > 5
    for row in rows:
        if row.case_id != UNPROFILED:
            for gene, label in zip(GENES, row.labels, strict=True):
                changes = [c for c in matrix[row.case_id][gene].split() if c[-1] != "="]
                assert label == (changes not in ([], ["WT"])), (row.case_id, gene)


def test_everything_wrong_is_said_at_once_and_nothing_is_written(run, damaged, stand_in):
    code, _, error, out = run("--genes", "EGFR", "LKB1")
    assert code == 2
    assert not out.exists()
    assert error.count("tapfm: ") == 1
    assert "gene LKB1: there is no such column" in error
    assert f"{damaged[0]}: damaged: md5 " in error
    assert f"{damaged[1].name}: missing, not at {damaged[1]}" in error
    assert error.count(f"gdc-client download -m MANIFEST -d {stand_in[0]}") == 2


def test_skip_leaves_out_what_is_not_whole_and_names_it(run, damaged):
    code, output, _, out = run("--on-error", "skip")
    assert code == 0
    assert "58 slides whole by size and md5" in output
    assert output.count("left out: " + str(damaged[0])) == 1
    paths = {row.path.resolve() for row in read_cohort(out, GENES, both_classes=()).rows}
    assert len(paths) == 58
    assert not paths & set(damaged)


def test_sites_are_preserved_on_request(run):
    output, out = run("--preserve-sites")[1::2]
    assert "sites in more than one part: 0; at worst " in output
    homes = {}
    for row in read_cohort(out, GENES, both_classes=()).rows:
        assert homes.setdefault(row.site, row.split) == row.split


def test_the_record_says_what_made_the_table(run, shared_data, stand_in):
    out = run("--genes", "EGFR:hotspot", "STK11:truncating", "KRAS", "--seed", "3")[3]
    record = json.loads(out.with_name("cohort.csv.labels.json").read_text())
    (source,) = record["sources"]
    assert source["rules"] == {"EGFR": "hotspot", "STK11": "truncating", "KRAS": "nonsynonymous"}
    for entry, path in (
        (source, shared_data / "labels" / "tcga_luad_mutations_cbioportal.tsv"),
        (record["table"], out),
        (record["manifest"], stand_in[0].parent / "manifest.txt"),
    ):
        assert entry["file"] == path.name
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source["counts"]["EGFR"]["unknown"] == 1
    assert record["split"] == {
        "fractions": [0.6, 0.2, 0.2], "seed": 3, "preserve_sites": False,
    }  # fmt: skip


def test_a_config_says_which_genes_and_where(stand_in, shared_data, tmp_path, monkeypatch):
    """Runs like `make labels COHORT=tcga_luad`, with the repository's config."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "tcga_luad"
    folder.mkdir(parents=True)
    (folder / "slides").symlink_to(stand_in[0])
    matrix = shared_data / "labels" / "tcga_luad_mutations_cbioportal.tsv"
    config = ROOT / "configs" / "cohorts" / "tcga_luad.yaml"
    arguments = ["--config", str(config), "--mutations", str(matrix)]
    manifest = stand_in[0].parent / "manifest.txt"
    assert cli.main(["labels", *arguments, "--manifest", str(manifest)]) == 0
    cohort = read_cohort(folder / "cohort.csv", GENES, folder / "slides", both_classes=())
    assert len(cohort.rows) == 60


def test_the_download_becomes_a_report_that_says_what_it_lacks(
    stand_in, damaged, shared_data, tmp_path, monkeypatch
):
    """Runs like `make train COHORT=tcga_luad`, from manifest to report, with a smaller encoder.

    Besides what the download lacks, a slide that is whole by its md5 cannot be read.
    """
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "tcga_luad"
    folder.mkdir(parents=True)
    (folder / "slides").symlink_to(stand_in[0])
    lines = (stand_in[0].parent / "manifest.txt").read_text().splitlines()
    manifest, matrix = tmp_path / "manifest.txt", "tcga_luad_mutations_cbioportal.tsv"
    manifest.write_text("\n".join([*lines[:17], lines[-1]]) + "\n")  # 16 of them, and a frozen one
    small = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False},
        "model": {"model": "demo_vit", "weights": None, "precision": "fp32"},
        "data": {
            "tiles": {"tile_px": 32, "mpp": 1.0, "tissue": {"min_area_um2": 500.0}},
            "labels": ["TP53"],
            "tiles_per_slide": 2,
            "workers": 0,
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    config = ["--config", str(ROOT / "configs" / "cohorts" / "tcga_luad.yaml")]
    both = [*config, "--config", "small.yaml"]
    mutations = str(shared_data / "labels" / matrix)
    assert cli.main(["labels", *config, "--mutations", mutations, "--manifest", str(manifest),
                     "--on-error", "skip"]) == 0  # fmt: skip
    table = folder / "cohort.csv"
    rows = read_cohort(table, GENES, folder / "slides", both_classes=()).rows
    torn = next(row for row in rows if row.split == "train" and row.case_id != UNPROFILED)
    whole = torn.path.read_bytes()
    torn.path.write_bytes(b"II*\0" + bytes(99))
    try:
        assert cli.main(["index", *both]) == 0
        assert cli.main(["fit", *both]) == 0
        assert cli.main(["test", "--run", "runs/tcga_luad", "--overlays", "0"]) == 0
    finally:
        torn.path.write_bytes(whole)

    report = tmp_path / "runs" / "tcga_luad" / "report_test"
    page = (report / "report.html").read_text()
    ledger, provenance = (page.split(f'<section id="{name}">')[1].split("</section>")[0]
                          for name in ("slides", "provenance"))  # fmt: skip
    for path, why in zip(damaged, ("damaged: md5", "missing"), strict=True):
        assert f'<th scope="row">{parse_slide(path.name).slide_id}</th>' in ledger
        assert f"{path.name}: {why}" in ledger
    assert f'<th scope="row">{torn.slide_id}</th><td>test</td>' in ledger
    for made_of in (manifest, shared_data / "labels" / matrix, table):
        digest = hashlib.sha256(made_of.read_bytes()).hexdigest()
        assert f'{made_of.name}</td><td class="text">{digest}</td>' in provenance
    for gene, place in zip(GENES, range(len(GENES)), strict=True):
        values = {row.case_id: row.labels[place] for row in rows}.values()
        counts = [sum(v == 1 for v in values), sum(v == 0 for v in values), 1]
        cells = "".join(f"<td>{n}</td>" for n in counts)
        assert f"{gene}</th><td>nonsynonymous</td>{cells}" in provenance
    assert "was changed" not in page

    # a table that was touched since is told from it, and the run folder alone says the rest
    data = {"table": str(table)}
    table.write_text(table.read_text() + "\n")
    record = label_record(report / "labels.json", data)
    assert "was changed" in "".join(label_tables(record))
    table.rename(folder / "away.csv")
    assert label_record(report / "labels.json", data) == record


def test_two_sources_are_compared_on_the_cases_of_the_manifest(run, shared_data):
    public = shared_data / "labels" / "gigapath_LUAD-5-gene_TCGA.csv"
    output = run("--against", str(public), "--profiled", "all")[1]
    assert "where the two disagree, of " in output
    row = next(line for line in output.splitlines()[::-1] if line.startswith("  KRAS"))
    gene, known, differ, only_first, only_second = row.split()
    assert gene == "KRAS"
    assert int(differ) == int(only_first) + int(only_second) <= int(known)


def test_without_a_manifest_a_row_a_case(tmp_path, capsys):
    matrix = tmp_path / "m.tsv"
    matrix.write_text("SAMPLE_ID\tEGFR\tKRAS\nTCGA-05-0001-01\tL858R\tNS\nx1\tWT\tG12C\n")
    out = tmp_path / "labels.csv"
    arguments = ["labels", "--mutations", str(matrix), "--genes", "KRAS", "EGFR"]
    assert cli.main(arguments) == 0
    assert "nothing written: give --out" in capsys.readouterr().out
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert out.read_text() == "case_id,KRAS,EGFR\nTCGA-05-0001,,1\nx1,1,0\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--genes", "EGFR", "--profiled", "all"], "a matrix already states who was sequenced"),
        (["--genes", "EGFR", "--slides", "."], "--manifest and --slides go together"),
        (["--genes", "EGFR", "EGFR:hotspot"], "name each gene once"),
        ([], "name each gene once"),
        (["--genes", "EGFR", "--manifest", "m.txt", "--slides", "."], "no readable manifest"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, message):
    matrix = tmp_path / "m.tsv"
    matrix.write_text("SAMPLE_ID\tEGFR\nTCGA-05-0001-01\tL858R\n")
    assert cli.main(["labels", "--mutations", str(matrix), *options]) == 2
    assert message in capsys.readouterr().err


def test_genes_have_rules_of_their_own():
    assert parse_genes(["A", "B:truncating"], "listed") == {"A": "listed", "B": "truncating"}
    with pytest.raises(LabelError):
        parse_genes(["A", "A"], "listed")
