"""The planted cohort is as its tests assume: 2 % of a positive's tissue, and a random label."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import planted
from slides.demo.tissue_painter import TUMOUR, paint


def test_only_planted_slides_hold_tumour_and_cases_stay_whole():
    slides = planted.plan(60)
    for split in ("train", "val", "test"):
        of_case = {}
        for slide, values in slides:
            if slide.split == split:
                assert of_case.setdefault(slide.case_id, values) == values
                assert slide.specimen.tumour_fraction == (planted.SHARE if values[0] else 0)
        values = np.array(list(of_case.values()))
        assert (values.sum(0) == -(-len(values) // 2)).all()
        assert {tuple(v) for v in values.tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert [v for _, v in slides] == [v for _, v in planted.plan(60)]


def test_noise_says_nothing_of_what_is_painted():
    slides = planted.plan(800)
    values = np.array([v for _, v in slides])
    sites = np.unique([s.site for s, _ in slides], return_inverse=True)[1]
    for other in (values[:, 0], sites == 0, [s.specimen.tissue_mm2 > 0.41 for s, _ in slides]):
        assert abs(np.corrcoef(values[:, 1], other)[0, 1]) < 0.12


def test_a_fiftieth_of_the_tissue_is_tumour():
    (slide, _), (bare, _) = (next(s for s in planted.plan(60) if s[1][0] == v) for v in (1, 0))
    truth = paint(slide.specimen, 2.0)[1]
    assert (truth == TUMOUR).sum() / (truth > 0).sum() == pytest.approx(0.02, abs=0.002)
    assert (paint(replace(bare.specimen), 2.0)[1] != TUMOUR).all()


@pytest.mark.parametrize(
    ("planted_value", "noise", "expected"),
    [(0.90, (0.41, 0.66), (True, True)), (0.89, (0.51, 0.7), (False, False))],
)
def test_verdicts(planted_value, noise, expected):
    def report(label, **auroc):
        return {"arms": {"end to end, tapfm_gated": {"figures": {label: {"auroc": auroc}}}}}

    reports = {
        "PLANTED": report("PLANTED", value=planted_value, low=0.5, high=1.0),
        "NOISE": report("NOISE", value=sum(noise) / 2, low=noise[0], high=noise[1]),
    }
    assert tuple(planted.verdicts(reports).values()) == expected
