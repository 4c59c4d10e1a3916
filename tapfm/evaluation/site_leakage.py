"""How well a slide's embedding tells the site it came from, before and after adapting.

Scanners, stains and fixation differ between sites, and encoders see it. A slide's site is guessed
from the `NEIGHBOURS` slides of other cases whose embeddings are nearest, by cosine after the mean
is taken off; of sites with equally many of them, the one whose slides are nearer. The figure is
the mean over sites of the share of their slides that are guessed right: 1 / sites if embeddings
tell nothing. A site of one case cannot be guessed and is left out.

Condition: where sites have other labels, embeddings that tell the label better tell the site
    better, too: read it beside the gain, and beside RI and MaRI (`robustness`).
Source: Howard et al. 2021 (Nat Commun 12:4423) for sites in TCGA; kNN on embeddings as in
    Kömen et al. 2024 (arXiv 2411.05489).

Shapes: N slides, E numbers of an embedding, S sites, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from tapfm.evaluation.predicted_rows import MIXED
from tapfm.reports.rows import ResultRow
from tapfm.stats.bootstrap import interval, percentiles, with_point

NEIGHBOURS = 5
FEW = 2 * NEIGHBOURS
DRAWS = 2000


def site_leakage(
    run: ResultRow, control: ResultRow, site: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return how well embeddings of a run and of its control tell sites.

    Args:
        run: with `embeddings_NE`.
        control: likewise; slides that one of both lacks are left out.
        site: of each slide or case; blank or `mixed` is left out.

    Returns:
        `run`, `control` and `more` (their difference, paired), each an `Interval` as a mapping;
        `chance`, `slides`, `sites`. None if fewer than two sites have two cases, or of up to `FEW`
        slides: where most are neighbours of each, their numbers are told, and not sites.
    """
    if run.embeddings_NE is None or control.embeddings_NE is None:
        return None
    places = [{slide: n for n, slide in enumerate(row.slide_ids)} for row in (run, control)]
    names = [s for s in run.slide_ids if s in places[1] and site.get(s, "") not in ("", MIXED)]
    case_of = dict(zip(run.slide_ids, run.case_ids, strict=True))
    cases: dict[str, set[str]] = {}
    for slide in names:
        cases.setdefault(site[slide], set()).add(case_of[slide])
    names = [slide for slide in names if len(cases[site[slide]]) > 1]
    sites_S, site_N = np.unique([site[slide] for slide in names], return_inverse=True)
    if len(sites_S) < 2 or len(names) <= FEW:
        return None
    case_N = np.array([case_of[slide] for slide in names])
    times_BN = with_point(case_N, DRAWS, 0).astype(float)
    shares = {}
    for kind, row, place in zip(("run", "control"), (run, control), places, strict=True):
        z_NE = row.embeddings_NE[[place[slide] for slide in names]]
        right_N = guessed_sites(z_NE, site_N, case_N) == site_N
        shares[kind] = mean_recall(right_N, site_N, times_BN)
    found = {kind: asdict(interval(share_B)) for kind, share_B in shares.items()}
    found["more"] = asdict(percentiles(shares["run"] - shares["control"]))
    return found | {"chance": 1 / len(sites_S), "slides": len(names), "sites": len(sites_S)}


def guessed_sites(z_NE: np.ndarray, site_N: np.ndarray, case_N: np.ndarray) -> np.ndarray:
    """Return the site of each slide, (N,) int, by its nearest slides of other cases."""
    z_NE = np.asarray(z_NE, np.float64) - np.mean(z_NE, 0, dtype=np.float64)
    z_NE = z_NE / np.maximum(np.linalg.norm(z_NE, axis=1, keepdims=True), 1e-12)
    near_NN = z_NE @ z_NE.T
    near_NN[case_N[:, None] == case_N] = -np.inf
    guesses = []
    for near_N in near_NN:
        best = np.argsort(-near_N, kind="stable")[:NEIGHBOURS]
        best = best[np.isfinite(near_N[best])]
        votes_S = np.bincount(site_N[best], weights=1 + 1e-6 * near_N[best])
        guesses.append(votes_S.argmax())
    return np.array(guesses)


def mean_recall(right_N: np.ndarray, site_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the mean over the sites drawn of the share guessed right, in every draw, (B,)."""
    shares = []
    for number in range(site_N.max() + 1):
        own_BN = times_BN[:, site_N == number]
        with np.errstate(invalid="ignore"):
            shares.append((own_BN * right_N[site_N == number]).sum(1) / own_BN.sum(1))
    return np.nanmean(shares, axis=0)
