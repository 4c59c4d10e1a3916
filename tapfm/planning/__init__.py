"""Plans which training setups fit a GPU, and checks the installation.

    plan.py         tapfm plan: the setups that fit a GPU, before the run
    gpu_defaults.py what a config leaves open: on a GPU, as the plan says
    speed.py        seconds of a tile and an update on each card
    epoch.py        hours of a run and efficiency of its epochs, on one card and many
    cards.py        memory and assumed speed of each card
    whole_run.py    hours and disk of a whole run, from a few of its slides
    doctor.py       tapfm doctor: versions, slide reading, a model's weights
    footprint.py    memory and work of one training step, counted without a GPU

Nothing here needs a GPU.
"""
