"""Verbs that read slides: index, predict, heatmap, features, embed, histaug, view, export."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tapfm.verbs import Do, at_least, config_flag, device, device_flags, later
from tapfm.verbs.launched import (
    FLAGS,
    chosen,
    launch_predictions,
    launch_source,
    launcher_flags,
)

if TYPE_CHECKING:
    from slides.streaming.settings import Source, TileSettings


def index(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm index`; return its action."""
    add = verb.add_argument
    source_flags(verb, "the config's; 224 and 0.5")
    add("--out", type=Path, default=Path("data/index"), help="folder (%(default)s)")
    add("--on-error", choices=("stop", "skip"), help="at a bad slide")
    add("--segmenter", choices=("slidesegmenter",), help="find tissue by this installed network; "
        "its masks are kept in --masks, or in OUT/masks_<name>")  # fmt: skip
    add("--coords", type=Path, help="folder of tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose, "
        "to take as they are")  # fmt: skip
    add("--thumbnails", type=Path, help="folder for a picture a slide")
    launcher_flags(verb)

    def do(**flags) -> int:
        from slides.tiling.index_file import index_path

        own = {key: value for key, value in flags.items() if key not in FLAGS}
        if flags["launcher"] is None:
            return index_here(**own)
        source = index_source(**own)
        pattern = str(index_path(source.index_dir, source.tiles.grid, "{slide_id}"))
        return launch_source(verb, flags, source, source.index_dir, pattern)

    return do


def index_source(
    out: Path, on_error: str | None, coords: Path | None, thumbnails: Path | None,
    segmenter: str | None = None, **given,
) -> Source:  # fmt: skip
    """Return the slides and tiles that `tapfm index` was asked for; masks of a segmenter are made.

    Raises:
        SettingsError: there is no such segmenter, or coordinates are given as well.
    """
    from dataclasses import replace

    from slides.streaming.settings import TileSettings
    from slides.tiling.tissue import Tissue

    source = source_of("index", out, TileSettings, **given)
    if segmenter:
        from slides.errors import SettingsError
        from slides.tiling.segmenter import write_masks

        if coords:
            raise SettingsError("index: --coords are tiles as they are: leave --segmenter out")
        folder = Path(given["masks"] or source.index_dir / f"masks_{segmenter}")
        write_masks([(r.slide_id, r.path, r.mpp) for r in source.rows], folder, segmenter)
        tissue = replace(source.tiles.tissue, masks=str(folder))
        source = replace(source, tiles=replace(source.tiles, tissue=tissue))
    if coords:  # instead of tissue detection
        tissue = Tissue(coords=str(coords), masks=given["masks"])
        source = replace(source, tiles=replace(source.tiles, tissue=tissue))
    return replace(source, on_error=on_error or source.on_error)


def index_here(thumbnails: Path | None, **given) -> int:
    """Index slides in this process and its workers; return 0, or 2 if a slide by name failed."""
    from slides.streaming.settings import index_and_cache

    source = index_source(thumbnails=thumbnails, **given)
    tiles, failed = index_and_cache(source, thumbnails)
    kept = len(source.rows) - len(failed)
    print(f"{kept} slides, {tiles} tiles; {len(failed)} slides left out{by_split(source, failed)}")
    return 2 if failed and given["slides"] else 0


def by_split(source: Source, failed: Mapping[str, str]) -> str:
    """Return how many slides of each split are left out, in brackets; "" if none is."""
    splits = [row.split for row in source.rows]
    lost = [row.split for row in source.rows if row.slide_id in failed]
    counts = [f"{lost.count(each)} of {splits.count(each)} {each}" for each in dict.fromkeys(lost)]
    return f" ({', '.join(counts)})" if any(lost) else ""


def predict(verb: ArgumentParser, draw: bool = False) -> Do:
    """Add the flags of `tapfm predict`, or with `draw` of `tapfm heatmap`; return its action."""
    add = verb.add_argument
    add("slides", nargs="+", type=Path, help="slides")
    add("--model", type=Path, required=True, dest="path",
        help="best.safetensors of a run, or pathpt.safetensors")  # fmt: skip
    add("--out", type=Path, default=Path("predictions"), help="folder (%(default)s)")
    add("--case", help="its name: these slides are one patient's")
    tile_flags(verb, "the model's own")
    add("--workers", type=at_least(0), default=2, help="reading processes (%(default)s)")
    device_flags(verb)
    launcher_flags(verb)

    def do(slides: Sequence[Path], slide_mpp: float | None, **given) -> int:
        from slides.errors import SettingsError
        from slides.streaming.loose_slides import rows_of_files
        from tapfm.pathpt.model import is_pathpt

        if given["launcher"] is not None:
            return launch_predictions(verb, {"slides": slides, "slide_mpp": slide_mpp, **given})
        given = {key: value for key, value in given.items() if key not in FLAGS}
        out, masks = given["out"], given["masks"]
        if draw and masks and out.resolve() == Path(masks).resolve():
            raise SettingsError(
                f"heatmap: --out {out} is the folder of the masks, and pictures and outlines of "
                "the same names would overwrite them. Give another --out."
            )
        if is_pathpt(given["path"]):
            from tapfm.pathpt.new_slides import name_slides as predict_slides
        else:
            from tapfm.inference.predict import predict_slides
        return predict_slides(rows=rows_of_files(slides, slide_mpp), draw=draw, **given)

    return do


def heatmap(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm heatmap`; return its action."""
    return predict(verb, draw=True)


def features(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm features`; return its action."""
    add = verb.add_argument
    source_flags(verb, "the config's or model's own")
    encoder_flags(verb)
    add("--out", type=Path, help="job folder; the index's")
    add("--name", help="of the encoder, in features_<name>")
    add("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the files (%(default)s)")
    add("--precision", choices=("fp32", "fp16", "bf16"),
        help="of the encoder; the publisher's on a GPU, else fp32")  # fmt: skip
    add("--format", nargs="+", default=(), dest="formats",
        choices=("trident", "clam", "stamp", "pt", "csv"),
        help="write them also as these programs read them")  # fmt: skip
    device_flags(verb)
    launcher_flags(verb)
    rest = ("name", "dtype", "precision", "chunk", "device", "weights", "formats")

    def do(model: str, out: Path | None, **given) -> int:
        from tapfm.frozen.features import run_features, tiles_of

        flags = {"model": model, "out": out, **given}
        how = {key: given.pop(key) for key in rest}
        given = {key: value for key, value in given.items() if key not in FLAGS}
        source = source_of("features", out or Path("data/index"), lambda: tiles_of(model), **given)
        if flags["launcher"] is not None:
            folder = out or source.index_dir
            pattern = folder / source.tiles.grid.tag / "features_*" / "{slide_id}.h5"
            return launch_source(verb, flags, source, folder, str(pattern))
        return run_features(source, model, out=out, **how)

    return do


def embed(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm embed`; return its action."""
    add = verb.add_argument
    add("--slide-encoder", required=True,
        help="titan, prism, care, madeleine or moozy; or the folder of a run")  # fmt: skip
    add("--weights", type=Path, help="its publisher's files; none of a run")
    add("--trust-code", action="store_true", help="run the code that comes with them")
    add("--features", type=Path, help="folder of tiles' features; the config's data.features_dir")
    config_flag(verb)
    add("--out", type=Path, help="folder; slide_features_<encoder> beside that of the features")
    add("--on-error", choices=("stop", "skip"), help="at a bad slide; the config's, or stop")
    add("--device", type=device, help="cuda or cpu; cuda where there is one")

    def do(config: Sequence[Path] | None, features: Path | None, on_error, **given) -> int:
        from slides.errors import SettingsError
        from tapfm.config import read_data, read_source
        from tapfm.frozen.slide_embeddings import rows_of_folder, run_embed

        data = read_data(config) if config else {}
        if not features and not data.get("features_dir"):
            raise SettingsError(
                "embed: give --features, the folder of tiles' features, or a --config with "
                "data.features_dir"
            )
        features = features or Path(data["features_dir"])
        rows = read_source(config).rows if config else rows_of_folder(features)
        on_error = on_error or data.get("on_error", "stop")
        return run_embed(features=features, rows=rows, on_error=on_error, **given)

    return do


def histaug(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm histaug`; return its action."""
    add = verb.add_argument
    source_flags(verb, "the config's or model's own")
    encoder_flags(verb)
    add("--out", type=Path, required=True, help="the network's file")
    add("--steps", type=at_least(1), default=2000, help="of training (%(default)s)")
    add("--batch", type=at_least(1), default=32, help="tiles of a step (%(default)s)")
    add("--tiles", type=at_least(2), default=2048, help="to train on (%(default)s)")
    add("--colour", type=float, default=0.2, help="largest change of colour (%(default)s)")
    add("--seed", type=int, default=0, help="of tiles and changes (%(default)s)")
    add("--device", type=device, help="cuda or cpu; cuda where there is one")
    rest = ("weights", "out", "steps", "batch", "tiles", "colour", "seed", "device")

    def do(model: str, **given) -> int:
        from tapfm.frozen.augmenter import run_histaug
        from tapfm.frozen.features import tiles_of

        how = {key: given.pop(key) for key in rest}
        source = source_of("histaug", Path("data/index"), lambda: tiles_of(model), **given)
        return run_histaug(source, model, **how)

    return do


def export(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm export`; return its action."""
    encoder_flags(verb)
    verb.add_argument("--out", type=Path, required=True, help="folder")
    verb.add_argument("--format", choices=("timm", "onnx", "torchscript", "peft"), default="timm",
        dest="form", help="timm: the encoder; onnx, torchscript: with the aggregator; peft: the "
        "adapter of lora or dora (%(default)s)")  # fmt: skip
    return later("tapfm.inference.export:run_export")


def view(verb: ArgumentParser) -> Do:
    """Add the flags of `tapfm view`; return its action."""
    add = verb.add_argument
    add("run", type=Path, help="folder of a run that was tested")
    add("--split", choices=("val", "test"), default="test", help="(%(default)s)")
    add("--port", type=at_least(0), default=8765, help="of 127.0.0.1; 0 is any (%(default)s)")
    add("--static", type=Path, help="folder for the page as files, to send; nothing is served")
    add("--static-px", type=at_least(256), default=4096, dest="side",
        help="longest side of the slides in files (%(default)s)")  # fmt: skip
    return later("tapfm.viewer.server:run_view")


def encoder_flags(verb: ArgumentParser) -> None:
    """Add the flags of an encoder, published or adapted."""
    verb.add_argument("--model", required=True, help="a model's key, or best.safetensors of a run")
    verb.add_argument("--weights", help="of a key, as in model.weights")


def tile_flags(verb: ArgumentParser, otherwise: str) -> None:
    """Add the flags of resolution and tissue masks."""
    add = verb.add_argument
    add("--mpp", type=float, help=f"microns per tile pixel; {otherwise}")
    add("--slide-mpp", type=float, help="where slides do not say")
    add("--masks", help="folder of <slide>.geojson or <slide>.png, to be taken for the tissue")


def source_flags(verb: ArgumentParser, otherwise: str) -> None:
    """Add the flags that `source_of` takes."""
    add = verb.add_argument
    add("slides", nargs="*", type=Path, help="slides, where there is no --config")
    config_flag(verb)
    add("--tile-px", type=int, help=f"side of a tile; {otherwise}")
    tile_flags(verb, otherwise)
    add("--workers", type=at_least(0), help="reading processes; the config's, or 2")
    add("--only", nargs="+", metavar="SLIDE", help="slides of the config, by slide_id")


def source_of(
    verb: str,
    out: Path,
    tiles: Callable[[], TileSettings],
    slides: Sequence[Path],
    config: Sequence[Path] | None,
    slide_mpp: float | None,
    masks: str | None,
    workers: int | None,
    only: Sequence[str] | None = None,
    **asked: float | None,
) -> Source:
    """Return slides and tiles of a config, or of single slides, where a bad one stops no other.

    `out` is the index folder of single slides, `tiles` their tile settings, before flags.
    """
    from dataclasses import replace

    from slides.errors import SettingsError
    from slides.streaming.loose_slides import rows_of_files
    from slides.streaming.settings import Source
    from tapfm.config import read_source

    if bool(slides) == bool(config):
        raise SettingsError(f"{verb}: give either slides or --config, and not both")
    if only and not config:
        raise SettingsError(f"{verb}: --only names slides of a --config: give their files instead")
    if config:
        source = read_source(config)
        source = replace(source, rows=chosen(source.rows, only))
    else:
        source = Source(rows_of_files(slides, slide_mpp), out, None, tiles(), "skip", 2)
    changes = {key: value for key, value in asked.items() if value is not None}
    if masks:
        changes["tissue"] = replace(source.tiles.tissue, masks=masks)
    workers = source.workers if workers is None else workers
    return replace(source, tiles=replace(source.tiles, **changes), workers=workers)
