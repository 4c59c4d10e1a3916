"""Labelled tiles: pictures of one class each, from a table or from folders.

    table     path, label, and optionally case_id and split     (.csv, .tsv or .parquet)
    folder    [part/]class/[case/]picture

A part is `train`, `val` or `test`, in any letter case and also in full (training, validation,
testing), or a folder name of a published data set:

    trainval, NCT-CRC-HE-100K, NCT-CRC-HE-100K-NONORM     split into train and val
    CRC-VAL-HE-7K                                         test

These data sets are read as they are published: NCT-CRC-HE-100K with CRC-VAL-HE-7K; SPIDER as its
`convert_to_imagenet.py` writes it at context size 1 (train and test, a folder a slide below the
class); OSPatch (trainval and test; its maps, `nuclei` and `non`, are not classes).

Tiles without a part are assigned one by case: no case is ever in two parts, and a table or folder
with such a case is refused. A picture in two parts, the same byte for byte, is warned of. If cases
are not known, each tile counts as its own case: neighbours may then be in two parts, and intervals
are too narrow (`TileSet.cases_known`).

Source: Kather et al. 2018, doi 10.5281/zenodo.1214456, for NCT-CRC: classes as folders, .tif of 224
    px at 0.5 microns per pixel; the published files name no patient. Nechaev et al. 2025 (SPIDER,
    arXiv 2503.02876). Liu et al. 2026 (HiAdapter), readme, for OSPatch.
Differs: SPIDER's metadata.json and OSPatch's fold lists are not read: their format is not
    documented, and the latter split tiles, not patients.

Shapes: S side of a tile, N tiles, K classes.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from slides.cohort.leaks import repeated_values, same_pictures
from slides.cohort.spelling import case_key, is_missing, look_alike
from slides.cohort.splits import FRACTIONS, Cases, assign_parts
from slides.cohort.table import SPLITS
from slides.cohort.table_file import file_at, read_table
from slides.cohort.targets import named_as_mean
from slides.errors import CohortError, SplitError, TileError, all_faults, some
from slides.files import files_below
from slides.seeds import stable_seed

PARTS = {
    **{split: split for split in SPLITS},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
    "trainval": "trainval",
    "NCT-CRC-HE-100K": "trainval",
    "NCT-CRC-HE-100K-NONORM": "trainval",
    "CRC-VAL-HE-7K": "test",
}
NO_CLASSES = {"nuclei", "non", "split"}  # OSPatch's maps and lists
PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MODES = {"RGB", "RGBA", "P", "L"}  # 8 bits; the range of other modes is not known


@dataclass(frozen=True)
class TileRow:
    """One labelled tile."""

    path: Path
    label: str
    case_id: str
    part: str
    """train, val or test; before splitting also trainval, or "" for any."""


@dataclass(frozen=True)
class TileSet:
    """All labelled tiles, in the table's order, or sorted by path."""

    rows: tuple[TileRow, ...]
    cases_known: bool
    """Whether each tile's case is known."""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """K class names, sorted."""
        return tuple(sorted({row.label for row in self.rows}))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of file names, labels, cases and parts; not of folders or pixels."""
        lines = (f"{r.path.name},{r.label},{r.case_id},{r.part}\n" for r in self.rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def files_sha256(self) -> str:
        """SHA-256 of the files' sizes and times of change; pixels are not read."""
        stats = (row.path.stat() for row in self.rows)
        lines = (f"{each.st_size},{each.st_mtime_ns}\n" for each in stats)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def part(self, split: str) -> tuple[TileRow, ...]:
        """Return the tiles of train, val or test."""
        return tuple(row for row in self.rows if row.part == split)

    def class_weights(self) -> list[float]:
        """Return each class's weight in the loss: tiles / (K * its tiles), over train."""
        counts = Counter(row.label for row in self.part("train"))
        return [counts.total() / (len(self.classes) * counts[name]) for name in self.classes]


def read_tiles(
    source: Path,
    case_pattern: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> TileSet:
    """Read the tiles of a table or folder, and assign each to a part.

    Args:
        source: a table, whose paths are relative to its folder, or a folder.
        case_pattern: regular expression whose first group in a picture's file name is its case;
            None takes the table's case_id or the folder below the class.
        fractions: shares of train, val and test, for tiles without a part.
        seed: of the random split.

    Raises:
        CohortError: missing files and columns, unknown parts, cases in two parts, classes that are
            not in the training part; all faults are listed.
        SplitError: the fractions are invalid, or there are too few cases.
    """
    if source.is_dir():
        rows = _from_folder(source)
        known = any(row.case_id for row in rows)
    else:
        rows, known = _from_table(source)
    if case_pattern is not None:
        rows, known = _cases_by_name(source, rows, case_pattern), True
    root = source if source.is_dir() else source.parent
    rows = [row if row.case_id else replace(row, case_id=_within(root, row.path)) for row in rows]
    faults = _case_faults(rows, known)
    if faults:
        raise CohortError(all_faults(source, faults))
    found = TileSet(tuple(_with_parts(rows, known, fractions, seed)), known)
    _warn_of_copies(source, found)
    faults = _class_faults(found)
    if faults:
        raise CohortError(all_faults(source, faults))
    return found


def read_tile(path: Path, side: int) -> np.ndarray:
    """Return a tile's pixels, uint8 (3, S, S); a k times larger one is averaged k by k.

    Raises:
        TileError: it cannot be read, or has another size.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise TileError(
                    f"{path}: its pixels are of mode {image.mode}; 8 bits a channel are needed. "
                    "Convert it to RGB."
                )
            width, height = image.size
            if width != height or width % side:
                raise TileError(
                    f"{path}: {width} x {height} px, but square tiles of {side} px, or of a whole "
                    f"multiple of it, were requested. Set data.tile_px, or leave the tile out."
                )
            if image.format == "JPEG" and image.mode == "RGB":
                import simplejpeg  # strict: Pillow fills damaged parts with grey

                image = Image.fromarray(simplejpeg.decode_jpeg(path.read_bytes()))
            image = image.convert("RGB")
            image = image.reduce(width // side) if width > side else image
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except TileError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TileError(
            f"{path}: cannot be read as a picture ({error}). Export it again."
        ) from error


def _from_folder(root: Path) -> list[TileRow]:
    there = sorted(each for each in root.iterdir() if each.is_dir())
    known = {name.lower(): part for name, part in PARTS.items()}
    parts = {each: known[each.name.lower()] for each in there if each.name.lower() in known}
    twice = [folder.name for folder, part in parts.items() if part == "trainval"]
    if len(twice) > 1:
        raise CohortError(f"{root}: {' and '.join(twice)} hold the same tiles: move one elsewhere.")
    strays = [folder.name for folder in there if folder not in parts]
    if parts and set(strays) - NO_CLASSES:
        raise CohortError(
            f"{root}: {', '.join(sorted(set(strays) - NO_CLASSES))} beside "
            f"{', '.join(folder.name for folder in parts)}: either all folders are parts "
            f"({', '.join(PARTS)}) or all are classes."
        )
    rows = []
    for folder, part in (parts or {root: ""}).items():
        for path in files_below(folder):
            within = path.relative_to(folder).parts
            if path.suffix.lower() in PICTURES and within[0] not in NO_CLASSES and len(within) > 1:
                case = within[1] if len(within) > 2 else ""
                rows.append(TileRow(path, within[0], case, part))
    if not rows:
        raise CohortError(
            f"{root}: no pictures ({', '.join(sorted(PICTURES))}) in folders named by their class. "
            "Give a table, or folders [train|val|test/]CLASS/[CASE/]PICTURE."
        )
    return rows


def _from_table(table: Path) -> tuple[list[TileRow], bool]:
    header, lines = read_table(table)
    missing = [name for name in ("path", "label") if name not in header]
    faults = [f"column {name!r} is missing (there are: {', '.join(header)})" for name in missing]
    rows, files = [], {}
    for number, cells in lines if not missing else ():
        row = dict(zip(header, cells, strict=False))
        path = file_at(table.parent, row.get("path", ""))
        label, part = row.get("label", ""), row.get("split", "")
        if not row.get("path") or not path.is_file():
            faults.append(f"row {number}: {path} is no file: correct path or leave the row out")
        else:
            files[number] = str(path.resolve())
        if is_missing(label):
            faults.append(
                f"row {number}: label is {label!r}: a tile needs a class, or leave it out"
            )
        if part not in ("", "trainval", *SPLITS) or ("split" in header and not part):
            faults.append(f"row {number}: split is {part!r}: give train, val, test or trainval")
        if "case_id" in header and not row.get("case_id"):
            faults.append(f"row {number}: case_id is blank: fill it in, or leave the column out")
        rows.append(TileRow(path, label, row.get("case_id", ""), part))
    faults += repeated_values("picture", files)
    if faults or not rows:
        raise CohortError(all_faults(table, faults or ["there is no row below the header"]))
    return rows, "case_id" in header


def _cases_by_name(source: Path, rows: list[TileRow], pattern: str) -> list[TileRow]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CohortError(f"data.case_pattern {pattern!r}: {error}") from error
    if not compiled.groups:
        raise CohortError(f"data.case_pattern {pattern!r}: put the case in brackets: (...)")
    found = [compiled.search(row.path.name) for row in rows]
    lost = [row.path.name for row, match in zip(rows, found, strict=True) if not match]
    if lost:
        raise CohortError(
            f"{source}: {len(lost)} of {len(rows)} file names do not match data.case_pattern "
            f"{pattern!r}, the first is {lost[0]}. Correct the pattern, or rename the files."
        )
    return [replace(row, case_id=match.group(1)) for row, match in zip(rows, found, strict=True)]


def _within(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _case_faults(rows: list[TileRow], known: bool) -> list[str]:
    """Return a fault for each case in two parts, or of two spellings that may be dealt apart."""
    parts, names = defaultdict(Counter), defaultdict(dict)
    for row in rows:
        key = case_key(row.case_id) if known else row.case_id
        parts[key][row.part] += 1
        names[key][row.case_id] = None
    return [
        (f"case {some(list(names[key]))}" if len(names[key]) == 1
         else f"cases {' and '.join(map(repr, names[key]))} look like one, spell it one way: it")
        + " is in "
        + " and ".join(f"{part} ({count} tiles)" for part, count in sorted(counts.items()))
        + ": put all tiles of a case in one part"
        for key, counts in parts.items()
        if len(counts) > 1 or (len(names[key]) > 1 and not counts.keys() <= set(SPLITS))
    ]  # fmt: skip


def _warn_of_copies(source: Path, tiles: TileSet) -> None:
    """Warn of tiles in two parts whose files have the same bytes."""
    copies = same_pictures({row: (row.path, row.part) for row in tiles.rows})
    if copies:
        each = [" and ".join(f"{r.part}/{r.path.name}" for r in rows[:3]) for rows, _ in copies]
        warnings.warn(
            f"{source}: {len(copies)} tiles are in two parts, the same byte for byte: "
            f"{some(each)}. Figures are flattered. Keep one of each.",
            stacklevel=3,
        )


def _class_faults(tiles: TileSet) -> list[str]:
    faults = named_as_mean("class", tiles.classes) + look_alike(tiles.classes)
    if len(tiles.classes) < 2:
        faults.append(f"only the class {', '.join(tiles.classes)}: two or more are needed")
    for split in ("train", "val"):
        if not tiles.part(split):
            faults.append(f"the {split} part is empty: training needs it")
    lacking = set(tiles.classes) - {row.label for row in tiles.part("train")}
    if tiles.part("train") and lacking:
        faults.append(f"no tile of {', '.join(sorted(lacking))} is in train: it cannot be learned")
    return faults


def _with_parts(
    rows: list[TileRow], known: bool, fractions: Sequence[float], seed: int
) -> list[TileRow]:
    """Return all rows with a part; if there is no `val`, it is split off from `train`."""
    there = {row.part for row in rows}
    pool = "trainval" if "trainval" in there else "train" if "val" not in there else None
    goals = {"": SPLITS, **({pool: SPLITS[:2]} if pool else {})}
    part_of = {}
    for given, splits in goals.items():
        members = [row for row in rows if row.part == given]
        shares = np.array(fractions[: len(splits)], float)
        if members and (len(shares) < len(splits) or not (shares >= 0).all() or not shares.any()):
            raise SplitError(
                f"data.fractions is {list(fractions)}: give the shares of train, val and test"
            )
        if members:
            part_of |= _part_of_case(members, known, splits, list(shares / shares.sum()), seed)
    return [replace(row, part=part_of.get(row.case_id, row.part)) for row in rows]


def _part_of_case(rows, known: bool, splits, shares: list[float], seed: int) -> dict[str, str]:
    """Return the part of each case, stratified by class."""
    if not known:  # each tile is a case, so class by class: quick for 100,000 tiles
        part_of = {}
        for name in sorted({row.label for row in rows}):
            cases = [row.case_id for row in rows if row.label == name]
            bits = np.random.PCG64(stable_seed("tiles", seed, name)).random_raw(len(cases))
            ends = np.round(np.cumsum(shares) * len(cases)).astype(int)
            ends[-1] = len(cases)
            places = np.searchsorted(ends, np.argsort(np.argsort(bits)), side="right")
            part_of |= {case: splits[p] for case, p in zip(cases, places, strict=True)}
        return part_of
    cases, names = list(dict.fromkeys(r.case_id for r in rows)), sorted({r.label for r in rows})
    has = {(row.case_id, row.label) for row in rows}
    values_CK = np.array([[float((case, name) in has) for name in names] for case in cases])
    parts = assign_parts(
        Cases(tuple(cases), ("",) * len(cases), tuple(names), values_CK), shares, seed
    )
    return {case: splits[part] for case, part in zip(cases, parts, strict=True)}
