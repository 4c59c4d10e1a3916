"""Encoder and aggregator as one model: built, saved, loaded. `aggregators` has one file each.

    model.py  the model, and the config that builds it again

Knows no slide file and no training run.
"""
