"""What is told before a run is begun.

check.py        `tapfm check`: table, slides, splits, leaks, disk, card and time on one page
cohort_plan.py  `tapfm plan --config`: hours of a run on its cohort, on one card and many
gains.py        what adapting gained where it was measured, by training patients
"""
