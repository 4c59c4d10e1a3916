"""What fits on which card, and whether this installation is sound.

    plan.py       what fits on a GPU, before the run
    doctor.py     tapfm doctor
    footprint.py  what a step holds and computes, counted without a GPU

Nothing here needs a GPU.
"""
