"""Every fault in the arguments of a verb is one clear line, with exit code 2 and no traceback."""

import pytest
import torch
import yaml

from tapfm.cli import main
from tapfm.config import data_keys
from tapfm.training.arguments import explain
from tests.cohorts import write_cohort
from tests.tile_sets import arguments, write_tiles


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    return write_tiles(folder / "tiles"), folder / "runs"


def said(capsys, command):
    """What a faulty command prints: no usage, no traceback."""
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("tapfm: ")
    assert "usage" not in err
    return err.removeprefix("tapfm: ").strip()


FIT = [
    ("--model.chunks 4", "model.chunks: there is no such key. Did you mean model.chunk?"),
    ("--model.steps.acumulate=4", "Did you mean model.steps.accumulate?"),
    ("--model.strateg1.name lora", "model.strateg1.name: there is no such key."),
    ("--namee x", "namee: there is no such key. Did you mean name?"),
    ("--nothing_like_it x", "nothing_like_it: there is no such key. `--help all` lists the keys."),
    ("--model.chunk", "model.chunk: no value. Write --model.chunk VALUE."),
    ("--model.chunk four", "model.chunk: 'four' is not a whole number, or null."),
    ("--model.chunk 1.5", "model.chunk: '1.5' is not a whole number, or null."),
    ("--model.drop_path null", "model.drop_path: 'None' is not a number."),
    ("--model.steps.encoder_lr fast", "'fast' is not a number, or null."),
    ("--model.steps 3", "model.steps: '3' is not keys and values. Set the keys below it, such as"),
    ("--data.turns maybe", "data.turns: 'maybe' is not true or false."),
    ("--data.labels EGFR", "data.labels: 'EGFR' is not a list, or null. Write [EGFR]."),
    ("--data.table.name x", "data.table.name: there is no such key."),
    ("--model.precision bf61", "fp32, bf16, bf16-true, or null. Did you mean bf16?"),
    ("--model.strategy lorra", "or keys and values. Did you mean lora?"),
    ("--model.aggregator gatedd", "Did you mean gated?"),
    ("--model.aggregator {name:gatedd}", "model.aggregator"),
    ("--model.regularisers [aemm]", "model.regularisers: name 'aemm' is none of"),
    ("--model.bag_transforms [{name:x}]", "model.bag_transforms"),
    ("--model.model demo_vitt", "Did you mean demo_vit?"),
    ("--model.tile_px 32", "model.tile_px: taken from data.tiles.tile_px. Leave it out."),
    ("--model.drop_path 1.5", "model.drop_path must be in [0, 1), got 1.5"),
    ("--data.workers -1", "data.workers must be 0 or more, got -1"),
    ("--data.tiles_per_slide 0", "data.tiles_per_slide must be 1 or more, got 0"),
    ("--data.colour -3", "data.colour must be 0 or more, got -3"),
    ("--data.tiles.tile_px 0", "data.tiles: tile size must be at least 1 pixel, got 0"),
    ("--resume_minutes -2", "resume_minutes must be 0 or more, got -2"),
    ("--trainer.strategy fsdp", "trainer.strategy fsdp: it divides the encoder among devices"),
    ("--resume_every -2", "resume_every must be 0 or more, got -2"),
    ("--trainer.max_epochs 0", "give it 1 or more (it is 0)"),
    ("--trainer.precision 16-mixed", "trainer.precision is 16-mixed"),
    ("--trainer.accelerator cuuda", "trainer.accelerator: 'cuuda' is none of"),
    ("--trainer.devices 0", "trainer: `Trainer(devices='0')`"),
    ("--trainer.strategy ddpp", "trainer: You selected an invalid strategy name"),
    ("--trainer.limit_train_batches -1", "for limit_train_batches"),
    ("--trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch must be 1 or more"),
    ("--trainer.logger nope", "is not true or false, or null, or the path of a class."),
    ("--trainer.callbacks [{class_path:nope.Nope}]", "trainer.callbacks"),
    ("--trainer.callbacks nope.Nope", "trainer.callbacks"),
    ("--seed_everything x", "seed_everything: 'x' is not true or false, or a whole number."),
    ("hello", "hello: belongs to no key. Write --KEY VALUE."),
    ("--data.table /nowhere.csv", "/nowhere.csv: there is no such file."),
    ("--model.weights /nowhere.pt", "/nowhere.pt is neither a checkpoint"),
    ("--config /nowhere.yaml", "/nowhere.yaml: there is no such config."),
    ("--config [1,2]", "[1,2]: there is no such config."),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), FIT, ids=[words for words, _ in FIT])
def test_a_fault_of_fit_is_one_line(cohort, capsys, words, line):
    words = words.replace("{name:", "{name: ").replace("{class_path:", "{class_path: ")
    flag, _, value = words.partition(" ")
    err = said(capsys, ["fit", "--config", str(cohort), flag, *([value] if value else [])])
    assert line in err
    assert "\n" not in err or "says:" in err


def test_a_gpu_that_is_not_there(cohort, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    err = said(capsys, ["fit", "--config", str(cohort), "--trainer.accelerator", "gpu"])
    assert err == (
        "trainer.accelerator is gpu, and PyTorch finds no GPU on this machine. Leave it out, or "
        "set cpu."
    )


def test_all_faults_of_configs_and_flags_are_listed_together(cohort, tmp_path, capsys):
    """Those of keys and types first; once there are none, those of values."""
    config = tmp_path / "faulty.yaml"
    config.write_text("""
model: {strategi: lora, chunk: four, steps: {head_lr: 1e-3, clip: a}}
data: {worker: 1, tiles: {tissue: 3}}
traner: {max_epochs: 3}
""")
    faulty = ["fit", "--config", str(cohort), "--config", str(config), "--model.precision", "fp8"]
    err = said(capsys, [*faulty, "--name", "x", "--colour", "3"])
    assert err.startswith("fit: 8 faults\n")
    lines = {line.strip().partition(":")[0] for line in err.splitlines()[1:]}
    assert lines == {
        "model.strategi", "model.chunk", "model.steps.clip", "data.worker", "data.tiles.tissue",
        "traner.max_epochs", "model.precision", "colour",
    }  # fmt: skip
    values = ["--model.drop_path", "1.5", "--data.workers", "-1", "--model.steps.clip", "-1",
              "--trainer.max_epochs", "0", "--model.model", "uniii", "--data.tiles.mpp", "-1",
              "--model.optimizer", "master", "--model.precision", "bf16"]  # fmt: skip
    assert said(capsys, ["fit", "--config", str(cohort), *values]).startswith("fit: 7 faults\n")


def test_a_config_that_is_none_is_all_that_is_said(tmp_path, capsys):
    config = tmp_path / "a.yaml"
    for text, line in (("a: [1\n b: }", "not YAML"), ("- 1", "lines of `key: value`")):
        config.write_text(text)
        err = said(capsys, ["fit", "--config", str(config)])
        assert line in err
        assert "\n" not in err, "a table that the config may name is not missing"
    assert said(capsys, ["fit"]) == "data.table: missing. Give it in a config, or as --data.table."


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--data.batchh 2", "data.batchh: there is no such key. Did you mean data.batch?"),
        ("--data.batch two", "data.batch: 'two' is not a whole number."),
        ("--model.head probee", "'probee' is not one of probe, random. Did you mean probe?"),
        ("--data.workers -1", "data.workers must be 0 or more, got -1"),
        ("--model.drop_path 1.5", "model.drop_path must be in [0, 1), got 1.5"),
        ("--data.mpp 0", "data: mpp must be in [0.05, 20]"),
        ("--data.colour -1", "data.colour must be 0 or more, got -1"),
        ("--trainer.max_epochs 0", "give it 1 or more (it is 0)"),
        ("--data.source /nowhere", "/nowhere: there is no such file."),
    ],
)
def test_a_fault_of_fit_tiles_is_one_line(tiles, capsys, words, line):
    err = said(capsys, arguments(*tiles, *words.split()))
    assert line in err
    assert "\n" not in err


@pytest.mark.parametrize("verb", ["index", "features", "probe", "labels"])
def test_unknown_keys_of_data_are_named_by_every_verb(cohort, tmp_path, capsys, verb):
    config = tmp_path / "a.yaml"
    data = yaml.safe_load(cohort.read_text())["data"]
    config.write_text(yaml.safe_dump({"data": {**data, "color": 1, "tiles_per_slid": 2}}))
    further = {"features": ["--model", "demo_vit"], "labels": ["--mutations", "m.maf"]}
    err = said(capsys, [verb, "--config", str(config), *further.get(verb, [])])
    assert "2 faults" in err
    assert "data.color: there is no such key. Did you mean data.colour?" in err.replace(
        "mean colour", "mean data.colour"
    )
    assert "tiles_per_slide?" in err


def test_faults_of_a_config_are_listed_together_without_torch(cohort, tmp_path, capsys):
    config = tmp_path / "a.yaml"
    tiles = {"mpp": "a", "tile": 3, "tissue": {"pens": True}}
    config.write_text(yaml.safe_dump({"data": {
        "table": str(cohort.parent / "cohort.csv"), "workers": "two", "stain": "x", "color": 1,
        "tiles": tiles,
    }}))  # fmt: skip
    err = said(capsys, ["index", "--config", str(config)])
    assert "6 faults" in err
    for near in ("colour", "tile_px", "pen"):
        assert f"Did you mean {near}?" in err


def test_keys_of_data_are_those_of_its_class():
    import inspect

    from tapfm.data.datamodule import SlideData

    assert data_keys() == set(inspect.signature(SlideData).parameters)


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("fitt", ["invalid choice: 'fitt'", "Did you mean fit?"]),
        ("", ["the following arguments are required: VERB"]),
        ("index --confg x", ["unrecognized argument --confg. Did you mean --config?"]),
        ("predict s.svs", ["the following arguments are required: --model"]),
        ("predict s.svs --model m --chunk 0", ["argument --chunk: 0 is less than 1"]),
        (
            "predict s.svs --model m --chunk 0 --workers two --devise cpu",
            ["3 faults", "--chunk: 0", "value: 'two'", "--devise. Did you mean --device?"],
        ),
        ("predict s.svs --model m --device cudaa", ["'cudaa' is no device: give cpu, cuda"]),
        ("predict s.svs --model /nowhere.safetensors", ["there is no such file"]),
        ("split --table x --out o --format clamm", ["Did you mean clam?"]),
        ("plan --model demo_vitt", ["Did you mean demo_vit?"]),
        ("study --seeds a b", ["2 faults", "invalid int value: 'a'", "invalid int value: 'b'"]),
        ("test --run /nowhere", ["/nowhere: no run with a best.safetensors below it"]),
    ],
)
def test_faults_of_flags_are_listed_without_the_usage(capsys, command, lines):
    err = said(capsys, command.split())
    for line in lines:
        assert line in err
    assert ("\n" in err) == ("faults" in lines[0])


def test_a_gpu_flag_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    err = said(capsys, ["predict", "s.svs", "--model", "m", "--device", "cuda:1"])
    assert "PyTorch finds 1 GPUs here, and cuda:1 is none of them" in err


def test_a_message_that_is_not_known_is_passed_on_in_one_line():
    assert explain("Something else\n  went wrong", ["a"]) == (["Something else went wrong"], [])


PLACES = [
    ("model: {chunk: 4}\n", "model:\n\n  chnk: 3\n", "chnk", "b.yaml, line 3"),
    ("model:\n  chunk: four\n", "data: {workers: 0}\n", "'four'", "a.yaml, line 2"),
    ("model:\n  chunk: four\n", "model: {chunk: 4}\n", "'four'", "a.yaml, line 2"),
    ("model: {chunk: 4}\n", "#\n#\nmodel: {chunk: five}\n", "'five'", "b.yaml, line 3"),
    ("model: {strategy: loar}\n", "model: {chunk: 4}\n", "Did you mean lora?", "a.yaml, line 1"),
    ("modle: {chunk: 4}\n", "model: {chunk: 4}\n", "modle", "a.yaml, line 1"),
    ("model: {chunk: 4}\n", "model:\n  drop_path: 1.5\n", "[0, 1)", "b.yaml, line 2"),
    ("model: {chunk: 4}\n", "data:\n  tiles:\n    mppp: 1\n", "mppp", "b.yaml, line 3"),
]


@pytest.mark.parametrize("first", [None, "a.yaml"], ids=["by path", "by own folder"])
@pytest.mark.parametrize(
    ("a", "b", "words", "place"), PLACES, ids=[each[3] + each[2] for each in PLACES]
)
def test_a_fault_of_a_config_names_file_and_line(cohort, tmp_path, capsys, monkeypatch, a, b, words,
                                                 place, first):  # fmt: skip
    """Of several configs the one that is at fault, wherever the command is typed."""
    (tmp_path / "a.yaml").write_text(a)
    (tmp_path / "b.yaml").write_text(b)
    if first:
        monkeypatch.chdir(tmp_path)
    folder = "" if first else f"{tmp_path}/"
    configs = ["--config", str(cohort), "--config", f"{folder}a.yaml", f"--config={folder}b.yaml"]
    err = said(capsys, ["fit", *configs])
    assert words in err
    assert err.endswith(f"({folder}{place})")
    assert len(err.splitlines()) == 1


def test_a_fault_of_a_flag_has_no_place(cohort, capsys):
    assert "line" not in said(capsys, ["fit", "--config", str(cohort), "--model.chunk", "x"])


def test_verbs_that_read_data_alone_name_file_and_line(cohort, tmp_path, capsys):
    (tmp_path / "b.yaml").write_text("data:\n  color: 1\n  tiles:\n    tile: 3\n")
    configs = ["--config", str(cohort), "--config", str(tmp_path / "b.yaml")]
    lines = said(capsys, ["index", *configs]).splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(f"({tmp_path}/b.yaml, line 2)")
    assert lines[2].endswith(f"({tmp_path}/b.yaml, line 4)")
