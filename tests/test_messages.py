"""Every message that a user can cause is under 6 lines, says what to do, and has no traceback.

The mistakes of a first hour, verb by verb, as they are typed. A message that lists several faults
has a line for each, and none of these has five.
"""

import re

import pytest

from tapfm.cli import main
from tests.cohorts import write_cohort

REMEDY = re.compile(  # what a user is told to do, or what there is to choose from
    r"[Cc]orrect|[Gg]ive|[Ww]rite|[Rr]un[ :]|[Ll]eave|[Ss]et |[Tt]ake|[Aa]dd|[Mm]ove|[Rr]emove|"
    r"[Ss]ave|Did you mean|[Cc]hoose|[Rr]ename|[Tt]here (are|is):? |must be|choose from|"
    r"none of \w+, \w+|nor one of \w+, \w+|is not a (whole )?number"
)
MISTAKES = {
    "no config": "fit --config gone.yaml",
    "no such name": "fit --config dmeo",
    "a config that is no YAML": "fit --config slides/s0.tif",
    "a misspelt verb": "tets --run runs",
    "a misspelt flag": "test --rnu runs",
    "a misspelt key": "fit --config config.yaml --data.tabel x.csv",
    "two misspelt keys": "fit --config config.yaml --data.tabel x.csv --modle.chunk 3",
    "no GPU": "fit --config config.yaml --trainer.accelerator gpu",
    "no such accelerator": "fit --config config.yaml --trainer.accelerator gup",
    "mixed precision of the trainer": "fit --config config.yaml --trainer.precision 16-mixed",
    "a word for a number": "fit --config config.yaml --model.chunk many",
    "a number that cannot be": "fit --config config.yaml --model.drop_path 1.5",
    "no such model": "fit --config config.yaml --model.model uni3",
    "no such strategy": "fit --config config.yaml --model.strategy loar",
    "no weights": "fit --config config.yaml --model.model uni",
    "no table": "fit --config config.yaml --data.table gone.csv",
    "no such label": "fit --config config.yaml --data.labels [EGFRR]",
    "a table of another kind": "fit --config config.yaml --data.table config.yaml",
    "no runs": "test --run nowhere",
    "no report": "report --run nowhere",
    "no model to predict with": "predict slides/s0.tif --model gone.safetensors",
    "no slide to predict": "index gone.svs",
    "slides and config": "index slides/s0.tif --config config.yaml",
    "no slides": "index",
    "no such card": "plan --gpu L5",
    "no such part": "split --table cohort.csv --out folds --folds 3 --repeats 2",
    "too many folds": "split --table cohort.csv --out folds --folds 99",
    "a split of nothing": "split --table gone.csv --out o.csv",
    "check of nothing": "check",
    "check of no table": "check --table gone.csv",
    "study without a config": "study --out s",
    "embed without features": "embed --slide-encoder titan --weights w",
    "embed by no encoder": "embed --slide-encoder tiatn --features slides",
    "embed without weights": "embed --slide-encoder titan --features slides",
    "a segmenter that is not there": "index slides/s0.tif --segmenter slidesegmenter --out i",
    "features of no model": "features --config config.yaml --model nothing",
    "export of nothing": "export --model gone.safetensors --out e",
    "labels of nothing": "labels --mutations gone.maf --out l.csv",
    "doctor of nothing": "doctor --model nothing",
    "no question": "pathpt --config config.yaml --question gone.yaml",
    "negative workers": "demo --workers -1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first_hour")
    write_cohort(folder)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_short_message_with_a_remedy(mistake, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    try:
        code = main(MISTAKES[mistake].split())
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code in (1, 2), (code, out, err)
    said = [line for line in (err or out).splitlines() if line.strip() and "\r" not in line]
    assert said, "nothing was said"
    assert len(said) < 6 or "doctor" in mistake, said
    assert REMEDY.search(" ".join(said)), said
    assert "Traceback" not in err


def test_the_first_screen_of_help_is_a_screen_and_names_real_keys(capsys):
    assert main(["fit", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 36
    assert max(map(len, short.splitlines())) <= 100
    named = re.findall(r"--((?:data|model|trainer)\.\w+|run_dir)", short)
    assert main(["fit", "--help", "all"]) == 0
    every = capsys.readouterr().out
    assert len(named) >= 10
    assert all(f"--{key}" in every for key in named)
    assert main(["fit", "--help", "data.tiles"]) == 0
    part = capsys.readouterr().out
    assert "--data.tiles.tile_px" in part
    assert "--data.table" not in part
