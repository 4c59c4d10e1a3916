"""`tapfm check`: everything that can go wrong, told before the first hour is spent; one page.

    tapfm check --config my.yaml                table, slides, splits, disk, card, time
    tapfm check --table cohort.xlsx             without a config yet
    tapfm check --config my.yaml --fix NEW.csv  write a mended table, and what was done

The exit code is 0 if a run can begin, 1 if not, 2 if the settings cannot be.

Nothing is written but with --fix. Every slide is opened; three are indexed to forecast the run.
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slides.cohort.cases import unlabelled
from slides.cohort.counts import count_table
from slides.cohort.mending import mend
from slides.cohort.table import Cohort, SlideRow
from slides.errors import CohortError, SlideError, some
from slides.files import write_csv, write_text
from slides.progress import progress_bar
from slides.streaming.settings import Source
from slides.wsi.reader import Slide
from tapfm.config import read_cohort_of, source_of_data
from tapfm.encoders.backbones import find
from tapfm.planning.cards import card_memory, usable
from tapfm.planning.footprint import CONTEXT_GIB, Footprint, Setup
from tapfm.planning.plan import forecast, make_plan
from tapfm.planning.whole_run import Forecast, forecast_run, rate, sample, spread, work
from tapfm.recipe.warm_start import VIEWS
from tapfm.training.fit import Cli, read_config

FEW = 5  # slides of a label value in val or test: an interval of theirs is as wide as the scale
LISTED = 5  # faults of slides that are printed


@dataclass
class Page:
    """The page, and what was found."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def part(self, title: str, *lines: str) -> None:
        """Add a part: a title and its lines, indented."""
        for number, line in enumerate(lines):
            self.lines.append(f"{title if not number else '':<9}{line}")

    def text(self) -> str:
        """Return the page."""
        found = [f"FAULT    {each}" for each in self.faults]
        found += [f"warning  {each}" for each in self.warnings]
        ready = "Not ready: " if self.faults else "Ready: "
        numbers = f"{len(self.faults)} faults, {len(self.warnings)} warnings"
        return "\n".join([*self.lines, "", *found, *[""] * bool(found), ready + numbers])


class Unbuilt(Cli):
    """A run's settings, checked; neither slides nor model are loaded."""

    def instantiate_classes(self) -> None:
        """Refuse what is wrong with the settings, and build nothing."""
        self.before_instantiate_classes()


def run_check(
    config: Sequence[Path] | None, table: Path | None, slides_dir: Path | None, fix: Path | None
) -> int:
    """Print the page; return 0 if a run can begin, 1 if not.

    Args:
        config: of the run.
        table: the cohort's, in place of the config's.
        slides_dir: of the table, likewise.
        fix: where to write a mended table; None writes nothing.

    Raises:
        SettingsError: settings that `tapfm fit` would refuse.
    """
    words = [word for each in config or () for word in ("--config", str(each))]
    for key, value in (("table", table), ("slides_dir", slides_dir)):
        words += [f"--data.{key}", str(value.absolute())] if value else []
    settings = read_config(words, Unbuilt).config
    data = settings.data.as_dict()
    page = Page([f"tapfm check: {', '.join(map(str, config or [table]))}", ""])
    if fix:
        return write_mended(data, fix)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cohort = read_cohort_of(data)
    except CohortError as error:
        print(f"{page.lines[0]}\n\n{error}\n{would_mend(data)}")
        return 1
    page.warnings += [str(each.message) for each in caught if "byte for byte" in str(each.message)]
    check_table(page, cohort, data)
    source = source_of_data(data, cohort)
    sound = cohort.rows if data["features_dir"] else check_slides(page, cohort, source)
    check_run(page, cohort, source, settings, sound)
    print(page.text())
    return 1 if page.faults else 0


def write_mended(data: dict[str, Any], out: Path) -> int:
    """Write a mended table and what was done; return 0 if it can be read, else 1."""
    folder = data["slides_dir"] and Path(data["slides_dir"])
    made = _mended(data)
    base = folder or Path(data["table"]).parent
    if not folder and base.resolve() != out.absolute().parent.resolve():
        place = made.header.index("slide_path") if "slide_path" in made.header else None
        for cells in made.rows if place is not None else ():
            cells[place] = str((base / cells[place]).absolute())
        made.done.append("slide_path: absolute, for the new table is in another folder")
    write_csv(out, made.header, made.rows)
    listed = made.done or ["nothing had to be mended"]
    write_text(out.with_suffix(".changes.txt"), "\n".join(listed) + "\n")
    print("\n".join([f"{out}: written from {data['table']}", *(f"  {line}" for line in listed)]))
    try:
        read_cohort_of({**data, "table": str(out), "columns": None, "values": None})
    except CohortError as error:
        print(f"\nLeft for you:\n{error}")
        return 1
    return 0


def would_mend(data: dict[str, Any]) -> str:
    """Return a line of what --fix would mend; blank if nothing."""
    try:
        done = _mended(data).done
    except CohortError:
        return ""
    return f"--fix NEW.csv would mend: {'; '.join(done)}" if done else ""


def check_table(page: Page, cohort: Cohort, data: dict[str, Any]) -> None:
    """Add counts by split, few or no positives, and sites in several splits."""
    counts = count_table(cohort)
    widths = [max(map(len, column)) + 2 for column in zip(*counts, strict=True)]
    lines = ["".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in counts]
    page.part("Table", str(data["table"]), *(line.rstrip() for line in lines))
    for name in ("train", "val"):
        if not cohort.split(name):
            page.faults.append(f"no slide is in split {name}: `tapfm split` deals one")
    if not cohort.split("test"):
        page.warnings.append("no slide is in split test: nothing unseen is left to judge the run")
    few = [
        f"{number} of {key} in {split}"
        for key, *numbers in counts[3:]
        for split, number in zip(counts[0][1:], numbers, strict=True)
        if split != "train" and int(number) < FEW and not key.endswith("unknown")
    ]
    if few:
        page.warnings.append(f"too few slides for narrow intervals: {some(few)}")
    if left := unlabelled(cohort.split("train"), cohort.labels, data["bags"]):
        page.warnings.append(f"{len(left)} training slides have no known label: left out")
    sites = defaultdict(set)
    for row in cohort.rows:
        sites[row.site].add(row.split)
    if shared := [site for site, splits in sites.items() if site and len(splits) > 1]:
        page.warnings.append(
            f"sites in several splits: {some(shared)}. Figures may rest on how a site stains: "
            "`tapfm split --preserve-sites`"
        )


def check_slides(page: Page, cohort: Cohort, source: Source) -> list[SlideRow]:
    """Open every slide; add files, sizes and resolutions; return those that can be read."""
    sound, wrong, size, scales = [], [], 0, Counter()
    for row in progress_bar(cohort.rows, "slides", unit="slide", leave=False, disable=None):
        try:
            size += row.path.stat().st_size if row.path.is_file() else 0
            with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
                source.tiles.grid.size0(slide.mpp, row.slide_id)  # refuses tiles finer than scans
                scales[f"{slide.mpp:.3g} ({slide.mpp_source})"] += 1
            sound.append(row)
        except (SlideError, OSError) as error:
            wrong.append(str(error))
    each = ", ".join(f"{number} at {scale}" for scale, number in scales.most_common(4))
    page.part(
        "Slides",
        f"{len(sound)} of {len(cohort.rows)} can be read, {size / 1e9:.1f} GB; microns per pixel: "
        f"{each or 'none'}",
        f"tiles of {source.tiles.tile_px} px at {source.tiles.mpp:g} microns per pixel",
    )
    skips = source.on_error == "skip" and sound
    where = page.warnings if skips else page.faults
    where += [" ".join(each.split()) for each in wrong[:LISTED]]
    if len(wrong) > LISTED:
        where.append(f"{len(wrong) - LISTED} more slides cannot be read")
    if wrong and not skips:
        page.faults.append("mend or remove these slides, or set data.on_error: skip")
    return sound


def check_run(
    page: Page, cohort: Cohort, source: Source, config: Any, sound: Sequence[SlideRow]
) -> None:
    """Add model and card, and the time, disk and memory of the whole run."""
    model, row = config.model, find(config.model.model)
    setup = Setup(
        model.precision, model.optimizer, model.recompute, model.strategy, model.merge_tokens
    )
    device = "cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu"
    if config.data.features_dir:
        page.part("Model", "features in place of slides; the encoder is not used")
        return
    weights = model.weights or ("in the package" if row.key.startswith("demo") else "missing")
    page.part("Model", f"{row.key}, weights {weights}, {model.precision}")
    known = bool(row.prefix_tokens)
    if known and device == "cuda":
        check_card(page, config, setup)
    elif device == "cpu":
        page.part("Card", "no GPU is used: this machine's processor trains")
    found = None if not sound else sample(source, spread(sound))
    if not known or found is None:
        page.part("Time", "cannot be foretold: no slide could be indexed, or an unusual encoder")
        return
    counts = {split: len(cohort.split(split)) for split in ("train", "val", "test")}
    parameters = Footprint(row, source.tiles.tile_px).sizes("full")[0]
    flop = work(row, source.tiles.tile_px, setup)
    flops = rate(device, model.precision)
    made = forecast_run(counts, found, flop, flops, config, row, parameters, VIEWS)
    add_forecast(page, made, config)


def check_card(page: Page, config: Any, setup: Setup) -> None:
    """Add the GPU memory that the run takes; a fault if the card has less."""
    model, row, tile_px = config.model, find(config.model.model), config.data.tiles.tile_px
    card, total = card_memory(None)
    peak = max(forecast(row, tile_px, setup, model.chunk).values()) + CONTEXT_GIB
    page.part("Card", f"{card}: {peak:.1f} of {usable(total):.1f} usable GiB")
    if peak > usable(total):
        choice = make_plan(row, gpu=None, tile_px=tile_px).choice
        way = f"{choice.setup.flags} --model.chunk {choice.chunk}" if choice else "another card"
        page.faults.append(f"the run takes {peak:.1f} GiB of GPU memory; what fits: {way}")


def add_forecast(page: Page, made: Forecast, config: Any) -> None:
    """Add hours and bytes of the run; a fault for each disk with less room."""
    hours = ", ".join(f"{part} {_hours(value)}" for part, value in made.hours.items() if value)
    page.part(
        "Time",
        f"{_hours(sum(made.hours.values()))} in all, within a factor of two: {hours}",
        f"{made.tiles:,} tiles, by {config.data.workers} reading processes",
    )
    places = {"index": config.data.index_dir, "cache": config.data.cache_dir,
              "run": config.run_dir}  # fmt: skip
    needed, free = Counter(), {}
    for part, size in made.disk.items():
        if size and places[part]:
            path = Path(places[part]).absolute()
            there = next(each for each in (path, *path.parents) if each.exists())
            device = there.stat().st_dev
            free[device] = shutil.disk_usage(there).free
            needed[device] += size
    each = ", ".join(f"{part} {_size(size)}" for part, size in made.disk.items() if size)
    page.part("Disk", f"up to {each}; free {', '.join(_size(v) for v in free.values())}")
    for device, size in needed.items():
        if size > free[device]:
            page.faults.append(
                f"the disk has {_size(free[device])} free and the run takes up to {_size(size)}: "
                "free some, leave data.cache_dir out, or set data.cache_gb"
            )


def _mended(data: dict[str, Any]):
    folder = data["slides_dir"] and Path(data["slides_dir"])
    how = {"names": data["columns"], "values": data["values"], "labels": data["labels"]}
    return mend(Path(data["table"]), folder, **how)


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return "under a minute"
    return f"{60 * hours:.0f} min" if hours < 1.5 else f"{hours:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
