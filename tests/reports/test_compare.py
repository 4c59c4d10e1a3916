"""Runs compared on one page, report.json, and what a browser measures of every page we write."""

import json
import shutil
from dataclasses import astuple

import numpy as np
import pytest
import yaml

from slides.files import write_csv
from slides.wsi.reader import Slide
from tapfm.cli import main
from tapfm.reports.compare import compare, outcome_of, read_rows
from tapfm.reports.html import case_pictures
from tapfm.reports.html.comparison import study_page
from tapfm.reports.rows import ResultRow
from tapfm.stats.bootstrap import Interval
from tapfm.stats.metrics import MACRO, evaluate, paired_difference
from tapfm.tasks import make_task
from tests.pages import FAINT, SCROLLED, SMALL, UNFRAMED, UNNAMED, WIDTH, Page
from tests.reports.test_page import EVIL, LABELS, write_run

N, DRAWS = 60, 300


def rows_of(*shares, seed=0):
    """Rows whose predictions hold so much of the truth."""
    rng = np.random.default_rng(seed)
    y_NK = (rng.random((N, 2)) < 0.5).astype(float)
    y_NK[3, 0] = np.nan
    names, cases = [f"s{n}" for n in range(N)], [f"c{n // 2}" for n in range(N)]
    return [
        ResultRow(f"r{n}", True, names, cases, y_NK,
                  share * np.nan_to_num(y_NK) + (1 - share) * rng.random((N, 2)))
        for n, share in enumerate(shares)
    ]  # fmt: skip


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert astuple(found[name]) == pytest.approx(astuple(each), abs=1e-12)


def test_differences_are_paired_and_the_first_run_is_measured_against():
    labels, rows = ["EGFR", EVIL], rows_of(0.1, 0.5, 0.1)
    found = compare(make_task({"name": "multilabel"}, labels), rows, "test", DRAWS, 3)
    assert [row["run"] for row in found["rows"]] == ["r0", "r1", "r2"]
    for row, given in zip(found["rows"], rows, strict=True):
        of = labels, given.y_NK, given.p_NK
        own = evaluate(*of, given.case_ids, DRAWS, 3)
        same(row["figures"], {name: each["auroc"] for name, each in own.items()})
        gains = paired_difference(*of, rows[0].p_NK, given.case_ids, DRAWS, 3)
        same(row["differences"], {} if row["run"] == "r0" else gains)
    assert found["rows"][1]["differences"][MACRO].low > 0
    told = [outcome_of(row["differences"][MACRO]) for row in found["rows"][1:]]
    assert [each["outcome"] for each in found["verdicts"]] == told
    assert told[0] == "better"
    assert found["verdicts"][0]["sentence"].endswith("macro AUROC. Take r1.")
    assert "2 comparisons" in found["note"]
    apart = found["apart"]["slides"]
    spread_N = np.ptp([row.p_NK for row in rows], axis=0).mean(1)
    assert apart[0]["slide_id"] == f"s{np.argmax(spread_N)}"
    assert len(apart) == 10


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [((0.1, 0.01, 0.2), "better"), ((-0.1, -0.2, -0.01), "worse"), ((0.1, -0.1, 0.2), "undecided"),
     ((np.nan,) * 3, "undefined")],
)  # fmt: skip
def test_outcomes(ends, outcome):
    assert outcome_of(Interval(*ends, 9)) == outcome


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort's folder with two tested runs, their report and its page."""
    folder = write_run(tmp_path_factory.mktemp("compare"))
    rng = np.random.default_rng(7)
    header = ["slide_id", "case_id", *(f"{p}{name}" for name in LABELS for p in ("", "p_"))]
    for share, name in ((0.0, "tapfm"), (0.9, "tapfm_gated")):
        lines = []
        for n in range(12):
            truth = n % 2
            p = share * truth + (1 - share) * rng.random(2)
            lines.append([f"s{n:02d}", f"c{n // 2}", truth, p[0], 1 - truth, 1 - p[1]])
        write_csv(folder / name / "predictions_test.csv", header, lines)
    assert main(["report", "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def compared(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    runs = [str(cohort / name) for name in ("tapfm", "tapfm_gated")]
    assert main(["compare", *runs, "--out", str(out)]) == 0
    return out / "compare.html"


def test_the_page_says_first_which_run_to_take(compared):
    page = Page(compared.read_text())
    assert page.faults == []
    found = json.loads((compared.parent / "compare.json").read_text())
    said = found["verdicts"][0]["sentence"]
    assert said.startswith("tapfm_gated is better than tapfm: +0.")
    assert page.text.index(said) < page.text.index("Table")
    assert not [each for each in page.values("src", "href") if not each.startswith(("#", "data:"))]
    assert "<script" not in compared.read_text().replace("&lt;script", "")


def test_a_cohorts_folder_stands_for_its_runs(cohort):
    _, rows = read_rows([cohort], "test")
    assert [row.title for row in rows] == ["tapfm", "tapfm_gated"]
    _, rows = read_rows([cohort / "tapfm", cohort], "test")
    assert len(rows) == 2  # none twice


def test_faults(cohort, tmp_path, capsys):
    assert main(["compare", str(cohort / "tapfm"), "--out", str(tmp_path)]) == 2
    assert "1 tested run(s) in all, and two at least are needed" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(cohort, other)
    path = other / "report_test" / "metrics_test.json"
    metrics = json.loads(path.read_text())
    metrics["task"]["labels"] = ["KRAS", "x"]
    path.write_text(json.dumps(metrics))
    header = "slide_id,case_id,KRAS,p_KRAS,x,p_x\ns00,c0,1,.5,0,.5\n"
    (other / "tapfm" / "predictions_test.csv").write_text(header)
    assert main(["compare", str(cohort / "tapfm"), str(other / "tapfm")]) == 2
    assert "Compare runs of one task and the same labels" in capsys.readouterr().err


def test_report_json_has_what_the_report_decides(cohort):
    folder = cohort / "report_test"
    found = json.loads((folder / "report.json").read_text())
    metrics = json.loads((folder / "metrics_test.json").read_text())
    assert found["format"] == 1
    assert [row["title"] for row in found["rows"]] == list(metrics["arms"])
    for row in found["rows"]:
        arm = metrics["arms"][row["title"]]
        assert row["figures"] == {name: each["auroc"] for name, each in arm["figures"].items()}
        gains = arm["auroc_difference"]
        assert row["difference"] == (gains and gains[MACRO])
    (verdict,) = found["verdicts"]
    assert verdict["sentence"] == metrics["verdicts"][0]["sentence"]
    assert verdict["saved"] == 0.75
    assert found["skipped"] == [{"slide_id": "s97", "reason": "no tissue"}]
    for name in found["files"].values():
        assert (folder / name).is_file()


@pytest.fixture
def study(tmp_path):
    interval = Interval(0.8, 0.7, 0.9, 100)
    figures = {"pooled": {"macro": interval}, "within_folds": {"macro": interval}}
    arm = {"end_to_end": True, "seeds": [0], "figures": figures, "differences": {"f": figures}}
    found = {"arms": {"a": arm, "f": {**arm, "differences": {}}, "late": {"seeds": []}},
             "reference": "f", "head": "macro", "figure": "auroc", "slides": 9, "cases": 9,
             "verdicts": ["a: adapting gained <nothing>."], "failed": {"b": "disk"}}  # fmt: skip
    return study_page(found, tmp_path, ["model", "figure"], [["a", "0.8"], ["f", "0.8"]])


def test_a_studys_page(study):
    page = Page(study.read_text())
    assert page.faults == []
    assert "a: adapting gained <nothing>." in page.text
    assert ["b", "disk"] in page.rows
    assert len(page.tags("svg")) == 2


BAD = """<!DOCTYPE html><body style="background:#fff"><p style="font-size:11px">small</p>
<p style="color:#999">faint</p><img src="data:,"><table style="width:900px"><tr><td>wide</table>
<div class="scroll" style="width:90px;overflow:clip"><table style="width:900px"><tr><td>cut</table>
</div><div class="scroll">short</div>"""


def test_the_instruments_find_faults(browser, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    browser.open((tmp_path / "bad.html").as_uri(), width=400)
    assert [each[-9:] for each in browser.ask(SMALL)] == ["small</p>"]
    (found,) = browser.ask(FAINT)
    assert found.startswith("2.85 ")  # of #999 on white, by WCAG's formula
    assert browser.ask(UNNAMED) == 1
    assert browser.ask(UNFRAMED.format(width=400)) == 1
    assert browser.ask(SCROLLED) == [1, 1], "of two, one is wide and hidden"
    assert browser.ask(WIDTH) > 400


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """The whole report of 60 slides with tiles of 224 px."""
    run = write_run(tmp_path_factory.mktemp("sixty"), slides=60, side=224, kinds=3)
    assert main(["report", "--run", str(run)]) == 0
    return run / "report_test" / "report.html"


def legible(browser, page, width, dark):
    """Measure all that a reader needs of a page, with everything on it opened."""
    browser.open(page.as_uri(), width=width, dark=dark)
    browser.ask("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.ask(SMALL) == []
    assert browser.ask(FAINT) == []
    assert browser.ask(UNNAMED) == 0
    assert browser.ask(UNFRAMED.format(width=width)) == 0
    assert browser.ask(WIDTH) == width
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    wide, stuck = browser.ask(SCROLLED)
    assert stuck == 0
    return wide


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("kind", ["report", "compare", "study"])
def test_every_page_is_legible(kind, width, dark, browser, cohort, compared, study):
    pages = {"report": cohort / "report_test" / "report.html", "compare": compared, "study": study}
    legible(browser, pages[kind], width, dark)


@pytest.mark.parametrize("width", [400, 1280])
def test_the_whole_report_of_sixty_slides(width, browser, sixty):
    assert 200_000 < sixty.stat().st_size < 15e6
    page = Page(sixty.read_text())
    assert page.faults == []
    assert ["test", "60", "30"] in [row[:3] for row in page.rows]
    assert len(page.tags("img")) == 10 * len(page.tags("article")) >= 40
    wide = legible(browser, sixty, width, dark=False)
    assert (wide > 3) == (width == 400), "wide tables scroll where they do not fit"


def test_a_page_of_sixty_slides_is_light(shared_data, tmp_path):
    """Pictures of real tissue, as they are embedded: 60 of the heaviest are below 15 MB."""
    heaviest = 0
    for name in ("PDACtc3_20x", "BS9_HE2_20x", "EROS_20x"):
        corners = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2) * 224
        weights_T = np.random.default_rng(0).dirichlet(np.ones(len(corners)))
        with Slide(shared_data / "slides" / "atlas" / f"{name}.tif", mpp=0.5) as slide:
            case_pictures._draw(tmp_path / name, slide, weights_T, corners + 2000, 224, 224)
        pictures = [path.stat().st_size for path in (tmp_path / name).glob("*.jpg")]
        assert len(pictures) == 10
        heaviest = max(heaviest, sum(pictures))
    assert 60 * heaviest * 4 / 3 < 15e6
    assert heaviest > 50_000  # of tissue, and not of glass


def test_the_config_is_what_marks_a_run(tmp_path):
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "predictions_test.csv").write_text("slide_id\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions_test.csv").write_text("slide_id\n")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({}))
    from tapfm.reports.compare import runs_in

    assert runs_in(tmp_path, "test") == [tmp_path / "run"]
