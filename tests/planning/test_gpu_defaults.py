"""What a config leaves open follows the plan on a GPU, and is as ever on a CPU."""

import functools
from types import SimpleNamespace

import pytest
import yaml

from tapfm.encoders.backbones import find
from tapfm.planning import plan
from tapfm.planning.cards import usable
from tapfm.planning.footprint import CONTEXT_GIB, Footprint
from tapfm.planning.gpu_defaults import LOG_EVERY, ON_CPU, foretell, planned, say_retries
from tapfm.planning.plan import PlanError
from tapfm.training.fit import prepare_folder, read_config
from tests.card import PretendCard
from tests.cohorts import write_cohort

QUIET = ["--trainer.enable_progress_bar", "false"]
OPEN = dict.fromkeys(ON_CPU)


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    with pytest.MonkeyPatch.context() as patch:
        real = functools.cache(lambda key, tile_px: Footprint(find(key), tile_px))
        patch.setattr(plan, "Footprint", lambda row, tile_px=None: real(row.key, tile_px))
        yield


def model(**changes):
    settings = {"model": "demo_vit", "strategy": "full", "tile_px": 112, "merge_tokens": 0,
                "steps": SimpleNamespace(pull=0.0), **OPEN}  # fmt: skip
    return SimpleNamespace(**settings | changes)


class Settings(SimpleNamespace):
    """Reads its fields by key too, as jsonargparse's namespaces do."""

    def __getitem__(self, key):
        return getattr(self, key)


def chosen(gib, **changes):
    with PretendCard(gib):
        given, reason = planned(Settings(**vars(model(**changes))), features=False)
    return given, reason


def test_an_open_config_follows_the_plan_on_a_gpu(tmp_path, capsys):
    config = write_cohort(tmp_path)
    text = yaml.safe_load(config.read_text())
    del text["model"]["chunk"]
    config.write_text(yaml.safe_dump(text))
    flags = ["--config", str(config), "--trainer.accelerator", "gpu", *QUIET]
    with PretendCard():
        cli = read_config(flags)
        assert (cli.config.model.precision, cli.config.model.optimizer) == ("bf16-true", "master")
        assert (cli.config.model.chunk, cli.config.model.recompute) == (64, False)
        assert cli.trainer.log_every_n_steps == LOG_EVERY
        said = capsys.readouterr().out
        assert "for this GPU: chunk 64, precision bf16-true, optimizer master, recompute" in said
        assert "GiB at its peak of 21.3 usable" in said
        expected = foretell(cli.model)
        assert max(expected.values()) + CONTEXT_GIB <= usable(22.03)
        prepare_folder(cli)
    (cli.folder / "last.ckpt").touch()
    with PretendCard(2.2):  # another card: the run that was begun keeps its settings
        again = read_config(flags)
    assert again.config.model.chunk == 64
    again = read_config(["--config", str(config), "--trainer.accelerator", "cpu", *QUIET])
    assert again.config.model.optimizer == "master"


def test_on_a_cpu_all_is_as_ever(tmp_path, capsys):
    cli = read_config(["--config", str(write_cohort(tmp_path)), *QUIET])
    assert {key: cli.config.model[key] for key in ON_CPU} == {**ON_CPU, "chunk": 5}
    assert cli.trainer.log_every_n_steps == 1
    assert cli.config.trainer.devices == 1, "auto would be DDP on a node of several"
    assert "for this GPU" not in capsys.readouterr().out


def test_what_is_set_stays_and_the_rest_is_fitted_around_it():
    given, _ = chosen(22.03, optimizer="adamw", precision="fp32")
    assert (given["optimizer"], given["precision"]) == ("adamw", "fp32")
    given, _ = chosen(22.03, recompute=True, chunk=7)
    assert (given["recompute"], given["chunk"]) == (True, 7)
    given, _ = chosen(22.03, steps=SimpleNamespace(pull=0.1))
    assert (given["optimizer"], given["precision"]) == ("adamw", "bf16")
    given, reason = chosen(22.03, strategy="frozen")
    assert given == {**ON_CPU, "precision": "bf16"}
    assert "frozen" in reason


def test_a_smaller_card_gets_another_setup():
    """1.49 GiB hold 3 tiles of it at once, 1.47 hold them with masters on the host."""
    large, small = chosen(22.03)[0], chosen(1.5)[0]
    assert large["chunk"] == 64 > small["chunk"] > 0


def test_a_card_on_which_nothing_fits_is_refused():
    with pytest.raises(PlanError, match=r"this run would take .* GiB of GPU memory"):
        chosen(1.42, optimizer="master")


@pytest.mark.parametrize(("retries", "lines"), [(0, 0), (3, 1)])
def test_an_allocator_that_was_short_of_memory_is_told(monkeypatch, capsys, retries, lines):
    monkeypatch.setattr("torch.cuda.memory_stats", lambda: {"num_alloc_retries": retries})
    say_retries()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all("short 3 times" in line and "model.chunk" in line for line in said)
