"""The rows: what each is for, and what is refused; the page has them all."""

import re

import pytest

from slides.errors import SettingsError
from tapfm.encoders.backbones import find as find_tile_encoder
from tapfm.slide_encoders.registry import LEFT_OUT, ROWS, find
from tapfm.slide_encoders.shipped import CALLS
from tests.conftest import ROOT

OURS = {row.key: row for row in ROWS if row.extract}
FITS = {row.key: (row.tile_encoder, row.tile_dim, row.tile_px * row.mpps[0], True) for row in ROWS}


@pytest.mark.parametrize("row", OURS.values(), ids=OURS)
def test_the_tile_encoder_is_one_of_ours_and_its_tiles_have_the_field(row):
    """So `tapfm features` with the row's flags makes the features that the row is for."""
    encoder = find_tile_encoder(row.tile_encoder)
    flags = dict(zip(row.extract.split()[::2], row.extract.split()[1::2], strict=True))
    assert flags["--model"] == encoder.key
    assert encoder.dim == row.tile_dim
    side = encoder.tile_px * float(flags.get("--mpp", encoder.mpp))
    assert side == pytest.approx(row.tile_px * row.mpps[0], rel=1e-3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_other_features_are_told_apart(row):
    name, dim, side, coords = FITS[row.key]
    assert row.fault(name, dim, side, coords) is None
    assert row.fault("", dim, None, coords) is None, "a file need not say"
    assert row.fault(f"{name}_1a2b3c4d", dim, side, coords) == f"features of {name}_1a2b3c4d"
    assert row.fault(name, dim + 1, side, coords) == f"{dim + 1} features a tile"
    assert row.fault(name, dim, 4 * side, coords) == f"tiles of {4 * side:.0f} microns"
    assert (row.fault(name, dim, side, False) is not None) == row.coords
    assert (row.aggregator is None) == (row.key in CALLS)


def test_names():
    assert find("TITAN").key == "titan"
    with pytest.raises(SettingsError, match=r"none of titan, .* Did you mean prism?"):
        find("prizm")
    for name in LEFT_OUT:
        with pytest.raises(SettingsError, match="it has no row here: "):
            find(name)


def test_the_page_has_every_row():
    page = (ROOT / "tapfm" / "slide_encoders" / "README.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (\d+) \| (.+?) \|", page, re.M)
    assert found == [
        (row.key, row.source, row.needs, str(row.dim), row.licence + ", gated" * row.gated)
        for row in ROWS
    ]
