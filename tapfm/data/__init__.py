"""Slides to bags: the data module and the batch.

    datamodule.py      LightningDataModule: slides or features to bags
    streamed.py        bags of slides in a row, read ahead
    lookahead.py       training slides with those that fit the same chunk
    skipped.py         the slides that a run leaves out
    feature_source.py  bags of features in place of slides
    feature_files.py   readers of feature files: tapfm, TRIDENT, CLAM, STAMP
    bag.py             the batch, where data and module meet

The only room where `slides` and a training run meet; `bag.py` knows neither.
"""
