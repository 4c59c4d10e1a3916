"""Mends a table: names of columns, words, paths and repeated rows, each change told in a line.

    Mended(header, rows, done) = mend(table, slides_dir)

Only what has one likely meaning is changed: a column by its usual other name, words for 1 and 0
where a column has both and nothing else, a path whose file is found once by its name. What cannot
be known (a patient, a label, the split) is left for the reader of the table to refuse.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from slides.cohort.spelling import guess_values, is_missing, read_number, value_reader
from slides.cohort.table import LIKE, OPTIONAL, REQUIRED, SPLIT_WORDS
from slides.cohort.table_file import file_at, like, read_table
from slides.errors import some
from slides.files import files_below

UNIT = re.compile(r"\s*(µm|μm|um|microns?)(/(px|pixel))?$", re.IGNORECASE)

NO_SLIDES = (".csv", ".tsv", ".json", ".txt", ".xml", ".h5", ".geojson", ".xlsx")


@dataclass
class Mended:
    """A table after mending."""

    header: list[str]
    rows: list[list[str]]
    done: list[str]
    """Changes made, a line each."""


def mend(
    table: Path,
    slides_dir: Path | None = None,
    names: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> Mended:
    """Return a table with what can be mended mended.

    Args:
        table: the file.
        slides_dir: folder below which slides are looked for; None is the table's.
        names: the user's names of columns -> those of tapfm.
        values: the user's words in label columns.
        labels: columns whose words may stand for 1 and 0; None is all without another meaning.

    Raises:
        CohortError: the file is no table.
    """
    header, records = read_table(table, names)
    made = Mended(header, [cells for _, cells in records], [])
    _drop_titles(made)
    made.rows = [cells for cells in made.rows if len(cells) == len(made.header)] or made.rows
    _name_columns(made)
    base = Path(slides_dir) if slides_dir else table.parent
    _find_slides(made, base)
    _spell(made, labels, values)
    _drop_repeats(made)
    return made


def _drop_titles(made: Mended) -> None:
    """Take the first of the top rows that names a known column for the header."""
    known = {like(name) for name in REQUIRED} | {each for names in LIKE.values() for each in names}
    lines = [made.header, *made.rows[:10]]
    scores = [sum(like(cell) in known for cell in line) for line in lines]
    if scores[0] == 0 and max(scores) > 1:
        first = scores.index(max(scores))
        made.header, made.rows = list(lines[first]), made.rows[first:]
        made.done.append(f"{first} rows above the header: left out")


def _name_columns(made: Mended) -> None:
    for name in REQUIRED:
        alike = [n for n, each in enumerate(made.header) if like(each) in LIKE[name] | {like(name)}]
        if name not in made.header and len(alike) == 1:
            made.done.append(f"column {made.header[alike[0]]!r}: now {name}")
            made.header[alike[0]] = name


def _find_slides(made: Mended, base: Path) -> None:
    """Correct paths of slides, and fill in slide_id or slide_path from each other."""
    files = defaultdict(list)
    stems = defaultdict(list)
    for path in files_below(base) if base.is_dir() else ():
        files[path.name.casefold()].append(path)
        stems[path.stem.casefold()].append(path)
    if "slide_path" not in made.header and "slide_id" in made.header:
        place = made.header.index("slide_id")
        made.header.append("slide_path")
        for cells in made.rows:
            cells.append(cells[place])
        made.done.append("column slide_path: made from slide_id")
    if "slide_path" not in made.header:
        return
    at = made.header.index("slide_path")
    moved = defaultdict(list)
    for cells in made.rows:
        if not (text := cells[at]) or _is_there(base, text):
            continue
        name = PureWindowsPath(text).name.casefold()
        alike = [*stems[name.rpartition(".")[0] or name], *stems[name]]
        slides = [each for each in alike if each.suffix.lower() not in NO_SLIDES]
        found = files[name] or list(dict.fromkeys(slides))
        if len(found) == 1:
            cells[at] = str(found[0].relative_to(base))
            kind = "folder" if files[name] else "ending"
            moved[kind].append(f"{text} is {cells[at]}")
    for kind, each in moved.items():
        made.done.append(f"slide_path, {kind} of {len(each)} slides: {some(each)}")
    if "slide_id" not in made.header:
        made.header.insert(0, "slide_id")
        for cells in made.rows:
            cells.insert(0, PureWindowsPath(cells[at]).stem)
        made.done.append("column slide_id: made from the names of the files")


def _is_there(base: Path, text: str) -> bool:
    try:
        return file_at(base, text).is_file()
    except (OSError, RuntimeError):
        return False


def _spell(made: Mended, labels: Sequence[str] | None, values: Mapping[Any, Any] | None) -> None:
    """Rewrite words of splits, resolutions and binary labels."""
    free = [name for name in made.header if name and name not in REQUIRED + OPTIONAL]
    meant = value_reader(values)
    for place, name in enumerate(made.header):
        texts = list(dict.fromkeys(cells[place] for cells in made.rows))
        if name == "split":
            words = {text: SPLIT_WORDS.get(text.lower(), text) for text in texts}
        elif name == "mpp":
            words = {text: UNIT.sub("", text) for text in texts}
        elif name in (free if labels is None else labels):
            words = {text: meant(name, text) for text in texts}
            known = [t for t in words.values() if not is_missing(t) or ("+" in texts and t == "-")]
            guessed = guess_values(known)
            words = {text: str(guessed.get(word, word)) for text, word in words.items()}
            words = {t: w for t, w in words.items() if read_number(w) is not None or not w}
        else:
            continue
        words = {text: word for text, word in words.items() if text != word}
        if not words:
            continue
        for cells in made.rows:
            cells[place] = words.get(cells[place], cells[place])
        each = [f"{text!r} is now {word or 'unknown'}" for text, word in words.items()]
        made.done.append(f"column {name}: {some(each)}")


def _drop_repeats(made: Mended) -> None:
    """Leave out rows that repeat another in every cell."""
    rows = list({tuple(cells): cells for cells in made.rows}.values())
    if len(rows) < len(made.rows):
        made.done.append(f"{len(made.rows) - len(rows)} rows that repeat another: left out")
        made.rows = rows
