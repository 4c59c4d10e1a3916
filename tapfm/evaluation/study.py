"""`tapfm study`: folds x seeds x aggregators x strategies, and one table of the results.

    <out>/folds/                              the cohort's table split by case, a file a fold
    <out>/fold_0/seed_0/<row>/cell.yaml       what the cell changes of the config
    <out>/fold_0/seed_0/<row>/run/            the fit's own folder
    <out>/fold_0/seed_0/<row>/report_test/    its report, frozen rows included
    <out>/fold_0/seed_0/<row>/log.txt         output of both commands
    <out>/fold_0/seed_0/<row>/finished.json   written last: seconds of fit and test
    <out>/frozen/                             frozen features and RGB numbers, shared by all cells
    <out>/study.json, study.csv               the table, its intervals, every paired difference

A cell is `tapfm fit` and `tapfm test` in their own processes, so that no failure stops others; a
failed cell is reported with its last message. The same command continues where it stopped: finished
cells are skipped, a half-trained one is resumed by `tapfm fit`. Seeds, strategies and aggregators
may be added; the config and the folds of a study do not change.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from slides.cohort.resplit import run_split
from slides.errors import SettingsError
from slides.files import write_json, write_text
from slides.streaming.settings import index_and_cache
from tapfm.config import read_data, read_source, read_yaml, spelling_of
from tapfm.config_paths import find_config
from tapfm.evaluation.study_cells import Cell, Study
from tapfm.evaluation.study_table import FINISHED, RUN, summary, write_figures
from tapfm.launcher.jobs import Job, launch
from tapfm.launcher.slides import launcher_of
from tapfm.reports.html.comparison import study_page

TAPFM = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]
TESTING = threading.Lock()  # one test at a time: they write the same frozen features


def read_study(file: Path | None, flags: Mapping[str, Any]) -> Study:
    """Return a study from its YAML and the flags that are not None.

    Raises:
        SettingsError: an unknown key, a missing one, or a value given twice.
    """
    found = {} if file is None else read_yaml(file, "study")
    found |= {key: value for key, value in flags.items() if value is not None}
    known = [each.name for each in fields(Study)]
    if unknown := sorted(set(found) - set(known)):
        raise SettingsError(f"study: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    if missing := [key for key in ("config", "out") if not found.get(key)]:
        raise SettingsError(
            f"study: {' and '.join(missing)} missing: give them in YAML or as flags"
        )
    for key in ("config", "seeds", "strategies", "aggregators", "slurm"):
        if key in found:
            listed = found[key] if isinstance(found[key], list | tuple) else [found[key]]
            found[key] = tuple(
                str(find_config(each)) if key == "config" else each for each in listed
            )
    study = Study(**{**found, "out": str(found["out"])})
    names_of = {
        "seeds": study.seeds,
        "aggregators": study.aggregators,
        "strategies": [strategy_name(each) for each in study.strategies],
    }
    for key, names in names_of.items():
        if not names or len(set(names)) < len(names):
            raise SettingsError(
                f"study: {key} are {list(names)}: give one at least, and none twice"
            )
    if study.launcher not in (None, "local", "slurm"):
        raise SettingsError(f"study: launcher is {study.launcher!r}: give local or slurm")
    if study.jobs < 1:
        raise SettingsError(f"study: jobs is {study.jobs}: give 1 or more")
    return study


def strategy_name(strategy: str | Mapping[str, Any]) -> str:
    """Return its name in folders and rows: lora, lora_rank16, or the stem of a config."""
    if isinstance(strategy, str):
        return Path(strategy).stem
    options = "".join(f"_{k}{v}" for k, v in strategy.items() if k != "name")
    name = f"{strategy.get('name', 'full')}{options}"
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def run_study(study: Study) -> int:
    """Run the unfinished cells, then print the table; return 0, or 2 if a cell failed.

    Raises:
        SettingsError: the folder holds a study with another config or other folds.
    """
    out, data = Path(study.out), read_data([Path(each) for each in study.config])
    tables = prepare(study, data)
    cells = plan_cells(study, tables)
    todo = [cell for cell in cells if not (cell.folder / FINISHED).exists()]
    print(f"{out}: {len(cells)} cells, {len(cells) - len(todo)} finished before")
    if todo:
        first = out / "folds" / "index.yaml"
        first.write_text(yaml.safe_dump({"data": {"table": str(tables[0].absolute())}}))
        if not data.get("features_dir"):
            index_and_cache(read_source([*map(Path, study.config), first]))  # once, for all cells
    if study.launcher:
        failed = launch_cells(study, todo, out)
    else:
        with ThreadPoolExecutor(study.jobs) as pool_of_jobs:
            faults = pool_of_jobs.map(lambda cell: run_cell(cell, out), todo)
            failed = {str(c): fault for c, fault in zip(todo, faults, strict=True) if fault}
    text, result, table = summary(study, cells, failed)
    write_json(out / "study.json", result)
    write_figures(out / "study.csv", result)
    print(text)
    if table:
        study_page(result, out, table[0], table[1:])
    print(f"{out}: study.json, study.csv{', study.html' if table else ''}")
    return 2 if failed else 0


def prepare(study: Study, data: Mapping[str, Any]) -> list[Path]:
    """Return the table of each fold; folds are made once for a folder."""
    out, table = Path(study.out), Path(data["table"])
    if not table.is_file():
        raise SettingsError(f"{table}: there is no such table. Correct data.table.")
    fixed = {
        "configs": [yaml.safe_load(Path(each).read_text()) for each in study.config],
        "table_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        **{key: asdict(study)[key] for key in ("folds", "fold_seed", "preserve_sites")},
    }
    about = out / "folds" / "study.yaml"
    if about.exists():
        then = yaml.safe_load(about.read_text())
        if changed := [key for key in fixed if then.get(key) != fixed[key]]:
            raise SettingsError(
                f"{out} holds a study with other {', '.join(changed)}. Give another --out, or "
                "delete that folder to start anew."
            )
    elif study.folds is not None:
        task = data.get("task") or "multilabel"
        run_split(table, out / "folds", data.get("labels"), folds=study.folds,
                  seed=study.fold_seed, preserve_sites=study.preserve_sites,
                  task=task, slides_dir=data.get("slides_dir"),
                  **spelling_of(data))  # fmt: skip
    write_text(about, yaml.safe_dump(fixed, sort_keys=False))
    if study.folds is None:
        return [table]
    return [out / "folds" / f"{table.stem}_{n}.csv" for n in range(study.folds)]


def plan_cells(study: Study, tables: Sequence[Path]) -> list[Cell]:
    """Return every cell, fold by fold."""
    cells = []
    for (fold, table), seed, aggregator, strategy in product(
        enumerate(tables), study.seeds, study.aggregators, study.strategies
    ):
        row = f"{aggregator}_{strategy_name(strategy)}"
        folder = Path(study.out) / f"fold_{fold}" / f"seed_{seed}" / row
        model: dict[str, Any] = {"aggregator": aggregator}
        is_config = isinstance(strategy, str) and strategy.endswith((".yaml", ".yml"))
        if not is_config:
            model["strategy"] = strategy if isinstance(strategy, str) else dict(strategy)
        changes = {"seed_everything": seed, "run_dir": str(folder.absolute()), "name": RUN,
                   "features": str(Path(study.out).absolute() / "frozen"),
                   "model": model, "data": {"table": str(table.absolute())}}  # fmt: skip
        configs = (*study.config, *([strategy] if is_config else []))
        cells.append(Cell(fold, seed, row, folder, changes, configs))
    return cells


def launch_cells(study: Study, cells: Sequence[Cell], out: Path) -> dict[str, str]:
    """Fit and test each cell as a job; return the reasons of failures by cell."""
    jobs = [
        Job(
            f"fold_{cell.fold}_seed_{cell.seed}_{cell.row}",
            tuple(map(tuple, commands_of(cell, out))),
            (str(cell.folder / "report_test" / "metrics_test.json"),),
        )
        for cell in cells
    ]
    folder, at_once = out / "jobs", study.jobs if study.jobs > 1 else None
    failed = launch(jobs, folder, launcher_of(study.launcher, at_once, study.slurm))
    for cell, job in zip(cells, jobs, strict=True):
        if job.name not in failed:
            spent = json.loads((folder / f"{job.name}.json").read_text())["seconds"]
            seconds = dict(zip(("fit", "test"), spent, strict=True))
            write_text(cell.folder / FINISHED, json.dumps({"seconds": seconds}) + "\n")
    pairs = zip(cells, jobs, strict=True)
    return {str(cell): failed[job.name] for cell, job in pairs if job.name in failed}


def commands_of(cell: Cell, out: Path) -> list[list[str]]:
    """Write what a cell changes of the config; return its fit and its test."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    changes = cell.folder / "cell.yaml"
    changes.write_text(yaml.safe_dump(dict(cell.changes), sort_keys=False))
    configs = [part for each in (*cell.configs, changes) for part in ("--config", str(each))]
    test = ["--run", str(cell.folder), "--features", str(out / "frozen"), "--overlays", "0"]
    return [["fit", *configs], ["test", *test]]


def run_cell(cell: Cell, out: Path) -> str | None:
    """Fit and test; return None, or the reason of a failure."""
    seconds = {}
    for verb, *arguments in commands_of(cell, out):
        began = time.perf_counter()
        with TESTING if verb == "test" else nullcontext():
            fault = _command([verb, *arguments], cell.folder / "log.txt")
        seconds[verb] = round(time.perf_counter() - began, 1)
        if fault:
            print(f"{cell}: {verb} failed: {fault}", file=sys.stderr, flush=True)
            return f"{verb}: {fault}"
    write_text(cell.folder / FINISHED, json.dumps({"seconds": seconds}) + "\n")
    print(f"{cell}: fit {seconds['fit']} s, test {seconds['test']} s", flush=True)
    return None


def _command(arguments: list[str], log: Path) -> str | None:
    """Run a verb with its output in the log; return None, or its last message if it failed."""
    with log.open("a") as file:
        file.write(f"\n$ tapfm {' '.join(arguments)}\n")
        file.flush()
        start = file.tell()
        code = subprocess.run(
            [*TAPFM, *arguments], stdout=file, stderr=file, check=False
        ).returncode
    if not code:
        return None
    with log.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    faults = [line.removeprefix("tapfm: ") for line in lines if line.startswith("tapfm: ")]
    return f"exit code {code}: {(faults or lines or ['no output'])[-1]} (see {log})"
