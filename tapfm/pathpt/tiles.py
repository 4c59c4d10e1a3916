"""The slides of a question: features, places, and pixels if asked for.

Features are read from files of `tapfm features`, or written there; the teacher's head maps them to
the joint space. With a student (another encoder) both encoders' features are kept.

Price: one forward pass a tile, once; the features of all the question's slides in memory.

Shapes: N tiles, C tiles of a chunk, D features, d joint width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slides.cohort.table import SlideRow
from slides.streaming.settings import Source, index_and_cache
from slides.streaming.tile_source import TileSource
from tapfm.data.bag import Tiles
from tapfm.encoders import backbones
from tapfm.encoders.fingerprint import state_fingerprint
from tapfm.engine.chunked import encode_bag
from tapfm.frozen.features import Extraction, extract, read_features
from tapfm.pathpt.question import QuestionError
from tapfm.pathpt.spatial import places
from tapfm.pathpt.text.keep import load_keep
from tapfm.pathpt.text.towers import VisionLanguage
from tapfm.pathpt.text.words import load_demo


@dataclass(frozen=True)
class EncodedSlide:
    """One slide of the question."""

    row: SlideRow
    subtype: int
    joint_Nd: Tensor
    """Tiles in the teacher's joint space."""
    z_Nd: Tensor
    """Tiles of the learning image tower: the same, or another encoder's features."""
    places_N2: Tensor


@dataclass(frozen=True)
class Towers:
    """The teacher, and the student: the encoder that learns from it, if another."""

    teacher: VisionLanguage | None
    """None beside a trained student."""
    student: backbones.Encoder | None
    device: str

    @property
    def encoder(self) -> backbones.Encoder:
        """Return the image tower of the features."""
        return self.student or self.teacher.encoder

    def encode(self, tiles_CP: Tensor) -> Tensor:
        """Return the model's input vectors of tiles."""
        z_CD = self.encoder.encode(tiles_CP)[0]
        return z_CD if self.student else self.teacher.joint(z_CD)

    def mark(self) -> str:
        """Return the fingerprint of the encoder's present weights."""
        vit = self.encoder.vit
        return state_fingerprint(self.encoder.row, vit.state_dict(), self.encoder.tile_px)


def load_towers(
    device: str,
    teacher: str,
    weights: str | None,
    images: str | None,
    image_weights: str | None,
    learned: bool = False,
) -> Towers:
    """Return a question's teacher and student, frozen, on their device.

    For a trained model (`learned`) no text tower is loaded, and no teacher beside a student.

    Raises:
        TextError, BackboneError: a tower is unavailable.
    """
    student, pair = None, None
    if images:
        student = backbones.load(images, image_weights)
        student.requires_grad_(False).eval().to(device)
    if not (learned and student):
        pair = load_demo() if teacher == "demo" else load_keep(weights, text=not learned)
        pair.to(device)
    return Towers(pair, student, device)


def read_slides(
    source: Source,
    rows: Sequence[SlideRow],
    subtype: dict[str, int | None],
    towers: Towers,
    out: Path,
    chunk: int,
) -> dict[str, EncodedSlide]:
    """Return every slide with its features, from files of `tapfm features` or written so.

    Raises:
        QuestionError: the tiles do not have the size that the image tower takes.
        SlideError: with `on_error: stop`, the first slide's fault; otherwise it is printed.
    """
    _, failed = index_and_cache(source)
    tile_source, grid, folders = TileSource.of(source), source.tiles.grid, []
    for encoder in (towers.teacher.encoder, *([towers.student] if towers.student else [])):
        if encoder.tile_px != grid.size:
            raise QuestionError(
                f"data.tiles.tile_px: tiles have {grid.size} px, and {encoder.row.key} takes "
                f"{encoder.tile_px}: set it to {encoder.tile_px}"
            )
        mark = state_fingerprint(encoder.row, encoder.vit.state_dict(), encoder.tile_px)
        name = f"{encoder.row.key}_{mark[:8]}"
        extraction = Extraction(encoder, name, mark, chunk=chunk, stain=source.stain)
        folders.append(out / grid.tag / f"features_{name}")
        left = [row for row in rows if row.slide_id not in failed]
        failed |= extract(extraction, left, source, folders[-1])[-1]
    found = {}
    for row in rows:
        if row.slide_id in failed:
            continue
        paths = (folder / f"{row.slide_id}.h5" for folder in folders)
        features, index = (
            [read_features(p).to(towers.device) for p in paths],
            tile_source.index(row),
        )
        with torch.no_grad():
            joint_Nd = towers.teacher.joint(features[0])
        z_Nd = features[1] if towers.student else joint_Nd
        spot_N2 = places(index.coords0, grid.step0(index.slide_mpp)).to(towers.device)
        found[row.slide_id] = EncodedSlide(row, subtype[row.slide_id], joint_Nd, z_Nd, spot_N2)
    for reason in failed.values():
        print(f"tapfm: left out: {reason}", file=sys.stderr)
    return found


def encode_slide(towers: Towers, tiles: Tiles, chunk: int) -> Tensor:
    """Return the vectors of all tiles of a slide by the image tower's present weights."""
    towers.encoder.eval()

    def encode(tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
        z_Cd = towers.encode(tiles_CP)
        return z_Cd, z_Cd.new_zeros(len(z_Cd))

    device = torch.device(towers.device)
    return encode_bag(encode, tiles.split(chunk), seed=0, device=device)[0].detach()
