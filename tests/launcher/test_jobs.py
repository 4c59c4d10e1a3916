"""Jobs run once, are resumed by the same command, and their failures stand in one table."""

import csv
import json
import sys

import pytest

from slides.errors import SettingsError
from tapfm.cli import VERBS, main, parser
from tapfm.evaluation.study import launch_cells, plan_cells
from tapfm.evaluation.study_cells import Study
from tapfm.evaluation.study_table import FINISHED
from tapfm.launcher import jobs as launching
from tapfm.launcher.jobs import Job, Local, launch
from tapfm.launcher.slides import command_of, launcher_of, slide_jobs
from tests.conftest import stained_picture, write_pyramid

STAND_IN = """
import pathlib, sys
name, folder = sys.argv[1:3]
with open(pathlib.Path(folder) / "ran.txt", "a") as file:
    file.write(name + "\\n")
if (pathlib.Path(folder) / f"break_{name}").exists():
    print("tapfm: the disk is full", file=sys.stderr)
    sys.exit(2)
(pathlib.Path(folder) / f"{name}.h5").write_text("")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in the place of `tapfm`, its folder, and a list of what it ran."""
    (tmp_path / "tapfm.py").write_text(STAND_IN)
    monkeypatch.setattr(launching, "TAPFM", [sys.executable, str(tmp_path / "tapfm.py")])
    jobs = [Job(name, ((name, str(tmp_path)),), (str(tmp_path / f"{name}.h5"),)) for name in "abc"]

    def ran():
        path = tmp_path / "ran.txt"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(names)

    return jobs, tmp_path, ran


def test_a_launch_does_what_is_left(stand_in):
    jobs, folder, ran = stand_in
    (folder / "break_b").touch()
    failed = launch(jobs, folder / "jobs", Local(2))
    assert list(failed) == ["b"]
    assert failed["b"].startswith("exit code 2: the disk is full (see ")
    with (folder / "jobs" / "failed.csv").open() as file:
        assert list(csv.reader(file)) == [["job", "reason"], ["b", failed["b"]]]
    assert ran() == ["a", "b", "c"]
    (folder / "break_b").unlink()
    assert not launch(jobs, folder / "jobs", Local())
    assert ran() == ["b"]
    assert not (folder / "jobs" / "failed.csv").exists()
    (folder / "c.h5").unlink()
    assert not launch(jobs, folder / "jobs", Local())
    assert ran() == ["c"], "its file was gone"
    other = Job("a", (("a", str(folder)), ("a", str(folder))), jobs[0].files)
    assert not launch([other], folder / "jobs", Local())
    assert ran() == ["a", "a"], "its commands are others"


def test_a_job_that_left_no_result_has_failed(stand_in):
    jobs, folder, ran = stand_in

    class Loses(Local):
        def run(self, jobs, folder):
            super().run([job for job in jobs if job.name != "b"], folder)
            (folder / "c.json").write_text("{")

    failed = launch(jobs, folder / "jobs", Loses())
    assert "ended without a result" in failed["b"]
    assert "damaged" in failed["c"]
    assert list(failed) == ["b", "c"]
    ran()
    assert not launch(jobs, folder / "jobs", Local())
    assert ran() == ["b", "c"]


def test_a_command_that_ends_well_and_writes_nothing_has_failed(stand_in):
    _, folder, _ = stand_in
    job = Job("a", (("a", str(folder)),), (str(folder / "features_*" / "a.h5"),))
    reason = job.run(folder / "jobs")
    assert "$ tapfm a" in reason
    assert json.loads((folder / "jobs" / "a.json").read_text())["code"] == 0


def test_two_jobs_of_one_name_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="named a"):
        launch([Job("a", ()), Job("a", ())], tmp_path, Local())


FLAGS = {
    "index": ["a.svs", "b.svs", "--mpp", "0.25", "--out", "x", "--on-error", "skip"],
    "features": ["a.svs", "--model", "uni", "--format", "clam", "stamp", "--chunk", "3"],
    "predict": ["a.svs", "b.svs", "--model", "m.safetensors", "--workers", "0"],
}


@pytest.mark.parametrize("verb", FLAGS)
def test_a_job_has_the_flags_of_the_launch(verb):
    """All but the launcher's own, read again to the same values."""
    top = parser()
    own = top._subparsers._group_actions[0].choices[verb]
    flags = vars(top.parse_args([verb, *FLAGS[verb], "--launcher", "local", "--jobs", "2"]))
    names = [path.stem for path in flags["slides"]]
    jobs = slide_jobs(own, flags, names, lambda name: [f"{name}.h5"], per_job=1)
    assert [job.name for job in jobs] == names
    assert all(job.files == (f"{job.name}.h5",) for job in jobs)
    again = [vars(parser().parse_args(job.commands[0])) for job in jobs]
    for number, each in enumerate(again):
        assert each.pop("slides") == [flags["slides"][number]]
        assert each["launcher"] is each["jobs"] is None
        for key in each.keys() - {"do", "launcher", "jobs"}:
            assert each[key] == flags[key], key


def test_slides_of_a_config_are_named():
    top = parser()
    own = top._subparsers._group_actions[0].choices["index"]
    given = ["--config", "a.yaml", "--config", "b.yaml", "--only", "p", "q", "r"]
    flags = vars(top.parse_args(["index", *given]))
    (one, two) = slide_jobs(own, flags, ["p", "q", "r"], lambda _: (), per_job=2)
    assert command_of(own, flags) == ["--config", "a.yaml", "--config", "b.yaml"]
    assert one.commands[0][1:4] == ("--only", "p", "q")
    assert (one.name, two.name) == ("p_and_1", "r")


def test_flags_of_the_launcher_that_cannot_be():
    with pytest.raises(SettingsError, match="KEY=VALUE"):
        launcher_of("slurm", None, ["partition"])
    with pytest.raises(SettingsError, match="leave it out"):
        launcher_of("local", None, ["partition=gpu"])
    assert {"index", "features", "predict"} <= VERBS.keys()


def test_an_index_on_processes(tmp_path, capsys):
    """The real verb: one slide is damaged, and is all that is left for the same command."""
    for number in range(2):
        picture = stained_picture(431, 367, seed=number)
        write_pyramid(tmp_path / f"s{number}.tif", picture, 0.5, levels=2)
    (tmp_path / "s2.tif").write_bytes(b"no slide")
    out, slides = tmp_path / "index", [str(tmp_path / f"s{n}.tif") for n in range(3)]
    command = ["index", *slides, "--out", str(out), "--tile-px", "32", "--workers", "0",
               "--launcher", "local", "--jobs", "2"]  # fmt: skip
    assert main(command) == 2
    said = capsys.readouterr()
    assert "2 of 3 slides are indexed" in said.out
    assert "s2" in said.err
    assert main(command) == 2
    assert "3 jobs, 2 done before" in capsys.readouterr().out
    (ledger,) = out.rglob("ledger.csv")
    with ledger.open() as file:
        rows = {row["slide_id"]: row["status"] for row in csv.DictReader(file)}
    assert (rows["s0"], rows["s1"]) == ("kept", "kept")


VERB = """
import pathlib, sys
verb, *rest = sys.argv[1:]
values = dict(zip(rest, rest[1:]))
if verb == "predict":
    out = pathlib.Path(values["--out"])
    out.mkdir(parents=True)
    names = [pathlib.Path(word).stem for word in rest if word.endswith(".svs")]
    rows = "".join(f"{name},{name},0.5\\n" for name in names)
    (out / "predictions.csv").write_text("slide_id,case_id,p_EGFR\\n" + rows)
    for name in names:
        (out / f"{name}_weights.h5").write_text(name)
elif verb == "test":
    folder = pathlib.Path(values["--run"])
    if "seed_1" in str(folder):
        print("tapfm: no test slide", file=sys.stderr)
        sys.exit(2)
    (folder / "report_test").mkdir()
    (folder / "report_test" / "metrics_test.json").write_text("{}")
"""


@pytest.fixture
def verbs(tmp_path, monkeypatch):
    (tmp_path / "verb.py").write_text(VERB)
    monkeypatch.setattr(launching, "TAPFM", [sys.executable, str(tmp_path / "verb.py")])


def test_predictions_of_jobs_come_together(verbs, tmp_path):
    """Each job writes a folder of its own: two that joined one table would lose rows."""
    out, slides = tmp_path / "out", [f"s{n}.svs" for n in range(3)]
    out.mkdir()
    (out / "predictions.csv").write_text("slide_id,case_id,p_EGFR\nold,old,0.1\ns0,s0,0.9\n")
    command = ["predict", *slides, "--model", "m.safetensors", "--out", str(out),
               "--launcher", "local", "--per-job", "2"]  # fmt: skip
    assert main(command) == 0
    with (out / "predictions.csv").open() as file:
        rows = {row["slide_id"]: row["p_EGFR"] for row in csv.DictReader(file)}
    assert rows == {"old": "0.1", "s0": "0.5", "s1": "0.5", "s2": "0.5"}
    assert (out / "s2_weights.h5").read_text() == "s2"
    assert main([*command, "--case", "c"]) == 2, "a case is one prediction"


def test_cells_of_a_study_are_jobs(verbs, tmp_path):
    """Those that end well are marked as finished, as cells of threads are."""
    study = Study(("c.yaml",), str(tmp_path), seeds=(0, 1), launcher="local")
    cells = plan_cells(study, [tmp_path / "table.csv"])
    failed = launch_cells(study, cells, tmp_path)
    assert list(failed) == ["fold 0, seed 1, tapfm_gated_full"]
    assert "no test slide" in failed["fold 0, seed 1, tapfm_gated_full"]
    finished = [(cell.folder / FINISHED).exists() for cell in cells]
    assert finished == [True, False]
    assert (tmp_path / "jobs" / "failed.csv").exists()
