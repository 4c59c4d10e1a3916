"""`tapfm fit-tiles`: training on labelled tiles.

    data.py        LightningDataModule of labelled tiles
    batch.py       some of them: where data and module meet
    module.py      LightningModule: a step is a batch
    prototypes.py  HiAdapter's loss
    baselines.py   linear probe on frozen features and on RGB statistics
    metrics.py     all figures of a row, with intervals
    report.py      its table and what stands behind it
    fit.py         the verb

Encoders and strategies are those of slides.
"""
