"""Frozen features: written to disk, kept in memory, and slide models fitted on them.

    features.py         `tapfm features`: an encoder's features in the files that other tools read
    other_formats.py    the same features as CLAM and STAMP lay them out
    slide_embeddings.py `tapfm embed`: a vector a slide by a published slide encoder
    frozen_slide.py     the record of a slide on frozen features; standardisation
    fitter.py           the one loop that trains slide models on frozen features
    baselines.py        the frozen rows of a report: mean-pool MLP, gated attention, RGB statistics
    linear_probe.py     the linear probe, by the task's own loss: convex, solved by L-BFGS
    warm_heads.py       the heads of the warm start: a solved linear probe, trained attention
    augmenter.py        `tapfm histaug`: the network of that bag transform, fitted to an encoder
    cached_features.py  slides as a run's encoder sees them now

Nothing here steps an encoder's optimizer.
"""
