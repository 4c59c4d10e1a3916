"""Metrics with confidence intervals, computed from arrays.

    bootstrap.py    draws of whole cases, and the intervals they give
    metrics.py      AUROC, AUPRC, paired differences
    delong.py       the variance of an AUROC in closed form, by case
    confusions.py   accuracy, recall, F1 from counts, in the same draws
    thresholds.py   decision thresholds: chosen on validation, then fixed
    calibration.py  ECE, reliability, temperature and Platt scaling
    outcomes.py     regression and survival: R2, correlations, concordance

Knows no file and no model.
"""
