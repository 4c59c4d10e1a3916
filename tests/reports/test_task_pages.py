"""Each task's page has its expected parts, sound and legible in a real browser."""

import json
import os

import h5py
import numpy as np
import pytest
import yaml

from tapfm.cli import main
from tapfm.reports.outcome_report import write_outcomes
from tapfm.reports.rows import ResultRow
from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.regression import Regression
from tapfm.tasks.survival import Survival
from tests.conftest import stained_picture, write_pyramid
from tests.pages import BROKEN_PICTURES, ILLEGIBLE, ROWS, WIDTH, Page

SLIDES, SIDE = 24, 32
TASKS = {
    "multiclass": Multiclass(("low", "high", "<odd>"), "grade", (1.0, 1.0, 1.0)),
    "regression": Regression(("HRD score", "log2 TPM of a gene"), (0.0, 0.0), (1.0, 1.0)),
    "survival": Survival(("h1", "h2", "h3"), "os_months", "os_event", (9.5, 21.25), 14.0),
}


def target_of(task, v):
    """Return targets of slides for which a number v is large or small; one is unknown."""
    if isinstance(task, Multiclass):
        y = np.digitize(v, [-0.5, 0.5])[:, None].astype(float)
    elif isinstance(task, Regression):
        y = np.stack([12345 + 1000 * v, -v], axis=1)
    else:
        y = np.stack([20 - 8 * v.clip(-2, 2), np.arange(SLIDES) % 3 > 0, v], axis=1).astype(float)
    y[1] = np.nan
    return y


def said_of(task, v):
    """Return the predictions of a model that knows v."""
    if isinstance(task, Multiclass):
        e = np.exp(-2 * np.square(v[:, None] - [-1, 0, 1]))
        return e / e.sum(1, keepdims=True)
    if isinstance(task, Regression):
        return np.stack([12345 + 1000 * v, -v], axis=1)
    return np.stack([v, 1 / (1 + np.exp(v - 1)), 1 / (1 + np.exp(v + 1))], axis=1)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Slides, and the cohort's table and index, of all tasks; two a case of the first's name."""
    folder = tmp_path_factory.mktemp("slides")
    index = folder / "index" / "20x_32px_0px_overlap"
    index.mkdir(parents=True)
    table = ["case_id,slide_id,slide_path,split"]
    ledger = ["slide_id,path,mpp,mpp_source,tissue_mm2,tiles,seconds,status,reason"]
    picture = stained_picture(167, 139, 0)
    for n in range(SLIDES):
        path = write_pyramid(folder / f"s{n:02d}.tif", picture, 0.5, 1)
        table.append(f"s{n // 2 * 2:02d},s{n:02d},s{n:02d}.tif,test")
        ledger.append(f"s{n:02d},{path},0.5,tiff,0.5,20,0.1,indexed,")
    (folder / "cohort.csv").write_text("\n".join(table) + "\n")
    (index / "ledger.csv").write_text("\n".join(ledger) + "\n")
    return folder


def write_run(folder, slides, task, of_cases=False):
    """Write the files of `tapfm fit` and `tapfm test` for a run and two baselines."""
    rng = np.random.default_rng(5)
    v = rng.standard_normal(SLIDES)
    names = [f"s{n:02d}" for n in range(SLIDES)]
    cases = [names[n // 2 * 2] for n in range(SLIDES)]
    tiles = {"tile_px": SIDE, "mpp": 0.5, "overlap": 0}
    data = {"table": str(slides / "cohort.csv"), "index_dir": str(slides / "index"), "tiles": tiles}
    data["bags"] = "case" if of_cases else "slide"
    run = folder / "tapfm_gated"
    (run / "weights_test").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    coords = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * SIDE
    for slide in names:
        with h5py.File(run / "weights_test" / f"{slide}.h5", "w") as file:
            file["weights"] = rng.dirichlet(np.ones(20)) / (2 if of_cases else 1)
            file.create_dataset("coords", data=coords).attrs["patch_size_level0"] = SIDE
    bags, own = (cases[::2], slice(None, None, 2)) if of_cases else (names, slice(None))
    arms = [
        ResultRow(
            title, trained, bags, cases[own], target_of(task, v)[own], said_of(task, heard)[own]
        )
        for title, trained, noise in (("frozen, linear probe", False, 1.5),
                                      ("frozen, gated attention", False, 1.0),
                                      ("end to end, tapfm_gated", True, 0.4))
        for heard in [v + noise * rng.standard_normal(SLIDES)]
    ]  # fmt: skip
    write_outcomes(folder / "report_test", "test", task, arms, draws=100)
    assert main(["report", "--run", str(folder)]) == 0
    return arms, (folder / "report_test" / "report.html").read_text()


@pytest.fixture(scope="module", params=TASKS)
def page(request, slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *write_run(folder, slides, TASKS[request.param])


def test_it_is_sound_and_shows_what_belongs_to_the_task(page):
    name, _, arms, html = page
    found = Page(html)
    assert found.faults == []
    assert len(set(found.values("id"))) == len(found.values("id"))
    captions = [attrs["aria-label"] for attrs in found.tags("svg") if "aria-label" in attrs]
    ours = arms[2]
    cells = [row[:5] for row in found.rows]
    if name == "multiclass":
        assert [c for c in captions if c.startswith("ROC")] == [
            f"ROC of {label}" for label in TASKS[name].labels
        ]
        known = ~np.isnan(ours.y_NK[:, 0])
        truth, said = ours.y_NK[known, 0], ours.p_NK[known].argmax(1)
        row = [str(int(((truth == 2) & (said == k)).sum())) for k in range(3)]
        assert ["<odd>", *row] in [each[:4] for each in cells]
        assert ["label", "right", "wrong", "missed"] in [r[:4] for r in found.rows]
    elif name == "regression":
        assert len([c for c in captions if c.startswith("predicted against true")]) == 6
        worst = np.nanargmax(ours.p_NK[:, 0] - ours.y_NK[:, 0])
        (row,) = [r for r in found.rows if r[0] == "HRD score" and len(r) == 5 and " s" in r[1]]
        assert row[3] == f"{ours.p_NK[worst, 0]:.6g} s{worst:02d}"
    else:
        assert len([c for c in captions if c.startswith("survival by risk")]) == 3
        assert ["end to end, tapfm_gated", "higher risk"] in [r[:2] for r in found.rows]
        assert "log-rank p = " in html
    assert "no curves" not in found.text
    assert found.tags("article")
    assert len(found.tags("img")) == 10 * len(found.tags("article"))


def test_it_is_legible_in_a_browser(page, browser):
    name, folder, _, html = page
    path = folder / "report_test" / "report.html"
    for width in (1280, 390):
        browser.open(path.as_uri(), width)
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]
        assert browser.ask(BROKEN_PICTURES) == 0
        assert browser.ask(WIDTH) == width
        assert browser.ask(ILLEGIBLE) == []
        assert browser.ask(ROWS) == Page(html).rows
        if shots := os.environ.get("TAPFM_SCREENSHOTS"):  # to look at
            browser.screenshot(f"{shots}/{name}_{width}.png")


def test_a_case_has_the_pictures_of_its_slides(slides, tmp_path):
    _, html = write_run(tmp_path, slides, TASKS["regression"], of_cases=True)
    found = Page(html)
    assert len(found.tags("img")) == 20 * len(found.tags("article")) > 0
    pictures = sorted((tmp_path / "tapfm_gated" / "cases_test").iterdir())
    assert len(pictures) == 2 * len(found.tags("article"))
    facts = json.loads((pictures[0] / "case.json").read_text())
    with h5py.File(tmp_path / "tapfm_gated" / "weights_test" / f"{pictures[0].name}.h5") as file:
        w = file["weights"][:] / file["weights"][:].sum()  # the slide's own share is no matter
    assert facts["effective"] == pytest.approx(1 / np.square(w).sum())
