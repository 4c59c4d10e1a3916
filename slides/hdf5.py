"""Opens HDF5 files that may be damaged, and writes on disks that may be full.

Texts of varying length lie in global heaps: objects in a row, each with its size, the free rest
with number 0. Where a few zeros stand for an object's header (a lost sector), the HDF5 library
takes it for a free rest of no size and stays there for ever, in C, where nothing interrupts it. So
heaps are walked here first. What refers to a text repeats its length; of a damaged one, up to 4 GB,
the library allocates all before it looks. So no length may be above the file's.

A file that the library could not finish, because the disk is full, crashes the process when its
object is collected (h5py 3.16, HDF5 2.0.0). So files are made in memory and then written.

Condition: of files above `WHOLE` bytes only both ends are looked at; h5py puts heaps there.
Source: HDF5 File Format Specification 3.0, III.E, Global Heap; IV.B, a reference to one.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slides.files import replacing

if TYPE_CHECKING:
    import h5py

WHOLE = 8 << 20  # bytes
HEAP = b"GCOL\x01\0\0\0"  # version 1, three bytes that are not used
OBJECT = struct.Struct("<HHIQ")  # number, references, not used, bytes
HEADER = len(HEAP) + 8  # with the heap's size
REFERENCE = struct.Struct("<IQI")  # a text's length, its heap's address, its number there


def open_h5(path: str | Path) -> h5py.File:
    """Return an HDF5 file, open to be read.

    Raises:
        OSError: it is damaged, or no HDF5 file.
    """
    import h5py

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        parts = {0: file.read(WHOLE if size <= WHOLE else WHOLE // 2)}
        if size > WHOLE:
            parts[file.seek(size - WHOLE // 2)] = file.read()
    heaps = {start + at: texts for start, part in parts.items() for at, texts in heaps_of(part)}
    for part in parts.values():
        check_lengths(part, heaps, size)
    return h5py.File(path, "r")


@contextmanager
def writing_h5(path: Path) -> Iterator[h5py.File]:
    """Yield a new HDF5 file, which takes its name once all of it is on the disk.

    Price: the file's bytes in memory.

    Raises:
        WriteError: no permission, no space, or a folder of that name.
    """
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        yield file
    with replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


def heaps_of(data: bytes) -> Iterator[tuple[int, set[int]]]:
    """Yield where each global heap begins in bytes of a file, and the numbers of its texts.

    Raises:
        OSError: an object of it leads nowhere.
    """
    start = data.find(HEAP)
    while start >= 0:
        texts, at = set(), start + HEADER
        end = start + int.from_bytes(data[start + len(HEAP) : at], "little")
        while at + OBJECT.size <= min(end, len(data)):
            number, _, _, length = OBJECT.unpack_from(data, at)
            if number == 0 and length < OBJECT.size:
                raise OSError(f"its texts are damaged at byte {at - start} of a heap")
            texts.add(number)
            at += length if number == 0 else OBJECT.size + (length + 7) // 8 * 8
        yield start, texts - {0}
        start = data.find(HEAP, start + 1)


def check_lengths(data: bytes, heaps: Mapping[int, set[int]], size: int) -> None:
    """Refuse bytes of a file of `size` bytes in which a text of its heaps is said to be longer.

    Raises:
        OSError: there is one.
    """
    for heap, texts in heaps.items():
        address = heap.to_bytes(8, "little")
        at = data.find(address, 4)
        while 0 <= at <= len(data) - REFERENCE.size + 4:
            length, _, number = REFERENCE.unpack_from(data, at - 4)
            if number in texts and length > size:
                raise OSError(f"it names a text of {length} bytes, and has {size} itself")
            at = data.find(address, at + 1)
