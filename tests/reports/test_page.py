"""The page is one sound file with the content of the run's files, checked in a real browser.

What HTML alone can tell (`Page`, with Python's parser) is always checked; how it is drawn, where
there is a Chromium. Every instrument is first shown a page on which it must find something.
"""

import json
import os
import re
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tapfm.cli import main
from tapfm.reports.report import write_results
from tapfm.reports.rows import ResultRow
from tests.conftest import stained_picture, write_pyramid
from tests.pages import BRIGHT, BROKEN_PICTURES, ILLEGIBLE, ROWS, WIDTH, Page

EVIL = '<script>alert("x")</script>&'  # a label may be called anything
LABELS = ["EGFR", EVIL]
SLIDES, SIDE = 12, 32


def write_run(folder, slides=SLIDES, side=SIDE, kinds=SLIDES):
    """Write the files of `tapfm fit` and `tapfm test` for two runs and a baseline, and slides.

    Slides have 9 x 8 tiles of `side` pixels, and so many `kinds` of pictures.
    """
    rng, names = np.random.default_rng(2), [f"s{n:02d}" for n in range(slides)]
    (folder / "slides").mkdir(parents=True)
    index = folder / "index" / "20x_32px_0px_overlap"
    index.mkdir(parents=True)
    y = (rng.random((slides, 2)) < 0.5).astype(float)
    y[:2], y[3, 0] = ((0, 1), (1, 0)), np.nan
    table = ["case_id,slide_id,slide_path,split,EGFR,other"]
    ledger = ["slide_id,path,mpp,mpp_source,tissue_mm2,tiles,seconds,status,reason"]
    for n, name in enumerate(names):
        path = folder / "slides" / f"{name}.tif"
        if n < kinds:
            picture = stained_picture(9 * side + 23, 8 * side + 7, n)
            write_pyramid(path, picture, 0.5, 2)
        else:
            os.link(folder / "slides" / f"s{n % kinds:02d}.tif", path)
        label = "" if np.isnan(y[n, 0]) else int(y[n, 0])
        table.append(f"c{n // 2},{name},slides/{name}.tif,test,{label},1")
        ledger.append(f"{name},{path},0.50000000001,tiff,0.5,72,0.1,indexed,")
    table.append("c9,s99,slides/s99.tif,train,1,1")
    (folder / "cohort.csv").write_text("\n".join(table) + "\n")
    (index / "ledger.csv").write_text("\n".join(ledger) + "\n")
    tiles = {"tile_px": SIDE, "mpp": 0.5, "overlap": 0, "tissue": {"pen": True}}
    where = {"table": str(folder / "cohort.csv"), "index_dir": str(folder / "index")}
    data = {**where, "tiles": tiles}
    coords = np.stack(np.meshgrid(np.arange(9), np.arange(8)), -1).reshape(-1, 2) * side
    arms = [ResultRow("frozen, gated attention", False, names, [f"c{n // 2}" for n in
    range(slides)], y,
                np.clip(0.3 * np.nan_to_num(y) + 0.7 * rng.random(y.shape), 0, 1))]  # fmt: skip
    for number, name in enumerate(("tapfm", "tapfm_gated")):
        run = folder / "runs" / name
        (run / "weights_test").mkdir(parents=True)
        for slide in names:
            with h5py.File(run / "weights_test" / f"{slide}.h5", "w") as file:
                file["weights"] = rng.dirichlet(np.ones(72))
                file.create_dataset("coords", data=coords).attrs["patch_size_level0"] = side
        settings = {"seed_everything": 0, "model": {"aggregator": name}, "data": data}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        steps = "".join(f"{s},s{s % 12:02d},72,5,{90 + s},0.25,{1 + s / 99},0.01,{1 + s / 99},"
                        + (f"0.5,{1.5 + s / 99}\n" if s > 9 else ",\n")  # the head alone, first
                        for s in range(1, 41))  # fmt: skip
        (run / "memory.csv").write_text(
            "step,slide_id,tiles,chunk,tiles_per_s,encode_s,encode_rss_gib,aggregate_s,"
            f"aggregate_rss_gib,adapt_s,adapt_rss_gib\n{steps}"
        )
        curve = "".join(f"{s},0,s01,{1 / s},{9 - s / 9},,\n{s},0,,,,{1 / s},{s / 41}\n"
                        for s in range(1, 41))  # fmt: skip
        (run / "metrics.csv").write_text(
            f"step,epoch,slide_id,train/loss,train/effective_tiles,val/loss,val/auroc\n{curve}"
        )
        (run / "skipped.json").write_text(json.dumps({"s98": "s98: <torn> file"} if number else {}))
        model_config = {"model": "demo_vit", "aggregator": name, "labels": LABELS, "tile_px": SIDE,
                  "mpp": 0.5, "fingerprint": f"f1e2d3c4{number}", "commit": "abc1234",
                  "cohort_sha256": "0123" * 16, "versions": {"torch": "2.8.0"}}  # fmt: skip
        save_file(
            {"w": torch.zeros(1)}, run / "best.safetensors", {"tapfm": json.dumps(model_config)}
        )
        p = np.clip((0.3 + number / 9) * np.nan_to_num(y) + 0.7 * rng.random(y.shape), 0, 1)
        arms.append(
            ResultRow(
                f"end to end, {name}", True, names, arms[0].case_ids, y, p, run / "metrics.csv"
            )
        )
    curve = [{"a": a, "loss": 0.7 - a / 9, "error": (1 - a) / 30, "figure": 0.6 + a / 9,
              "head": "gated attention"} for a in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    choice = {"a": 0.75, "source": "mean of the weights", "reason": "by <rule>", "curve": curve}
    arms[2] = replace(arms[2], control=arms[0].title, choice=choice)
    write_results(
        folder / "runs" / "report_test", "test", LABELS, arms, [("s97", "no tissue")], 200
    )
    return folder / "runs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("page"))
    assert main(["report", "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def html(run):
    return (run / "report_test" / "report.html").read_text()


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "report_test" / "metrics_test.json").read_text())


def intervals(metrics):
    """Return every interval of the file, as the page writes it."""
    for arm in metrics["arms"].values():
        figures = [each[key] for each in arm["figures"].values() for key in ("auroc", "auprc")]
        for sign, group in (("", figures), ("+", (arm["auroc_difference"] or {}).values())):
            for each in group:
                yield "{} [{}, {}]".format(
                    *(f"{each[key]:{sign}.3f}" for key in ("value", "low", "high"))
                )


def test_the_page_is_sound_and_stands_alone(html):
    page = Page(html)
    assert page.faults == []
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    targets = [href for href in page.values("href", "xlink:href") if href != "data:,"]
    assert targets
    assert {target for target in targets if not target.startswith("#")} == set()
    assert {target[1:] for target in targets} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert {src.split(",")[0] for src in page.values("src")} == {"data:image/jpeg;base64"}
    assert not page.tags("script")
    assert all(attrs.get("alt") for attrs in page.tags("img"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in page.tags("svg"))


def test_the_verdict_comes_first_and_its_curve_is_shown(html, metrics):
    page = Page(html)
    (verdict,) = metrics["verdicts"]
    body = page.text[page.text.index("test split", page.text.index("test split") + 1) :]
    assert body.removeprefix("test split").lstrip().startswith(verdict["sentence"])
    assert "a = 0.75 of the mean of the weights: by <rule>." in page.text
    assert ["0.75", "saved", "0.6167", "0.0083", "0.6833", "gated attention"] in page.rows
    assert ["0.5", "", "0.6444", "0.0167", "0.6556", "gated attention"] in page.rows
    assert "validation loss of tapfm_gated against a" in page.values("aria-label")


def test_the_tables_have_the_numbers_of_the_files(html, metrics, run):
    page = Page(html)
    cells = [cell.removesuffix(" †") for row in page.rows for cell in row]
    for said in intervals(metrics):
        assert said in cells
    assert sum(f"EGFR, {n} of {SLIDES - 1} positive" in cells for n in range(SLIDES)) == 1
    for note in metrics["notes"]:
        assert note in page.text
    for row in (["end to end, tapfm", "40", "72", "72", "110.5 [94.9, 126.1]"],
                ["end to end, tapfm", "adapt", "0.5", "1.90"],
                ["s98", "training of tapfm_gated", "s98: <torn> file"],
                ["s97", "test", "no tissue"],
                ["test", "12", "6", str(12 * 72), *page_count(run)],
                ["train", "1", "1", "0", "1", "0", "0"],
                ["fingerprint", "f1e2d3c40", "f1e2d3c41"],
                ["versions torch", "2.8.0", "2.8.0"],
                ["model.aggregator", "tapfm", "tapfm_gated"]):  # fmt: skip
        assert row in [each[: len(row)] for each in page.rows]
    assert "aggregator: tapfm_gated" in page.text


def page_count(run):
    lines = (run.parent / "cohort.csv").read_text().splitlines()[1:-1]
    labels = [line.split(",")[4] for line in lines]
    return [str(labels.count(value)) for value in ("1", "0", "")]


def test_cases_are_the_surest_with_their_pictures(html, run):
    page = Page(html)
    table = pd.read_csv(run / "report_test" / "predictions_test.csv")
    positive = table[table["EGFR"] == 1].set_index("slide_id")["p_EGFR (end to end, tapfm)"]
    said = f"{positive.max():.3f} {positive.idxmax()}"
    (row,) = [row for row in page.rows if row[0] == "EGFR" and len(row) == 6 and said in row]
    assert row[1:3] == ["0.5", said]
    folder = run / "tapfm" / "cases_test" / positive.idxmax()
    assert len(list(folder.glob("tile_*.jpg"))) == 8
    assert len(page.tags("img")) == 10 * len(page.tags("article"))


def test_without_slides_the_page_is_the_same_and_without_pictures_it_says_so(run, html, tmp_path):
    alone = tmp_path / run.name
    shutil.copytree(run, alone)
    for config in alone.glob("*/config.yaml"):  # on a machine that has nothing of the cohort
        config.write_text(config.read_text().replace(str(run.parent), "/nowhere"))
    assert main(["report", "--run", str(alone)]) == 0
    again = (alone / "report_test" / "report.html").read_text()
    assert again.replace("/nowhere", str(run.parent)) == html
    for folder in alone.glob("*/cases_test"):
        shutil.rmtree(folder)
    rows = (alone / "report_test" / "slides.csv").read_text()
    (alone / "report_test" / "slides.csv").write_text(rows.replace(str(run.parent), "/nowhere"))
    assert main(["report", "--run", str(alone)]) == 0
    page = Page((alone / "report_test" / "report.html").read_text())
    assert not page.tags("img")
    assert re.search(r"(s\d+) cannot be opened: /nowhere/slides/\1.tif is missing", page.text)


def test_what_is_missing_is_said_and_what_is_new_is_shown(run, metrics, tmp_path):
    bare = tmp_path / "runs"
    (bare / "report_test").mkdir(parents=True)
    metrics = {**metrics, "temperature": {"EGFR": 1.59375}}
    metrics["arms"]["frozen, gated attention"]["figures"]["EGFR"]["ece"] = 0.0703125
    (bare / "report_test" / "metrics_test.json").write_text(json.dumps(metrics))
    assert main(["report", "--run", str(bare)]) == 0
    page = Page((bare / "report_test" / "report.html").read_text())
    for said in ("no curves", "no training curves", "memory and time are unknown", "no ledger",
                 "0.07031", "1.594"):  # fmt: skip
        assert said in page.text
    assert {cell for row in page.rows for cell in row} >= set(intervals(metrics))


def test_nothing_to_report_says_what_to_run(tmp_path, capsys):
    assert main(["report", "--run", str(tmp_path), "--split", "val"]) == 2
    said = f"Run `tapfm test --run {tmp_path} --split val` first"
    assert said in capsys.readouterr().err
    (tmp_path / "report_test").mkdir()
    (tmp_path / "report_test" / "metrics_test.json").write_text('{"arms": ')
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "not the figures of a report (JSONDecodeError" in capsys.readouterr().err
    facts = {"arms": {"x": {"end_to_end": False}}, "task": {"name": "multilabel", "labels": ["A"]}}
    (tmp_path / "report_test" / "metrics_test.json").write_text(json.dumps(facts))
    (tmp_path / "report_test" / "predictions_test.csv").write_text("slide_id,case_id,A\n")
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "and p_A (x) are needed, too" in capsys.readouterr().err


# ------------------------------------------------------------------------- in a real browser

LOOKS = {"wide": (1280, False), "narrow": (390, False), "dark": (1280, True)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("script", [True, False], ids=["script", "no-script"])
def test_drawn_in_a_browser(browser, run, metrics, html, look, script):
    width, dark = LOOKS[look]
    path = run / "report_test" / "report.html"
    browser.open(path.as_uri(), width, dark=dark, script=script)
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.ask("document.images.length") == len(Page(html).tags("img")) > 30
    assert browser.ask(BROKEN_PICTURES) == 0
    assert browser.ask(WIDTH) == width
    assert browser.ask(ILLEGIBLE) == []
    rows = browser.ask(ROWS)
    assert rows == Page(html).rows
    assert {cell.removesuffix(" †") for row in rows for cell in row} >= set(intervals(metrics))
    assert browser.ask("document.scripts.length") == 0
    paper, ink = browser.ask(BRIGHT)
    assert (paper < 60 < 180 < ink) if dark else (ink < 60 < 180 < paper)
    if folder := os.environ.get("TAPFM_SCREENSHOTS"):  # to look at
        browser.screenshot(f"{folder}/{look}.png")


def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        '<!DOCTYPE html><meta name="viewport" content="width=device-width"><body>'
        '<img src="data:image/jpeg;base64,AAAA"><img src="http://127.0.0.1:9/a.png">'
        '<div style="width: 1500px">wide</div><script>console.error("bad"); nothing()</script>'
        '<figure class="panel"><svg width="300" height="60"><text x="9" y="30">one</text>'
        '<text x="12" y="30">two</text><text x="290" y="30">three</text>'
        '<text x="90" y="30" style="font-size: 5px">four</text></svg></figure>'
    )
    browser.open(path.as_uri(), 1280)
    said = " ".join(browser.complaints())
    assert "bad" in said
    assert "nothing is not defined" in said
    assert browser.requests() == [path.as_uri(), "http://127.0.0.1:9/a.png"]
    assert browser.ask(BROKEN_PICTURES) == 2
    assert browser.ask(WIDTH) > 1500
    browser.open(path.as_uri(), 390)
    assert browser.ask(WIDTH) > 1500
    assert browser.ask(ILLEGIBLE) == ["on each other: one / two", "cut: three", "small: four"]


def test_the_parser_sees_what_is_wrong():
    assert Page("<p><b>x</p></b>").faults != []
    assert Page("<table><tr><td>x</table>").faults != []
    assert Page("<div><p>x</p><br><img></div>").faults == []
