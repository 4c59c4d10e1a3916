"""Pages of several runs: of `tapfm compare`, and of a study.

Both say first which model to take, then show the table, then the intervals as a picture. They are
one file without scripts or requests, in the form of the report's page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from slides.files import write_json, write_text
from tapfm import __version__
from tapfm.reports.compare import compare, read_rows
from tapfm.reports.compare import table as compared
from tapfm.reports.html.panels import WIDE, panel
from tapfm.reports.html.tables import Html, html, table
from tapfm.reports.plain_table import as_text, span
from tapfm.stats.bootstrap import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = 34  # letters of a name beside its interval


def run_compare(runs: Sequence[Path], split: str, out: Path) -> int:
    """Compare runs, write compare.json and compare.html, print verdicts and table; return 0.

    Args:
        runs: folders of runs, or of cohorts, which stand for all their runs.
        split: `val` or `test`.
        out: folder to write to.

    Raises:
        SettingsError: fewer than two runs, or runs of different tasks.
        RunsError, ResultRowError: a run was not tested, or runs cannot be compared.
    """
    task, rows = read_rows(runs, split)
    found = compare(task, rows, split)
    write_json(out / "compare.json", found)
    print(
        as_text(compared(found), [found["note"]], [each["sentence"] for each in found["verdicts"]])
    )
    print(comparison_page(found, out))
    return 0


def comparison_page(found: Mapping[str, Any], out: Path) -> Path:
    """Write compare.html of a comparison (`reports.compare`); return its path."""
    head, rows = found["head"], found["rows"]
    pictures = [
        forest({row["run"]: row["figures"][head] for row in rows}, found["figure"]),
        forest(
            {row["run"]: row["differences"][head] for row in rows[1:]},
            f"{found['figure']} minus {found['first']}",
            zero=True,
        ),
    ]
    header, *lines = compared(found)
    sections = {
        "Table": [table(header, lines, first=2), f'<p class="soft">{html(found["note"])}</p>'],
        "Intervals": ['<div class="panels">', *pictures, "</div>"],
        "Slides that the runs differ on most": [_apart(found["apart"], rows)],
    }
    if found["skipped"]:
        left = [[each["slide_id"], each["reason"]] for each in found["skipped"]]
        sections["Left out"] = [table(["slide", "because"], left)]
    said = [each["sentence"] for each in found["verdicts"]]
    title = f"{' against '.join(row['run'] for row in rows)}, {found['split']} split"
    return _write(out / "compare.html", title, said, found, sections)


def study_page(found: Mapping[str, Any], out: Path, header: Sequence, lines: Sequence) -> Path:
    """Write study.html; return its path.

    Args:
        found: the content of study.json (`evaluation.study_table`).
        out: the study's folder.
        header: of its table.
        lines: of its table.
    """
    done = {title: row for title, row in found["arms"].items() if row["seeds"]}
    figure, head = found.get("figure", ""), found.get("head")
    pictures = []
    if done:
        pooled = {title: row["figures"]["pooled"][head] for title, row in done.items()}
        pictures.append(forest(pooled, figure))
        reference = found["reference"]
        gains = {
            title: row["differences"][reference]["pooled"][head]
            for title, row in done.items()
            if reference in row["differences"]
        }
        if gains:
            pictures.append(forest(gains, f"{figure} minus {reference}", zero=True))
    sections = {"Table": [table(header, lines)]}
    if pictures:
        sections["Intervals"] = ['<div class="panels">', *pictures, "</div>"]
    if found["failed"]:
        sections["Failed"] = [table(["cell", "because"], list(found["failed"].items()))]
    said = found.get("verdicts") or ["No row that adapts the encoder is finished: no verdict."]
    name = f"Study {out.resolve().name}"
    return _write(out / "study.html", name, said, found, sections)


def forest(figures: Mapping[str, Interval], title: str, *, zero: bool = False) -> Html:
    """Return values with their intervals as a drawing, a line each; undefined ones are left out.

    Args:
        figures: name to value and interval.
        title: of the drawing.
        zero: draw a line at 0, of differences.
    """
    shown = {name: each for name, each in figures.items() if not math.isnan(each.value)}

    def draw(axis: Axes) -> None:
        for n, each in enumerate(shown.values()):
            if each.draws:
                axis.plot([each.low, each.high], [n, n], color="#0072b2", linewidth=2)
            axis.plot([each.value], [n], "o", color="#0072b2", markersize=6)
        if zero:
            axis.axvline(0, color="0.5", linewidth=1)
        names = [name if len(name) <= NAMES else f"{name[: NAMES - 1]}…" for name in shown]
        axis.set_yticks(range(len(shown)), names, parse_math=False)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.set_title(title, parse_math=False)
        axis.grid(axis="x", color="0.9")

    said = "; ".join(f"{name} {span(each)}" for name, each in shown.items())
    return panel(draw, f"{title}: {said or 'undefined'}", (WIDE[0], 1.2 + 0.35 * len(shown)))


def _apart(apart: Mapping[str, Any], rows: Sequence[Mapping]) -> Html:
    runs = [row["run"] for row in rows]
    header = ["slide", *apart["targets"]]
    header += [f"{name} ({run})" for name in apart["predictions"] for run in runs]
    lines = [
        [each["slide_id"], *(cell or "unknown" for cell in each["targets"])]
        + [each["predicted"][run][n] for n in range(len(apart["predictions"])) for run in runs]
        for each in apart["slides"]
    ]
    return table(header, lines)


def _write(
    path: Path,
    title: str,
    said: Sequence[str],
    found: Mapping[str, Any],
    sections: Mapping[str, Sequence[str]],
) -> Path:
    names = {title: f"part-{n}" for n, title in enumerate(sections)}
    body = [
        f'<section id="{names[name]}">\n<h2>{html(name)}</h2>\n{"".join(parts)}\n</section>'
        for name, parts in sections.items()
    ]
    links = [f'<li><a href="#{name}">{html(title)}</a></li>' for title, name in names.items()]
    counts = [f"{found[key]} {key}" for key in ("slides", "cases") if key in found]
    page = files("tapfm.reports.html").joinpath("page.html").read_text(encoding="utf-8")
    text = Template(page).substitute(
        verdicts="".join(f'<p class="verdict">{html(each)}</p>' for each in said),
        title=escape(title),
        subtitle=escape(", ".join([*counts, f"tapfm {__version__}"])),
        contents="".join(links),
        body="\n".join(body),
    )
    write_text(path, text)
    return path
