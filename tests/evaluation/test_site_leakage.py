"""Sites told by slide embeddings: by the nearest slides of other cases, against a plain loop."""

from collections import Counter

import numpy as np
import pytest

from tapfm.evaluation.predicted_rows import result_row
from tapfm.evaluation.site_leakage import NEIGHBOURS, guessed_sites, site_leakage
from tapfm.inference.prediction import Prediction, pool_cases
from tapfm.reports.rows import ResultRow
from tapfm.reports.verdict import sites_sentence
from tapfm.tasks.multilabel import Multilabel

RNG = np.random.default_rng(5)
N = 48
SITE = np.arange(N) % 3
CASE = np.arange(N) // 2 // 3 * 3 + SITE  # two slides a case, next to each other in a site
TELLS = np.eye(3)[SITE] + 0.1 * RNG.standard_normal((N, 3))
NOISE = RNG.standard_normal((N, 6))


def row(title, z_NE, keep=range(N)):
    names = [f"s{n}" for n in keep]
    return ResultRow(title, True, names, [f"c{CASE[n]}" for n in keep], np.zeros((len(names), 1)),
                     np.zeros((len(names), 1)), embeddings_NE=z_NE[list(keep)])  # fmt: skip


SITES = {f"s{n}": "abc"[SITE[n]] for n in range(N)}


def reference(z_NE, site_N, case_N):
    z_NE = z_NE - z_NE.mean(0)
    guesses = []
    for n in range(len(z_NE)):
        others = [m for m in range(len(z_NE)) if case_N[m] != case_N[n]]
        cosine = {
            m: z_NE[m] @ z_NE[n] / np.linalg.norm(z_NE[m]) / np.linalg.norm(z_NE[n]) for m in others
        }
        nearest = sorted(others, key=lambda m: -cosine[m])[:NEIGHBOURS]
        votes = Counter(site_N[m] for m in nearest)
        nearness = {site: sum(cosine[m] for m in nearest if site_N[m] == site) for site in votes}
        guesses.append(max(votes, key=lambda site: (votes[site], nearness[site])))
    return guesses


@pytest.mark.parametrize("z_NE", [TELLS, NOISE, NOISE + 100], ids=["tells", "noise", "shifted"])
def test_a_site_is_that_of_the_nearest_slides_of_other_cases(z_NE):
    assert guessed_sites(z_NE, SITE, CASE).tolist() == reference(z_NE, SITE, CASE)


def test_slides_of_one_case_do_not_tell_each_others_site():
    """Each case has a direction of its own: with its own slides it would be told always."""
    z_NE = np.eye(CASE.max() + 1)[CASE] + 0.01 * RNG.standard_normal((N, CASE.max() + 1))
    with_own = guessed_sites(z_NE, SITE, np.arange(N)) == SITE
    assert with_own.mean() > (guessed_sites(z_NE, SITE, CASE) == SITE).mean() + 0.2


def test_what_tells_sites_is_found_and_noise_is_near_chance():
    found = site_leakage(row("run", TELLS), row("control", NOISE), SITES)
    assert (found["slides"], found["sites"], found["chance"]) == (N, 3, pytest.approx(1 / 3))
    assert found["run"]["value"] == 1
    right = guessed_sites(NOISE, SITE, CASE) == SITE
    recall = np.mean([right[site == SITE].mean() for site in range(3)])
    assert found["control"]["value"] == pytest.approx(recall)
    assert found["control"]["value"] < 0.6
    assert found["more"]["low"] > 0
    assert sites_sentence(found).startswith("It leaks sites: embeddings tell the site of 1.000")
    swapped = site_leakage(row("run", NOISE), row("control", TELLS), SITES)
    assert sites_sentence(swapped).startswith("Sites: embeddings tell the site of 0.")


def test_slides_without_a_site_and_sites_of_one_case_are_left_out():
    few = SITES | {"s0": "", "s3": "mixed", "s7": "alone"}
    found = site_leakage(row("run", TELLS), row("control", NOISE, range(1, N)), few)
    assert (found["slides"], found["sites"]) == (N - 3, 3)
    assert site_leakage(row("run", TELLS), row("control", NOISE), dict.fromkeys(SITES, "a")) is None
    assert site_leakage(row("run", TELLS), row("control", NOISE), {}) is None


def test_embeddings_come_from_predictions_and_of_cases_are_their_means(tmp_path):
    task = Multilabel(("A",))
    each = [
        Prediction(f"s{n}", f"c{n // 2}", np.zeros(1), np.zeros(1), np.ones(1), np.zeros(1),
                   embedding_E=np.array([n, 1.0]))
        for n in range(4)
    ]  # fmt: skip
    made = result_row("run", tmp_path, {"test": each, "val": each}, "test", end_to_end=True)
    np.testing.assert_array_equal(made.embeddings_NE, [[0, 1], [1, 1], [2, 1], [3, 1]])
    cases = [type("Case", (), {"case_id": f"c{n}", "labels": (0.0,)}) for n in range(2)]
    pooled = pool_cases(each, task, "mean", cases)
    np.testing.assert_array_equal([p.embedding_E for p in pooled], [[0.5, 1], [2.5, 1]])
    bare = [*each[:3], Prediction("s3", "c1", np.zeros(1), np.zeros(1), np.ones(1))]
    assert result_row("r", tmp_path, {"test": bare, "val": []}, "test", end_to_end=True
                      ).embeddings_NE is None  # fmt: skip


@pytest.mark.parametrize(("slides", "told"), [(10, False), (12, True)])
def test_of_few_slides_nothing_is_said(slides, told):
    """Where all others are neighbours, their number is told: the site of none is guessed right."""
    six = guessed_sites(TELLS[:6:1], SITE[:6], np.arange(6)) == SITE[:6]
    assert not six.any(), "though embeddings tell it"
    keep = range(slides)
    found = site_leakage(row("run", TELLS, keep), row("control", NOISE, keep), SITES)
    assert (found is not None) == told
