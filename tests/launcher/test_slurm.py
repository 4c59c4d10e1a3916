"""Against a real Slurm of one node, started here: what fails or is cancelled is run again."""

import csv
import shlex
import threading
import time

import pytest
from safetensors.torch import load_file

from slides.errors import SettingsError
from tapfm.cli import main, parser
from tapfm.launcher import slurm
from tapfm.launcher.jobs import TAPFM
from tests.cohorts import write_cohort
from tests.conftest import stained_picture, write_pyramid
from tests.one_node_slurm import OneNodeSlurm, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
SLIDES = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with (
        OneNodeSlurm(tmp_path_factory.mktemp("slurm")) as found,
        pytest.MonkeyPatch.context() as at,
    ):
        at.setenv("SLURM_CONF", found.env["SLURM_CONF"])
        at.setattr(slurm, "POLL_S", 0.5)
        yield found


def ledger(folder):
    (path,) = folder.rglob("ledger.csv")
    with path.open() as file:
        return {row["slide_id"]: row["status"] for row in csv.DictReader(file)}


def test_an_array_survives_a_failed_node_and_what_is_cancelled_is_run_again(
    cluster, tmp_path, capsys
):
    slides = []
    for number in range(SLIDES):
        picture = stained_picture(431, 367, seed=number)
        slides.append(str(write_pyramid(tmp_path / f"s{number}.tif", picture, 0.5, levels=2)))
    out = tmp_path / "index"
    command = ["index", *slides, "--out", str(out), "--tile-px", "32", "--workers", "0",
               "--launcher", "slurm", "--jobs", "2"]  # fmt: skip
    codes = []
    launch = threading.Thread(target=lambda: codes.append(main(command)), daemon=True)
    launch.start()

    def done():
        return len(list((out / "jobs" / "index").glob("s*.json")))

    cluster.await_(lambda: done() >= 3, 120)
    cluster.await_(lambda: cluster.jobs("R"), 30)
    lost = set(cluster.jobs("R"))
    before = done()
    cluster.fail_node()
    cluster.await_(lambda: done() > before, 120)
    cancelled = sorted(cluster.jobs("PD"), key=lambda name: int(name.split("_")[1]))[-2:]
    assert not lost & set(cancelled)
    cluster.run("scancel", *cancelled)
    while launch.is_alive():
        cluster.hurry()
        time.sleep(1)
    assert codes == [2]
    with (out / "jobs" / "index" / "failed.csv").open() as file:
        failed = {row["job"]: row["reason"] for row in csv.DictReader(file)}
    assert len(failed) == 2, "those of the failed node were run again"
    assert all("ended without a result" in reason for reason in failed.values())
    kept = {name for name, status in ledger(out).items() if status == "kept"}
    assert kept == {f"s{n}" for n in range(SLIDES)} - set(failed)
    capsys.readouterr()
    assert main(command) == 0
    assert "20 jobs, 18 done before" in capsys.readouterr().out
    assert ledger(out) == {f"s{n}": "kept" for n in range(SLIDES)}
    assert not (out / "jobs" / "index" / "failed.csv").exists()


def test_a_fit_that_is_requeued_ends_as_if_it_had_not_been(cluster, tmp_path):
    config = write_cohort(tmp_path)
    command = ["fit", "--config", str(config), "--trainer.max_epochs", "2"]
    assert main([*command, "--name", "whole"]) == 0
    runs = tmp_path / "runs"
    words = shlex.join([*TAPFM, *command, "--name", "requeued"])
    job = cluster.run("sbatch", "--parsable", "--requeue", f"--output={tmp_path}/log",
                      "--open-mode=append", "--wrap", words).strip()  # fmt: skip
    metrics = runs / "requeued" / "metrics.csv"
    cluster.await_(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, 120)
    cluster.run("scontrol", "requeue", job)
    while cluster.run("squeue", "-h", "-o", "%i"):
        cluster.hurry()
        time.sleep(1)
    whole, requeued = (
        load_file(runs / name / "best.safetensors") for name in ("whole", "requeued")
    )
    assert (runs / "whole" / "metrics.csv").read_text() == metrics.read_text()
    assert whole.keys() == requeued.keys()
    assert all((whole[key] == requeued[key]).all() for key in whole)
    assert (tmp_path / "log").read_text().count("tapfm_gated; predicts") == 2, "it began twice"


def test_sbatch_is_quoted_where_it_refuses(cluster, tmp_path):
    path = write_pyramid(tmp_path / "s.tif", stained_picture(431, 367), 0.5, levels=2)
    command = ["index", str(path), "--out", str(tmp_path), "--launcher", "slurm", "--slurm",
               "partition=nowhere"]  # fmt: skip
    with pytest.raises(SettingsError, match=r"sbatch refused .* partition"):
        flags = vars(parser().parse_args(command))
        del flags["verb"]
        flags.pop("do")(**flags)
