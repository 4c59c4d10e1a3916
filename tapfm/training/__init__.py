"""One training run on slides: the step, the two passes, what is minimised, what is written.

    module.py       LightningModule: the training step is the paper's algorithm
    alternating.py  the two optimizers that take turns; shared with training on labelled tiles
    passes.py       pass 1 and pass 2 of a slide: frozen blocks once, out of memory, few tiles
    objective.py    between the passes: bag transforms, task loss, regularisers
    optim.py        learning rates over a run
    oom_retry.py    when memory runs out: the same gradient from smaller chunks
    callbacks.py    metrics.csv, memory.csv, resume point
    stopping.py     a run that is asked to stop: saves, says so, and its exit code
    encode_once.py  a frozen encoder's features, made before the first epoch
    fit.py          `tapfm fit`: config to run folder
    begun.py        what a run was begun with, and by; whether it may be continued
    announce.py     what a run tells: before it trains, then how far it is (status.json)
    arguments.py    what is wrong with its arguments, all at once
    old_keys.py     keys of version 0.1, and of runs that were begun with them

Read `module.py` first.
"""
