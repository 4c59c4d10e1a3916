"""The architecture, as a test: which room may import which."""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict

import pytest

from tests.conftest import ROOT

SHARED = {  # whole files, errors, seeds, progress: no pixels
    "slides.files", "slides.errors", "slides.progress", "slides.seeds",
}  # fmt: skip
NO_PIXELS = {  # rooms and files of tapfm that never meet a slide
    "adapt", "adapt.strategies", "bag_transforms", "encoders", "engine", "regularisers", "settings",
    "slide_encoders", "slide_model", "slide_model.aggregators", "slide_model.layers", "stats",
    "tasks",
    "training.alternating", "training.module", "training.objective", "training.passes",
    "tile_training.module",
    "pathpt.text", "pathpt.spatial", "pathpt.pseudo", "pathpt.vote", "pathpt.tile_loss",
    "pathpt.model", "pathpt.scores", "weights",
}  # fmt: skip
BELOW = {  # what a room may know of tapfm: a reader of one of these files needs no more
    "stats": set(),
    "settings": set(),
    "weights": set(),
    "autocast": set(),
    "encoders": {"settings", "weights", "autocast"},
    "tasks": {"stats", "settings"},
    "adapt": {"settings", "weights", "autocast"},
    "adapt.strategies": {"adapt", "settings"},
    "engine": {"encoders", "adapt", "data.bag", "settings"},
    "slide_model.layers": set(),
    "slide_model.aggregators": {"data.bag", "settings", "slide_model.layers"},
    "slide_encoders": {"data.bag", "settings", "slide_model.aggregators"},
    "regularisers": {"data.bag", "settings", "slide_model.aggregators"},
    "bag_transforms": {"data.bag", "settings", "slide_model.aggregators"},
    "data.bag": set(),
}
BESIDE = {  # files of one kind, none of which knows another of its kind
    "tapfm.adapt.strategies": (),
    "tapfm.slide_model.aggregators": ("contract", "pooling"),
    "tapfm.regularisers": ("contract",),
    "tapfm.bag_transforms": ("contract",),
}


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for top in ("slides", "tapfm") for path in files(top)}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports(path):
    """All modules and names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in names if name in MODULES]
            yield from inside
            if len(inside) < len(names):
                yield node.module


def room_of(module):
    return module if module in PACKAGES else module.rpartition(".")[0]


def within(module, part):
    """Whether a module is a part of tapfm: a file, or a file of a room, not of a room within it."""
    return module == f"tapfm.{part}" or room_of(module) == f"tapfm.{part}"


def tops(path):
    return {name.split(".")[0] for name in imports(path) if name not in SHARED}


@pytest.mark.parametrize("path", files("slides"), ids=module_of)
def test_slides_knows_no_models(path):
    banned = {"tapfm", "timm", "lightning"}
    if room_of(module_of(path)) != "slides.streaming":
        banned |= {"torch", "torchvision"}
    assert not tops(path) & banned


@pytest.mark.parametrize("unit", [room_of, str], ids=["rooms", "files"])
def test_there_is_no_circle_of_rooms_nor_of_files(unit):
    """The packages' roots are no rooms: the command line and the version are there."""
    below = defaultdict(set)
    for module, path in MODULES.items():
        for name in set(imports(path)) & MODULES.keys():
            below[unit(module)].add(unit(name))
    for room in below:
        below[room] -= {room, "tapfm", "slides"}

    def reached(room, seen):
        for other in below[room] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    for room in set(below) - {"tapfm", "slides"}:
        assert room not in reached(room, set()), room


@pytest.mark.parametrize("part", sorted(NO_PIXELS))
def test_methods_meet_no_slide(part):
    found = [path for module, path in MODULES.items() if within(module, part)]
    assert found
    for path in found:
        assert not tops(path) & {"slides", "openslide", "h5py"}, path


@pytest.mark.parametrize("part", BELOW)
def test_a_room_knows_what_is_below_it(part):
    found = [(module, path) for module, path in MODULES.items() if within(module, part)]
    assert found
    for module, path in found:
        ours = {name for name in imports(path) if name.startswith("tapfm.")}
        allowed = {part, *BELOW[part]}
        strange = {n for n in ours & MODULES.keys() if not any(within(n, each) for each in allowed)}
        assert not strange, module
        assert "lightning" not in tops(path), module


@pytest.mark.parametrize("room", BESIDE)
def test_files_of_a_kind_do_not_know_each_other(room):
    kinds = {m for m in MODULES if room_of(m) == room and m != room}
    shared = {f"{room}.{name}" for name in BESIDE[room]}
    assert len(kinds) > len(shared)
    for kind in kinds - shared:
        assert not set(imports(MODULES[kind])) & (kinds - shared - {kind}), kind


def test_training_and_data_meet_in_the_batch_only():
    for room, batch in (("training", "data.bag"), ("tile_training", "tile_training.batch")):
        module = set(imports(MODULES[f"tapfm.{room}.module"]))
        data = "tapfm.data.datamodule" if room == "training" else "tapfm.tile_training.data"
        assert data not in module
        there = set(imports(MODULES[data]))
        assert f"tapfm.{room}.module" not in there
        assert not any(name.startswith("tapfm.adapt") for name in there)
        assert f"tapfm.{batch}" in module & there


def test_tile_training_is_no_slide_training():
    assert "tapfm.training.module" not in set(imports(MODULES["tapfm.tile_training.module"]))


def test_nothing_imports_the_command_line():
    for module, path in MODULES.items():
        if not within(module, "verbs"):
            assert "tapfm.cli" not in set(imports(path)), path
            if module != "tapfm.cli":
                assert not any(name.startswith("tapfm.verbs") for name in imports(path)), path


def test_what_a_benchmark_takes_from_the_project_is_there():
    """No test runs them all, so a name that moved would be found by the next who measures."""
    lost = [
        f"{path.name}:{node.lineno}: {node.module}.{alias.name}"
        for path in files("benchmarks")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("slides", "tapfm")
        for alias in node.names
        if f"{node.module}.{alias.name}" not in MODULES
        and not hasattr(importlib.import_module(node.module), alias.name)
    ]
    assert not lost


def test_rooms_and_files_are_small():
    """At most 14 files a room beside its `__init__`, 360 lines a file, 60 a function.

    A room of methods, of which each is one file, has as many as there are methods.
    """
    for package in PACKAGES:
        inside = [m for m in MODULES if m.rpartition(".")[0] == package and m not in PACKAGES]
        assert len(inside) <= 14 or package in BESIDE, package
    for path in MODULES.values():
        text = path.read_text()
        assert text.count("\n") <= 360, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "demo",
        "labels",
        "split",
        "index",
        "plan",
        "probe",
        "test",
        "study",
        "report",
        "predict",
        "heatmap",
        "features",
        "embed",
        "pathpt",
        "export",
        "doctor",
    ],
)
def test_help_needs_no_torch(verb):
    """So it is instant. (`fit --help` lists Lightning's arguments, and so must load it.)"""
    code = (
        "import sys; from tapfm.cli import main\n"
        f"try: main({[verb, '--help'] if verb else ['--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'timm', 'lightning', 'pandas', 'zarr', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verb in done.stdout
