"""Progress of a long job: a bar in a terminal, and in a log file a plain line every half minute.

A bar's frames follow each other on one line; in the log of a job that line is as long as the job.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 30  # seconds between two lines; a job that is done sooner has none


class Lines:
    """A file that gets each frame of a bar as a line of its own."""

    def __init__(self, file: TextIO):
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        """Write a frame as a line; what only moves or clears, or says no more, is left out."""
        count = text.strip().partition("[")[0]
        if count and count != self.last:
            self.last = count
            self.file.write(f"{text.strip()}\n")

    def flush(self) -> None:
        """Flush the file below."""
        self.file.flush()

    def isatty(self) -> bool:
        """Return False: this is no terminal."""
        return False


def progress_bar(
    steps: Iterable[Any] | None = None,
    desc: str | None = None,
    total: int | None = None,
    **how: Any,
) -> tqdm:
    """Return tqdm's bar over steps, which tells its progress as this output can show it.

    Args:
        steps: to go through, or None: then `update` counts them.
        desc: in front.
        total: number of steps, where `steps` has no length.
        how: further arguments of tqdm, such as `unit`.
    """
    if not sys.stderr.isatty():
        plain = {"file": Lines(sys.stderr), "mininterval": EVERY, "delay": EVERY, "miniters": 1}
        how = {**plain, "ncols": 0, **how}
    return tqdm(steps, desc, total, **how)
