"""The demo cohort has the properties that its plan promises, on disk as well.

* The plan is a pure function of the seed; cases are never split; every split has both classes of
  every label; some labels are unknown; some cases have two slides.
* Written slides are real pyramids: OpenSlide opens them, names the vendor, and says the true mpp.
* The same plan gives the same bytes.
* Tumour is a minority of the tissue; a trait changes the tumour, mostly its texture, and leaves
  the compartments alone.
"""

import csv
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import openslide
import pytest
from PIL import Image
from scipy import ndimage

from slides.cohort.table import read_cohort
from slides.demo import cell_stamps as cells
from slides.demo import cohort as synthetic
from slides.demo.cohort import FEWEST, LABELS, MIN_SIDE0, MPPS, SPLITS, plan_demo, write_slide
from slides.demo.tissue_painter import GLASS, TISSUE, TUMOUR, Specimen, paint, site_stain
from slides.errors import SettingsError
from tapfm.cli import main

SMALL = {"tissue_mm2": 0.05, "tumour_fraction": 0.3}  # a ninth of a demo specimen


def of_cases(plan):
    """Return labels, split and number of slides of each case."""
    cases = defaultdict(list)
    for slide in plan:
        cases[slide.case_id].append(slide)
    return cases


class TestPlan:
    @pytest.mark.parametrize("slides", [FEWEST, 13, 41, 104, 140])
    @pytest.mark.parametrize("seed", [0, 1, 7])
    def test_every_split_has_both_classes_of_every_label(self, seed, slides):
        plan = plan_demo(seed, slides)
        assert len(plan) == slides
        for split in SPLITS:
            labels = [s.labels for s in plan if s.split == split]
            for k in range(len(LABELS)):
                assert {y[k] for y in labels} >= {0, 1}, (split, LABELS[k])

    def test_too_small_a_cohort_is_refused(self):
        with pytest.raises(SettingsError, match=f"at least {FEWEST} slides.*{FEWEST - 1} were"):
            plan_demo(0, FEWEST - 1)

    def test_is_a_function_of_the_seed(self):
        assert plan_demo(3) == plan_demo(3)
        assert plan_demo(3) != plan_demo(4)

    def test_cases_stay_whole(self):
        cases = of_cases(plan_demo(0))
        for slides in cases.values():
            assert len({(s.split, s.site, s.labels, s.specimen.traits) for s in slides}) == 1
        counts = [len(slides) for slides in cases.values()]
        assert set(counts) == {1, 2}
        assert 0.05 < counts.count(2) / len(counts) < 0.25

    def test_no_two_slides_are_painted_alike(self):
        plan = plan_demo(0)
        assert len({s.specimen.seed for s in plan}) == len(plan)
        assert not {s.specimen.seed for s in plan} & {s.specimen.seed for s in plan_demo(1)}

    def test_prevalence_and_unknowns(self):
        known = [slides[0].labels for slides in of_cases(plan_demo(0)).values()]
        for k, wanted in enumerate(synthetic.PREVALENCE):
            states = [y[k] for y in known if y[k] is not None]
            assert 0.02 < 1 - len(states) / len(known) < 0.10
            assert abs(np.mean(states) - wanted) < 0.05

    def test_known_labels_are_the_painted_traits(self):
        for slide in plan_demo(0):
            for label, trait in zip(slide.labels, slide.specimen.traits, strict=True):
                assert label in (None, trait)

    def test_test_split_can_carry_an_interval(self):
        """A bootstrap over cases needs a few positives of the rarest label."""
        cases = of_cases(s for s in plan_demo(0) if s.split == "test")
        assert sum(slides[0].labels[2] == 1 for slides in cases.values()) >= 5

    def test_resolutions_scanners_and_pens_are_mixed(self):
        plan = plan_demo(0)
        assert {s.mpp for s in plan} == set(MPPS)
        assert {(s.mpp, s.aperio) for s in plan} == {(m, a) for m in MPPS for a in (True, False)}
        assert 0 < sum(s.pen for s in plan) < len(plan) / 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write three slides (Aperio fine, generic coarse, one with pen); return (plan, folder)."""
    out = tmp_path_factory.mktemp("demo")
    for folder in ("slides", "truth"):
        (out / folder).mkdir()
    first = plan_demo(0)[0]
    plan = [
        replace(
            first,
            slide_id=f"s{number}",
            mpp=mpp,
            aperio=aperio,
            pen=pen,
            specimen=replace(first.specimen, seed=number, **SMALL),
        )
        for number, (mpp, aperio, pen) in enumerate(
            [(0.2527, True, False), (0.5021, False, False), (0.5, True, True)]
        )
    ]
    for slide in plan:
        write_slide(slide, out)
    return plan, out


class TestFiles:
    def test_openslide_reads_vendor_resolution_and_levels(self, written):
        plan, out = written
        for slide in plan:
            with openslide.OpenSlide(out / slide.path) as opened:
                vendor = "aperio" if slide.aperio else "generic-tiff"
                assert opened.properties["openslide.vendor"] == vendor
                assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(
                    slide.mpp, rel=1e-4
                )
                assert min(opened.dimensions) >= MIN_SIDE0
                assert opened.dimensions[0] != opened.dimensions[1]
                nominal = (1, 4, 16) if slide.aperio else (1, 2, 4, 8)
                np.testing.assert_allclose(opened.level_downsamples, nominal, rtol=5e-3)

    def test_truth_lies_where_the_tissue_is(self, written):
        """Read through OpenSlide: the truth's glass is glass, its tissue is stained."""
        plan, out = written
        for slide in plan:
            facts = json.loads((out / f"truth/{slide.slide_id}.json").read_text())
            truth = np.asarray(Image.open(out / f"truth/{slide.slide_id}.png"))
            with openslide.OpenSlide(out / slide.path) as opened:
                sides0 = (facts["width0"], facts["height0"])
                assert opened.dimensions == sides0
                step0 = facts["downsample"]
                assert truth.shape == tuple(-(-n // step0) for n in sides0[::-1])
                seen = np.asarray(opened.get_thumbnail(truth.shape[::-1])).astype(int)
            h, w = min(seen.shape[0], truth.shape[0]), min(seen.shape[1], truth.shape[1])
            seen, truth = seen[:h, :w], truth[:h, :w]
            glass = np.abs(seen - slide.specimen.stain.glass).max(-1) < 12
            assert glass[truth == GLASS].mean() > 0.97
            assert glass[(truth == TISSUE) | (truth == TUMOUR)].mean() < 0.15
            assert (synthetic.PEN in truth) == slide.pen
            shifted = np.roll(glass, 40, axis=1)  # the partner: a displaced mask is noticed
            assert shifted[(truth == TISSUE) | (truth == TUMOUR)].mean() > 0.15

    def test_facts_agree_with_the_plan(self, written):
        plan, out = written
        for slide in plan:
            facts = json.loads((out / f"truth/{slide.slide_id}.json").read_text())
            assert tuple(facts["true_labels"].values()) == slide.specimen.traits
            assert facts["tumour_mm2"] < 0.5 * facts["tissue_mm2"]
            if not slide.pen:
                assert facts["tissue_mm2"] == pytest.approx(SMALL["tissue_mm2"], rel=0.05)

    def test_same_plan_same_bytes(self, written, tmp_path):
        plan, out = written
        for folder in ("slides", "truth"):
            (tmp_path / folder).mkdir()
        slide = plan[1]
        write_slide(slide, tmp_path)
        truth = f"truth/{slide.slide_id}"
        for name in (slide.path, f"{truth}.png", f"{truth}.json"):
            assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name

    def test_table_is_one_the_cohort_reader_takes(self, tmp_path, monkeypatch):
        """Nothing is painted: the slides are empty files."""

        def touch(job):
            slide, out = job
            (out / slide.path).touch()

        monkeypatch.setattr(synthetic, "_write", touch)
        table = synthetic.write_demo(tmp_path, seed=5, slides=29, workers=0, progress=False)
        cohort, plan = read_cohort(table), plan_demo(5, 29)
        assert cohort.labels == LABELS
        assert [r.slide_id for r in cohort.rows] == [s.slide_id for s in plan]
        for row, slide in zip(cohort.rows, plan, strict=True):
            expected = [np.nan if y is None else y for y in slide.labels]
            np.testing.assert_array_equal(row.labels, expected)
            assert (row.case_id, row.split, row.site) == (slide.case_id, slide.split, slide.site)
        with table.open() as file:
            assert any(row[label] == "" for row in csv.DictReader(file) for label in LABELS)


def test_a_cohort_of_another_size_or_seed_is_painted_anew(tmp_path, monkeypatch, capsys):
    """A marker that names the seed alone is of a version whose cohort had other slides."""
    painted = []
    monkeypatch.setattr(synthetic, "write_demo", lambda *asked: painted.append(asked) or asked[0])
    (tmp_path / "seed.txt").write_text("0\n")
    demo = ["demo", "--out", str(tmp_path)]
    for flags, times in (([], 1), ([], 1), (["--slides", "12"], 2), (["--seed", "1"], 3)):
        assert main([*demo, *flags]) == 0
        assert len(painted) == times
    assert "is there already" in capsys.readouterr().out


class TestPainting:
    @pytest.mark.parametrize("mpp", [0.5, 1.0])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_areas_are_those_asked_for(self, seed, mpp):
        specimen = Specimen(seed=seed, stain=site_stain(0, seed), traits=(0, 1, 0), **SMALL)
        rgb, truth = paint(specimen, mpp)
        assert rgb.shape == (*truth.shape, 3)
        tissue_mm2 = (truth != GLASS).sum() * (mpp / 1000) ** 2
        assert tissue_mm2 == pytest.approx(SMALL["tissue_mm2"], rel=0.05)
        tumour = (truth == TUMOUR).sum() / (truth != GLASS).sum()
        assert tumour == pytest.approx(SMALL["tumour_fraction"], rel=0.05)
        assert tumour < 0.5

    def test_demo_tumours_are_a_minority(self):
        assert max(s.specimen.tumour_fraction for s in plan_demo(0)) < 0.5

    @pytest.mark.parametrize("trait", range(len(cells.TRAITS)))
    def test_a_trait_shows_in_the_tumour_cells_texture(self, trait):
        """Compares state 1 with state 0, on 40 cells of equal size and darkness each.

        The measure is what each trait is: the darkest spot of a nucleus; the clear part of the
        cell; its lightest spot. The states of one trait lie
        apart by more than their spread, and the other two traits do not move it as far.
        """
        measured = [darkest_spot, clear_part, lightest_spot][trait]

        def sample(states):
            rng = np.random.default_rng(11)
            drawn = [cells.tumour_cell(rng, states, 4.8, 0.85) for _ in range(40)]
            return np.array([measured(cells.stamp(cell, 0.25, rng)) for cell in drawn])

        none = sample((0, 0, 0))
        moved = [
            abs(np.median(sample(tuple(np.eye(3, dtype=int)[k]))) - np.median(none))
            for k in range(3)
        ]
        inner = np.percentile(none, 75) - np.percentile(none, 25)
        assert moved[trait] > 2 * inner
        assert moved[trait] > 2 * max(moved[:trait] + moved[trait + 1 :])

    @pytest.mark.parametrize("trait", range(len(cells.TRAITS)))
    def test_average_colour_gives_no_label_away(self, trait):
        """The mean colour of the tumour moves less between states than between slides."""

        def tumour_colour(seed, traits):
            specimen = Specimen(seed, site_stain(0, seed % 4), traits, **SMALL)
            rgb, truth = paint(specimen, 0.5)
            return rgb[truth == TUMOUR].mean(0)

        states = (0, 0, 0), tuple(int(k == trait) for k in range(3))
        colour = np.array([[tumour_colour(seed, s) for s in states] for seed in range(6)])
        between_states = np.abs((colour[:, 1] - colour[:, 0]).mean(0)).max()
        between_slides = colour[:, 0].std(0).max()
        assert between_states < 0.75 * between_slides

    def test_resolution_changes_the_sampling_not_the_specimen(self):
        specimen = Specimen(seed=3, stain=site_stain(0, 0), traits=(1, 0, 1), **SMALL)
        (fine, fine_truth), (coarse, coarse_truth) = (paint(specimen, mpp) for mpp in (0.5, 1.0))
        h, w = coarse_truth.shape
        agree = fine_truth[: 2 * h : 2, : 2 * w : 2][:h, :w] == coarse_truth
        assert agree.mean() > 0.97
        # cells are drawn at random for each resolution, so only the stain they add up to agrees
        assert fine.mean() == pytest.approx(coarse.mean(), abs=6)

    def test_sites_differ_and_seeds_have_their_own(self):
        stains = [site_stain(0, k) for k in range(4)] + [site_stain(1, k) for k in range(4)]
        assert len(set(stains)) == len(stains)


def darkest_spot(stamp):
    """Return haematoxylin of the nucleus's darkest pixels over its median."""
    cover, inks = stamp[1]
    dark = inks[..., 0][cover[..., 0] > 0.95]
    dark = dark[dark > 0.2]  # a vacuole is cover without stain
    return np.percentile(dark, 99) / np.median(dark)


def clear_part(stamp):
    """Return the share of the upper layer's cover that has no stain."""
    cover, inks = stamp[1]
    seen = cover[..., 0] > 0.5
    return (inks.sum(-1)[seen] < 0.15).mean()


def lightest_spot(stamp):
    """Return haematoxylin of the lightest pixels well inside the nucleus over its median."""
    cover, inks = stamp[1]
    seen = inks.sum(-1) > 0.1  # a vacuole is cover without stain
    inside = ndimage.binary_erosion((cover[..., 0] > 0.95) & seen, iterations=4)
    h = inks[..., 0][inside]
    return np.percentile(h, 4) / np.median(h)
