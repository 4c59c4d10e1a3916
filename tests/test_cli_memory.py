"""How CUDA allocates is set before CUDA starts, and never over the user's head."""

import os

import pytest

from tapfm.cli import main

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
