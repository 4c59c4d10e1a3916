"""`model.steps.head_start`: the slide model is fitted to frozen features before the encoder learns.

    callback.py    both, before the first slide; the better begins the run

A head that knows nothing sends gradients that spoil the features before they can serve it.
`head_first` lets it learn alone inside the run, which pays the encoder for every look.

The slides are those of the first epochs, augmented as they will be, and what is chosen is chosen on
validation by the loss: a head that a change of colour upsets, or that is too sure of what it was
fitted to, sends no useful gradient. The features are standardised by these slides from here on,
which is what lets a young gate learn: as they come, what all tiles share is many times what tells
one from another. The outcome is the run's first candidate for its best weights: end to end begins
where frozen ends, and is never saved below it.

Price: as many tiles encoded as in an epoch of training, and seconds to minutes after it; 6 kB of
    host memory a tile of a ViT-g: 25 GB for four views of 500 slides of 2,048 tiles, which several
    processes share.
Source: Kumar et al. 2022 (LP-FT, arXiv 2202.10054).
Differs: what is probed is the slide's embedding, tiles weighed as the fresh aggregator does, and
    behind its LayerNorm; and where a gate taught on tiles does better, that is taken.
"""
