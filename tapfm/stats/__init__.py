"""Figures with intervals: arrays in, numbers out.

    bootstrap.py    case-clustered draws and the intervals they give
    metrics.py      AUROC, AUPRC, paired differences
    delong.py       the variance of an AUROC in closed form, by case
    confusions.py   accuracy, recall, F1 from counts, in the same draws
    thresholds.py   yes or no: chosen on validation, frozen
    calibration.py  ECE, reliability, temperature and Platt's scaling
    outcomes.py     of values and times: R2, correlations, concordance

Knows no file and no model.
"""
