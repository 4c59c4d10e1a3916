"""Verbs that read slides: `tapfm index`, `predict`, `heatmap`, `features`; beside it `export`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tapfm.verbs import Do, at_least, config_flag, device_flags, later

if TYPE_CHECKING:
    from slides.cohort.table import SlideRow
    from slides.streaming.settings import Source, TileSettings


def index(verb: ArgumentParser) -> Do:
    """`tapfm index`."""
    add = verb.add_argument
    source_flags(verb, "the config's; 224 and 0.5")
    add("--out", type=Path, default=Path("data/index"), help="folder (%(default)s)")
    add("--on-error", choices=("stop", "skip"), help="at a bad slide")
    add("--coords", type=Path, help="folder of tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose, "
        "to take as they are")  # fmt: skip
    add("--thumbnails", type=Path, help="folder for a picture a slide")

    def do(out: Path, on_error: str | None, coords: Path | None, thumbnails: Path | None, **given):
        from dataclasses import replace

        from slides.streaming.settings import TileSettings, index_and_cache
        from slides.tiling.tissue import Tissue

        source = source_of("index", out, TileSettings, **given)
        if coords:  # in place of what finds tissue
            tissue = Tissue(coords=str(coords), masks=given["masks"])
            source = replace(source, tiles=replace(source.tiles, tissue=tissue))
        source = replace(source, on_error=on_error or source.on_error)
        tiles, failed = index_and_cache(source, thumbnails)
        kept = len(source.rows) - len(failed)
        print(f"{kept} slides, {tiles} tiles; {len(failed)} slides left out")
        for reason in failed.values():
            print(f"tapfm: {reason}", file=sys.stderr)
        return 2 if failed and given["slides"] else 0

    return do


def predict(verb: ArgumentParser, draw: bool = False) -> Do:
    """`tapfm predict`; drawn, `tapfm heatmap`."""
    add = verb.add_argument
    add("slides", nargs="+", type=Path, help="slides")
    add("--model", type=Path, required=True, dest="path",
        help="best.safetensors of a run, or pathpt.safetensors")  # fmt: skip
    add("--out", type=Path, default=Path("predictions"), help="folder (%(default)s)")
    add("--case", help="its name: these slides are one patient's")
    tile_flags(verb, "the model's own")
    add("--workers", type=at_least(0), default=2, help="reading processes (%(default)s)")
    device_flags(verb)

    def do(slides: Sequence[Path], slide_mpp: float | None, **given) -> int:
        from slides.errors import SettingsError
        from tapfm.pathpt.model import is_pathpt

        out, masks = given["out"], given["masks"]
        if draw and masks and out.resolve() == Path(masks).resolve():
            raise SettingsError(
                f"heatmap: {out} is the folder of the masks, and pictures and outlines of the "
                "same names would take their place. Give another --out."
            )
        if is_pathpt(given["path"]):
            from tapfm.pathpt.new_slides import predict_slides
        else:
            from tapfm.inference.predict import predict_slides
        return predict_slides(rows=loose_rows(slides, slide_mpp), draw=draw, **given)

    return do


def heatmap(verb: ArgumentParser) -> Do:
    """`tapfm heatmap`."""
    return predict(verb, draw=True)


def features(verb: ArgumentParser) -> Do:
    """`tapfm features`."""
    add = verb.add_argument
    source_flags(verb, "the config's or model's own")
    encoder_flags(verb)
    add("--out", type=Path, help="job folder; the index's")
    add("--name", help="of the encoder, in features_<name>")
    add("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the files (%(default)s)")
    add("--precision", choices=("fp32", "fp16", "bf16"),
        help="of the encoder; the publisher's on a GPU, else fp32")  # fmt: skip
    device_flags(verb)
    rest = ("name", "dtype", "precision", "chunk", "device", "weights")

    def do(model: str, out: Path | None, **given) -> int:
        from tapfm.frozen.features import run_features, tiles_of

        how = {key: given.pop(key) for key in rest}
        source = source_of("features", out or Path("data/index"), lambda: tiles_of(model), **given)
        return run_features(source, model, out=out, **how)

    return do


def export(verb: ArgumentParser) -> Do:
    """`tapfm export`."""
    encoder_flags(verb)
    verb.add_argument("--out", type=Path, required=True, help="folder")
    return later("tapfm.inference.export:run_export")


def encoder_flags(verb: ArgumentParser) -> None:
    """An encoder, as published or adapted."""
    verb.add_argument("--model", required=True, help="a model's key, or best.safetensors of a run")
    verb.add_argument("--weights", help="of a key, as in model.weights")


def tile_flags(verb: ArgumentParser, otherwise: str) -> None:
    """How far apart the tiles are, and where tissue is."""
    add = verb.add_argument
    add("--mpp", type=float, help=f"microns per tile pixel; {otherwise}")
    add("--slide-mpp", type=float, help="where slides do not say")
    add("--masks", help="folder of <slide>.geojson or <slide>.png, to be taken for the tissue")


def source_flags(verb: ArgumentParser, otherwise: str) -> None:
    """What `source_of` takes."""
    add = verb.add_argument
    add("slides", nargs="*", type=Path, help="slides, where there is no --config")
    config_flag(verb)
    add("--tile-px", type=int, help=f"side of a tile; {otherwise}")
    tile_flags(verb, otherwise)
    add("--workers", type=at_least(0), help="reading processes; the config's, or 2")


def source_of(
    verb: str,
    out: Path,
    tiles: Callable[[], TileSettings],
    slides: Sequence[Path],
    config: Sequence[Path] | None,
    slide_mpp: float | None,
    masks: str | None,
    workers: int | None,
    **asked: float | None,
) -> Source:
    """Slides and tiles of a config, or loose ones, of which a bad one never stops the others.

    The flags are the last; `out` is loose slides' index folder, `tiles` theirs where no flag says.
    """
    from dataclasses import replace

    from slides.errors import SettingsError
    from slides.streaming.settings import Source
    from tapfm.config import read_source

    if bool(slides) == bool(config):
        raise SettingsError(f"{verb}: give either slides or --config, and not both")
    if config:
        source = read_source(config)
    else:
        source = Source(loose_rows(slides, slide_mpp), out, None, tiles(), "skip", 2)
    changes = {key: value for key, value in asked.items() if value is not None}
    if masks:
        changes["tissue"] = replace(source.tiles.tissue, masks=masks)
    workers = source.workers if workers is None else workers
    return replace(source, tiles=replace(source.tiles, **changes), workers=workers)


def loose_rows(paths: Sequence[Path], mpp: float | None) -> list[SlideRow]:
    """Slides without a table, as rows of one: named by their files, nothing known of them.

    Raises:
        SettingsError: two have one name.
    """
    from slides.cohort.table import SlideRow
    from slides.errors import SettingsError
    from slides.wsi.reader import slide_stem

    named: dict[str, Path] = {}
    for path in paths:
        if (other := named.setdefault(slide_stem(path), path)) is not path:
            raise SettingsError(
                f"{slide_stem(path)}: {other} and {path} are both called so, and what is written "
                "of one would take the other's place. Rename one, or run them apart, each with "
                "its own --out."
            )
    return [SlideRow(name, name, path, "test", mpp, "", "", ()) for name, path in named.items()]
