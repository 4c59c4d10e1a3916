"""The command line. Each verb imports what it needs when it runs, so `--help` is instant.

A fault that the user can mend is printed as one error, without a traceback, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

MASKS = "folder of <slide>.geojson or <slide>.png, to be taken for the tissue"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["fit"]:  # its arguments are Lightning's
            from tapfm.fit import run_fit

            return run_fit(argv[1:])
        if argv[:1] == ["fit-tiles"]:
            from tapfm.tile_fit import run_fit_tiles

            return run_fit_tiles(argv[1:])
        arguments = parser().parse_args(argv)
        return arguments.do(arguments)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("slides", "tapfm"):
            raise  # not one of ours: a fault of the program, with its traceback
        print(f"tapfm: {error}", file=sys.stderr)
        explain_config(argv, error)
        return 2


def explain_config(argv: Sequence[str], error: Exception) -> None:
    """A cohort that is not there yet: what its config says to put where."""
    from slides.errors import CohortError
    from tapfm.config import preamble

    configs = [Path(value) for key, value in pairwise(argv) if key == "--config"]
    if isinstance(error, CohortError) and configs:
        print(f"\n{configs[0]} says:\n{preamble(configs[0])}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """All verbs."""
    top = argparse.ArgumentParser(prog="tapfm", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="write the demo cohort: slides, table, truth masks")
    demo.add_argument("--out", type=Path, default=Path("data/demo"), help="folder (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="another seed is another cohort")
    demo.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    demo.set_defaults(do=run_demo)

    labels = verbs.add_parser("labels", help="a table of labels, or a cohort, from mutation data")
    labels.add_argument("--mutations", type=Path, required=True,
                        help="MAF, cBioPortal matrix or GigaPath's table; or .gz")  # fmt: skip
    labels.add_argument("--against", type=Path, default=None, help="a second one, to compare")
    labels.add_argument("--profiled", default=None, metavar="FILE",
                        help="who was sequenced: cases_sequenced.txt or a text with a sample a "
                        "line; `all`: everyone in the file")  # fmt: skip
    labels.add_argument("--genes", nargs="+", default=None, metavar="GENE[:RULE]",
                        help="columns of the table; the config's labels")  # fmt: skip
    labels.add_argument("--rule", default="nonsynonymous",
                        help="or truncating, hotspot, listed (%(default)s)")  # fmt: skip
    labels.add_argument("--manifest", type=Path, default=None, help="of a GDC download of slides")
    labels.add_argument("--slides", type=Path, default=None, help="its folder; the config's")
    labels.add_argument("--config", type=Path, action="append", help="YAML with a data part")
    labels.add_argument(
        "--out", type=Path, default=None, help="the table; with a manifest, the config's"
    )
    labels.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                        help="at a missing or damaged slide (%(default)s)")  # fmt: skip
    split_arguments(labels)
    labels.set_defaults(do=run_labels)

    split = verbs.add_parser("split", help="deal a cohort's cases anew: folds, repeats, sites")
    split.add_argument("--table", type=Path, required=True, help="the cohort's")
    split.add_argument("--out", type=Path, required=True, help="a .csv, or a folder for several")
    split.add_argument("--labels", nargs="+", default=None,
                       help="to stratify over; all; of survival TIME EVENT")  # fmt: skip
    split.add_argument("--task", default="multilabel", help="what they hold (%(default)s)",
                       choices=("multilabel", "multiclass", "regression", "survival"))  # fmt: skip
    split.add_argument("--folds", type=int, default=None, help="cross-validation")
    split.add_argument("--repeats", type=int, default=None, help="Monte-Carlo cross-validation")
    split.add_argument("--from", type=Path, default=None, dest="source",
                       help="a CLAM or Patho-Bench file to take the split from")  # fmt: skip
    split.add_argument("--fold", type=int, default=0, help="of a Patho-Bench file (%(default)s)")
    split.add_argument("--format", nargs="+", default=["table"], help="what to write: any of "
                       "table, clam, clam-bool, patho-bench",
                       choices=("table", "clam", "clam-bool", "patho-bench"))  # fmt: skip
    split_arguments(split)
    split.set_defaults(do=run_split)

    index = verbs.add_parser("index", help="find the tissue tiles of a cohort or of slides")
    index.add_argument("slides", nargs="*", type=Path, help="slides, where there is no --config")
    index.add_argument("--config", type=Path, action="append", help="YAML with a data part")
    index.add_argument("--out", type=Path, default=Path("data/index"), help="folder (%(default)s)")
    tile_arguments(index)
    index.add_argument("--workers", type=int, default=None, help="processes")
    index.add_argument("--on-error", choices=("stop", "skip"), default=None, help="at a bad slide")
    index.add_argument("--masks", type=Path, default=None, help=MASKS)
    index.add_argument("--coords", type=Path, default=None, help="folder of tiles that TRIDENT, "
                       "CLAM, AtlasPatch or hs2p chose, to take as they are")  # fmt: skip
    index.add_argument("--thumbnails", type=Path, default=None, help="folder for a picture a slide")
    index.set_defaults(do=run_index)

    plan = verbs.add_parser("plan", help="what fits on a GPU, before the run")
    plan.add_argument("--model", default="h_optimus_0", help="foundation model (%(default)s)")
    plan.add_argument("--gpu", type=float, default=24, help="GPU memory in GiB (%(default)s)")
    plan.add_argument("--tile-px", type=int, default=None, help="side of a tile; the model's own")
    plan.set_defaults(do=run_plan)

    probe = verbs.add_parser("probe", help="which blocks a cohort's labels pull at: n for last_n")
    probe.add_argument(
        "--config", type=Path, action="append", required=True, help="YAML, as of fit"
    )
    probe.add_argument("--out", type=Path, default=Path("probe"), help="folder (%(default)s)")
    probe.add_argument("--slides", type=int, default=32, help="training slides (%(default)s)")
    probe.add_argument("--epochs", type=int, default=3, help="of the trial fit (%(default)s)")
    probe.set_defaults(do=run_probe)

    fit = verbs.add_parser("fit", help="train; `tapfm fit --help` lists every key", add_help=False)
    fit.set_defaults(do=None)
    tiles = verbs.add_parser(
        "fit-tiles",
        help="train on labelled tiles, and compare; `tapfm fit-tiles --help` lists every key",
        add_help=False,
    )
    tiles.set_defaults(do=None)

    test = verbs.add_parser("test", help="runs against frozen baselines, with intervals")
    test.add_argument("--run", type=Path, required=True, help="folder of the cohort's runs")
    test.add_argument("--split", choices=("val", "test"), default="test", help="(%(default)s)")
    test.add_argument("--overlays", type=int, default=4, help="slides to draw (%(default)s)")
    test.add_argument("--features", type=Path, default=None,
                      help="frozen features that several folders share; <run>/frozen")  # fmt: skip
    test.set_defaults(do=run_test)

    study = verbs.add_parser("study", help="folds, seeds and strategies: one table, resumable")
    study.add_argument("study", nargs="?", type=Path, help="YAML with the keys below; flags win")
    study.add_argument("--config", action="append", help="the cohort's, and others behind it")
    study.add_argument("--out", default=None, help="folder of the study")
    study.add_argument(
        "--folds", type=int, default=None, help="cross-validation; the table's split"
    )
    study.add_argument("--fold-seed", type=int, default=None, help="another one is another deal")
    study.add_argument("--preserve-sites", action="store_true", default=None,
                       help="a site in one fold only")  # fmt: skip
    study.add_argument("--seeds", type=int, nargs="+", default=None, help="of training; 0")
    study.add_argument("--strategies", nargs="+", default=None, metavar="STRATEGY",
                       help="names, or configs to put behind; full")  # fmt: skip
    study.add_argument("--aggregators", nargs="+", default=None, help="tapfm_gated")
    study.add_argument("--jobs", type=int, default=None, help="fits at the same time; 1")
    study.set_defaults(do=run_study)

    report = verbs.add_parser("report", help="the runs' results, cases and settings as one page")
    report.add_argument("--run", type=Path, required=True, help="folder of the cohort's runs")
    report.add_argument("--split", choices=("val", "test"), default="test", help="(%(default)s)")
    report.set_defaults(do=run_report)

    for verb, text in (
        ("predict", "probabilities and tile weights of any slides"),
        ("heatmap", "predict, and draw: PNG overlay and GeoJSON for QuPath"),
    ):
        each = verbs.add_parser(verb, help=text)
        each.add_argument("slides", nargs="+", type=Path, help="slides")
        each.add_argument("--model", type=Path, required=True, help="best.safetensors of a run")
        each.add_argument("--out", type=Path, default=Path("predictions"), help="(%(default)s)")
        each.add_argument("--case", default=None, help="its name: these slides are one patient's")
        each.add_argument("--slide-mpp", type=float, default=None, help="where slides do not say")
        each.add_argument("--mpp", type=float, default=None, help="of the tiles; the model's own")
        each.add_argument("--masks", type=Path, default=None, help=MASKS)
        each.add_argument("--chunk", type=int, default=16, help="tiles at once (%(default)s)")
        each.add_argument("--workers", type=int, default=2, help="reading processes (%(default)s)")
        each.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
        each.set_defaults(do=run_predict, draw=verb == "heatmap")

    features = verbs.add_parser("features", help="features of every tile, for other tools to read")
    features.add_argument("slides", nargs="*", type=Path, help="slides, where there is no --config")
    features.add_argument("--config", type=Path, action="append", help="YAML with a data part")
    model_arguments(features)
    features.add_argument("--out", type=Path, default=None, help="job folder; the index's")
    features.add_argument("--name", default=None, help="of the encoder, in features_<name>")
    features.add_argument("--tile-px", type=int, default=None, help="side of a tile; the model's")
    features.add_argument("--mpp", type=float, default=None, help="of the tiles; the model's own")
    features.add_argument("--slide-mpp", type=float, default=None, help="where slides do not say")
    features.add_argument("--masks", type=Path, default=None, help=MASKS)
    features.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the files")
    features.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default=None,
                          help="of the encoder; the publisher's on a GPU, else fp32")  # fmt: skip
    features.add_argument("--chunk", type=int, default=16, help="tiles at once (%(default)s)")
    features.add_argument("--workers", type=int, default=None, help="reading processes")
    features.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
    features.set_defaults(do=run_features)

    pathpt = verbs.add_parser("pathpt", help="name every tile by learned prompts, from few slides")
    pathpt.add_argument("--config", type=Path, action="append", required=True,
                        help="YAML with a data part")  # fmt: skip
    pathpt.add_argument("--question", type=Path, required=True, help="YAML of classes and prompts")
    pathpt.add_argument("--out", type=Path, default=Path("runs/pathpt"), help="(%(default)s)")
    pathpt.add_argument("--seed", type=int, default=0, help="of draws and training (%(default)s)")
    pathpt.add_argument("--chunk", type=int, default=16, help="tiles at once (%(default)s)")
    pathpt.add_argument("--drawn", type=int, default=4, help="test slides to draw (%(default)s)")
    pathpt.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
    pathpt.set_defaults(do=run_pathpt)

    export = verbs.add_parser("export", help="an encoder as a plain timm model, for other tools")
    model_arguments(export)
    export.add_argument("--out", type=Path, required=True, help="folder")
    export.set_defaults(do=run_export)

    doctor = verbs.add_parser("doctor", help="what is installed, and whether a model loads right")
    doctor.add_argument("--model", default=None, help="foundation model to check")
    doctor.add_argument("--weights", default=None, help="its weights, as in model.weights")
    doctor.set_defaults(do=run_doctor)
    return top


def model_arguments(verb: argparse.ArgumentParser) -> None:
    """An encoder, as published or adapted."""
    verb.add_argument("--model", required=True, help="a model's key, or best.safetensors of a run")
    verb.add_argument("--weights", default=None, help="of a key, as in model.weights")


def tile_arguments(verb: argparse.ArgumentParser) -> None:
    """Tile geometry for slides without a config."""
    verb.add_argument("--tile-px", type=int, default=224, help="side of a tile (%(default)s)")
    verb.add_argument("--mpp", type=float, default=0.5, help="microns per tile pixel (%(default)s)")
    verb.add_argument("--slide-mpp", type=float, default=None, help="where slides do not say")


def split_arguments(verb: argparse.ArgumentParser) -> None:
    """How cases are dealt to train, val and test."""
    verb.add_argument("--fractions", type=float, nargs=3, default=(0.6, 0.2, 0.2), metavar="SHARE",
                      help="of the cases in train, val, test (%(default)s)")  # fmt: skip
    verb.add_argument("--preserve-sites", action="store_true", help="a site in one part only")
    verb.add_argument("--seed", type=int, default=0, help="another seed is another split")


def run_demo(arguments: argparse.Namespace) -> int:
    """`tapfm demo`."""
    marker = arguments.out / "seed.txt"  # written last: a cohort that has it is whole
    if marker.exists() and marker.read_text().strip() == str(arguments.seed):
        print(f"{arguments.out}: the demo cohort is there already; delete the folder to repaint it")
        return 0
    from slides.synthetic import write_demo

    marker.unlink(missing_ok=True)
    table = write_demo(arguments.out, arguments.seed, workers=arguments.workers)
    marker.write_text(f"{arguments.seed}\n")
    print(f"{table}: the demo cohort")
    return 0


def run_labels(arguments: argparse.Namespace) -> int:
    """`tapfm labels`."""
    from tapfm.config import ConfigError, read_data
    from tapfm.labels import Downloads, parse_genes, run_labels

    data = read_data(arguments.config) if arguments.config else {}
    folder = data.get("slides_dir")
    slides = arguments.slides or (Path(folder) if folder else None)
    if bool(arguments.manifest) != bool(slides if arguments.manifest else arguments.slides):
        raise ConfigError("labels: a manifest and its folder go together: --manifest and --slides")
    out = arguments.out
    if arguments.manifest and data:  # the config's table has a row a slide, so takes a manifest
        out = out or Path(data["table"])
    downloads = arguments.manifest and Downloads(
        arguments.manifest,
        slides,
        Path(folder) if folder else (out or Path(".")).parent,
        arguments.on_error,
        arguments.fractions,
        arguments.preserve_sites,
        arguments.seed,
    )
    sources = [arguments.mutations] + [arguments.against] * (arguments.against is not None)
    rules = parse_genes(arguments.genes or data.get("labels") or [], arguments.rule)
    return run_labels(sources, rules, arguments.profiled, downloads, out)


def run_split(arguments: argparse.Namespace) -> int:
    """`tapfm split`."""
    from tapfm.split import run_split

    return run_split(
        arguments.table,
        arguments.out,
        labels=arguments.labels,
        folds=arguments.folds,
        repeats=arguments.repeats,
        fractions=arguments.fractions,
        seed=arguments.seed,
        preserve_sites=arguments.preserve_sites,
        source=arguments.source,
        fold=arguments.fold,
        formats=arguments.format,
        task=arguments.task,
    )


def run_index(arguments: argparse.Namespace) -> int:
    """`tapfm index`."""
    from dataclasses import replace

    from slides.tissue import Tissue
    from tapfm.config import ConfigError, TileSettings, index_and_cache, read_source

    if bool(arguments.slides) == bool(arguments.config):
        raise ConfigError("index: give either slides or --config, and not both")
    if arguments.config:
        source = read_source(arguments.config)
    else:
        tiles = TileSettings(arguments.tile_px, arguments.mpp)
        source = loose_source(arguments, arguments.out, tiles)
    if arguments.workers is not None:
        source = replace(source, workers=arguments.workers)
    if arguments.on_error is not None:
        source = replace(source, on_error=arguments.on_error)
    if arguments.coords is not None:
        tissue = Tissue(coords=str(arguments.coords))  # in place of what finds tissue
        source = replace(source, tiles=replace(source.tiles, tissue=tissue))
    source = with_masks(source, arguments.masks)
    tiles, failed = index_and_cache(source, arguments.thumbnails)
    print(f"{len(source.rows) - len(failed)} slides, {tiles} tiles; {len(failed)} slides left out")
    for reason in failed.values():
        print(f"tapfm: {reason}", file=sys.stderr)
    return 2 if failed and not arguments.config else 0


def run_plan(arguments: argparse.Namespace) -> int:
    """`tapfm plan`."""
    from tapfm.plan import run_plan

    return run_plan(arguments.model, arguments.gpu, arguments.tile_px)


def run_probe(arguments: argparse.Namespace) -> int:
    """`tapfm probe`."""
    from tapfm.probe import run_probe

    return run_probe(arguments.config, arguments.out, arguments.slides, arguments.epochs)


def run_test(arguments: argparse.Namespace) -> int:
    """`tapfm test`."""
    from tapfm.evaluate import run_test

    return run_test(arguments.run, arguments.split, arguments.overlays, arguments.features)


def run_study(arguments: argparse.Namespace) -> int:
    """`tapfm study`."""
    from tapfm.study import read_study, run_study

    flags = {k: v for k, v in vars(arguments).items() if k not in ("verb", "do", "study")}
    return run_study(read_study(arguments.study, flags))


def run_report(arguments: argparse.Namespace) -> int:
    """`tapfm report`."""
    from tapfm.page import run_report

    return run_report(arguments.run, arguments.split)


def run_predict(arguments: argparse.Namespace) -> int:
    """`tapfm predict` and `tapfm heatmap`."""
    from tapfm.predict import predict_slides

    return predict_slides(
        arguments.model,
        loose_rows(arguments.slides, arguments.slide_mpp),
        arguments.out,
        case=arguments.case,
        mpp=arguments.mpp,
        masks=arguments.masks and str(arguments.masks),
        chunk=arguments.chunk,
        workers=arguments.workers,
        device=arguments.device,
        draw=arguments.draw,
    )


def run_features(arguments: argparse.Namespace) -> int:
    """`tapfm features`."""
    from dataclasses import replace

    from tapfm.config import ConfigError, read_source
    from tapfm.features import run_features, tiles_of

    if bool(arguments.slides) == bool(arguments.config):
        raise ConfigError("features: give either slides or --config, and not both")
    asked = {"tile_px": arguments.tile_px, "mpp": arguments.mpp}
    asked = {key: value for key, value in asked.items() if value is not None}
    if arguments.config:
        source = read_source(arguments.config)
        source = replace(source, tiles=replace(source.tiles, **asked))
    else:
        tiles = replace(tiles_of(arguments.model), **asked)
        source = loose_source(arguments, arguments.out or Path("data/index"), tiles)
    if arguments.workers is not None:
        source = replace(source, workers=arguments.workers)
    return run_features(
        with_masks(source, arguments.masks),
        arguments.model,
        arguments.weights,
        out=arguments.out,
        name=arguments.name,
        dtype=arguments.dtype,
        precision=arguments.precision,
        chunk=arguments.chunk,
        device=arguments.device,
    )


def run_pathpt(arguments: argparse.Namespace) -> int:
    """`tapfm pathpt`."""
    from tapfm.pathpt.run import run_pathpt

    return run_pathpt(
        arguments.config,
        arguments.question,
        arguments.out,
        seed=arguments.seed,
        chunk=arguments.chunk,
        drawn=arguments.drawn,
        device=arguments.device,
    )


def run_export(arguments: argparse.Namespace) -> int:
    """`tapfm export`."""
    from tapfm.export import run_export

    return run_export(arguments.model, arguments.weights, arguments.out)


def run_doctor(arguments: argparse.Namespace) -> int:
    """`tapfm doctor`."""
    from tapfm.doctor import run_doctor

    return run_doctor(arguments.model, arguments.weights)


def with_masks(source, masks: Path | None):
    """The same slides, their tissue taken from masks; None leaves it as it is."""
    from dataclasses import replace

    if masks is None:
        return source
    tissue = replace(source.tiles.tissue, masks=str(masks))
    return replace(source, tiles=replace(source.tiles, tissue=tissue))


def loose_source(arguments: argparse.Namespace, out: Path, tiles):
    """What `read_source` gives, from the arguments alone; a bad slide never stops the others."""
    from tapfm.config import Source

    rows = loose_rows(arguments.slides, arguments.slide_mpp)
    return Source(rows, out, None, tiles, "skip", 2)


def loose_rows(paths: Sequence[Path], mpp: float | None) -> list:
    """Slides without a table, as rows of one: named by their files, nothing known of them."""
    from slides.cohort import SlideRow
    from slides.reader import slide_stem

    return [SlideRow(slide_stem(p), slide_stem(p), p, "test", mpp, "", "", ()) for p in paths]
