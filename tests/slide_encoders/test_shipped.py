"""TITAN, PRISM and CARE are called as their publishers call them, on twins of their folders."""

import pytest
import torch

from slides.errors import SettingsError
from tapfm.slide_encoders import shipped
from tapfm.slide_encoders.opened import open_slide_encoder
from tapfm.slide_encoders.registry import find

T, STEP0 = 5, 512
CORNERS0 = STEP0 * torch.stack([torch.arange(T) % 3, torch.arange(T) // 3], 1) + 7


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """transformers copies a folder's code to its cache before it runs it."""
    pytest.importorskip("transformers", reason="needs `pip install transformers`")
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(shipped, "find_spec", lambda name: name)  # PRISM's twin needs none


@pytest.mark.parametrize("key", ["titan", "prism", "care"])
def test_a_slide_as_its_publisher_encodes_it(tmp_path, key):
    from tests.slide_encoders.twins import write_shipped

    row = find(key)
    last = write_shipped(tmp_path / key, row)
    z_TD = torch.randn(T, row.tile_dim, generator=torch.Generator().manual_seed(0))
    opened = open_slide_encoder(row, tmp_path / key, trust_code=True)
    found = opened.encode(z_TD, CORNERS0 if row.coords else None, STEP0)
    places = (CORNERS0 // STEP0).float() if row.coords else torch.zeros(T, 0)
    with torch.no_grad():
        expected = last(torch.cat([z_TD, places], 1)).tanh().mean(0)
    torch.testing.assert_close(found, expected)
    assert found.shape == (row.dim,)
    if row.coords:
        moved = opened.encode(z_TD, CORNERS0 + STEP0, STEP0)
        assert (moved - found).abs().max() > 1e-3, "places are given"


def test_code_is_not_run_unasked_and_what_it_lacks_is_named(tmp_path, monkeypatch):
    from tests.slide_encoders.twins import write_shipped

    row = find("titan")
    with pytest.raises(SettingsError, match=r"titan: .* is not the folder of its repository"):
        open_slide_encoder(row, tmp_path / "gone", trust_code=True)
    write_shipped(tmp_path / "titan", row, failing=True)
    with pytest.raises(SettingsError, match=r"modeling_twin.py in .*Read it, and add --trust-code"):
        open_slide_encoder(row, tmp_path / "titan", trust_code=False)
    with pytest.raises(SettingsError, match=r"fails: ImportError.*no_such_package"):
        open_slide_encoder(row, tmp_path / "titan", trust_code=True)
    monkeypatch.setattr(shipped, "find_spec", lambda name: None if name == "environs" else name)
    write_shipped(tmp_path / "prism", find("prism"))
    with pytest.raises(
        SettingsError, match=r"prism: .* environs cannot be imported. Run: pip inst"
    ):
        open_slide_encoder(find("prism"), tmp_path / "prism", trust_code=True)


def test_other_weights_are_refused(tmp_path):
    from dataclasses import replace

    from tests.slide_encoders.twins import write_shipped

    row = find("prism")
    write_shipped(tmp_path / "p", replace(row, dim=8))
    opened = open_slide_encoder(row, tmp_path / "p", trust_code=True)
    with pytest.raises(
        SettingsError, match=r"shape \(1, 8\), not finite ones of shape \(1, 1280\)"
    ):
        opened.encode(torch.zeros(T, row.tile_dim), None, 1)
