"""Encoder and aggregator as one model: built, saved, loaded.

    aggregators/        one file each
    layers/             what aggregators share
    model.py            the model, and the config that builds it again
    plain_encoder.py    a saved model's encoder as plain timm weights
    start.py            an aggregator that starts from another run's
    feature_encoder.py  what stands in the encoder's place in a model on features

Knows no slide file and no training run.
"""
