"""Opens HDF5 files that may be damaged, without the library's endless loop.

Texts of varying length lie in global heaps: objects in a row, each with its size, the free rest
with number 0. Where a few zeros stand for an object's header (a lost sector), the HDF5 library
takes it for a free rest of no size and stays there for ever, in C, where nothing interrupts it. So
heaps are walked here first.

Condition: of files above `WHOLE` bytes only both ends are looked at; h5py puts heaps there.
Source: HDF5 File Format Specification 3.0, III.E, Global Heap.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py

WHOLE = 8 << 20  # bytes
HEAP = b"GCOL\x01\0\0\0"  # version 1, three bytes that are not used
OBJECT = struct.Struct("<HHIQ")  # number, references, not used, bytes
HEADER = len(HEAP) + 8  # with the heap's size


def open_h5(path: str | Path) -> h5py.File:
    """Return an HDF5 file, open to be read.

    Raises:
        OSError: it is damaged, or no HDF5 file.
    """
    import h5py

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        parts = [file.read(WHOLE if size <= WHOLE else WHOLE // 2)]
        if size > WHOLE:
            file.seek(size - WHOLE // 2)
            parts.append(file.read())
    for part in parts:
        check_heaps(part)
    return h5py.File(path, "r")


def check_heaps(data: bytes) -> None:
    """Refuse bytes of a file in which a global heap has an object that leads nowhere.

    Raises:
        OSError: it has.
    """
    start = data.find(HEAP)
    while start >= 0:
        at = start + HEADER
        end = start + int.from_bytes(data[start + len(HEAP) : at], "little")
        while at + OBJECT.size <= min(end, len(data)):
            number, _, _, length = OBJECT.unpack_from(data, at)
            if number == 0 and length < OBJECT.size:
                raise OSError(f"its texts are damaged at byte {at - start} of a heap")
            at += length if number == 0 else OBJECT.size + (length + 7) // 8 * 8
        start = data.find(HEAP, start + 1)
