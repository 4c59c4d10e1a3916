"""The guide is built without a warning, its messages are the program's, and its notebook runs."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

GUIDE = ROOT / "docs" / "guide"


def test_the_guide_is_built_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="needs `pip install 'tapfm[docs]'`")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f"]
    done = subprocess.run(
        [*build, str(ROOT / "docs" / "mkdocs.yml"), "-d", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "first_hour.html", "faq.html", "settings.html", "cards.html"} <= made
    for name in made - {"404.html"}:  # which a server shows, from its root
        path = tmp_path / "site" / name
        targets = re.findall(r'href="([\w./-]+\.html)(?:#[\w-]+)?"', path.read_text())
        assert targets
        assert not [each for each in targets if not (path.parent / each).is_file()], path.name


def test_a_broken_link_is_refused(tmp_path):
    """The partner: the same build, of a page that leads nowhere."""
    pytest.importorskip("mkdocs", reason="needs `pip install 'tapfm[docs]'`")
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "index.md").write_text("[nowhere](nowhere.md)\n")
    (tmp_path / "mkdocs.yml").write_text("{site_name: x, docs_dir: guide, plugins: []}\n")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr


def spoken():
    """All of the program's text on one line, strings that follow each other joined."""
    paths = [path for top in ("slides", "tapfm") for path in (ROOT / top).rglob("*.py")]
    text = "\n".join(path.read_text() for path in paths)
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("message", re.findall(r"^### (.+)$", (GUIDE / "faq.md").read_text(), re.M))
def test_a_message_of_the_faq_is_the_programs(message):
    assert message in spoken()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    jupytext = pytest.importorskip("jupytext", reason="needs `pip install 'tapfm[docs]'`")
    from nbclient import NotebookClient

    notebook = jupytext.read(ROOT / "docs" / "notebooks" / "first_hour.py")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert not [o for o in outputs if o["output_type"] == "error"]
    text = "".join(o.get("text", "") or o["data"].get("text/plain", "") for o in outputs
                   if o["output_type"] != "error")  # fmt: skip
    assert "(112, 112, 3)" in text
    assert "p_EGFR" in text
    assert (tmp_path / "runs").is_dir()


CONTEXT = ["PathAlign", "MLLM-HWSI", "SlideChat", "GIANT", "Quilt-LLaVA", "DCT-HistoTransformer",
           "SongCi", "PIBD", "MOTCat", "PLUTO", "PathReasoner-R1", "Pathology-CoT", "PathGen-1.6M",
           "PathMoE"]  # fmt: skip


def test_related_papers_have_a_line_of_need_and_one_of_commands_that_exist():
    """Commands of `fit-tiles` are Lightning's to read; the others are parsed as they stand."""
    from tapfm import cli

    page = (ROOT / "docs" / "related.md").read_text()
    parts = re.split(r"^### ", page, flags=re.M)[1:]
    assert [part.split()[0] for part in parts] == CONTEXT
    for part in parts:
        _, needs, here = part.strip().splitlines()
        assert (needs[:9], here[:8]) == ("- Needs: ", "- Here: ")
        commands = re.findall(r"`tapfm ([^`]+)`", here)
        assert commands
        for command in commands:
            verb, *arguments = command.split()
            assert verb in cli.VERBS
            if verb not in cli.LIGHTNINGS:
                cli.parser().parse_args([verb, *arguments])
