"""The settings of a PathPT run, from YAML: classes with their names, prompts, and training.

Each subtype names by `where` which of the cohort's label columns are 1 and 0 for its slides; the
first class is normal tissue and has none. A slide that no subtype fits, or with a deciding label
unknown, is left out; a slide that two subtypes fit is an error.

Source: PathPT (arXiv 2508.15904): shots, draws, prompts, epochs, rate and scale, by default.
Differs: `images` without a text tower and `strategy`, end to end, are our additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from slides.cohort.table import SlideRow
from slides.cohort.targets import named_as_mean
from slides.errors import SettingsError
from tapfm.pathpt.text.prompts import MODES
from tapfm.yaml_files import load, read_text

TEACHERS = ("demo", "keep")
INITS = ("template", "random")


class QuestionError(SettingsError):
    """A question is invalid, or does not fit this cohort."""


@dataclass(frozen=True)
class TileClass:
    """One class of tiles."""

    name: str
    """Name in prompts and reports."""
    synonyms: tuple[str, ...] = ()
    """Further names, for zero-shot prompts."""
    where: Mapping[str, int] = field(default_factory=dict)
    """Label columns and their values for slides of this subtype."""


@dataclass(frozen=True)
class Question:
    """Classes and settings of a PathPT run."""

    classes: tuple[TileClass, ...]
    """Normal tissue, then the subtypes."""
    templates: tuple[str, ...]
    """Sentences with {} for a class's name."""
    teacher: str = "demo"
    """The vision-language model: `demo` or `keep`."""
    weights: str | None = None
    """The teacher's weights: KEEP's folder, or `hub`."""
    images: str | None = None
    """Key of a vision-only encoder that learns from the teacher's tile labels; None: the teacher's
    own image tower."""
    image_weights: str | None = None
    """Weights of that encoder, as in model.weights."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Training slides of each subtype."""
    draws: int = 10
    """Number of draws of training slides."""
    mode: str = "token"
    """Kind of prompts: `token`, `embedding` or `both`; vision-only encoders: `embedding`."""
    init: str = "template"
    """Initial context of the prompts: `template` or `random`."""
    context: int = 32
    """Context tokens of each class."""
    epochs: int = 20
    trust_from: int = 10
    """Epoch (from 0) from which candidates get the model's own label."""
    lr: float = 1e-4
    """Learning rate of Adam for prompts and mixer."""
    scale: float = 10.0
    """Factor on the cosines."""
    double_softmax: bool = False
    """Use the loss of the release, for comparison."""
    strategy: str | Mapping[str, Any] | None = None
    """Strategy of the image tower, trained end to end; None keeps it frozen."""
    encoder_lr: float | None = None
    """Learning rate of the image tower; None is the strategy's own."""

    def __post_init__(self):
        subtypes = self.classes[1:]
        faults = [
            fault
            for fault, bad in (
                ("classes: normal tissue and two subtypes or more are needed", len(subtypes) < 2),
                ("classes: two have the same name",
                 len({c.name for c in self.classes}) < len(self.classes)),
                ("classes: the first is normal tissue and has no where",
                 bool(self.classes) and bool(self.classes[0].where)),
                ("classes: every subtype needs a where", not all(c.where for c in subtypes)),
                ("classes: where takes 0 and 1", any(v not in (0, 1) for c in subtypes
                                                    for v in c.where.values())),
                ("templates: each needs one {}",
                 not self.templates or any(t.count("{}") != 1 for t in self.templates)),
                (f"teacher: {self.teacher!r} is none of {', '.join(TEACHERS)}",
                 self.teacher not in TEACHERS),
                (f"mode: {self.mode!r} is none of {', '.join(MODES)}", self.mode not in MODES),
                (f"mode: {self.images} has no text tower of its own: set mode: embedding",
                 self.images is not None and self.mode != "embedding"),
                (f"init: {self.init!r} is none of {', '.join(INITS)}", self.init not in INITS),
                ("shots, draws, context, epochs: 1 or more",
                 min((*self.shots, self.draws, self.context, self.epochs), default=0) < 1),
                ("lr and scale: above 0", min(self.lr, self.scale) <= 0),
            )
            if bad
        ]  # fmt: skip
        faults += named_as_mean("class", self.names)
        if faults:
            raise QuestionError("; ".join(faults))

    @property
    def names(self) -> list[str]:
        """Return the names of the K classes."""
        return [each.name for each in self.classes]

    @property
    def columns(self) -> list[str]:
        """Return the label columns that decide."""
        return list(dict.fromkeys(key for each in self.classes for key in each.where))

    @property
    def towers(self) -> dict[str, str | None]:
        """Return the arguments of `tiles.load_towers`."""
        names = ("teacher", "weights", "images", "image_weights")
        return {name: getattr(self, name) for name in names}

    def sentences(self) -> list[list[str]]:
        """Return every prompt of each class: templates times names."""
        return [
            [template.format(name) for name in (each.name, *each.synonyms)
             for template in self.templates]
            for each in self.classes
        ]  # fmt: skip


def read_question(path: Path) -> Question:
    """Return a question from YAML.

    Raises:
        QuestionError: no such file, not YAML, unknown or missing keys, or invalid settings.
    """
    if not path.is_file():
        raise QuestionError(f"{path}: there is no such question. Correct --question.")
    try:
        found = load(read_text(path, "question"), path)
    except SettingsError as error:
        raise QuestionError(str(error)) from error
    classes = found.get("classes") if isinstance(found, dict) else None
    if not isinstance(classes, list) or not all(isinstance(each, dict) for each in classes):
        raise QuestionError(f"{path}: classes is needed, a list with a name and a where for each")
    _known(path, "classes", TileClass, classes)
    _known(path, "the question", Question, [found])
    try:
        lists = {key: tuple(found[key]) for key in ("templates", "shots") if key in found}
        lists["classes"] = tuple(
            TileClass(each["name"], tuple(each.get("synonyms", ())), each.get("where", {}))
            for each in classes
        )
        return Question(**{**found, **lists})
    except (QuestionError, TypeError) as error:  # a number where a list is meant, say
        raise QuestionError(f"{path}: {error}") from error


def subtypes(
    question: Question, labels: Sequence[str], rows: Iterable[SlideRow]
) -> dict[str, int | None]:
    """Return each slide's subtype, 0 to C - 1; None if none fits or a deciding label is unknown.

    Args:
        question: the question.
        labels: names of the rows' labels.
        rows: slides.

    Raises:
        QuestionError: two subtypes fit one slide.
    """
    found: dict[str, int | None] = {}
    for row in rows:
        known = dict(zip(labels, row.labels, strict=True))
        fit = [
            number
            for number, each in enumerate(question.classes[1:])
            if all(known[column] == value for column, value in each.where.items())
        ]
        if len(fit) > 1:
            both = " and ".join(question.classes[1 + n].name for n in fit[:2])
            raise QuestionError(
                f"{row.slide_id}: {both} fit it both. Make their `where` exclude each other."
            )
        found[row.slide_id] = fit[0] if fit else None
    return found


def _known(path: Path, part: str, kind: type, given: Sequence[Mapping[str, Any]]) -> None:
    names = {each.name for each in fields(kind)}
    needed = {
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    }
    for each in given:
        unknown, missing = sorted(each.keys() - names), sorted(needed - each.keys())
        if unknown or missing:
            pairs = (("unknown", unknown), ("no", missing))
            faults = [f"{word} {', '.join(keys)}" for word, keys in pairs if keys]
            raise QuestionError(
                f"{path}: {part}: {'; '.join(faults)}. There are {', '.join(sorted(names))}."
            )
