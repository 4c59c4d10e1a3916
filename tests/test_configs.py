"""Every config is read as it stands, and the READMEs' commands and tables are the program's."""

import ast
import re
import shlex
import subprocess
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from inspect import signature
from io import StringIO
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

from slides.errors import SettingsError
from tapfm import cli, verbs
from tapfm.config import preamble, read_source
from tapfm.config_paths import find_config
from tapfm.settings import spec_of
from tests.conftest import ROOT

CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "pathpt"
)  # questions of `tapfm pathpt` are no configs of a run: tests/pathpt/test_run.py reads them
README = (ROOT / "README.md").read_text()
PAGES = {"": README}  # all that a user reads, by folder
for path in (*ROOT.glob("configs/README.md"), *ROOT.glob("tapfm/*/README.md")):
    PAGES[str(path.parent.relative_to(ROOT))] = path.read_text()
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES["docs/guide"] = "\n".join(path.read_text() for path in GUIDE)
LINKED = ["README.md", "CONTRIBUTING.md", "docs/decisions.md", "benchmarks/README.md",
          "benchmarks/LOG.md",
          *(f"{folder}/README.md" for folder in PAGES if folder not in ("", "docs/guide")),
          *(f"docs/guide/{path.name}" for path in GUIDE if "](" in path.read_text())]  # fmt: skip


def verb_of(config):
    """Which verb takes a config: that of its folder."""
    return "fit-tiles" if Path(config).parent.name == "tiles" else "fit"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_short_says_what_it_is_for_and_has_known_keys(config, tmp_path, capsys):
    text = config.read_text()
    assert len(text.splitlines()) <= 50
    said = preamble(config)
    assert "Expect" in said
    assert config.stem in said
    # the keys, by Lightning's parser: it instantiates nothing and needs no slide
    with pytest.raises(SystemExit) as end:
        cli.main([verb_of(config), "--config", str(config), "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for part in ("model", "data"):
        for key, value in yaml.safe_load(text).get(part, {}).items():
            if not isinstance(value, dict):
                assert printed[part][key] == value


STRATEGY_CONFIGS = sorted((ROOT / "configs" / "strategies").glob("*.yaml"))


@pytest.mark.parametrize("config", STRATEGY_CONFIGS, ids=lambda path: path.stem)
def test_a_strategys_config_goes_behind_any_cohorts(config, capsys):
    """It says what the strategy is by default, and takes back the cohort's rate for another."""
    from tapfm.adapt.strategies import make_strategy

    cohort = ROOT / "configs" / "cohorts" / "demo.yaml"
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(cohort), "--config", str(config), "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert make_strategy(model["strategy"]) == make_strategy(config.stem)
    assert model["steps"]["encoder_lr"] is None
    assert model["steps"]["head_lr"] == 3e-3, "the rest stays the cohort's"


def test_every_strategy_has_a_config_and_none_is_left_over():
    from tapfm.adapt.strategies import STRATEGIES

    assert {config.stem for config in STRATEGY_CONFIGS} == set(STRATEGIES)


def test_make_puts_a_strategys_config_behind_the_cohorts():
    def lines(*arguments):
        command = ["make", "-n", "train", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    two = r"tapfm fit --config configs/cohorts/demo.yaml\s+--config configs/strategies/lean.yaml "
    assert re.search(two, lines("STRATEGY=lean"))
    assert "strategies" not in lines()


@pytest.mark.parametrize("verb", ["index", "fit"])
def test_tcga_luad_says_what_to_put_where(verb, capsys, monkeypatch, tmp_path):
    config = ROOT / "configs" / "cohorts" / "tcga_luad.yaml"
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, "--config", str(config)]) == 2
    said = capsys.readouterr().err
    for text in ("data/tcga_luad/cohort.csv", "data/tcga_luad/slides", "gdc-client", "case_id"):
        assert text in said
    assert said.count("tapfm: ") == 1


def test_unknown_cohort_and_unknown_keys_are_named(tmp_path):
    with pytest.raises(SettingsError, match="no such config"):
        read_source([tmp_path / "nowhere.yaml"])
    with pytest.raises(SettingsError, match=r"no such config. There are: .*demo.*tcga_luad"):
        read_source([ROOT / "configs" / "cohorts" / "nowhere.yaml"])
    config = tmp_path / "a.yaml"
    config.write_text("data: {table: t.csv, tiles: {tile_size: 224}}")
    with pytest.raises(SettingsError, match=r"data.tiles: unknown tile_size; there are tile_px"):
        read_source([config])
    config.write_text("data: {table: t.csv, tiles: {tissue: {fraction: 1}}}")
    with pytest.raises(SettingsError, match=r"data.tiles.tissue: unknown fraction"):
        read_source([config])
    config.write_text("data: [")
    with pytest.raises(SettingsError, match="not YAML"):
        read_source([config])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[a]", r"a.yaml: data: \['a'\] is not lines of"),
        ("{table: }", "data.table is missing"),
        ("{table: T, tiles: 224}", "data.tiles: 224 is not lines of"),
        ("{table: T, tiles: {mpp: '0,5'}}", "data.tiles.mpp: '0,5' is no number"),
        ("{table: T, tiles: {mpp: 0.01}}", r"mpp must be in \[0.05, 20\]"),
        ("{table: T, tiles: {tissue: {min_fraction: 25}}}", r"min_fraction must be in \[0, 1\]"),
        ("{table: T, labels: EGFR}", r"data.labels: 'EGFR' is no list: write \[EGFR\]"),
        ("{table: T, on_error: ignore}", "data.on_error: 'ignore' is neither stop nor skip"),
        ("{table: T, workers: many}", "data.workers: 'many' is no number"),
        ("{table: T, cache_dir: c, cache_gb: 10GB}", "data.cache_gb: '10GB' is no number"),
        ("{table: T, task: [multilabel]}", r"data.task \['multilabel'\] is none of multilabel"),
    ],
)
def test_a_value_that_cannot_be_is_named_and_no_traceback(tmp_path, capsys, data, message):
    from tests.cohorts import write_cohort

    write_cohort(tmp_path)
    (tmp_path / "a.yaml").write_text(f"data: {data}".replace("T,", f"{tmp_path / 'cohort.csv'},"))
    assert cli.main(["index", "--config", str(tmp_path / "a.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "-1"], "argument --workers: -1 is less than 0"),
        (["--workers", "two"], "invalid whole number value: 'two'"),
        (["--tile-px", "0"], "size must be at least 1 pixel, got 0"),
        (["--mpp", "0.01"], r"mpp must be in \[0.05, 20\]"),
    ],
)
def test_a_flag_that_cannot_be_is_named_and_no_traceback(tmp_path, capsys, flags, message):
    slide = tmp_path / "s.svs"
    with suppress(SystemExit):  # argparse's own
        assert cli.main(["index", str(slide), "--out", str(tmp_path), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_later_configs_win(tmp_path):
    from tests.cohorts import write_cohort

    first = write_cohort(tmp_path / "cohort")
    second = tmp_path / "second.yaml"
    second.write_text("data: {tiles: {tile_px: 48}}")
    source = read_source([first, second])
    assert source.tiles.grid.size == 48
    assert source.tiles.tissue.min_area_um2 == 1000
    assert len(source.rows) == 14


def test_a_flag_wins_over_the_config(tmp_path):
    from tests.cohorts import write_cohort

    config = write_cohort(tmp_path)
    tiles = read_source([config]).tiles
    asked = ["--tile-px", "48", "--mpp", str(2 * tiles.mpp)]
    assert cli.main(["index", "--config", str(config), *asked]) == 0
    made = replace(tiles, tile_px=48, mpp=2 * tiles.mpp)
    assert [path.name for path in (tmp_path / "index").iterdir()] == [made.grid.tag]


def commands():
    """`make ...` and `tapfm ...` lines of the READMEs' code blocks."""
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", "\n".join(PAGES.values()), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split(" #")[0].strip()
            if command.startswith(("make", "tapfm")):
                yield command


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_readme_command_exists(command, monkeypatch):
    program, *arguments = shlex.split(command)
    if program == "make":
        done = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif arguments[0] in ("fit", "fit-tiles"):
        configs = [a for a in arguments if a.startswith("configs/")]
        named = [b for a, b in pairwise(arguments) if a == "--config" and re.fullmatch(r"\w+", b)]
        configs += [find_config(name) for name in named]  # one that comes with tapfm
        assert all((ROOT / a).exists() for a in configs)
        assert arguments[0] in {verb_of(a) for a in configs}
    else:
        flags = vars(cli.parser().parse_args(arguments))
        assert flags.pop("verb") == arguments[0]
        monkeypatch.setattr(verbs, "resolve_name", lambda name: signature(resolve_name(name)).bind)
        do = flags.pop("do")  # its own, which the verb's tests run, or another module's:
        assert do.__module__ != "tapfm.verbs" or do(**flags), "which takes these flags"


PACKAGES = sorted(path.parent for top in ("slides", "tapfm")
                  for path in (ROOT / top).rglob("__init__.py"))  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_packages_docstring_lists_its_files(package):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    said = set(re.findall(r"(\w+\.py)\b", docstring))
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert said == there


@pytest.mark.parametrize("page", LINKED)
def test_links_of_a_page_lead_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert link.startswith("https://") or target.exists(), link
        if heading and not link.startswith("https://"):
            assert heading in anchors(target), link


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", LINKED)
def test_files_that_a_page_names_exist(page):
    """`tapfm/engine/chunked.py`, not a pattern such as `tests/<room>/test_x.py`."""
    text = (ROOT / page).read_text()
    named = re.findall(r"(?<![\w/.-])(?:slides|tapfm|tests|configs|benchmarks)/[\w./]*\w", text)
    for name in named:
        assert (ROOT / name).exists(), name


def settings(verb, *configs):
    """Return the keys of a run, as `model.steps.warm_start`."""
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
        cli.main([verb, *(f"--config={ROOT / config}" for config in configs), "--print_config"])
    return set(dotted(yaml.safe_load(printed.getvalue())))


def dotted(tree, above=""):
    for key, value in tree.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{above}{key}.")


def test_keys_and_modules_that_pages_name_exist():
    known = settings("fit", "configs/cohorts/demo.yaml", "configs/strategies/lora.yaml")
    known |= settings("fit-tiles", "configs/tiles/nct_crc.yaml")
    known |= {"model.aggregator.name", "model.aggregator.temperature"}  # a name alone is one too
    for page in LINKED:
        text = (ROOT / page).read_text()
        named = re.findall(r"(?<![\w/.])(?:model|data|trainer)\.[a-z_]\w*(?:\.\w+)*", text)
        assert not set(named) - known - {"model.safetensors", "model.pt"}, page
        for name in re.findall(r"`((?:tapfm|slides)\.[\w.]+)`", text):
            assert resolve_name(name), page


GUIDE = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)[1:]


@pytest.mark.parametrize("section", GUIDE, ids=lambda section: section.partition("\n")[0])
def test_a_guide_is_short_and_names_what_its_files_have(section):
    linked = re.findall(r"\]\(([^)]+)\)", section)
    texts = "\n".join((ROOT / link).read_text() for link in linked)
    names = set(re.findall(r"`([A-Za-z_]\w*)(?:\([^`]*\))?`", section))
    assert names
    assert not {name for name in names if not re.search(rf"\b{name}\b", texts)}
    assert {"**File**", "**Row**", "**Rows**"} & set(re.findall(r"\*\*\w+\*\*", section))
    assert "**Test**" in section
    assert len(section.strip().splitlines()) <= 16, "a heading, a blank line, and under 15 more"


def test_readme_tree_is_the_tree():
    block = re.search(r"```text\nslides/(.*?)```", README, re.S).group(0)
    said = set(re.findall(r"^ *([\w.]+/?)", block, re.M))
    rooms = {f"{package.name}/" for package in PACKAGES}
    assert said == rooms | {"configs/", "benchmarks/", "tests/"}


def test_benchmarks_are_listed_with_what_they_do():
    first = (ROOT / "benchmarks" / "README.md").read_text().partition("\n## ")[0]
    said = re.findall(r"^\| `(\w+)` \|", first, re.M)
    there = [
        *ROOT.glob("benchmarks/*.py"),
        *(p.parent for p in ROOT.glob("benchmarks/*/__init__.py")),
    ]
    assert sorted(said) == sorted(path.stem for path in there)


def test_readme_names_every_model_with_its_licence():
    from tapfm.encoders.backbones import ROWS

    for row in ROWS:
        assert (
            f"| `{row.key}` | {row.source} | {row.parameters:,} | {row.licence} |"
            in PAGES["tapfm/encoders"]
        )


def test_readme_has_a_row_for_every_strategy():
    """Its options with their defaults, as YAML; what it trains; its learning rate; its export."""
    from tapfm.adapt.strategies import STRATEGIES, make_strategy, strategy_spec
    from tests.adapt.test_adapt import NO_EXPORT, UNI

    row = r"\| `(\{name: .*\})` \| .* \| ([\d,]+) \| ([\de-]+) \| (yes|no) \|"
    rows = re.findall(row, PAGES["tapfm/adapt"])
    said = {yaml.safe_load(spec)["name"]: (yaml.safe_load(spec), *rest) for spec, *rest in rows}
    assert said.keys() == STRATEGIES.keys()
    for name, (spec, count, lr, export) in said.items():
        strategy = make_strategy(spec)
        assert strategy == make_strategy(name), "the README's options are the defaults"
        assert list(spec) == list(strategy_spec(strategy)), "and all of them"
        assert count == f"{UNI[name]:,}"
        assert float(lr) == strategy.lr
        assert (export == "no") == (name in NO_EXPORT)


@pytest.mark.parametrize(
    "table",
    [
        "tapfm.slide_model.aggregators:AGGREGATORS",
        "tapfm.regularisers:REGULARISERS",
        "tapfm.bag_transforms:BAG_TRANSFORMS",
    ],
)
def test_configs_page_has_a_row_for_each_method_with_its_defaults(table):
    kinds = resolve_name(table)
    rows = re.findall(r"^\| `(\{name: .*?\})` \|", PAGES["configs"], re.M)
    specs = {spec["name"]: spec for spec in map(yaml.safe_load, rows) if spec["name"] in kinds}
    assert specs.keys() == kinds.keys()
    for name, spec in specs.items():
        assert spec == spec_of(kinds, kinds[name]())
        assert "AGGREGATORS" not in table or f"| `{name}` |" in README


def test_a_strategy_is_configured_in_yaml_or_by_keys_of_the_command_line(tmp_path, capsys):
    second = tmp_path / "lora.yaml"
    second.write_text("model: {strategy: {name: lora, rank: 16}}")
    keys = ["--model.strategy.name", "lora", "--model.strategy.rank", "16"]
    spec = {"name": "lora", "rank": 16}
    for options, expected in (
        (["--config", str(second)], spec),
        (keys, spec),
        (["--config", str(second), "--model.strategy", "full"], "full"),
        (["--model.strategy", "ssf"], "ssf"),
    ):
        config = ROOT / "configs" / "cohorts" / "demo.yaml"
        with pytest.raises(SystemExit):
            cli.main(["fit", "--config", str(config), *options, "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["model"]["strategy"] == expected
