"""Slide encoders: what each is, needs and costs to use; a row an encoder.

A slide encoder is bound to the tile encoder that it was trained on: to other features, an adapted
encoder's too, it answers with numbers that mean nothing. So a row names that encoder, by the names
under which programs write its features, with the field of a tile in microns.

Source: the publishers' model pages, and TRIDENT's list of 2026, for tile encoder, tile size,
magnification, widths and licences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tapfm.settings import SettingsError, did_you_mean, plain

SIZE_TOLERANCE = 0.1  # of a tile's side: scanners' resolutions differ by as much


@dataclass(frozen=True)
class SlideEncoder:
    """A slide encoder and the features that it is for."""

    key: str
    """The name users type; case, `-`, `_` and `.` do not matter."""
    source: str
    """Its repository at huggingface.co."""
    licence: str
    gated: bool
    """Whether a licence must be accepted at the publisher first."""
    tile_encoder: str
    """Name of its tile encoder: tapfm's, or TRIDENT's where tapfm has no such."""
    also: tuple[str, ...]
    """Other names of that encoder in files of features."""
    tile_dim: int
    """Features of a tile, D."""
    tile_px: int
    """Side of the tile that is read, before the tile encoder shrinks it."""
    mpps: tuple[float, ...]
    """Microns per pixel of that tile; () is unknown."""
    dim: int
    """Numbers of a slide, E."""
    files: str
    """Files to give as its weights."""
    aggregator: str | None = None
    """Name of the aggregator that states the network; None: it ships as code."""
    packages: tuple[str, ...] = ()
    """Packages that its publisher's code imports beside torch."""
    coords: bool = True
    """Whether it looks at where tiles lie."""
    extract: str = ""
    """Flags of `tapfm features` for its tiles' features; "" where TRIDENT must make them."""

    @property
    def page(self) -> str:
        """Return the address of the publisher's page, with licence and gate."""
        return f"https://huggingface.co/{self.source}"

    @property
    def terms(self) -> str:
        """Return source, licence and gate in a line."""
        gate = f", gated: accept it at {self.page}" if self.gated else ""
        return f"{self.source}, licence {self.licence}{gate}"

    @property
    def needs(self) -> str:
        """Return in words which features it is for."""
        mpps = " or ".join(f"{mpp:g}" for mpp in self.mpps)
        tiles = f", tiles of {self.tile_px} px at {mpps} microns per pixel" if mpps else ""
        return f"{self.tile_dim} features of {self.tile_encoder or 'its own encoder'}{tiles}"

    def fault(self, encoder: str, dim: int, side_um: float | None, coords: bool) -> str | None:
        """Return why a slide's features are not those that it is for; None if they may be.

        Args:
            encoder: name of the tile encoder in the file; "" where the file has none.
            dim: features of a tile.
            side_um: side of a tile in microns; None is unknown.
            coords: whether it is known where tiles lie.
        """
        names = {plain(name) for name in (self.tile_encoder, *self.also)}
        if encoder and self.tile_encoder and plain(encoder) not in names:
            return f"features of {encoder}"
        if dim != self.tile_dim:
            return f"{dim} features a tile"
        sides = [self.tile_px * mpp for mpp in self.mpps]
        if side_um and sides and all(abs(side_um / side - 1) > SIZE_TOLERANCE for side in sides):
            return f"tiles of {side_um:.0f} microns"
        return "no coordinates" if self.coords and not coords else None


_CONCH_V1_5 = {
    "tile_encoder": "conch_v1_5", "also": ("conch_v15",), "tile_dim": 768, "tile_px": 512,
    "mpps": (0.5,), "extract": "--model conch_v1_5 --mpp 0.5714",
}  # fmt: skip
_FOLDER = "the folder of its repository: config.json, its .py files, its weights"

ROWS = (
    SlideEncoder(
        "titan", "MahmoodLab/TITAN", "CC-BY-NC-ND-4.0", True, **_CONCH_V1_5, dim=768,
        files=_FOLDER, packages=("transformers",),
    ),
    SlideEncoder(
        "prism", "paige-ai/Prism", "CC-BY-NC-ND-4.0", True, "virchow", ("virchow_v1",), 2560, 224,
        (0.5,), 1280, _FOLDER, packages=("transformers", "environs", "sacremoses"), coords=False,
        extract="--model virchow",
    ),
    SlideEncoder(
        "care", "Zipper-1/CARE", "CC-BY-NC-4.0", True, **_CONCH_V1_5, dim=512, files=_FOLDER,
        packages=("transformers",),
    ),
    SlideEncoder(
        "madeleine", "MahmoodLab/madeleine", "CC-BY-NC-ND-4.0", True, "conch_v1",
        ("conch",), 512, 256, (1.0,), 512, "the folder of its repository: "
        "model_config.json, model.pt", "madeleine", coords=False,
    ),
    SlideEncoder(
        "moozy", "AtlasAnalyticsLab/MOOZY", "CC-BY-NC-SA-4.0", False, "lunit_s8",
        ("lunit_vits8", "lunit_vit_small_patch8_dino"), 384, 224,
        (0.5, 0.25), 768, "moozy.pt, or the folder that holds it", "moozy",
        extract="--model lunit_s8",
    ),
)  # fmt: skip

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "chief": "it takes features of CTransPath, which has no row among the tile encoders, and "
        "its code, which is no package",
        "gigapath": "its LongNet needs flash-attn and the package gigapath; the tile encoder has a "
        "row",
        "threads": "its weights are not published",
    }
)
"""Slide encoders without a row, and the reason."""


def find(key: str) -> SlideEncoder:
    """Return the row of a slide encoder.

    Raises:
        SettingsError: there is none, and why.
    """
    known = {plain(row.key): row for row in ROWS}
    if plain(key) in known:
        return known[plain(key)]
    for name, why in LEFT_OUT.items():
        if plain(key) == name:
            raise SettingsError(f"slide encoder {key}: it has no row here: {why}. Take titan.")
    names = [row.key for row in ROWS]
    raise SettingsError(
        f"slide encoder {key!r} is none of {', '.join(names)}.{did_you_mean(key, names)}"
    )
