"""Reads the text and the rows of a published table, as it comes: packed, commented, joined, torn.

A row may lack its last cells where they are blank. The last row may not, if the file ends within a
line: that file is cut.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from slides.errors import LabelError
from slides.files import decode_text

CELL = 1 << 24  # characters of a cell: the allele of a long deletion exceeds csv's default limit

Rows = Iterator[tuple[int, list[str]]]
"""Row number, as a spreadsheet has it, and stripped cells."""


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        LabelError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabelError(f"{path}: {error.strerror}. Give the path of the file.") from error


def source_text(path: Path, data: bytes) -> str:
    """Return the text of a file's bytes.

    Raises:
        LabelError: it is no text.
    """
    try:
        return decode_text(data)
    except ValueError as error:
        raise LabelError(f"{path}: {error}") from error


def source_table(path: Path, data: bytes) -> tuple[list[str], Rows]:
    """Return header and numbered rows below any # lines; tab-separated if the header has a tab.

    Raises:
        LabelError: it is empty, no text, or has a header alone.
    """
    csv.field_size_limit(CELL)
    text = source_text(path, data)
    lines = io.StringIO(text, newline="")
    number, first = 1, lines.readline()
    while first.startswith("#"):
        number, first = number + 1, lines.readline()
    if not first.strip():
        raise LabelError(f"{path}: it is empty. Download it again.")
    # In a MAF quotes are plain characters; in a CSV they enclose commas.
    style = {"delimiter": ";"} if first.count(";") > first.count(",") else {}
    if "\t" in first:
        plain = {} if first.startswith('"') else {"quoting": csv.QUOTE_NONE}  # R quotes all text
        style = {"delimiter": "\t"} | plain
    header = [name.strip() for name in next(csv.reader([first], **style))]
    rows = (
        (n, [cell.strip() for cell in cells])
        for n, cells in enumerate(csv.reader(lines, **style), start=number + 1)
        if any(cells) and cells[0][:1] != "#" and cells[: len(header)] != header
    )
    rows = _filled(path, rows, len(header), text.endswith(("\n", "\r")))
    return _matrix_names(header), rows


def sequenced_samples(text: str) -> list[str]:
    """Return the samples that a MAF's comments name as sequenced, as cBioPortal writes them."""
    comments = itertools.takewhile(lambda line: line.startswith("#"), io.StringIO(text))
    said = (re.match(r"#\s*sequenced[ _]samples:(.*)", line) for line in comments)
    return [sample for match in said if match for sample in match[1].split()]


def _matrix_names(header: list[str]) -> list[str]:
    """Return the columns of cBioPortal's table of alterations as those of its matrix.

    It has a column of all alterations of a gene, EGFR, and one of each kind, `EGFR: MUT`.
    """
    if "Sample ID" not in header:
        return header
    kinds = {name.removesuffix(": MUT") for name in header if name.endswith(": MUT")}
    names = {"Sample ID": "SAMPLE_ID"} | {f"{gene}: MUT": gene for gene in kinds}
    names |= {gene: f"{gene}: any" for gene in kinds}
    return [names.get(name, name) for name in header]


def _filled(path: Path, rows: Rows, width: int, ends: bool) -> Rows:
    """Yield rows of `width` cells, or more where the file has more; refuse a torn last row."""
    number, cells = 0, None
    for number, cells in rows:
        yield number, cells + [""] * (width - len(cells))
    if cells is None:
        raise LabelError(
            f"{path}: its header alone, and no row: no mutation of any case. The GDC has a file a "
            "case, and some cases have none: join the files of all cases (cat)."
        )
    if len(cells) < width and not ends:
        raise LabelError(
            f"{path}: row {number}: {len(cells)} cells of {width}: the file is cut, since its last "
            "line has no end. Download it again; if only blank cells are missing, end the line."
        )
