"""tapfm adapts pathology foundation models to slide-level questions, end to end, on one GPU."""

__version__ = "0.1.0"
