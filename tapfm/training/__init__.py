"""One run: the step, the two passes, optimizers, callbacks, warm start.

    module.py      LightningModule: training_step is the algorithm
    fit.py         tapfm fit
    callbacks.py   metrics.csv, memory.csv, best weights, resume point
    optim.py       learning rates, parameter groups
    passes.py      these as a run makes them, with the three below
    oom_retry.py   when memory runs out: the same gradient from smaller chunks
    warm_start.py  both, before the first slide; the better begins the run

Read `module.py` first: its training step is the paper's algorithm.
"""
