"""Slide encoders that others have trained: tiles' features to one vector a slide.

    registry.py   the rows: licence, the tile encoder that each needs, its vector; what does not fit
    published.py  files of Madeleine and MOOZY, into the aggregators that state these networks
    shipped.py    TITAN, PRISM and CARE: models that come as code with their weights (transformers)
    opened.py     any of them, as one function of a slide's tiles

`tapfm embed` writes their vectors (tapfm.frozen.slide_embeddings); `model.start_from` takes
the files of Madeleine and MOOZY. Nothing is downloaded.
"""
