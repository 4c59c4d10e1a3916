"""Measures how often 95 % intervals contain the true value: case-clustered ones, and others.

    python -m benchmarks.coverage

Cohorts are drawn from a ranker whose AUROC is known (binormal: a positive's score is N(d, 1), a
negative's N(0, 1), d = sqrt(2) z(AUROC)). Three cases in ten have two slides, which share their
label and half of the variance of their scores. On each cohort: the report's interval, percentiles
and BCa of the same draws, and DeLong's by case; and for a second score, 0.1 worse and correlated
with the first, the report's interval of the difference. A cohort that lacks a class is drawn anew.
Writes results/coverage.json and the table between the markers in README.md.

Price: 2 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
from scipy.stats import norm

from benchmarks.record import RESULTS, facts, rewrite
from tapfm.reports.plain_table import markdown
from tapfm.stats.bootstrap import bootstrap_cases, interval, once, percentiles
from tapfm.stats.delong import delong
from tapfm.stats.metrics import auroc_draws

SIMULATIONS, DRAWS = 500, 1000
CASES, PREVALENCES, AUROCS = (40, 150), (0.4, 0.2), (0.7, 0.8, 0.9)
WORSE = 0.1
TWO_SLIDES, SHARED = 0.3, 0.5
WANTED = (0.93, 0.97)
METHODS = {
    "report": "report",
    "percentiles": "percentiles",
    "bca": "BCa",
    "delong": "DeLong by case",
    "difference": "report, of a difference",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    simulations = parser.parse_args().simulations
    about, rows = facts("cpu"), []
    for cases in CASES:
        for prevalence in PREVALENCES:
            for auroc in AUROCS:
                rows.append(simulate(cases, prevalence, auroc, simulations, DRAWS))
                print(rows[-1], flush=True)
    result = {**about, "simulations": simulations, "draws": DRAWS, "rows": rows}
    (RESULTS / "coverage.json").write_text(json.dumps(result, indent=1) + "\n")
    rewrite("coverage", table(result))
    return 0


def cohort(rng: np.random.Generator, cases: int, prevalence: float, auroc: float):
    """Return labels (N,), two scores (2, N) and cases (N,) of slides; both classes occur."""
    case_N = np.repeat(np.arange(cases), 1 + (rng.random(cases) < TWO_SLIDES))
    y_C = (rng.random(cases) < prevalence).astype(float)
    if y_C.min() == y_C.max():
        return cohort(rng, cases, prevalence, auroc)
    slides, p_2N = len(case_N), []
    both_N = rng.standard_normal(slides)
    for each in (auroc, auroc - WORSE):
        of_case = np.sqrt(SHARED) * rng.standard_normal(cases)[case_N]
        own_N = of_case + np.sqrt(1 - SHARED) * rng.standard_normal(slides)
        shift = np.sqrt(2) * norm.ppf(each) * y_C[case_N]
        p_2N.append(shift + np.sqrt(0.5) * both_N + np.sqrt(0.5) * own_N)
    return y_C[case_N], np.stack(p_2N), case_N


def simulate(
    cases: int, prevalence: float, auroc: float, simulations: int, draws: int
) -> dict[str, float]:
    """Return the share of intervals that contain the truth, and their mean width, by method."""
    held, width = dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0.0)
    for seed in range(simulations):
        rng = np.random.default_rng([seed, cases, round(100 * prevalence), round(100 * auroc)])
        y_N, p_2N, case_N = cohort(rng, cases, prevalence, auroc)
        without_CN = (case_N != np.arange(cases)[:, None]).astype(np.uint16)
        times = [once(y_N), bootstrap_cases(case_N.astype(str), draws, seed), without_CN]
        a, b = (auroc_draws(y_N, p_N, np.concatenate(times)) for p_N in p_2N)
        drawn = a[1 : draws + 1]
        report, gain = interval(a[: draws + 1]), percentiles((a - b)[: draws + 1])
        closed = delong(y_N, p_2N[0], case_N)
        spans = {
            "report": (report.low, report.high),
            "percentiles": np.nanquantile(drawn, [0.025, 0.975]),
            "bca": bca(a[0], drawn, a[draws + 1 :]),
            "delong": (closed.low, closed.high),
            "difference": (gain.low, gain.high),
        }
        for name, (low, high) in spans.items():
            held[name] += bool(low <= (WORSE if name == "difference" else auroc) <= high)
            width[name] += float(min(high, 1.0) - low)
    return {
        "cases": cases, "prevalence": prevalence, "auroc": auroc,
        **{name: count / simulations for name, count in held.items()},
        **{f"{name}_width": round(total / simulations, 4) for name, total in width.items()},
    }  # fmt: skip


def bca(value: float, drawn_B: np.ndarray, without_C: np.ndarray) -> np.ndarray:
    """Return the BCa interval (Efron 1987), with acceleration from left-out cases."""
    drawn_B, without_C = drawn_B[~np.isnan(drawn_B)], without_C[~np.isnan(without_C)]
    below = np.mean(drawn_B < value) + np.mean(drawn_B == value) / 2
    bias = norm.ppf(np.clip(below, 1 / len(drawn_B), 1 - 1 / len(drawn_B)))
    off_C = without_C.mean() - without_C
    spread = (off_C**2).sum() ** 1.5
    skew = (off_C**3).sum() / (6 * spread) if spread else 0.0
    z = bias + norm.ppf([0.025, 0.975])
    return np.quantile(drawn_B, norm.cdf(bias + z / (1 - skew * z)))


def table(result: dict) -> str:
    """Return a row a kind of cohort; values that miss `WANTED` are bold."""
    lines = [["cases", "positive cases, about", "AUROC", *METHODS.values()]]
    for row in result["rows"]:
        cells = [str(row["cases"]), f"{row['cases'] * row['prevalence']:g}", f"{row['auroc']:g}"]
        for name in METHODS:
            inside = WANTED[0] <= row[name] <= WANTED[1]
            mark = "" if inside else "**"
            cells.append(f"{mark}{100 * row[name]:.1f}{mark}")
        lines.append(cells)
    return markdown(lines) + (
        f"\n\nPercent of {result['simulations']} cohorts of {result['draws']} draws each; bold is "
        f"outside {100 * WANTED[0]:g} to {100 * WANTED[1]:g} (a true 95 moves by 1.0 at 500). "
        f"{result['machine']}; {result['date']}, commit {result['commit']}."
    )


if __name__ == "__main__":
    sys.exit(main())
