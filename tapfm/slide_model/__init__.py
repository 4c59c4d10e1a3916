"""Encoder + aggregator + head: built, saved, loaded.

    aggregators.py  tile weights and slide logits
    model.py        encoder and aggregator together; saved and loaded

Knows no slide file and no training run.
"""
