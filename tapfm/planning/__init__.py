"""Plans which training setups fit a GPU, and checks the installation.

    plan.py       tapfm plan: the setups that fit a GPU, before the run
    cards.py      memory and assumed speed of each card
    doctor.py     tapfm doctor: versions, slide reading, a model's weights
    whole_run.py  hours and disk of a whole run, from a few of its slides
    footprint.py  memory and work of one training step, counted without a GPU

Nothing here needs a GPU.
"""
