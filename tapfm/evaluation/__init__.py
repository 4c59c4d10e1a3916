"""Comparison of runs: test, study, gradient probe and feature drift.

    evaluate.py        tapfm test: all runs of a cohort beside frozen baselines
    predicted_rows.py  its rows: runs, their frozen controls, frozen baselines
    study.py           tapfm study: folds, seeds and strategies as resumable cells
    study_cells.py     the settings of a study, and of one cell
    study_table.py     a study's table, intervals and differences
    probe.py           tapfm probe: how strongly a cohort's labels act on each block
    probe_figure.py    a probe's result for a part of the encoder, and its figure
    robustness.py      what adapting did to robustness: CKA, stain draws, RI and MaRI
    site_leakage.py    how well slide embeddings tell sites, before and after
    continued.py       tapfm fit --continue-from: replay, and what was forgotten
    drift.py           how far features have moved, by linear CKA

Reads runs; trains no encoder, but for the probe's own small fit.
"""
