"""The record of where a cohort's labels come from, which `tapfm labels` left beside its table.

Copied to `report_<split>/labels.json` while the table exists, so that a run folder alone has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from slides.files import write_json
from tapfm.reports.html.tables import table


def label_record(saved: Path, data: Mapping) -> dict | None:
    """Return the record; None for a table that `tapfm labels` did not make.

    Args:
        saved: the copy, rewritten if the record itself exists.
        data: the `data` part of a run's config.
    """
    cohort = Path(data.get("table", ""))
    beside = cohort.with_name(f"{cohort.name}.labels.json") if cohort.is_file() else None
    if beside and beside.is_file():
        record = json.loads(beside.read_text())
        now = hashlib.sha256(cohort.read_bytes()).hexdigest()
        record["table"]["changed_since"] = now != record["table"]["sha256"]
        write_json(saved, record)
    return json.loads(saved.read_text()) if saved.is_file() else None


def left_out(record: Mapping | None) -> list[tuple[str, str]]:
    """Return slides of the manifest that are not in the table, with the reason."""
    return [(each["slide"], each["reason"]) for each in (record or {}).get("left_out", ())]


def label_tables(record: Mapping) -> Iterator[str]:
    """Yield tables of known cases and rule of each label, and of the source files."""
    first, *others = record["sources"]
    rows = [[name, rule, *first["counts"][name].values()] for name, rule in first["rules"].items()]
    header = ["label", "rule", *(f"cases {kind}" for kind in next(iter(first["counts"].values())))]
    yield table(header, rows, f"Labels, by {first['kind']}; profiled: {first['profiled']}")
    made_of = {"labels": first, "compared with": others[0] if others else None,
               "profiled": record["profiled_list"], "manifest": record.get("manifest"),
               "cohort table": record["table"]}  # fmt: skip
    files = {kind: each for kind, each in made_of.items() if isinstance(each, Mapping)}
    yield table(
        ["", "file", "SHA-256"], [[kind, e["file"], e["sha256"]] for kind, e in files.items()]
    )
    if record["table"].get("changed_since"):
        yield "<p>The cohort table was changed after `tapfm labels` had written it.</p>"
