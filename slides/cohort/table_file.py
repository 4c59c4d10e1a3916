"""Reads the file of a table as programs write it: text, Excel or Parquet, to rows of text.

Spreadsheets part columns by semicolons or tabs where a comma is the decimal sign, write UTF-16 or
Windows-1252, add blank columns, and write `Case ID` for case_id. What can mean one thing alone is
read, by what is in the file and not by its ending. Text is tidied (`slides.cohort.spelling.tidy`),
but for paths, which name files.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from slides.cohort.spelling import tidy
from slides.errors import CohortError
from slides.files import decode_text

SEPARATORS = ",;\t|"
PATHS = ("slide_path", "path")  # columns of paths
IDS = ("case_id", "slide_id")  # columns of names, which pandas may have turned into 103.0
NAMED = (*IDS, "slide_path", "split", "mpp")  # found by like names, such as Slide Path
TEXTS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}  # ending -> usual separator
EXCEL = (".xlsx", ".xlsm")


def read_table(
    table: Path, names: Mapping[str, str] | None = None
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return header and (row number, cells), as stripped text; blank rows are left out.

    Columns without a name whose cells are blank are left out too; pandas calls its row numbers
    `Unnamed: 0`, which is no name. Rows are numbered as a spreadsheet does: the header is row 1.

    Args:
        table: the file.
        names: the user's names of columns -> those of tapfm, `{Patient ID: case_id}`.

    Raises:
        CohortError: the file is missing, of another format, or has no header, or a name is of no
            column.
    """
    if not table.is_file():
        raise CohortError(f"{table}: there is no such file. Give the path of the cohort table.")
    lines = _lines(table)
    header = [re.sub(r"^Unnamed: \d+$", "", tidy(name)) for name in lines[0]] if lines else []
    if not any(header):
        raise CohortError(f"{table}: no header. The first row must name the columns.")
    header = _renamed(table, header, names or {})
    paths = {place for place, name in enumerate(header) if name in PATHS}
    rows = [
        (number, [cell.strip() if at in paths else tidy(cell) for at, cell in enumerate(line)])
        for number, line in enumerate(lines[1:], start=2)
    ]
    return _without_blanks(header, [(number, cells) for number, cells in rows if any(cells)])


def _lines(table: Path) -> list[list[str]]:
    """Return the cells of a file, line by line, header first."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        return _parquet_lines(table)
    with table.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # Excel's files are, whatever they are called
    if suffix in EXCEL or (zipped and suffix in TEXTS):
        return _sheet_lines(table)
    if suffix in TEXTS:
        return _text_lines(table, TEXTS[suffix])
    raise CohortError(
        f"{table}: tables end in .csv, .tsv, .xlsx or .parquet, this one in "
        f"{suffix or 'nothing'}. Save it as one of them."
    )


def like(name: str) -> str:
    """Return the same key for `Slide Path`, `slide-path` and `slide_path`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _renamed(table: Path, header: list[str], names: Mapping[str, str]) -> list[str]:
    """Return the header by the user's names, and with like names of `NAMED` as these."""
    given = {tidy(str(theirs)): str(ours) for theirs, ours in names.items()}
    if absent := [name for name in given if name not in header]:
        raise CohortError(
            f"{table}: data.columns: there is no column {', '.join(map(repr, absent))}. There are: "
            f"{', '.join(filter(None, header))}."
        )
    header = [given.get(name, name) for name in header]
    for ours in NAMED:
        alike = [place for place, name in enumerate(header) if like(name) == like(ours)]
        if len(alike) == 1:
            header[alike[0]] = ours
    return header


def repeated_columns(header: Sequence[str]) -> list[str]:
    """Return a fault for each column name that appears more than once."""
    places = [str(place) for place, name in enumerate(header, start=1) if not name]
    unnamed = f"columns {', '.join(places)} have cells and no name: name or remove them"
    return [unnamed] * (len(places) > 1) + [
        f"column {name!r} appears {times} times: rename or remove one"
        for name, times in sorted(Counter(header).items())
        if name and times > 1
    ]


def file_at(base: Path, text: str) -> Path:
    r"""Return the path of a cell, relative to `base`; `a\b.svs` is `a/b.svs` if only that is there.

    Raises:
        OSError, RuntimeError: the path cannot be followed.
    """
    path = (base / Path(text).expanduser()).absolute()
    if "\\" in text and not path.exists():
        other = (base / text.replace("\\", "/")).absolute()
        return other if other.exists() else path
    return path


def _text_lines(table: Path, usual: str) -> list[list[str]]:
    try:
        text = decode_text(table.read_bytes())
        said = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
        text = text[said.end() :] if said else text
        header = re.sub('"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0])
        found = max(usual + SEPARATORS, key=header.count)  # of equal ones the first: the usual
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=said[1] if said else found))
    except (csv.Error, OSError) as error:
        raise CohortError(f"{table}: cannot be read ({error}). Export it again.") from error
    except ValueError as error:
        raise CohortError(f"{table}: {error}") from error


def _cell_text(value: object) -> str:
    """Return the text of a cell that has a type: 1 of True and of 1.0, "" of what is missing."""
    import pandas

    if pandas.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a whole-number column with gaps is stored as floats
    return str(int(value)) if pandas.api.types.is_bool(value) else str(value)


def _sheet_lines(table: Path) -> list[list[str]]:
    """Return the cells of a workbook's only sheet with any, or of its only one with a `split`."""
    import pandas

    how = {"sheet_name": None, "header": None, "dtype": object, "keep_default_na": False}
    try:
        with table.open("rb") as file:  # by its content, whatever its name
            found = pandas.read_excel(file, engine="openpyxl", na_values=[""], **how)
    except ImportError as error:
        raise CohortError(
            f"{table}: Excel's files are read by openpyxl, which is not there. `pip install "
            "'tapfm[excel]'`, or save the table as .csv."
        ) from error
    except Exception as error:  # openpyxl and zipfile raise many kinds for a damaged file
        why = " ".join(str(error).split())
        raise CohortError(
            f"{table}: a spreadsheet that cannot be read ({why}). Save it as text: .csv."
        ) from error
    sheets = {name: frame for name, frame in found.items() if frame.notna().any(axis=None)}
    if len(sheets) > 1:
        named = {name: f for name, f in sheets.items() if "split" in map(like, map(str, f.iloc[0]))}
        if len(named) != 1:
            raise CohortError(
                f"{table}: {len(sheets)} sheets have cells ({', '.join(sheets)}) and "
                f"{len(named)} a column `split`. Keep one sheet, or save it as .csv."
            )
        sheets = named
    rows = [frame.to_numpy().tolist() for frame in sheets.values()]
    return [[_cell_text(value) for value in line] for line in (rows[0] if rows else ())]


def _parquet_lines(table: Path) -> list[list[str]]:
    import pandas  # here, because most tables are text and this import costs half a second

    try:
        frame = pandas.read_parquet(table)
    except (ValueError, OSError, ImportError) as error:
        why = f"not a readable Parquet file ({error}). Write it again, or save it as .csv."
        raise CohortError(f"{table}: {why}") from error
    if any(frame.index.names):  # set_index before to_parquet
        frame = frame.reset_index()
    columns = [[_cell_text(value) for value in frame[name].tolist()] for name in frame.columns]
    return [[str(name) for name in frame.columns], *map(list, zip(*columns, strict=True))]


def _without_blanks(
    header: list[str], rows: list[tuple[int, list[str]]]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return header and rows without blank columns and blank cells beyond them; ids as integers."""
    width = len(header)
    full = {place for _, cells in rows for place, cell in enumerate(cells) if cell}
    kept = [place for place in range(width) if header[place] or place in full]
    lines = []
    for number, cells in rows:
        beyond = cells[width:] if any(cells[width:]) else []
        lines.append((number, [cells[place] for place in kept if place < len(cells)] + beyond))
    header = [header[place] for place in kept]
    for place in (header.index(name) for name in IDS if name in header):
        there = [cells for _, cells in lines if cells[place : place + 1] > [""]]
        if there and all(re.fullmatch(r"\d+\.0", cells[place]) for cells in there):
            for cells in there:
                cells[place] = cells[place].removesuffix(".0")
    return header, lines
