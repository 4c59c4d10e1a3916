"""Checks how CUDA allocates under the command line, and when garbage is collected."""

import gc
import os

import pytest

from tapfm.cli import main
from tapfm.verbs import later

NAMES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize("given", [None, *NAMES])
def test_segments_can_grow_unless_the_user_said_how(monkeypatch, given):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    with pytest.raises(SystemExit):
        main(["--help"])
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    expected = {given: "max_split_size_mb:64"} if given else {NAMES[0]: "expandable_segments:True"}
    assert found == expected
    monkeypatch.delenv(NAMES[0], raising=False)


def looked_through(fails=False):
    """Return objects that a collection passes over, and whether garbage is collected."""
    if fails:
        raise RuntimeError("a verb's own fault")
    return gc.get_freeze_count(), gc.isenabled()


def test_a_verb_collects_its_own_garbage_and_leaves_imports_alone():
    verb = later("tests.test_cli_memory:looked_through")
    frozen, enabled = verb()
    assert enabled
    assert frozen > 10_000
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError, match="own fault"):
        verb(fails=True)
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        assert verb() == (0, False), "the caller collects no garbage, and decides"
    finally:
        gc.enable()
