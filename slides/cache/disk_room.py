"""Frees disk space for the tile cache without removing caches that are in use.

A slide's cache is a folder. A reader has a shared lock on it; a process that adds or removes a
cache locks the parent folder exclusively. Locks belong to open files, so the system releases them
when a process ends in any way.

Price: a system call per lock, and a walk over the cache's files to make room.
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
    """A shared lock that keeps a slide's cache from being removed; marks it as just used.

    Raises:
        FileNotFoundError: the cache does not exist.
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
        with contextlib.suppress(OSError):  # a read-only cache is never removed
            os.utime(path)

    def close(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = close


def lock_if_possible(path: Path) -> CacheLock | None:
    """Return a lock; None on a disk without locks, where nothing is removed either."""
    try:
        return CacheLock(path)
    except FileNotFoundError:
        raise
    except OSError:
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the exclusive right to change which caches a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put_in_place(made: Path, path: Path) -> None:
    """Rename a finished cache to its final name, replacing an older one."""
    outdated = scratch(path, ".outdated")
    with locked(path.parent):
        if path.exists():  # a folder that is not empty cannot be replaced
            path.rename(outdated)
        made.rename(path)
    shutil.rmtree(outdated, ignore_errors=True)


def make_room(cache_dir: Path, budget: int, keep: Collection[Path] = ()) -> None:
    """Remove caches other than `keep` until they take at most `budget` bytes.

    The least recently used goes first. Caches in use stay, so the total may exceed the budget.
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
    """Return a temporary path beside a slide's cache, unique to this process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{what}")


def remove_leftovers(path: Path) -> None:
    """Delete half-written caches of this machine's killed runs: they can be large."""
    mine = f".{path.name}.{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{mine}*"):
        pid = leftover.name.removeprefix(mine).split(".")[0]
        try:
            os.kill(int(pid), 0)  # signal 0 only tests whether the process lives
        except (ProcessLookupError, ValueError):
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            pass  # it is alive and belongs to another user


def _remove(path: Path) -> bool:
    """Remove a cache unless it is in use; return whether it is gone."""
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
    except OSError:  # no permission to remove it
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
