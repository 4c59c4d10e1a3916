"""`tapfm report`: all of a cohort's runs as one HTML page, `report_<split>/report.html`.

The page is one file that needs nothing else: tables are HTML, drawings SVG, photographs data URIs;
there is no script, and its policy forbids every request. It is built from the run folder alone,
from the files of `tapfm fit` and `tapfm test`, and names what is missing. Unknown keys of
metrics_<split>.json are shown as they are (`tables`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import yaml

from slides.files import write_json, write_text
from tapfm import __version__
from tapfm.reports import summary
from tapfm.reports.figures import read_curves
from tapfm.reports.html.adapting import adapting
from tapfm.reports.html.cards import slide_cards
from tapfm.reports.html.label_record import label_record, label_tables, left_out
from tapfm.reports.html.panels import cost_panels, key, training_panels
from tapfm.reports.html.tables import further_table, html, pairs, results_table, split_table, table
from tapfm.reports.html.task_reports import REPORTS
from tapfm.reports.rows import ResultRow
from tapfm.reports.runs import Run, read_metrics, read_result_rows, read_runs, read_task
from tapfm.reports.slide_table import by_split, slide_table
from tapfm.tasks import Task

PAGE = "report.html"
PHASES = ("encode", "aggregate", "adapt")
MEMORY = ("allocated_gib", "reserved_gib", "rss_gib")
PARTS = {
    "Results": "results",
    "Adapting": "adapting",
    "Curves": "curves",
    "Training": "training",
    "Memory and throughput": "cost",
    "Slides to look at": "cases",
    "Slide ledger": "slides",
    "Provenance": "provenance",
    "Configuration": "configuration",
}


def run_report(run: Path, split: str) -> int:
    """Write the page of a folder of runs; return 0."""
    print(write_page(run, split))
    return 0


def write_page(run: Path, split: str) -> Path:
    """Write the page from the files in the folder; return its path.

    Args:
        run: folder of the cohort's runs.
        split: `val` or `test`.

    Raises:
        RunsError: `tapfm test` has not been run, or its files are damaged.
    """
    report = run / f"report_{split}"
    metrics = read_metrics(report / f"metrics_{split}.json", run, split)
    runs = read_runs(run)
    task = read_task(metrics)
    rows = read_result_rows(report / f"predictions_{split}.csv", metrics, task, runs)
    data = runs[0].config.get("data") or {} if runs else {}
    slides = slide_table(report / "slides.csv", data)
    record = label_record(report / "labels.json", data)
    body = [
        _section("Results", results(metrics, report, split)),
        *([_section("Adapting", adapting(found))] if (found := metrics.get("verdicts")) else []),
        _section("Curves", curves(task, rows)),
        _section("Training", training(rows)),
        _section("Memory and throughput", cost(rows, runs)),
        _section(
            "Slides to look at", slide_cards(task, rows, runs, split, slides, metrics["arms"])
        ),
        _section("Slide ledger", ledger(slides, metrics, runs, record)),
        _section("Provenance", provenance(runs, metrics, record)),
        _section("Configuration", configuration(runs)),
    ]
    parts = {title: name for title, name in PARTS.items() if found or title != "Adapting"}
    links = [f'<li><a href="#{name}">{title}</a></li>' for title, name in parts.items()]
    counts = [f"{metrics[key]} {key}" for key in ("slides", "cases") if key in metrics]
    template = Template(
        files("tapfm.reports.html").joinpath("page.html").read_text(encoding="utf-8")
    )
    text = template.substitute(
        verdicts="".join(f'<p class="verdict">{html(v["sentence"])}</p>' for v in found or ()),
        title=escape(f"{run.resolve().name}, {split} split"),
        subtitle=escape(
            ", ".join([*counts, f"{len(metrics['arms'])} models; tapfm {__version__}"])
        ),
        contents="".join(links),
        body="\n".join(body),
    )
    write_text(report / PAGE, text)
    write_json(report / summary.NAME, summary.summary(task, metrics, report))
    return report / PAGE


def results(metrics: Mapping, report: Path, split: str) -> Iterator[str]:
    """Yield the table, its notes, and all further figures."""
    yield results_table(metrics)
    for note in metrics.get("notes") or ():
        yield f"<p>{html(note)}</p>"
    if not metrics.get("notes"):
        yield _soft(f"Intervals: 95 %, {metrics.get('draws')} bootstrap draws of whole cases.")
        if metrics.get("reference"):
            yield _soft("* the best row that was not trained end to end, with which the others are "
                        "compared; chosen on this split itself, which favours it.")  # fmt: skip
    found = report / f"tile_auroc_{split}.json"
    if found.is_file():
        caption = "Tile weights against the truth masks: AUROC of tumour tiles, mean over slides"
        yield table(["run", "AUROC"], [[k, f"{v:.3f}"] for k, v in _json(found).items()], caption)
    if further := further_table(metrics):
        yield f"<details><summary>All further figures</summary>{further}</details>"
    if beside := split_table(metrics):
        yield beside


def curves(task: Task, rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield SVG panels of predictions against targets: ROC, scatter or Kaplan-Meier, by task."""
    if not rows or not len(rows[0].slide_ids):
        yield _soft("No predictions of the models: no curves.")
        return
    yield from REPORTS[task.report].curves(task, rows)


def training(rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield the training curves."""
    panels = training_panels(rows)
    if not panels:
        yield _soft("No metrics.csv in a run's folder: no training curves.")
        return
    yield key(rows, {row.title for row in rows if row.metrics_csv})
    yield f'<div class="panels">{"".join(panels)}</div>'


def cost(rows: Sequence[ResultRow], runs: Sequence[Run]) -> Iterator[str]:
    """Yield time and memory of training steps, from memory.csv."""
    logs = {r.title: log for r in runs if (log := r.folder / "memory.csv").is_file()}
    trained = [row for row in rows if row.title in logs]
    if not trained:
        yield _soft("No memory.csv in a run's folder: memory and time are unknown.")
        return
    steps, phases = [], []
    for row in trained:
        found = {name: values for name, (_, values) in read_curves(logs[row.title]).items()}
        if "tiles_per_s" in found:
            slow, middle, fast = np.percentile(found["tiles_per_s"], (10, 50, 90))
            tiles, speed = found["tiles"], f"{middle:.4g} [{slow:.4g}, {fast:.4g}]"
            sizes = f"{np.median(tiles):.0f}", f"{tiles.max():.0f}"
            steps.append([row.title, len(tiles), *sizes, speed])
        for phase in PHASES:
            if f"{phase}_s" in found:
                peaks = (found.get(f"{phase}_{unit}") for unit in MEMORY)
                gib = ("" if peak is None else f"{peak.max():.2f}" for peak in peaks)
                phases.append([row.title, phase, f"{np.median(found[f'{phase}_s']):.3g}", *gib])
    yield table(["model", "steps", "tiles of a slide, median", "largest",
                 "tiles per second, median [10 %, 90 %]"], steps)  # fmt: skip
    header = ["model", "phase", "seconds a slide, median", "GPU GiB allocated, peak",
              "GPU GiB reserved, peak", "process GiB, peak"]  # fmt: skip
    there = [n for n in range(len(header)) if any(line[n] for line in phases)]  # no GPU, no column
    yield table([header[n] for n in there], [[line[n] for n in there] for line in phases], first=2)
    yield key(rows, logs)
    yield f'<div class="panels">{"".join(cost_panels(rows, logs))}</div>'


def ledger(
    slides: list[dict], metrics: Mapping, runs: Sequence[Run], record: Mapping | None
) -> Iterator[str]:
    """Yield the slides of the cohort, and those left out with the reason."""
    out = [[slide, "the cohort table", reason] for slide, reason in left_out(record)]
    out += [[each["slide_id"], metrics.get("split"), each["reason"]]
            for each in metrics.get("skipped") or ()]  # fmt: skip
    for run in runs:
        path = run.folder / "skipped.json"
        skipped = _json(path) if path.is_file() else {}
        out += [[slide, f"training of {run.name}", reason] for slide, reason in skipped.items()]
    if out:
        yield table(["left out", "in", "because"], out)
    else:
        yield "<p>No slide was left out.</p>"
    if not slides:
        yield _soft("The cohort table and its index are missing, and so is their copy "
                    "(slides.csv, which `tapfm test` writes): no ledger.")  # fmt: skip
        return
    yield table(*by_split(slides, runs[0].config.get("data") or {} if runs else {}))
    whole = table(list(slides[0]), (row.values() for row in slides))
    yield f"<details><summary>All {len(slides)} slides</summary>{whole}</details>"


def provenance(runs: Sequence[Run], metrics: Mapping, record: Mapping | None) -> Iterator[str]:
    """Yield the headers of the saved models and the record of the labels."""
    from tapfm.recipe.best_weights import BEST  # torch and Lightning, for this alone
    from tapfm.slide_model.model import CheckpointError, read_model_config

    found: dict[str, dict[str, object]] = {}
    for run in runs:
        try:
            model_config, facts = read_model_config(run.folder / BEST)
            found[run.name] = dict(pairs({**asdict(model_config), **facts}))
        except CheckpointError as error:
            yield _soft(str(error))
    if found:
        names = {name: None for facts in found.values() for name in facts}
        rows = [[name, *(_fact(facts.get(name)) for facts in found.values())] for name in names]
        yield table(
            ["", *found], [row for row in rows if any(cell is not None for cell in row[1:])]
        )
    if record:
        yield from label_tables(record)
    yield _soft(f"Bootstrap seed {metrics.get('seed')}; page written by tapfm {__version__}.")


def configuration(runs: Sequence[Run]) -> Iterator[str]:
    """Yield every setting of every run, first those in which they differ."""
    every = {run.name: dict(_dotted(run.config)) for run in runs}
    names = {name: None for found in every.values() for name in found}
    differ = [name for name in names if len({repr(f.get(name)) for f in every.values()}) > 1]
    if differ:
        rows = [[name, *(_fact(found.get(name)) for found in every.values())] for name in differ]
        yield table(["setting", *every], rows, "Where the runs differ")
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        yield (f"<details><summary>{html(run.name)}/config.yaml</summary>"
               f"<pre>{escape(text)}</pre></details>")  # fmt: skip


def _section(title: str, parts: Iterator[str]) -> str:
    inner = "\n".join(parts)
    return f'<section id="{PARTS[title]}">\n<h2>{title}</h2>\n{inner}\n</section>'


def _soft(text: str) -> str:
    return f'<p class="soft">{html(text)}</p>'


def _fact(value: object) -> object:
    """Return a setting as a cell, with all its digits."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else value


def _dotted(config: Mapping, above: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _json(path: Path) -> dict:
    return json.loads(path.read_text())
