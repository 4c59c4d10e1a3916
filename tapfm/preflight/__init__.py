"""What is told before a run is begun.

check.py  `tapfm check`: table, slides, splits, leaks, disk, card and time on one page
"""
