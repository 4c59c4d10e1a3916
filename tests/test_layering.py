"""The architecture, as a test: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH_IN_SLIDES = {"stream.py", "chunks.py", "workers.py", "crew.py", "held.py", "augment.py"}
LEAVES = {  # tapfm's files that know no other part of tapfm, but for those named
    "attention": set(),
    "heads": set(),
    "registry": {"heads"},
    "transformers_layout": set(),
    "checkpoints": {"registry", "transformers_layout"},
    "tail": {"attention"},
    "compiled": set(),
    "backbones": {"attention", "checkpoints", "compiled", "registry", "tail"},
    "aggregators": set(),
    "losses": set(),
    "cox": set(),
    "outcomes": {"bootstrap"},
    "confusions": {"bootstrap"},
    "plain_table": {"bootstrap"},
    "chunked": set(),
    "rescue": {"chunked"},
    "boundary": {"backbones", "bag", "chunked"},
    "processes": set(),
    "sampling": set(),
    "optim": set(),
    "masters": set(),
    "bootstrap": set(),
    "metrics": {"bootstrap"},
    "arms": set(),
    "pooling": {"arms", "bootstrap", "metrics"},
    "delong": set(),
    "thresholds": {"confusions"},
    "calibration": set(),
    "memory": set(),
    "surgery": {"optim"},
    "pixels": set(),
    "prototypes": set(),
    "lowrank": {"surgery"},
    "bag": set(),
    "tile_batch": set(),
    "tile_metrics": {"bootstrap", "confusions", "metrics"},
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
    return {name.split(".")[0] for name in imports(path)}


def ours(path):
    """Modules of tapfm that a file imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("tapfm.")}
    return {name for name in names if (ROOT / "tapfm" / f"{name}.py").exists()}


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
    path = ROOT / "tapfm" / f"{leaf}.py"
    assert ours(path) <= LEAVES[leaf]
    assert "slides" not in tops(path)


@pytest.mark.parametrize(
    "part", ["prompts", "spatial", "pseudo", "vote", "tile_loss", "towers", "network", "scores"]
)
def test_what_pathpt_computes_knows_no_slides(part):
    path = ROOT / "tapfm" / "pathpt" / f"{part}.py"
    assert not tops(path) & {"slides", "h5py", "lightning"}
    assert not ours(path) & {"data", "features", "predict", "fit", "module"}


def test_module_and_data_meet_in_the_bag_only():
    module, data = ROOT / "tapfm" / "module.py", ROOT / "tapfm" / "data.py"
    assert "slides" not in tops(module)
    assert "data" not in ours(module)
    assert not ours(data) & {"module", "adapt"}
    assert "bag" in ours(module) & ours(data)


def test_module_and_data_of_tiles_meet_in_the_batch_only():
    module, data = ROOT / "tapfm" / "tile_module.py", ROOT / "tapfm" / "tile_data.py"
    assert "slides" not in tops(module)
    assert not ours(module) & {"tile_data", "data"}
    assert not ours(data) & {"tile_module", "module", "adapt"}
    assert "tile_batch" in ours(module) & ours(data)


def test_strategies_do_not_know_each_other():
    strategies = {path.stem for path in files("tapfm/adapt")} - {"__init__"}
    for strategy in strategies:
        names = set(imports(ROOT / "tapfm" / "adapt" / f"{strategy}.py"))
        others = {f"tapfm.adapt.{other}" for other in strategies - {strategy}}
        assert not names & others


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
