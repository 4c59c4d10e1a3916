"""What a run was begun with: config, cohort, program; whether it may be continued with others.

    config.yaml    all settings
    cohort.json    every row, and a hash for each split

A resumed run whose rows or schedule have changed would be neither the old run nor a new one. So
changed rows of train and val are refused by name, and another number of epochs, over which the
schedule is laid anew, has to be asked for (`--extend`). The rows of test teach nothing: changes
there are said.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from slides.errors import LISTED, SettingsError, all_faults
from slides.files import clear_partials, write_text
from tapfm import __version__
from tapfm.config_paths import with_absolute_paths
from tapfm.data.datamodule import SlideData
from tapfm.training.callbacks import BEFORE, RESUME
from tapfm.training.old_keys import changed_keys

CONFIG, COHORT = "config.yaml", "cohort.json"
DESCRIBES_RUN = ("seed_everything", "model", "data")  # what may not change between start and resume
Rows = dict[str, dict[str, Any]]
"""The rows of each split, by slide_id: column -> value."""


def prepare_folder(cli: Any, *, writes: bool = True) -> None:
    """Make the run's folder and write what the run is begun with.

    Args:
        cli: the run's `Cli`.
        writes: whether this process is the one that writes.

    Raises:
        SettingsError: the folder holds a run of another config, other rows, or other epochs.
    """
    folder = cli.folder
    saved = with_absolute_paths(yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False)))
    text = yaml.safe_dump(saved, sort_keys=False)
    rows = rows_of(cli.datamodule)
    begun = any((folder / name).exists() for name in (RESUME, BEFORE))
    resumes = begun and (folder / CONFIG).exists()
    if resumes:
        then, now = yaml.safe_load((folder / CONFIG).read_text()), yaml.safe_load(text)
        _refuse_other_settings(folder, then, now, cli)
        _refuse_other_rows(folder, rows)
    if not writes:
        return
    clear_partials(folder)
    write_text(folder / CONFIG, text)
    known = {split: {"sha256": sha256_of(each), "rows": each} for split, each in rows.items()}
    write_text(folder / COHORT, json.dumps(known) + "\n")


def rows_of(data: Any) -> Rows:
    """Return the rows of a data module on slides or on labelled tiles."""
    found: Rows = {}
    if hasattr(data, "cohort"):
        names = data.cohort.labels
        for row in data.cohort.rows:
            labels = [None if math.isnan(value) else value for value in row.labels]
            if len(names) != len(labels):
                names = [f"value {n}" for n in range(len(labels))]
            found.setdefault(row.split, {})[row.slide_id] = {
                "case_id": row.case_id, "file": row.path.name, "mpp": row.mpp, "stain": row.stain,
                "site": row.site, **dict(zip(names, labels, strict=True)),
            }  # fmt: skip
    else:
        for row in data.tiles.rows:
            tile = {"label": row.label, "case_id": row.case_id}
            found.setdefault(row.part, {})[str(row.path)] = tile
    return found


def sha256_of(rows: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a split's rows, in their order."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def changed_rows(then: Mapping[str, Any], now: Mapping[str, Any], split: str) -> list[str]:
    """Return a line for each row of a split that differs."""
    lines = [f"{name} ({split}): added" for name in now.keys() - then.keys()]
    lines += [f"{name} ({split}): taken out" for name in then.keys() - now.keys()]
    for name in then.keys() & now.keys():
        was, is_ = then[name], now[name]
        cells = [
            f"{key} was {_cell(was.get(key))}, is {_cell(is_.get(key))}"
            for key in dict.fromkeys([*was, *is_])
            if was.get(key) != is_.get(key)
        ]
        if cells:
            lines.append(f"{name} ({split}): {', '.join(cells)}")
    if not lines and [*then] != [*now]:
        lines.append(f"the rows of {split} are in another order")
    return sorted(lines)


def _refuse_other_settings(folder: Path, then: Mapping, now: Mapping, cli: Any) -> None:
    were, are = ({key: each[key] for key in DESCRIBES_RUN} for each in (then, now))
    if changed := changed_keys(were, are, cli.parser.get_defaults()):
        raise SettingsError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}). "
            "Give another --name or --run_dir, or delete that folder to start anew."
        )
    was, is_ = (each.get("trainer", {}).get("max_epochs") for each in (then, now))
    if was not in (None, is_) and not cli.config.extend:
        raise SettingsError(
            f"{folder} holds a run of {was} epochs, and trainer.max_epochs is {is_}: its schedule "
            f"of learning rates would be laid anew. Give {was}, another --name, or --extend true "
            "to go on so."
        )


def _refuse_other_rows(folder: Path, now: Rows) -> None:
    if not (folder / COHORT).exists():  # a run of an older version
        return
    try:
        known = json.loads((folder / COHORT).read_text())
        then = {split: each["rows"] for split, each in known.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{folder / COHORT}: damaged ({error}): it cannot be seen whether the cohort has "
            "changed. Delete it if it has not."
        ) from error
    changed = {
        split: changed_rows(then.get(split, {}), now.get(split, {}), split)
        for split in ("train", "val", "test")
    }
    if changed["test"]:
        print(f"{folder}: {len(changed['test'])} rows of test have changed: {changed['test'][0]}")
    if lines := changed["train"] + changed["val"]:
        more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        ways = "Put them back, or give another --name or --run_dir."
        raise SettingsError(
            all_faults(f"{folder} holds a run on other rows. {ways}", lines[:LISTED] + more)
        )


def _cell(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return "blank" if value in (None, "") else value


def provenance(data: SlideData) -> dict[str, Any]:
    """Return what a saved model says of its making."""
    return {
        "cohort_sha256": data.cohort.sha256,
        "tissue": asdict(data.tiles.tissue),
        "stain": data.tile_source.stain,
        "bags": data.bags,
        "pool": data.pool,
        **program(),
    }


def program() -> dict[str, Any]:
    """Return commit and versions of what is running."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "versions": {"tapfm": __version__, "torch": torch.__version__,
                     "lightning": L.__version__, "python": platform.python_version()},
    }  # fmt: skip
