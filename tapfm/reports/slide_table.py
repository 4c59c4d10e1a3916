"""One table of all slides of a run's cohort: the cohort's columns and the indexing's result.

Written to `report_<split>/slides.csv` while cohort table and index exist, and read from there
otherwise, so that a run folder alone lists its slides.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slides.cohort.counts import Tally
from slides.cohort.spelling import missing_words, tidy, value_reader
from slides.cohort.table import OPTIONAL, REQUIRED
from slides.cohort.table_file import read_table
from slides.cohort.targets import Cells, make_columns
from slides.errors import CohortError
from slides.files import replacing
from slides.grid import Grid

MADE = ("mpp", "mpp_source", "tissue_mm2", "tiles", "status", "reason", "path")
NO_LABEL = {*REQUIRED, *OPTIONAL, *MADE}


class Labelled(NamedTuple):
    """The label values of a slide."""

    labels: tuple[float, ...]


def slide_table(saved: Path, data: Mapping) -> list[dict[str, str]]:
    """Return a row a slide; none if neither the saved table nor the cohort's exists.

    Args:
        saved: the table of an earlier report, rewritten if the cohort's own can be read.
        data: the `data` part of a run's config.
    """
    tiles = data.get("tiles") or {}
    sizes = {"size": "tile_px", "mpp": "mpp", "overlap": "overlap"}
    grid = Grid(**{ours: tiles[key] for ours, key in sizes.items() if key in tiles})
    ledger = _rows(Path(data.get("index_dir", "data/index")) / grid.tag / "ledger.csv")
    try:
        header, records = read_table(Path(data["table"]), data.get("columns"))
    except (CohortError, KeyError):
        ledger = []
    if not ledger:
        return _rows(saved)
    made = {row["slide_id"]: row for row in ledger}
    rows = []
    for _, cells in records:
        row = dict(zip(header, cells, strict=False))
        found = made.get(row.get("slide_id", ""), {"status": "not indexed"})
        rows.append({**row, **{key: found.get(key, "") for key in MADE}})
        if found.get("mpp"):
            rows[-1]["mpp"] = f"{float(found['mpp']):.6g}"
    columns = [name for name in header if name != "slide_path" and name not in MADE]
    with replacing(saved) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *MADE], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return _rows(saved)


def by_split(
    rows: Sequence[Mapping[str, str]], data: Mapping
) -> tuple[list[str], list[list[object]]]:
    """Return header and rows of a table of counts by split: slides, cases, tiles, label values.

    Args:
        rows: of `slide_table`.
        data: the `data` part of a run's config, which says what is a label, and of which task.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row.get("split", "")].append(row)
    counted = _tallies(rows, data)
    names = list(dict.fromkeys(name for tally in counted.values() for name in tally))
    counts = [
        [split, len(group), len({row.get("case_id") for row in group}),
         sum(int(row["tiles"] or 0) for row in group)]
        + [counted.get(split, {}).get(name, "") for name in names]
        for split, group in groups.items()
    ]  # fmt: skip
    return ["split", "slides", "cases", "tiles", *names], counts


def _tallies(rows: Sequence[Mapping[str, str]], data: Mapping) -> dict[str, Tally]:
    """Return the counts of label values of each split; none if the labels are not to be read."""
    free = [name for name in (rows[0] if rows else ()) if name not in NO_LABEL]
    try:
        columns = make_columns(data.get("task") or "multilabel")
        names = list(columns.choose(data.get("labels"), free))
    except CohortError:
        return {}
    if not set(names) <= set(free):
        return {}
    meant, places = value_reader(data.get("values")), range(len(rows))
    texts = {n: [meant(name, tidy(rows[n][name])) for name in names] for n in places}
    splits = {n: rows[n].get("split", "") for n in places}
    found = columns.read(Cells(names, texts, splits, missing_words(data.get("missing") or ())), ())
    return {
        split: columns.tally(
            names, found.classes,
            [Labelled(found.rows[n]) for n in places if splits[n] == split],
        )
        for split in dict.fromkeys(splits.values())
    }  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
