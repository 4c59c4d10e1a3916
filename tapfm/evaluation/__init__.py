"""Runs against each other: test, study, probe, drift.

    evaluate.py     tapfm test
    study.py        tapfm study: folds, seeds and strategies as cells that resume
    probe.py        tapfm probe: which blocks a cohort's labels pull at
    drift.py        how far features have moved, by linear CKA
    study_table.py  its table
    probe_figure.py  what a probe found of each part, and its picture
    study_cells.py   what a study is to run, and one cell of it

Reads runs; trains no encoder.
"""
