"""Room for the tile cache: whose cache is in use, and which goes when the disk is to be kept free.

A slide's cache is a folder. Whoever reads it holds a shared lock on that folder; whoever puts one
in its place, or removes one, holds the lock on the folder above while it does. Locks belong to open
files, so the system lets go of them when a process ends in whatever way.

Price: a system call to hold, and a walk over the cache's files to make room.
Condition: `flock`, so Linux or macOS, and a disk that is not NFS before version 4.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path


class CacheLock:
    """Keeps a slide's cache from being removed until it is closed, and marks it as just used.

    Raises:
        FileNotFoundError: there is no such cache, or no more.
    """

    def __init__(self, path: Path):
        self._descriptor = None
        while self._descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_ino == os.stat(path).st_ino:  # not removed just before
                    self._descriptor, descriptor = descriptor, None
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        with contextlib.suppress(OSError):  # a cache that may only be read is never removed
            os.utime(path)

    def close(self) -> None:
        """Let go."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = close


def lock_if_possible(path: Path) -> CacheLock | None:
    """A hold; None on a disk that knows no locks, where nothing is removed either.

    Raises:
        FileNotFoundError: there is no such cache, or no more.
    """
    try:
        return CacheLock(path)
    except FileNotFoundError:
        raise
    except OSError:
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The only one to change which caches a folder has; waits for its turn."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put_in_place(made: Path, path: Path) -> None:
    """Rename a whole cache to its name; one that was there goes."""
    outdated = scratch(path, ".outdated")
    with locked(path.parent):
        if path.exists():  # a folder that is not empty cannot be replaced
            path.rename(outdated)
        made.rename(path)
    shutil.rmtree(outdated, ignore_errors=True)


def make_room(cache_dir: Path, budget: int, keep: Collection[Path] = ()) -> None:
    """Remove caches other than those to keep until they take at most `budget` bytes.

    The longest unused goes first. Those in use stay, so they may take more than that in the end.
    """
    there = set(Path(cache_dir).glob("*/*.zarr")) - set(keep)
    caches = {path: _size_bytes(path) for path in there}
    total = sum(caches.values())
    for path in sorted(caches, key=_last_used):
        if total <= budget:
            break
        if _remove(path):
            total -= caches[path]


def scratch(path: Path, what: str = "") -> Path:
    """A name beside a slide's cache that is this process's own."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{what}")


def remove_leftovers(path: Path) -> None:
    """Delete what killed runs of this machine left half-written: it can be many gigabytes."""
    mine = f".{path.name}.{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{mine}*"):
        pid = leftover.name.removeprefix(mine).split(".")[0]
        try:
            os.kill(int(pid), 0)  # sends nothing: asks whether the process lives
        except (ProcessLookupError, ValueError):
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            pass  # it lives, and is another user's


def _remove(path: Path) -> bool:
    """Remove a cache that nobody reads; whether it is gone."""
    aside = scratch(path, ".outdated")
    try:
        with locked(path.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.rename(aside)
            finally:
                os.close(descriptor)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    except OSError:  # not ours to remove
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size_bytes(path: Path) -> int:
    total = 0
    for each in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += each.stat().st_size
    return total
