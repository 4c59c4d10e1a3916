"""PathPT on demo cohorts: from 1, 5 and 10 slides a subtype, beside zero-shot and frozen models.

    python -m benchmarks.pathpt --cohorts 0 --draws 3

Paints the cohort that `tapfm demo --seed` makes, asks it configs/pathpt/demo.yaml with so many
draws of the training slides, and writes figures to results/pathpt.json and the table between the
markers in README.md.

Price: five minutes a cohort on one core, and two to paint it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks.record import RESULTS, facts, rewrite
from tapfm.tables import interval

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PROGRAM = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]


def main() -> int:
    """Run the cohorts that are asked for; the table shows all that were ever run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pathpt_bench")
    arguments = parser.parse_args()
    path = RESULTS / "pathpt.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for cohort in arguments.cohorts:
        results[str(cohort)] = run_cohort(cohort, arguments.draws, arguments.work / str(cohort))
        path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        rewrite("pathpt", table(results))
    return 0


def run_cohort(cohort: int, draws: int, work: Path) -> dict:
    """Paint, ask; figures and seconds."""
    about, data = facts("cpu"), work / "data"
    config = yaml.safe_load((CONFIGS / "cohorts" / "demo.yaml").read_text())["data"]
    config |= {"table": str(data / "cohort.csv"), "index_dir": str(data / "index")}
    config |= {"cache_dir": None}  # every tile is read once
    question = yaml.safe_load((CONFIGS / "pathpt" / "demo.yaml").read_text()) | {"draws": draws}
    work.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", {"data": config}), ("question", question)):
        (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
    subprocess.run([*PROGRAM, "demo", "--seed", str(cohort), "--out", str(data)], check=True)
    began = time.perf_counter()
    asked = ["--config", work / "config.yaml", "--question", work / "question.yaml"]
    subprocess.run([*PROGRAM, "pathpt", *asked, "--out", work / "out"], check=True)
    seconds = round(time.perf_counter() - began)
    return {**about, "seconds": seconds, **json.loads((work / "out" / "scores.json").read_text())}


def table(results: dict) -> str:
    """A row a cohort, number of shots and model."""
    titles = ["cohort", "shots", "model", "balanced accuracy [95 %]", "weighted F1 [95 %]"]
    titles += ["minus best frozen [95 %]"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for cohort, result in results.items():
        for shots, arms in result["shots"].items():
            for arm, figures in arms.items():
                gain = figures.get("minus_best_frozen", {}).get("balanced_accuracy")
                cells = [cohort, shots, arm, interval(figures["balanced_accuracy"])]
                cells += [interval(figures["weighted_f1"]), interval(gain, sign="+")]
                lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for cohort, result in results.items():
        counts = ", ".join(f"{n} {name}" for name, n in result["subtypes"].items())
        lines.append(
            f"Cohort {cohort}: {result['slides']} test slides of {result['cases']} cases "
            f"({counts}), means over {result['draws']} draws, {result['seconds']} s. "
            f"{result['machine']}; {result['date']}, commit {result['commit']}, "
            f"torch {result['torch']}, timm {result['timm']}.\n"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
