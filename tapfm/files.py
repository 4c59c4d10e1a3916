"""Files that are whole or not there; the writing itself is `slides.files`."""

from slides.files import replacing

__all__ = ["replacing"]
