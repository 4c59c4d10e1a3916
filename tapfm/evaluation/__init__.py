"""Runs against each other: test, study, probe, drift.

    evaluate.py     tapfm test
    study.py        tapfm study: folds, seeds and strategies as cells that resume
    probe.py        tapfm probe: which blocks a cohort's labels pull at
    drift.py        how far features have moved, by linear CKA
    study_table.py  its table

Reads runs; trains no encoder.
"""
