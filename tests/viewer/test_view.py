"""The viewer opens, zooms, shows its layer and tiles in a real browser, and asks nobody else."""

import json
import re
import threading
import time
import urllib.error
import urllib.request

import h5py
import numpy as np
import pytest

from slides.errors import SettingsError
from slides.files import write_csv
from tapfm.cli import main
from tapfm.reports.rows import ResultRow
from tapfm.tasks import make_task
from tapfm.viewer.contents import as_script, errors, one_run, read_contents, tiles_of
from tapfm.viewer.pyramid import Pyramid
from tests.conftest import coordinate_code
from tests.pages import BROKEN_PICTURES, FAINT, SMALL, WIDTH
from tests.reports.test_page import EVIL, LABELS, write_run

SIDE, TILES = 32, 72
PIXELS = """(() => { const c = document.getElementById('layer');
  const copy = document.createElement('canvas'); copy.width = c.width; copy.height = c.height;
  const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(c, 0, 0);
  const d = pen.getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })()"""
MIDDLE = """(() => { const b = document.getElementById('stage').getBoundingClientRect();
  return [b.x + b.width / 2, b.y + b.height / 2]; })()"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose first slide's file is gone, and whose tiles have predictions."""
    folder = tmp_path_factory.mktemp("view")
    write_run(folder)
    run, rng = folder / "runs" / "tapfm", np.random.default_rng(5)
    for path in (run / "weights_test").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["predictions"] = rng.random((TILES, 2)).astype(np.float32)
    header = ["slide_id", "case_id", *(f"{p}{name}" for name in LABELS for p in ("", "p_"))]
    rows = []
    for n in range(12):  # s00 is predicted worst, s11 best; nothing is known of s05
        known = "" if n == 5 else 1
        rows.append([f"s{n:02d}", f"c{n // 2}", known, n / 12, known, n / 12])
    write_csv(run / "predictions_test.csv", header, rows)
    return run


@pytest.fixture(scope="module")
def address(run):
    """The page as it is served, on any port."""
    import uvicorn

    from tapfm.viewer.server import listen, make_app

    server = uvicorn.Server(
        uvicorn.Config(make_app(read_contents(run, "test")), log_level="error", lifespan="off")
    )
    listening = listen(0)
    assert listening.getsockname()[0] == "127.0.0.1"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


def wait(browser, what):
    for _ in range(200):
        if browser.ask(what):
            return
        time.sleep(0.05)
    raise AssertionError(f"never: {what}; {browser.complaints()}")


def shown(browser, url):
    browser.open(url)
    wait(browser, "view.state().drawn && view.state().tiles === 72")


def click(browser, x, y):
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_a_real_browser_opens_zooms_and_picks_and_nothing_leaves(browser, address):
    shown(browser, address)
    assert browser.ask("document.getElementById('name').textContent") == "s00"
    covered = browser.ask(PIXELS)
    assert covered > 10_000  # the layer is visible
    browser.ask("(() => { at = document.getElementById('which'); at.value = 'none';"
                "at.onchange(); })()")  # fmt: skip
    assert browser.ask(PIXELS) == 0
    browser.ask("(() => { at.value = 'p_EGFR'; at.onchange(); })()")
    assert browser.ask(PIXELS) >= covered  # predictions veil light tiles too
    zoom = browser.ask("view.state().zoom")
    browser.ask("document.getElementById('in').click()")
    wait(browser, f"view.state().zoom > {1.9 * zoom}")
    browser.ask("document.getElementById('home').click()")
    wait(browser, f"Math.abs(view.state().zoom - {zoom}) < 0.01 * {zoom}")
    click(browser, *browser.ask(MIDDLE))
    wait(browser, "view.state().chosen >= 0")
    number = browser.ask("view.state().chosen")
    numbers = browser.ask("document.getElementById('numbers').textContent")
    assert "weight" in numbers
    assert "p_EGFR" in numbers
    assert browser.ask("document.querySelectorAll('#around td').length") == 9
    wait(browser, f"{BROKEN_PICTURES} === 0")
    # the middle of a slide of 311 x 263 px lies in the tile of column 4, row 4 of 9
    assert number == 4 * 9 + 4
    assert {url.startswith(address) for url in browser.requests()} == {True}
    assert len([url for url in browser.requests() if "/zoom/" in url]) > 1
    assert browser.complaints() == []


def test_the_next_slide_by_error_and_one_that_cannot_be_opened(browser, address, run):
    shown(browser, address)
    order = browser.ask("[...document.getElementById('slide').options].map(o => o.textContent)")
    assert [each.split()[0] for each in order] == ["s00", "s01", "s02", "s03", "s04", "s06", "s07",
                                                   "s08", "s09", "s10", "s11", "s05"]  # fmt: skip
    assert order[-1] == "s05 (error unknown)"
    browser.ask("document.getElementById('next').click()")
    wait(browser, "view.state().number === 1 && view.state().drawn && view.state().tiles")
    assert browser.ask("document.getElementById('name').textContent") == "s01"
    path = read_contents(run, "test").slides[2].path
    away = path.with_suffix(".away")
    path.rename(away)
    try:
        browser.ask("document.getElementById('next').click()")
        wait(browser, "!document.getElementById('fault').hidden")
        assert "s02" in browser.ask("document.getElementById('fault').textContent")
        assert browser.ask(PIXELS) == 0
    finally:
        away.rename(path)
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_legible_also_on_a_phone(browser, address, dark):
    browser.open(address, width=400, height=800, dark=dark)
    wait(browser, "view.state().drawn && view.state().tiles")
    assert browser.ask(WIDTH) == 400
    assert browser.ask(SMALL) == []
    assert browser.ask(FAINT) == []
    assert (
        browser.ask("[...document.images].filter(i => !i.alt && i.checkVisibility()).length") == 0
    )


def test_files_show_the_same_without_a_server(browser, run, tmp_path):
    assert main(["view", str(run), "--static", str(tmp_path / "out"), "--static-px", "256"]) == 0
    index = tmp_path / "out" / "index.html"
    shown(browser, index.as_uri())
    assert browser.ask(PIXELS) > 10_000
    browser.ask("document.querySelector('#top button').click()")
    wait(browser, "view.state().chosen >= 0 && view.state().zoom > 1.2")
    wait(browser, f"{BROKEN_PICTURES} === 0")
    assert browser.complaints() == []
    assert {url.partition(":")[0] for url in browser.requests()} == {"file"}
    assert main(["view", str(run), "--static", str(tmp_path / "out"), "--static-px", "256"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    assert main(["view", str(run), "--static", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"


def ask(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_what_is_asked_for_wrongly_is_refused(address):
    status, headers, body = ask(address)
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"//" not in re.sub(rb"<!doctype html>", b"", body).replace(b"/>", b"")
    assert ask(address, Host="evil.example")[0] == 400  # a page of another origin, by rebinding
    for wrong in (
        "slides/99/slide.js",
        "slides/0/zoom/99/0_0.jpg",
        "slides/0/zoom/1/9_9.jpg",
        "slides/0/tile/999.jpg",
        "slides/-1/slide.js",
        "page/../server.py",
    ):
        assert ask(address + wrong)[0] in (404, 405), wrong


def test_a_name_cannot_end_the_script():
    made = as_script("view.start", {"name": EVIL.replace("script", "/script")})
    assert "</" not in made
    assert (
        json.loads(made.partition("(")[2].rpartition(")")[0])["name"]
        == "</script>" + (EVIL.replace("script", "/script").partition(">")[2])
    )


def test_deep_zoom_shows_the_pixels_where_they_lie(coordinate_slide):
    """Each level's tile, decoded, says the position that deep zoom's geometry gives it."""
    import io

    from PIL import Image

    pyramid = Pyramid(coordinate_slide.path, "c")
    facts = pyramid.facts()
    assert (facts.width, facts.height, facts.scale) == (1531, 1193, 1)
    picture = np.asarray(Image.open(io.BytesIO(pyramid.tile(facts.level, 2, 1))))
    x0, y0 = 2 * 254 - 1, 254 - 1
    expected = coordinate_code(*np.meshgrid(np.arange(x0, x0 + 256), np.arange(y0, y0 + 256)))
    blue = picture[..., 2].astype(int) - expected[..., 2]
    assert np.median(np.abs(blue)) <= 2  # JPEG; another tile would be a byte's step off
    assert pyramid.facts(facts.level - 2).scale == 4
    assert pyramid.level_within(400) == facts.level - 2  # 383 px
    with pytest.raises(ValueError, match="Invalid"):
        pyramid.tile(facts.level, 99, 0)


def row_of(y, p):
    names = [f"s{n}" for n in range(len(y))]
    return ResultRow("r", True, names, names, np.array(y, float), np.array(p, float))


def test_errors_by_task():
    nan = np.nan
    labels = make_task({"name": "multilabel"}, ["a", "b"])
    found = errors(labels, row_of([[1, 0], [1, nan], [nan, nan]], [[0.9, 0.3], [0.2, 0.9], [1, 1]]))
    np.testing.assert_allclose(found, [0.2, 0.8, nan])
    classes = make_task({"name": "multiclass", "column": "c", "weight": [1, 1, 1]}, ["x", "y", "z"])
    found = errors(
        classes, row_of([[2], [0], [nan]], [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [1, 0, 0]])
    )
    np.testing.assert_allclose(found, [0.3, 0.7, nan])
    values = make_task({"name": "regression", "mean": [0.0], "std": [1.0]}, ["v"])
    found = errors(values, row_of([[0], [4], [nan]], [[1], [4], [9]]))
    np.testing.assert_allclose(found, [0.5, 0, nan])  # deviation of 0 and 4: 2


def test_flat_attention_is_said(tmp_path):
    from tapfm.viewer.contents import Shown

    def tiles(weights):
        with h5py.File(tmp_path / "w.h5", "w") as file:
            file["weights"] = np.array(weights)
            file.create_dataset("coords", data=np.zeros((len(weights), 2), int))
            file["coords"].attrs["patch_size_level0"] = 9
        return tiles_of(Shown("s", None, tmp_path / "w.h5", {}), ("p",))

    assert tiles([0.25, 0.25, 0.26, 0.24])["flat"]
    assert not tiles([0.7, 0.1, 0.1, 0.1])["flat"]
    assert tiles([0.7, 0.1, 0.1, 0.1])["predictions"] == {}


def test_faults(run, tmp_path, capsys):
    with pytest.raises(SettingsError, match="no run with tile weights of split val"):
        one_run(run, "val")
    assert one_run(run, "test") == run
    with pytest.raises(SettingsError, match=r"holds 2 runs\. Give one: .*tapfm, .*tapfm_gated"):
        one_run(run.parent, "test")
    assert main(["view", str(tmp_path)]) == 2
    assert "Run `tapfm test --run" in capsys.readouterr().err
