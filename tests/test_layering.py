"""The architecture, as a test: who may import whom."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TORCH_IN_SLIDES = {
    "stream.py",
    "chunks.py",
    "workers.py",
    "prefetch.py",
    "bounded_tiles.py",
    "augment.py",
}
LEAVES = {  # tapfm's files that know no other part of tapfm, but for those named
    "encoders.attention": set(),
    "encoders.heads": set(),
    "encoders.registry": {"encoders.heads"},
    "encoders.transformers_layout": set(),
    "encoders.checkpoints": {"encoders.registry", "encoders.transformers_layout"},
    "encoders.tail": {"encoders.attention"},
    "encoders.compiled": set(),
    "encoders.backbones": {
        "encoders.attention",
        "encoders.checkpoints",
        "encoders.compiled",
        "encoders.registry",
        "encoders.tail",
    },
    "slide_model.aggregators": set(),
    "tasks.losses": set(),
    "tasks.cox": set(),
    "stats.outcomes": {"stats.bootstrap"},
    "stats.confusions": {"stats.bootstrap"},
    "reports.plain_table": {"stats.bootstrap"},
    "engine.chunked": set(),
    "training.oom_retry": {"engine.chunked"},
    "engine.frozen_prefix": {"data.bag", "encoders.backbones", "engine.chunked"},
    "distributed": set(),
    "engine.sampling": set(),
    "training.optim": {"settings"},
    "engine.master_weights": set(),
    "stats.bootstrap": set(),
    "stats.metrics": {"stats.bootstrap"},
    "reports.rows": set(),
    "reports.pooling": {"reports.rows", "stats.bootstrap", "stats.metrics"},
    "stats.delong": set(),
    "stats.thresholds": {"stats.confusions"},
    "stats.calibration": set(),
    "engine.memory": set(),
    "adapt.surgery": {"adapt.parameter_groups"},
    "adapt.pixels": set(),
    "tile_training.prototypes": set(),
    "adapt.lowrank": {"adapt.surgery"},
    "data.bag": set(),
    "tile_training.batch": set(),
    "tile_training.metrics": {"stats.bootstrap", "stats.confusions", "stats.metrics"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path):
    """Top packages that a file imports; files and errors, which all share, are no pixels."""
    shared = ("slides.files", "slides.errors", "slides.seeds")
    return {name.split(".")[0] for name in imports(path) if not name.startswith(shared)}


def ours(path):
    """Modules of tapfm that a file imports, as `engine.chunked`."""
    names = {name.removeprefix("tapfm.") for name in imports(path) if name.startswith("tapfm.")}
    return {name for name in names if file_of(name).exists()}


def file_of(module):
    return ROOT / "tapfm" / f"{module.replace('.', '/')}.py"


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("slides"), ids=lambda p: p.name)
def test_slides_knows_no_models(path):
    banned = {"tapfm", "timm", "lightning"}
    if path.name not in TORCH_IN_SLIDES:
        banned |= {"torch", "torchvision"}
    assert not tops(path) & banned


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_know_nothing_of_the_rest(leaf):
    path = file_of(leaf)
    assert ours(path) <= LEAVES[leaf]
    assert "slides" not in tops(path)


@pytest.mark.parametrize(
    "part",
    ["text/prompts", "spatial", "pseudo", "vote", "tile_loss", "text/towers", "model", "scores"],
)
def test_what_pathpt_computes_knows_no_slides(part):
    path = ROOT / "tapfm" / "pathpt" / f"{part}.py"
    assert not tops(path) & {"slides", "h5py", "lightning"}
    assert not ours(path) & {
        "data.datamodule",
        "frozen.features",
        "inference.predict",
        "training.fit",
        "training.module",
    }


def test_module_and_data_meet_in_the_bag_only():
    module, data = file_of("training.module"), file_of("data.datamodule")
    assert "slides" not in tops(module)
    assert "data.datamodule" not in ours(module)
    assert "training.module" not in ours(data)
    assert not any(name.startswith("tapfm.adapt") for name in imports(data))
    assert "data.bag" in ours(module) & ours(data)


def test_module_and_data_of_tiles_meet_in_the_batch_only():
    module, data = file_of("tile_training.module"), file_of("tile_training.data")
    assert "slides" not in tops(module)
    assert not ours(module) & {"tile_training.data", "data.datamodule"}
    assert not ours(data) & {"tile_training.module", "training.module"}
    assert not any(name.startswith("tapfm.adapt") for name in imports(data))
    assert "tile_training.batch" in ours(module) & ours(data)


def test_strategies_do_not_know_each_other():
    from tapfm.adapt.strategies import STRATEGIES

    strategies = {kind.__module__.rpartition(".")[2] for kind in STRATEGIES.values()}
    assert len(strategies) == len(STRATEGIES), "a file each"
    for strategy in strategies:
        names = set(imports(ROOT / "tapfm" / "adapt" / "strategies" / f"{strategy}.py"))
        others = {f"tapfm.adapt.strategies.{other}" for other in strategies - {strategy}}
        assert not names & others


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("encoders", {"encoders"}),
        (
            "engine",
            {
                "encoders",
                "adapt",
                "engine",
                "data.datamodule",
                "slide_model",
                "data.bag",
                "slide_model.model",
            },
        ),
        ("stats", {"stats"}),
    ],
)
def test_rooms_know_what_is_below_them(room, below):
    for path in files(f"tapfm/{room}"):
        assert {name.split(".")[0] for name in ours(path)} <= {r.split(".")[0] for r in below}, path
        assert not tops(path) & {"slides", "lightning"}, path


def test_nothing_imports_the_command_line():
    verbs = set(files("tapfm/verbs"))
    for path in set(files("tapfm") + files("slides")) - verbs:
        assert "cli" not in ours(path), path
        if path.name != "cli.py":
            assert not any(name.startswith("tapfm.verbs") for name in imports(path)), path


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
