"""Time the first hour: from the wheel and an empty folder to a report, by three commands.

    python -m benchmarks.first_hour [--borrow] [--full] [--keep FOLDER]

Wheel and sdist are built from a copy of the tracked files; the wheel that is installed is the one
that is built from the sdist. It is installed with everything that it requires, at the versions of
constraints.txt, into a new virtual environment; with `--borrow` it is installed alone, and what it
requires comes from this interpreter's packages, which saves 6 GB and hides a requirement that is
not named. An environment that is in `--keep` already gets the new wheel alone. Then `tapfm demo`,
`fit` and `test` run in an empty folder, as a user types them, with settings that are small (24
slides, 4 epochs) unless `--full` asks for the demo as it is.

Exit code 1 says that a step failed, that the report is not there or not whole, or that more than
15 minutes of this process's share of the machine went by: the lesser of wall clock and, where other
programs take the processors, twice the CPU time. The row goes to results/first_hour.csv, unless it
was `--borrow`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.record import HERE, RESULTS, cpu_seconds, facts, write_rows

MINUTES = 15
SMALL = {"demo": "--slides 24", "fit": "--trainer.max_epochs 4", "test": ""}
FULL = {"demo": "", "fit": "", "test": ""}
COMMANDS = {"demo": "demo", "fit": "fit --config demo", "test": "test --run runs/demo"}
BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"


def run(command: list[str | Path], where: Path, log: Path) -> float:
    """Run a command, and return its seconds; it is given no module of this checkout.

    Raises:
        SystemExit: it failed; the last lines that it wrote are printed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    begun = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(command, cwd=where, env=environment, stdout=file, check=False,
                              stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        print(log.read_text()[-3000:], f"{log.stem}: exit code {done.returncode}", sep="\n")
        raise SystemExit(1)
    return time.perf_counter() - begun


def build(place: Path) -> Path:
    """Return the wheel that is built from the sdist, which is built from the tracked files."""
    copy, unpacked, root = place / "copy", place / "unpacked", HERE.parent
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    run([sys.executable, "-c", BUILD.format("sdist"), place], copy, place / "sdist.log")
    shutil.unpack_archive(next(place.glob("*.tar.gz")), unpacked)
    inside = next(unpacked.iterdir())
    run([sys.executable, "-c", BUILD.format("wheel"), place], inside, place / "wheel.log")
    return next(place.glob("*.whl"))


def install(wheel: Path, place: Path, borrow: bool) -> tuple[Path, float]:
    """Return the folder of the environment's programs, and the seconds that installing took."""
    begun, venv = time.perf_counter(), place / "venv"
    python, given = venv / "bin" / "python", ["-c", HERE.parent / "constraints.txt"]
    if venv.exists():
        given = ["--no-deps", "--force-reinstall", "--no-index"]
    else:
        run([sys.executable, "-m", "venv", venv], place, place / "venv.log")
    if borrow:
        (packages,) = venv.glob("lib/python*/site-packages")
        # behind the environment's own; .pth files there (an editable tapfm) are not followed
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        given = ["--no-deps", "--force-reinstall", "--no-index"]
    run([python, "-m", "pip", "install", *given, wheel], place, place / "install.log")
    return venv / "bin", time.perf_counter() - begun


def faults_of(folder: Path, venv: Path) -> list[str]:
    """Return what is wrong with the report of a run that was made by the environment's tapfm."""
    report = folder / "runs" / "demo" / "report_test"
    found = json.loads((report / "report.json").read_text())
    where = run_python(venv, "import tapfm; print(tapfm.__file__)")
    wrong = {
        f"tapfm is not the wheel's: {where}": not where.startswith(str(venv.parent)),
        "no page": not (report / "report.html").stat().st_size > 10_000,
        "no verdict": not found["verdicts"],
        "fewer than 5 rows": len(found["rows"]) < 5,
    }
    return [text for text, is_so in wrong.items() if is_so]


def run_python(venv: Path, text: str) -> str:
    """Return what a line of Python prints in the environment, away from the checkout."""
    command = [venv / "python", "-c", text]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(command, cwd=venv, env=environment, check=True, capture_output=True,
                          text=True).stdout.strip()  # fmt: skip


def main() -> int:
    """Build, install, run the three commands, record the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--borrow", action="store_true", help="this interpreter's packages")
    parser.add_argument("--full", action="store_true", help="the demo as it is")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is left behind")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.keep or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        empty = Path(tempfile.mkdtemp(prefix="empty_", dir=place))
        venv, seconds = install(build(Path(tempfile.mkdtemp(dir=place))), place, given.borrow)
        times = {"settings": "full" if given.full else "small", "install": seconds}
        spent = cpu_seconds()
        for name, words in COMMANDS.items():
            more = (FULL if given.full else SMALL)[name]
            command = [venv / "tapfm", *words.split(), *more.split()]
            times[name] = run(command, empty, place / f"{name}.log")
        faults = faults_of(empty, venv)
    minutes = sum(times[name] for name in COMMANDS) / 60
    cpu_minutes = (cpu_seconds() - spent) / 60
    row = {**times, "minutes": minutes, "cpu_minutes": cpu_minutes, "load": os.getloadavg()[1]}
    print(row, *faults, sep="\n")
    if not given.borrow:
        record(row)
    return int(bool(faults) or min(minutes, 2 * cpu_minutes) > MINUTES)


def record(row: dict[str, object]) -> None:
    """Put a row into the results, in the place of an older one of the same settings."""
    import csv

    path, rows = RESULTS / "first_hour.csv", []
    if path.exists():
        with path.open(newline="") as file:
            rows = [each for each in csv.DictReader(file) if each["settings"] != row["settings"]]
    write_rows(path, [*rows, row | facts("cpu")])


if __name__ == "__main__":
    raise SystemExit(main())
