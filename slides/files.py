"""Atomic writing of text, JSON, CSV and bytes; text of any encoding; damaged files as errors."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import os
import re
import socket
import zipfile
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from slides.errors import IndexFileError, SlideError

UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)  # of the GDC
HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"
FULL = re.compile(  # of torch, twice, and of safetensors
    r"PytorchStreamWriter|inline_container|[Nn]o space left|os error \d+|code: \d+|quota"
)
_cleared: set[Path] = set()  # folders that this process has looked through
LONG = 160  # bytes of a name
PLACE = 65_536  # bytes that a fingerprint reads at each of three places
DAMAGE = (  # everything that h5py, numpy and json raise for lost or changed bytes
    OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
)  # fmt: skip


class WriteError(OSError):
    """A file cannot be written, or cannot be extended."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, else remove it.

    Raises:
        WriteError: no permission, no space, or a folder of that name.
    """
    try:
        with _renaming(path) as partial:
            yield partial
    except Exception as error:  # safetensors and torch have their own for a full disk
        if not (isinstance(error, OSError) or FULL.search(str(error))):
            raise
        raise WriteError(unwritten(path, error)) from error


def unwritten(path: Path, error: Exception) -> str:
    """Return the message for a file that could not be written."""
    why = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
    return (
        f"{path}: cannot be written ({why}). Give another path, or fix the cause, and run the same "
        "command again."
    )


@contextmanager
def _renaming(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it once its bytes are on the disk, and then the new name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if (folder := path.parent.absolute()) not in _cleared:
        _cleared.add(folder)
        clear_partials(folder)
    short = path.name  # with what is added, a file's name may have 255 bytes
    if len(os.fsencode(short)) > LONG:
        short = f"{short[: LONG // 4]}.{hashlib.sha256(os.fsencode(short)).hexdigest()[:16]}"
    partial = path.with_name(f".{short}.{HOST}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # as the umask has it; safetensors makes its own 0600
        yield partial
        with suppress(OSError):  # a file system without permissions
            partial.chmod(mode)
        if partial.is_file():
            _sync(partial)
        os.replace(partial, path)
        with suppress(OSError):  # not every file system syncs a folder
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)  # some file systems report a full disk only here
    finally:
        os.close(place)


def clear_partials(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written in a folder."""
    for path in folder.glob(".*.partial"):
        found = re.fullmatch(r"\..+\.(?P<host>[^.]+)\.(?P<process>\d+)\.partial", path.name)
        if found and found["host"] == HOST and not _alive(int(found["process"])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def slide_stem(path: str | Path) -> str:
    """Return a slide's file name without its ending; inner dots (TCGA barcodes) stay."""
    return re.sub(r"(\.ome(?=\.tiff?$))?\.[^.]*$", "", Path(path).name, flags=re.IGNORECASE)


def names_of(slide_id: str, path: str | Path | None = None) -> tuple[str, ...]:
    """Return the names by which files of a slide may be called, the likeliest first.

    They are its slide_id, its file's name without the extension, and both without the UUID that
    the GDC adds to a TCGA barcode: `tapfm labels` drops it, and other programs keep it.
    """
    stem = slide_stem(path or "")
    names = [slide_id, stem, UUID.sub("", slide_id), UUID.sub("", stem)]
    return tuple(dict.fromkeys(filter(None, names)))


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and the folders below it, linked ones too, sorted by path.

    A link to a folder that it lies in is not entered again. Hidden files and folders are left out:
    what macOS (`._name`) and notebooks (`.ipynb_checkpoints`) put beside others.
    """
    found, waiting = [], [(Path(folder), frozenset(Path(folder).resolve().parents))]
    while waiting:
        place, above = waiting.pop()
        here = place.resolve()
        if here in above or not place.is_dir():
            continue
        for path in place.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                waiting.append((path, above | {here}))
            elif path.is_file():
                found.append(path)
    return sorted(found)


def write_whole(path: Path, data: bytes, name: str) -> None:
    """Write `data` to `path` completely, or keep the old file and raise IndexFileError."""
    try:
        with _renaming(path) as partial, open(partial, "wb") as file:
            file.write(data)
    except OSError as error:
        raise IndexFileError(
            f"{name}: {len(data)} bytes could not be written to {path}: "
            f"{error.strerror or error}. Nothing half-written was left. Free some space or give "
            f"another index folder, then run the same command again: finished indexes are kept."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; missing folders are made."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def plain_name(text: str) -> str:
    """Return text as the name of one file or folder: `HER2/neu` is `HER2_neu`."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", text).strip(". ") or "_"


def write_json(path: Path, value: object) -> None:
    """Write JSON; dataclasses become objects, and nan becomes null."""
    write_text(path, json.dumps(_plain(value), indent=1) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV: the header, then one line per row."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def rows_there(path: Path, header: Sequence[str]) -> list[list[str]]:
    """Return the rows of a CSV that will be extended; an empty list if it does not exist.

    Raises:
        WriteError: it has other columns, or cannot be read.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a BOM
            first, *rows = [*csv.reader(file)] or [[*header]]
    except (OSError, ValueError, csv.Error) as error:
        raise WriteError(f"{path}: cannot be read ({error}). Move it away.") from error
    if first != [*header]:
        raise WriteError(
            f"{path}: has the columns {', '.join(first)}, but the new rows have "
            f"{', '.join(header)}. Give another path, or move the file away."
        )
    return [row for row in rows if row]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from replacing a file while its rows are read, joined and written.

    A lock of a process that has ended holds nothing. Its empty file, `.<name>.lock`, stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def join_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows into a CSV, replacing old rows that have the same first cell.

    Several processes may do so at once, and none loses a row of another.

    Raises:
        WriteError: the file there has other columns, or it cannot be written.
    """
    rows = list(rows)
    names = {row[0] for row in rows}
    try:
        with locked(path):
            older = [row for row in rows_there(path, header) if row[0] not in names]
            write_csv(path, header, older + rows)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: cannot be locked ({error}). Give another path.") from error


def decode_text(data: bytes) -> str:
    """Return the text of a file in UTF-8, UTF-16 or Windows-1252, plain or packed by gzip.

    Raises:
        ValueError: what the file is instead, and what to do.
    """
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"a broken gzip ({error}). Download it again.") from error
    if data[257:262] == b"ustar":
        raise ValueError("a tar archive. Unpack it (tar -xf), and give the table in it.")
    if data[:4] == b"PK\x03\x04":
        raise ValueError(
            "a spreadsheet (.xlsx) or a zip archive. Save it as text (.csv), or unpack it."
        )
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer, not the file. Run `git lfs pull` where it lies.")
    if re.match(rb"\s*<(!doctype|html)", data, re.I):
        raise ValueError("a web page, not a table. Download the file that it links to.")
    two = data.startswith((BOM_UTF16_LE, BOM_UTF16_BE))  # Excel's "Unicode text"
    for encoding in ("utf-16",) if two else ("utf-8-sig", "cp1252"):
        with suppress(UnicodeDecodeError):
            if "\0" not in (text := data.decode(encoding)):
                return text
    raise ValueError("no text of a known encoding. Save it as UTF-8.")


def file_fingerprint(path: Path) -> str:
    """Return a fingerprint that changes when another file takes this one's place.

    It is the file's size and a hash of its beginning, middle and end, so a copy has the same one.
    It takes milliseconds; an unchanged file is not read again.
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
    """Turn any exception that a damaged file causes in its reader into `fault(reason)`."""
    try:
        yield
    except SlideError:
        raise
    except DAMAGE as error:
        raise fault(f"{type(error).__name__}: {error}") from error


def _plain(value: object) -> object:
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
