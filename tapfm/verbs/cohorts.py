"""Verbs that make a cohort's table: `tapfm demo`, `labels`, `split`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from slides.demo import SLIDES
from tapfm.verbs import Do, at_least, config_flag


def demo(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm demo`; return its action."""
    add = verb.add_argument
    add("--out", type=Path, default=Path("data/demo"), help="folder (%(default)s)")
    add("--seed", type=int, default=0, help="another seed is another cohort")
    add("--slides", type=int, default=SLIDES, help="of all splits (%(default)s)")
    add("--workers", type=at_least(0), default=2, help="processes (%(default)s)")

    def do(out: Path, seed: int, slides: int, workers: int) -> int:
        marker = out / "seed.txt"  # written last: it marks a complete cohort
        asked = f"{seed}, {slides} slides"
        if marker.exists() and marker.read_text().strip() == asked:
            print(f"{out}: the demo cohort is there already; delete the folder to repaint it")
            return 0
        from slides.demo.cohort import write_demo

        marker.unlink(missing_ok=True)
        table = write_demo(out, seed, slides, workers)
        marker.write_text(f"{asked}\n")
        print(f"{table}: the demo cohort")
        return 0

    return do


def labels(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm labels`; return its action."""
    add = verb.add_argument
    add("--mutations", type=Path, required=True,
        help="MAF, cBioPortal matrix or GigaPath's table; or .gz")  # fmt: skip
    add("--against", type=Path, help="a second one, to compare")
    add("--profiled", metavar="FILE", help="who was sequenced: cases_sequenced.txt or a text with "
        "a sample a line; `all`: everyone in the file")  # fmt: skip
    add("--genes", nargs="+", metavar="GENE[:RULE]", help="columns of the table; the config's")
    add("--rule", default="nonsynonymous", help="or truncating, hotspot, listed (%(default)s)")
    add("--manifest", type=Path, help="of a GDC download of slides")
    add("--slides", type=Path, help="its folder; the config's")
    config_flag(verb)
    add("--out", type=Path, help="the table; with a manifest, the config's")
    add("--on-error", choices=("stop", "skip"), default="stop",
        help="at a missing or damaged slide (%(default)s)")  # fmt: skip
    split_flags(verb)

    def do(mutations, against, profiled, genes, rule, manifest, slides, config, out, on_error,
           **deal) -> int:  # fmt: skip
        from slides.errors import SettingsError
        from slides.labels.cohort_table import Downloads, parse_genes, run_labels
        from tapfm import __version__
        from tapfm.config import read_data

        data = read_data(config) if config else {}
        folder = data.get("slides_dir")
        if bool(manifest) != bool(slides or (manifest and folder)):
            raise SettingsError(
                "labels: --manifest and --slides go together and only one is given: give both"
            )
        slides = slides or (Path(folder) if folder else None)
        if manifest and data:  # the config's table has a row a slide, so takes a manifest
            out = out or Path(data["table"])
        beside = Path(folder) if folder else (out or Path(".")).parent
        downloads = manifest and Downloads(manifest, slides, beside, on_error, **deal)
        sources = [mutations] + [against] * (against is not None)
        rules = parse_genes(genes or data.get("labels") or [], rule)
        return run_labels(sources, rules, profiled, downloads, out, f"tapfm {__version__}")

    return do


def split(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm split`; return its action."""
    add = verb.add_argument
    config_flag(verb)
    add("--table", type=Path, help="the cohort's; the config's")
    add("--out", type=Path, required=True, help="a .csv, or a folder for several")
    add("--slides-dir", help="of relative paths, which then stay as they are; the config's")
    add("--labels", nargs="+", help="to stratify over; the config's, all; of survival TIME EVENT")
    add("--task", help="what they hold, as data.task; the config's, multilabel")
    add("--missing", nargs="+", help="words for unknown, as data.missing; the config's")
    add("--folds", type=int, help="cross-validation")
    add("--repeats", type=int, help="Monte-Carlo cross-validation")
    add("--from", type=Path, dest="source", metavar="FILE",
        help="CLAM's, Patho-Bench's or STAMP's to take the split from")  # fmt: skip
    add("--fold", type=int, default=0, help="of Patho-Bench's or STAMP's file (%(default)s)")
    add("--format", nargs="+", default=["table"], dest="formats", help="what to write: any of "
        "these", choices=("table", "clam", "clam-bool", "patho-bench", "stamp"))  # fmt: skip
    split_flags(verb)

    def do(config, table, slides_dir, labels, task, missing, **deal) -> int:
        from slides.cohort.resplit import run_split
        from slides.errors import SettingsError
        from tapfm.config import read_data, spelling_of

        if not config and not table:
            raise SettingsError("split: give --table of a cohort, or --config of a run")
        flags = {"table": table and str(table), "slides_dir": slides_dir, "labels": labels,
                 "task": task, "missing": missing}  # fmt: skip
        data = read_data(config) if config else {}
        data |= {key: value for key, value in flags.items() if value}
        of_config = {"task": data.get("task") or "multilabel", "slides_dir": data.get("slides_dir")}
        return run_split(
            Path(data["table"]), labels=data.get("labels"), **of_config, **spelling_of(data), **deal
        )

    return do


def split_flags(verb: ArgumentParser) -> None:
    """Add the flags of the split of cases into train, val and test."""
    add = verb.add_argument
    add("--fractions", type=float, nargs=3, default=(0.6, 0.2, 0.2), metavar="SHARE",
        help="of the cases in train, val, test (%(default)s)")  # fmt: skip
    add("--preserve-sites", action="store_true", help="a site in one part only")
    add("--seed", type=int, default=0, help="another seed is another split")
