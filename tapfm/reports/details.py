"""Details of a row of the report: thresholds, calibration, DeLong, and groups of slides.

`row_details` returns them as the values of metrics_<split>.json, where `reports.report` lists the
keys; `sections` as Markdown. Thresholds and rescaled probabilities come from the row's validation
predictions, and are left out without them. A group is a site or a stain of the cohort's table (the
index does not know the scanner), `mixed` if a case's slides differ in it; one with fewer than
`FEW_CASES` cases of a class is shown by its counts alone. Every macro names the labels it averages.

Shapes: N slides, K labels, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from tapfm.reports.plain_table import markdown, span
from tapfm.stats import calibration
from tapfm.stats.bootstrap import interval, mean_of, with_point
from tapfm.stats.delong import delong, delong_difference
from tapfm.stats.metrics import MACRO, auroc_draws
from tapfm.stats.thresholds import FIGURES, RULES, choose_threshold, figures_at

FEW_CASES = 10  # of either class; below it no interval is reliable
Validation = tuple[np.ndarray, np.ndarray]
"""y_NK and p_NK of the validation split."""


def row_details(
    labels: Sequence[str],
    y_NK: np.ndarray,
    p_NK: np.ndarray,
    cases_N: Sequence[str],
    *,
    validation: Validation | None = None,
    reference_NK: np.ndarray | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, dict | None]:
    """Return `delong`, `operating_points`, `calibration` and `subgroups` of one row.

    Args:
        labels: K names.
        y_NK: 0, 1, or nan where unknown.
        p_NK: probabilities.
        cases_N: each slide's case.
        validation: labels and probabilities of the validation split.
        reference_NK: probabilities of the row it is compared with, if any.
        groups: kind, such as site, to each slide's group; blank if unknown.
        draws: bootstrap draws.
        seed: seed of the draws.
    """
    times_BN = with_point(cases_N, draws, seed)
    return {
        "delong": _delong(labels, y_NK, p_NK, cases_N, reference_NK),
        "operating_points": validation
        and _operating_points(labels, y_NK, p_NK, validation, times_BN),
        "calibration": _calibration(labels, y_NK, p_NK, validation, times_BN),
        "subgroups": {
            kind: _groups(labels, y_NK, p_NK, np.asarray(cases_N), np.asarray(of_N), draws, seed)
            for kind, of_N in (groups or {}).items()
            if len(set(of_N) - {""}) > 1
        },
    }


def _delong(labels, y_NK, p_NK, cases_N, reference_NK) -> dict[str, dict]:
    found = {}
    for k, label in enumerate(labels):
        own = delong(y_NK[:, k], p_NK[:, k], cases_N)
        found[label] = {
            "value": own.value, "se": own.se, "low": own.low, "high": own.high,
            **_cases(y_NK[:, k], cases_N), "difference": None, "se_difference": None, "p": None,
        }  # fmt: skip
        if reference_NK is not None:
            gain = delong_difference(y_NK[:, k], p_NK[:, k], reference_NK[:, k], cases_N)
            found[label] |= {"difference": gain.value, "se_difference": gain.se, "p": gain.p}
    return found


def _operating_points(labels, y_NK, p_NK, validation: Validation, times_BN) -> dict[str, dict]:
    found: dict[str, dict] = {label: {} for label in [*labels, MACRO]}
    for rule in RULES:
        drawn = {}
        for k, label in enumerate(labels):
            threshold = choose_threshold(validation[0][:, k], validation[1][:, k], rule)
            figures = figures_at(threshold, y_NK[:, k], p_NK[:, k], times_BN)
            found[label][rule] = {"threshold": threshold, "chosen_on": "val"} | {
                name: interval(value_B) for name, value_B in figures.items()
            }
            if not math.isnan(figures[FIGURES[0]][0]):
                drawn[label] = figures
        found[MACRO][rule] = {"threshold": None, "chosen_on": "val"} | {
            name: interval(mean_of([each[name] for each in drawn.values()], len(times_BN)))
            for name in FIGURES
        }
        found[MACRO]["labels"] = list(drawn)
    return found


def _calibration(labels, y_NK, p_NK, validation: Validation | None, times_BN) -> dict[str, dict]:
    fits: dict[str, Callable | None] = {
        "raw": None, "temperature": calibration.fit_temperature,
        "platt": calibration.fit_platt,
    }  # fmt: skip
    found: dict[str, dict] = {label: {} for label in [*labels, MACRO]}
    for name, fit in fits.items():
        drawn = {}
        for k, label in enumerate(labels):
            y_N, scaling = y_NK[:, k], calibration.Scaling()
            if fit is not None:
                scaling = validation and fit(validation[0][:, k], validation[1][:, k])
            if scaling is None or np.isnan(y_N).all():
                found[label][name] = None
                continue
            p_N = scaling(p_NK[:, k])
            bins, off_B = calibration.reliability(y_N, p_N), calibration.brier(y_N, p_N, times_BN)
            drawn[label] = calibration.ece(bins), off_B
            found[label][name] = {
                **asdict(scaling), "ece": calibration.ece(bins), "brier": interval(off_B),
                "bins": [asdict(each) for each in bins],
            }  # fmt: skip
        if not drawn:
            found[MACRO][name] = None
            continue
        gaps, off_KB = zip(*drawn.values(), strict=True)
        found[MACRO][name] = {
            "labels": list(drawn),
            "ece": float(np.mean(gaps)),
            "brier": interval(mean_of(off_KB, len(times_BN))),
        }
    return found


def _groups(labels, y_NK, p_NK, cases_N, of_N, draws: int, seed: int) -> dict[str, dict]:
    found = {}
    for name in sorted(set(of_N)):
        own_N = of_N == name
        times_BN, each = with_point(cases_N[own_N], draws, seed), {}
        for k, label in enumerate(labels):
            y_N, p_N = y_NK[own_N, k], p_NK[own_N, k]
            counts = _cases(y_N, cases_N[own_N])
            enough = min(counts.values()) >= FEW_CASES
            drawn = interval(auroc_draws(y_N, p_N, times_BN)) if enough else None
            each[label] = {**counts, "known": int((~np.isnan(y_N)).sum()), "auroc": drawn}
        counts = {"slides": int(own_N.sum()), "cases": len(set(cases_N[own_N]))}
        found[str(name) or "not stated"] = {**counts, "labels": each}
    return found


def _cases(y_N: np.ndarray, cases_N: Sequence[str]) -> dict[str, int]:
    cases_N = np.asarray(cases_N)
    return {
        f"{word}_cases": len(set(cases_N[y_N == value]))
        for word, value in (("positive", 1), ("negative", 0))
    }


def sections(labels: Sequence[str], rows: Mapping[str, Mapping]) -> str:
    """Return the details of all rows as Markdown, by title."""
    parts = [_calibration_section(labels, rows), _delong_section(labels, rows)]
    if any(found["operating_points"] for found in rows.values()):
        parts.insert(0, _threshold_section(labels, rows))
    for kind in dict.fromkeys(kind for found in rows.values() for kind in found["subgroups"]):
        parts.append(_group_section(kind, rows))
    return "\n\n".join(parts) + "\n"


def _threshold_section(labels: Sequence[str], rows: Mapping[str, Mapping]) -> str:
    lines = [
        [label if first else "", title, _number(point["threshold"]),
         *(span(point[name], undefined="") for name in FIGURES)]
        for label in [MACRO, *labels]
        for first, (title, point) in _numbered(
            (title, found["operating_points"][label]["balanced"])
            for title, found in rows.items() if found["operating_points"]
        )
    ]  # fmt: skip
    head = ["label", "model", "threshold", "balanced accuracy", "sensitivity", "specificity",
            "F1"]  # fmt: skip
    return (
        "## Yes or no\n\nAt the threshold of the highest balanced accuracy on the validation "
        "split, frozen; metrics_*.json has those of the highest F1 and of 90 % specificity.\n\n"
        + markdown([head, *lines])
    )


def _calibration_section(labels: Sequence[str], rows: Mapping[str, Mapping]) -> str:
    lines = [
        [label if first else "", title]
        + [_number(each and each["ece"]) for each in (one["raw"], one["temperature"], one["platt"])]
        + [span(one["raw"] and one["raw"]["brier"], undefined="")]
        + [span((one["platt"] or one["raw"] or {}).get("brier"), undefined="")]
        for label in [MACRO, *labels]
        for first, (title, one) in _numbered(
            (title, found["calibration"][label]) for title, found in rows.items()
        )
    ]
    head = ["label", "model", "ECE", "with temperature", "with Platt's", "Brier",
            "Brier with Platt's"]  # fmt: skip
    return (
        "## Calibration\n\nExpected calibration error in 10 bins of equal width, as predicted and "
        "after a temperature or Platt's scaling fitted on validation. The loss makes "
        "both classes weigh the same, so raw probabilities are not frequencies.\n\n"
        + markdown([head, *lines])
    )


def _delong_section(labels: Sequence[str], rows: Mapping[str, Mapping]) -> str:
    lines = [
        [label if first else "", title, f"{one['positive_cases']}/{one['negative_cases']}",
         f"{_number(one['value'])} [{_number(one['low'])}, {_number(one['high'])}]",
         _number(one["difference"], "+"), _number(one["p"], ".2g")]
        for label in labels
        for first, (title, one) in _numbered(
            (title, found["delong"][label]) for title, found in rows.items()
        )
    ]  # fmt: skip
    head = ["label", "model", "cases +/-", "AUROC [95 %]", "minus *", "p"]
    return (
        "## DeLong\n\nClosed form, slides of a case taken together; paired test against the best "
        "frozen row. p is of one comparison, not of all that are here.\n\n"
        + markdown([head, *lines])
    )


def _group_section(kind: str, rows: Mapping[str, Mapping]) -> str:
    groups = next(iter(rows.values()))["subgroups"][kind]
    lines = [
        [name if first else "", label, f"{one['positive_cases']}/{one['negative_cases']}"]
        + [span(found["subgroups"][kind][name]["labels"][label]["auroc"], undefined="")
           for found in rows.values()]
        for name, group in groups.items()
        for first, (label, one) in _numbered(group["labels"].items())
    ]  # fmt: skip
    return (
        f"## By {kind}\n\nAUROC [95 %] where a group has {FEW_CASES} cases of either class; "
        "else its counts alone.\n\n" + markdown([[kind, "label", "cases +/-", *rows], *lines])
    )


def _numbered(pairs):
    """Yield each pair with whether it is the first."""
    return ((number == 0, pair) for number, pair in enumerate(pairs))


def _number(value: float | None, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return ""
    return format(value, sign if sign.endswith("g") else f"{sign}.3f")
