"""Checks a GDC download against its manifest, and picks the diagnostic slides.

    id  filename  md5  size  state        the manifest, tab-separated; a row a file
    <folder>/<id>/<filename>              where gdc-client puts them; anywhere below will do
    <folder>/verified.tsv                 md5 of every file that was hashed, with its size and time

Each file's size is compared first, then its md5. A line is added to `verified.tsv` as soon as a
file is hashed, so an interrupted check continues where it stopped, and a file is hashed again only
if its size or its time of change differs.

Price: one pass over the bytes, at the disk's speed (md5 alone reaches about 600 MB/s).
Source: the GDC's manifest format.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slides.cohort.tcga_names import CPTAC, SlideName, parse_slide
from slides.errors import DownloadError, all_faults
from slides.files import files_below

COLUMNS = ("id", "filename", "md5", "size")
SLIDE_ENDINGS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".dcm")
BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class ManifestFile:
    """A row of a manifest."""

    id: str
    """The GDC's UUID of the file, and its folder's name."""
    name: str
    md5: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Checked:
    """Result of checking a download against its manifest."""

    found: dict[str, Path]
    """id -> the file, intact as the manifest says."""
    faults: list[str]
    """A line for each file that is missing or damaged, with what to do."""
    hashed: int
    """Files that were hashed now, and not found in `verified.tsv`."""


def read_manifest(path: Path) -> list[ManifestFile]:
    """Return the files that a manifest lists, in its order.

    Raises:
        DownloadError: it is faulty; all faults are listed.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as error:
        raise DownloadError(f"{path}: no readable manifest ({error}). Give the GDC's.") from error
    header = lines[0] if lines else []
    lacking = [name for name in COLUMNS if name not in header]
    if lacking:
        raise DownloadError(
            f"{path}: no column {', '.join(lacking)} in its first line ({', '.join(header)[:99]}). "
            "Give the manifest as portal.gdc.cancer.gov writes it, tab-separated."
        )
    listed, faults = [], []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cells):
            continue
        row = dict(zip(header, cells, strict=False))
        if len(cells) != len(header):
            faults.append(f"row {number}: {len(cells)} cells of {len(header)}: it is cut short")
        elif not re.fullmatch("[0-9a-fA-F]{32}", row["md5"]) or not row["size"].isdigit():
            faults.append(
                f"row {number}: {row['filename']} has md5 {row['md5']!r} and size {row['size']!r}, "
                "not 32 hexadecimal digits and a number of bytes"
            )
        elif Path(row["filename"]).name != row["filename"] or Path(row["id"]).name != row["id"]:
            faults.append(f"row {number}: {row['id']!r}, {row['filename']!r}: not plain names")
        else:
            size = int(row["size"])
            listed.append(ManifestFile(row["id"], row["filename"], row["md5"].lower(), size))
    for what in ("id", "name"):
        twice = Counter(getattr(file, what) for file in listed)
        faults += [f"{what} {name} is listed {n} times" for name, n in twice.items() if n > 1]
    if not listed and not faults:
        faults = ["it lists no file"]
    if faults:
        faults.append("download the manifest again")
        raise DownloadError(all_faults(path, faults))
    return listed


def pick_diagnostic(
    files: Sequence[ManifestFile],
) -> tuple[list[tuple[ManifestFile, SlideName]], dict[str, int]]:
    """Return the diagnostic (DX) tumour slides of TCGA, and all of CPTAC, whose names do not tell.

    Returns:
        Each slide with its parsed name, and the number of files left out by kind.

    Raises:
        DownloadError: names without a case, two slides of one barcode, or no diagnostic slide.
    """
    picked, left, odd = [], Counter(), []
    for file in files:
        stem, dot, ending = file.name.rpartition(".")
        if dot + ending.lower() not in SLIDE_ENDINGS:
            left[f"no slide (.{ending})"] += 1
        elif name := parse_slide(file.name):
            if name.diagnostic:
                picked.append((file, name))
            else:
                left[f"{name.section[:2]}, sample type {name.sample_type:02d}"] += 1
        elif match := CPTAC.fullmatch(stem):
            picked.append((file, SlideName(stem, match[1].upper(), "", "", 1)))
        else:
            odd.append(f"{file.name}: no TCGA or CPTAC name, so its case is not known")
    twice = Counter(name.slide_id for _, name in picked)
    odd += [
        f"{slide_id}: {n} files have this barcode: keep the one you want in the manifest"
        for slide_id, n in twice.items()
        if n > 1
    ]
    if not picked and not odd:
        odd.append(f"no diagnostic slide (DX) is listed, only {_counted(left)}")
    if odd:
        raise DownloadError(all_faults("manifest", odd))
    return picked, dict(left)


def check_files(files: Sequence[ManifestFile], folder: Path, progress: bool = True) -> Checked:
    """Find every file of a manifest and compare its size and md5.

    Args:
        files: rows of the manifest.
        folder: where gdc-client put them; `verified.tsv` is kept there.
        progress: show a bar of bytes, with rate and time left.
    """
    from slides.progress import progress_bar

    folder = Path(folder)
    verified = _Verified(folder / "verified.tsv")
    places = {path.name: path for path in files_below(folder)}
    found, faults = {}, []
    total = sum(file.size for file in files)
    with progress_bar(
        total=total, desc="verify", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for file in files:
            path = folder / file.id / file.name
            path = path if path.is_file() else places.get(file.name, path)
            if fault := _fault(
                file, path, places.get(file.name + ".partial"), verified, bar.update
            ):
                again = f"run `gdc-client download -m MANIFEST -d {folder}` again"
                faults.append(f"{fault}{again}")
            else:
                found[file.id] = path
    return Checked(found, faults, verified.hashed)


def _fault(file: ManifestFile, path: Path, partial: Path | None, verified, advance) -> str:
    """Return what is wrong with a file, up to the remedy; "" if it matches the manifest."""
    if not path.is_file():
        some = f"; {partial.name} has {partial.stat().st_size} of its bytes" if partial else ""
        return f"{file.name}: missing, not at {path}{some}: "
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{path}: {size} bytes, the manifest says {file.size}: delete it and "
        md5 = verified.md5(path, advance)
    except OSError as error:
        return f"{path}: cannot be checked ({error}): fix that, or delete it and "
    if md5 != file.md5:
        return f"{path}: damaged: md5 {md5}, the manifest says {file.md5}: delete it and "
    return ""


class _Verified:
    """A record of hashed files: path, size, mtime (ns), md5; later lines override."""

    def __init__(self, path: Path):
        self.path, self.hashed = path, 0
        self.known: dict[tuple[str, str, str], str] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole, _, torn = text.rpartition("\n")  # a stopped run may have left half a line
        self.start = "\n" if torn else ""
        for line in whole.splitlines():
            *key, md5 = line.split("\t")
            self.known[tuple(key)] = md5

    def md5(self, path: Path, advance: Callable[[int], object]) -> str:
        """Return a file's md5, as recorded or hashed now; report its bytes to `advance`."""
        stat = path.stat()
        name = path.relative_to(self.path.parent).as_posix()
        key = name, str(stat.st_size), str(stat.st_mtime_ns)
        if key in self.known:
            advance(stat.st_size)
            return self.known[key]
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                advance(len(block))
        line = self.start + "\t".join((*key, digest.hexdigest())) + "\n"
        with suppress(OSError), self.path.open("a", encoding="utf-8") as record:
            record.write(line)  # in a read-only folder, files are hashed every time
        self.start, self.hashed = "", self.hashed + 1
        return digest.hexdigest()


def _counted(left: Counter) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(left.items())) or "nothing"
