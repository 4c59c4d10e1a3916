"""Slides to bags: the data module and the batch.

    datamodule.py  LightningDataModule: slides to bags
    bag.py         the batch, where data and module meet

The only room where `slides` and a training run meet; `bag.py` knows neither.
"""
