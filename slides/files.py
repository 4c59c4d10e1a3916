"""Files that are whole or not there, and what a damaged one makes of its reader."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from slides.errors import IndexFileError, SlideError

PLACE = 65_536  # bytes
DAMAGE = (  # what h5py, numpy and json raise, between them, where bytes are lost or changed
    OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
)  # fmt: skip


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it if the block ends well, removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, name: str) -> None:
    """All of `data` under `path`, or what was there before and an IndexFileError."""
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # some file systems tell of a full disk only here
    except OSError as error:
        raise IndexFileError(
            f"{name}: {len(data)} bytes could not be written to {path}: "
            f"{error.strerror or error}. Nothing half-written was left. Free some space or name "
            f"another index folder, then run the same command again: what is indexed is kept."
        ) from error


def fingerprint(path: Path) -> str:
    """By which a file that took another's place is noticed; a copy has the same.

    Its size, and a hash of its beginning, middle and end: a few milliseconds, not minutes; a file
    that has not changed since is not read again.
    """
    stat = path.stat()
    return _fingerprint(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _fingerprint(path: Path, size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in (0, size // 2, max(size - PLACE, 0)):
            file.seek(start)
            digest.update(file.read(PLACE))
    return f"{size}:{digest.hexdigest()[:16]}"


@contextmanager
def damage_as(fault: Callable[[str], SlideError]) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes the fault, told what it was."""
    try:
        yield
    except SlideError:
        raise
    except DAMAGE as error:
        raise fault(f"{type(error).__name__}: {error}") from error
