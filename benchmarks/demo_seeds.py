"""The default on several demo cohorts: does adapting the encoder beat freezing it on each?

    python -m benchmarks.demo_seeds --seeds 0 1 2
    python -m benchmarks.demo_seeds --seeds 1 --patients 25     of the 50 that are trained on
    python -m benchmarks.demo_seeds --seeds 1 --patients 100    a cohort twice as large

Each seed paints a cohort of its own (other patients, other sites and stains), trains on it with
that seed, and tests: what `make train` does for its default run, from nothing. Beside it a run of
as many epochs whose encoder is frozen, `--model.strategy frozen`: the slide model alone, trained
under augmentation. Writes the seeds' figures to results/demo_seeds.json, and the table between the
markers in README.md from that file.

Price: 15 minutes of one core and 250 MB of disk a seed, more for more patients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks.record import RESULTS, facts, rewrite, write_part
from slides.demo import SLIDES
from tapfm.evaluation.study import TAPFM
from tapfm.reports.html.tables import interval_cell
from tapfm.reports.plain_table import markdown
from tapfm.reports.rows import END_TO_END, FROZEN_ENCODER

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "cohorts" / "demo.yaml"
PAINTED = 50  # patients to train on, of a cohort of as many slides as `tapfm demo` paints


def main() -> int:
    """Run the seeds that are asked for; the table shows all seeds ever run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patients", type=int, help="to train on, not as many as are painted")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "demo_seeds")
    arguments = parser.parse_args()
    path = RESULTS / "demo_seeds.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in arguments.seeds:
        part = f", {arguments.patients} patients" if arguments.patients else ""
        found = run_seed(seed, arguments.patients, arguments.work / str(seed))
        results = dict(sorted({**results, f"{seed}{part}": found}.items()))
        path.write_text(json.dumps(results, indent=1) + "\n")
        rewrite("demo_seeds", table(results))
    return 0


def run_seed(seed: int, patients: int | None, work: Path) -> dict:
    """Paint, index, fit, test; return figures and seconds of each stage."""
    about, more = facts("cpu"), (patients or 0) > PAINTED
    if more:
        work = work.with_name(f"{seed}_{patients}")
    config, seconds = prepare(seed, work, SLIDES * patients // PAINTED if more else SLIDES)
    runs = work / (f"runs_{patients}" if patients else "runs")
    run = ["--config", str(config), "--seed_everything", str(seed), "--run_dir", str(runs)]
    if patients and not more:
        part = work / "data" / f"cohort_{patients}.csv"  # the truth masks lie beside it
        write_part(work / "data" / "cohort.csv", part, patients, seed)
        run += ["--data.table", str(part)]
    seconds["fit"] = stage(f"demo seed {seed}: fit", ["fit", *run])
    alone = ["--model.strategy", "frozen", "--name", "slide_model_alone"]
    seconds["slide_model_alone"] = stage(f"demo seed {seed}: frozen", ["fit", *run, *alone])
    seconds["test"] = stage(f"demo seed {seed}: test", ["test", "--run", str(runs)])
    report = runs / "report_test"
    metrics = json.loads((report / "metrics_test.json").read_text())
    metrics["arms"] = {
        title: {key: row[key] for key in ("figures", "auroc_difference")}
        for title, row in metrics["arms"].items()
    }
    tile_auroc = json.loads((report / "tile_auroc_test.json").read_text())
    return {**about, "seconds": seconds, "tile_auroc": tile_auroc, **metrics}


def prepare(seed: int, work: Path, slides: int = SLIDES) -> tuple[Path, dict[str, int]]:
    """Paint and index a seed's cohort below `work`; return its config and seconds of both."""
    config = yaml.safe_load(CONFIG.read_text())
    data = work / "data"
    for key, name in (("table", "cohort.csv"), ("index_dir", "index"), ("cache_dir", "cache")):
        config["data"][key] = str(data / name)
    work.mkdir(parents=True, exist_ok=True)
    changed = work / "config.yaml"
    changed.write_text(yaml.safe_dump(config))
    paint = ["demo", "--seed", str(seed), "--slides", str(slides), "--out", str(data)]
    return changed, {
        "demo": stage(f"demo seed {seed}: demo", paint),
        "index": stage(f"demo seed {seed}: index", ["index", "--config", str(changed)]),
    }


def stage(title: str, command: list[str]) -> int:
    """Run a command of tapfm on one core; return its seconds."""
    began = time.perf_counter()
    if subprocess.run(
        [*TAPFM, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    ).returncode:
        raise SystemExit(f"{title} failed")
    return round(time.perf_counter() - began)


def table(results: dict) -> str:
    """Return a row a seed and model."""
    row = next(row for result in results.values() for row in result["arms"].values())
    labels = [name for name in row["figures"] if name != "macro"]
    lines = [["seed", "model", "macro AUROC [95 %]", *labels, "minus its control [95 %]",
              "minus best frozen [95 %]", "tile AUROC"]]  # fmt: skip
    for seed, result in results.items():
        gains = {verdict["row"]: verdict["difference"] for verdict in result["verdicts"]}
        for number, (name, row) in enumerate(result["arms"].items()):
            auroc = {label: row["figures"][label]["auroc"] for label in ("macro", *labels)}
            over_best = (row["auroc_difference"] or {}).get("macro")
            run = name.removeprefix(END_TO_END).removeprefix(FROZEN_ENCODER)
            tile = result["tile_auroc"].get(run)
            lines.append(
                [
                    "" if number else seed,
                    name + (" (best frozen)" if name == result["reference"] else ""),
                    interval_cell(auroc["macro"]),
                    *(f"{auroc[label]['value']:.3f}" for label in labels),
                    interval_cell(gains.get(name), sign="+"),
                    interval_cell(over_best, sign="+"),
                    f"{tile:.3f}" if tile else "",
                ]
            )
    notes = []
    for seed, result in results.items():
        seconds = result["seconds"]
        stages = ", ".join(f"{name} {value}" for name, value in seconds.items())
        notes.append(
            f"Seed {seed}: {result['slides']} test slides of {result['cases']} cases; seconds: "
            f"{stages}, {sum(seconds.values())} in all. {result['machine']}; {result['date']}, "
            f"commit {result['commit']}, torch {result['torch']}, timm {result['timm']}.\n"
        )
    return markdown(lines) + "\n\n" + "\n".join(notes)


if __name__ == "__main__":
    sys.exit(main())
