"""The pixel size of each odd spelling in the zoo; what has none is an error, and so is a power."""

import pytest

from slides.errors import MissingResolutionError
from slides.wsi.resolution import find_mpp
from tests.zoo import NO_RESOLUTION, RESOLUTIONS


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_every_spelling(name):
    properties, source = RESOLUTIONS[name]
    assert find_mpp(properties, "a") == (pytest.approx(0.4), pytest.approx(0.4), source)


@pytest.mark.parametrize("name", NO_RESOLUTION)
def test_what_has_no_length(name):
    with pytest.raises(MissingResolutionError, match="a: no pixel size"):
        find_mpp(NO_RESOLUTION[name], "a")


@pytest.mark.parametrize(("power", "mpp"), [(20.0, "0.5"), (40.0, "0.25"), (60.0, "0.17")])
def test_an_objective_power_in_the_table_is_named(power, mpp):
    says = rf"table = {power:g} \(an objective's power: {power:g}x is about {mpp} microns"
    with pytest.raises(MissingResolutionError, match=says):
        find_mpp({"openslide.mpp-x": "0.25"}, "a", power)
