"""`tapfm embed`: one vector a slide by a slide encoder that others have trained, or by a run.

    <job>/features_conch_v15/<slide>.h5          features of tiles, by whatever program
    <job>/slide_features_titan/<slide>.h5        `features` (E,), as TRIDENT lays them out

`tapfm test --slide-features FOLDER` adds a linear probe on them to a report, paired with the runs;
`data.features_dir: FOLDER` is a cohort on them, and `FOLDER,FOLDER` a mixture of several: with
`model.aggregator: gated` a learned gate weighs the encoders slide by slide, and each has a linear
layer of its own. Runs are encoders as well (`--slide-encoder RUN`), so that models of other cancers
can be the frozen sources of a new one's. A file is whole or not there; run again, what is
there and of the same weights and tiles is kept.

Price: one forward pass of the slide encoder a slide.
Condition: features of the tile encoder and tiles that the slide encoder was trained on; others are
    refused, as far as their files tell.

Source: Path-PKT (Liu et al. 2025, arXiv 2508.02282), a mixture of frozen source models.
Differs: the gate sees the sources' vectors, where theirs sees the tiles; every source takes part,
    where theirs takes the five of largest weight and adds terms that keep all in use; experts are
    linear, without a ReLU.

Shapes: T tiles of a slide, E numbers of a slide.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from slides.cohort.table import SlideRow
from slides.errors import FeatureFileError, SettingsError, SlideError
from slides.hdf5 import open_h5, writing_h5
from slides.progress import progress_bar
from tapfm import __version__
from tapfm.data.bag import Places
from tapfm.data.feature_files import SlideFeatures, read_slide
from tapfm.data.feature_source import slide_mpp
from tapfm.slide_encoders.opened import OpenedEncoder, open_slide_encoder
from tapfm.slide_encoders.registry import SlideEncoder, find
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import load, read_model_config


def run_embed(
    slide_encoder: str,
    weights: Path | None,
    features: Path,
    rows: Sequence[SlideRow],
    *,
    out: Path | None = None,
    trust_code: bool = False,
    on_error: str = "stop",
    device: str | None = None,
) -> int:
    """Write a vector a slide; return 0, or 2 if a slide was left out.

    Args:
        slide_encoder: key of a row of `slide_encoders.registry`, or the folder of a run.
        weights: its publisher's files; None of a run.
        features: folder of tiles' features, as `data.features_dir`.
        rows: the slides.
        out: folder for the vectors; None is `slide_features_<key>` beside that of the features.
        trust_code: run the code that comes with the weights.
        on_error: `stop` at a slide's fault, or `skip` it.
        device: where to; None is CUDA where there is one.

    Raises:
        SettingsError: no such encoder, its files are not as they should be, or no such folder.
        FeatureFileError: with `stop`, the first slide's fault.
    """
    if not features.is_dir():
        raise SettingsError(f"embed: there is no folder {features}. Correct --features.")
    opened = open_any(slide_encoder, weights, trust_code)
    row = opened.row
    opened.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out, mark = out or features.resolve().parent / f"slide_features_{row.key}", opened.fingerprint
    kept, unnamed, failed = 0, 0, {}
    for each in progress_bar(rows, row.key, unit="slide", disable=None):
        try:
            found = read_slide(features, each.slide_id, partial(slide_mpp, each), each.path)
            path, unnamed = out / f"{each.slide_id}.h5", unnamed + (not found.encoder)
            if is_there(path, mark, len(found)):
                kept += 1
            else:
                write_vector(path, opened, found, mark, slide_mpp(each))
        except SlideError as fault:
            if on_error != "skip":
                raise
            failed[each.slide_id] = str(fault)
    for reason in failed.values():
        print(f"tapfm: {reason}", file=sys.stderr)
    if unnamed:
        print(f"features of {unnamed} slides name no encoder: taken for {row.tile_encoder}'s")
    print(
        f"{out}: {len(rows) - len(failed)} slides, {row.dim} numbers each; {kept} were there "
        f"already; {row.key} {mark}, licence {row.licence}"
    )
    return 2 if failed else 0


def open_any(slide_encoder: str, weights: Path | None, trust_code: bool) -> OpenedEncoder:
    """Return a published slide encoder, or that of a run.

    Raises:
        SettingsError: no such encoder, or it has no files.
        CheckpointError: no model of slides is in the folder.
    """
    run = Path(slide_encoder)
    path = run / "best.safetensors" if run.is_dir() else run
    if path.is_file():
        return open_run(path)
    row = find(slide_encoder)
    print(f"{row.key}: {row.terms}; for {row.needs}", file=sys.stderr)
    if weights is None:
        raise SettingsError(f"{row.key}: give --weights: {row.files}, from {row.page}.")
    return open_slide_encoder(row, weights, trust_code)


def open_run(path: Path) -> OpenedEncoder:
    """Return the aggregator of a run as a slide encoder, for features of the run's encoder.

    Of a run on features the tiles' size is not compared: its config need not say it.

    Raises:
        CheckpointError: the file is no model of slides.
    """
    config, facts = read_model_config(path)
    model = load(path)
    if config.features:
        encoder, also, mpps = config.features.get("encoder", ""), (), ()
        extract = f"--model {encoder}" if encoder else ""
    else:  # as `tapfm features` names an adapted encoder, and a published one
        encoder = f"{config.model}_{str(facts.get('fingerprint'))[:8]}"
        also = (config.model,) if config.strategy["name"] == "frozen" else ()
        mpps, extract = (config.mpp,), f"--model {path}"
    dim = model.encoder.dim
    one = TileSet.of(
        Places.of([torch.zeros(1, 2)], [1.0], 1.0), torch.zeros(1, dim), torch.zeros(1)
    )
    with torch.inference_mode():
        width = len(model.aggregator(one).embedding_E)
    row = SlideEncoder(
        path.parent.name, str(path), "that of its tile encoder", False, encoder, also, dim,
        config.tile_px, mpps, width, str(path), config.aggregator["name"],
        coords=model.aggregator.uses_coords, extract=extract,
    )  # fmt: skip
    return OpenedEncoder(row, model.aggregator)


def write_vector(
    path: Path, opened: OpenedEncoder, found: SlideFeatures, mark: str, mpp0: float | None
) -> None:
    """Encode a slide and write its file.

    Args:
        path: of the file.
        opened: the slide encoder.
        found: features of the slide's tiles.
        mark: the slide encoder's fingerprint.
        mpp0: microns per level-0 pixel of the slide; None is unknown.

    Raises:
        FeatureFileError: the features are not those that the slide encoder is for.
    """
    row = opened.row
    check_features(row, found, mpp0)
    where = None if found.coords0 is None else torch.from_numpy(found.coords0)
    if getattr(opened.model, "uses_score", False) and found.score_T is None:
        raise FeatureFileError(
            f"{found.slide_id}: {found.path} has no CLS scores, which {row.key} looks at. Extract "
            "them with `tapfm features`."
        )
    vector_E = opened.encode(found.z_TD, where, found.step0, found.score_T)
    with writing_h5(path) as file:
        features = file.create_dataset("features", data=vector_E.numpy())
        features.attrs.update(
            encoder=row.key, fingerprint=mark, precision="fp32", licence=row.licence,
            tile_encoder=found.encoder or "not stated", tiles=len(found), name=found.slide_id,
            writer=f"tapfm {__version__}",
        )  # fmt: skip


def check_features(row: SlideEncoder, found: SlideFeatures, mpp0: float | None) -> None:
    """Refuse features that a slide encoder is not for.

    Raises:
        FeatureFileError: they are of another encoder, width or tile size, or lack coordinates.
    """
    there = found.coords0 is not None
    side_um = found.size0 * mpp0 if mpp0 and there and found.writer != "CLAM" else None
    if why := row.fault(found.encoder, found.z_TD.shape[1], side_um, there):
        how = f"`tapfm features {row.extract}`" if row.extract else "TRIDENT"
        raise FeatureFileError(
            f"{found.slide_id}: {found.path} has {why}, and {row.key} is for {row.needs}. Extract "
            f"them with {how}."
        )


def is_there(path: Path, mark: str, tiles: int) -> bool:
    """Return whether a file holds the vector of these weights and as many tiles.

    Raises:
        SettingsError: another program's file is there, or other weights'.
    """
    if not path.exists():
        return False
    attrs: dict = {}
    with suppress(OSError, KeyError), open_h5(path) as file:
        attrs = dict(file["features"].attrs)
    if attrs.get("fingerprint") != mark:
        raise SettingsError(
            f"embed: {path} is of other weights ({attrs.get('fingerprint', 'not stated')}, now "
            f"{mark}), of another program, or damaged. Give another --out, or delete {path.parent}."
        )
    return int(attrs.get("tiles", -1)) == tiles


def rows_of_folder(features: Path) -> list[SlideRow]:
    """Return a row for each feature file of a folder, of which nothing else is known.

    Raises:
        FeatureFileError: there is none.
    """
    names = {path.stem for below in ("", "h5_files", "pt_files") for end in ("h5", "pt")
             for path in (features / below).glob(f"*.{end}")}  # fmt: skip
    if not names:
        raise FeatureFileError(f"embed: {features} has no .h5 or .pt file. Correct --features.")
    return [SlideRow(name, name, Path(name), "test", None, "", "", ()) for name in sorted(names)]
