"""Wheel and sdist hold what a user needs: `--config demo` works without a checkout.

Both are built from the tracked files alone, and what is in the wheel is run from an empty folder.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.conftest import ROOT

BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"


def tracked():
    """The files of the checkout that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True,
                          text=True).stdout.splitlines()  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return wheel and sdist, built from a copy, for building leaves files behind."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in tracked():
        if name.startswith(("tests/", "benchmarks/")) or not (ROOT / name).is_file():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for kind in ("wheel", "sdist"):
        made = subprocess.run([sys.executable, "-c", BUILD.format(kind), str(out)], cwd=copy,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert made.returncode == 0, made.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def shipped(top):
    return {name for name in tracked() if name.startswith(top)}


def test_the_wheel_holds_every_module_config_and_picture_of_a_page(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    code = {name for name in shipped(("tapfm/", "slides/")) if not name.endswith("README.md")}
    assert code <= names, sorted(code - names)
    configs = {f"tapfm/{name}" for name in shipped("configs/")}
    assert configs <= names, sorted(configs - names)
    strange = {n for n in names if not n.startswith(("tapfm/", "slides/")) and "dist-info" not in n}
    assert not strange


def test_the_sdist_holds_what_a_wheel_is_built_from(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"setup.py", "setup.cfg", "README.md", "LICENSE", "constraints.txt"} <= names
    assert shipped("configs/") <= names


def test_demo_is_found_from_an_empty_folder_without_a_checkout(built, tmp_path):
    place, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(place)
    asked = "import sys; from tapfm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", asked, "fit", "--config", "demo", "--print_config"]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    made = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    assert "table: data/demo/cohort.csv" in made.stdout, "of the current folder"
    where = "from tapfm.config_paths import find_config as f; print(f('demo'))"
    found = subprocess.run([sys.executable, "-c", where], cwd=empty, env=environment, text=True,
                           capture_output=True, check=True).stdout.strip()  # fmt: skip
    assert found == str(place / "tapfm" / "configs" / "cohorts" / "demo.yaml")
