"""The recipe: what stands around the training step so that adapting does not lose to frozen.

    best_weights.py    the weights of the best epoch, in a file
    warm_start.py      the slide model is fitted on frozen features before the first slide
    frozen_means.py    mean frozen features of the training slides, for regularisers
    weight_average.py  a running mean of the encoder's learned weights
    pull_to_start.py   the encoder's weights are drawn toward the pretrained ones (L2-SP)
    solved_head.py     the head is solved anew at each epoch's start
    interpolation.py   how much of the encoder's change is kept: chosen on validation
    saved_model.py     the chosen model and the frozen one, saved

`tapfm.training.fit` puts the parts together.
"""
