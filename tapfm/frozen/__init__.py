"""What the frozen encoder gives: features on disk, and slide models fitted to them.

    features.py         tapfm features: what other tools read, and the frozen baselines
    baselines.py        frozen mean-pool MLP and gated attention, RGB statistics
    linear_probe.py     frozen linear probe, by the task's own loss
    cached_features.py  slides as the frozen encoder sees them; standardising
    solved_head.py      the head as a linear probe of slides' embeddings
    taught_head.py      gate and head trained on the remembered features

Knows no optimizer step of the encoder.
"""
