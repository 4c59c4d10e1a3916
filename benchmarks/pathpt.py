"""PathPT on demo cohorts: from 1, 3 and 6 slides a subtype, beside zero-shot and frozen models.

    python -m benchmarks.pathpt --cohorts 0 --draws 3
    python -m benchmarks.pathpt --cohorts 0 --draws 1 --end-to-end

Paints the cohort that `tapfm demo --seed` makes, asks it configs/pathpt/demo.yaml with so many
draws of the training slides, and writes figures to results/pathpt.json and the table between the
markers in README.md. End to end, only six slides a subtype are asked for, and LoRA in the image
tower, at its own rate, learns beside prompts and mixer; the same draws are of the same slides.

Price, in processor time: two minutes a cohort, and two to paint it; end to end, nine a draw.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.record import RESULTS, cpu_seconds, facts, rewrite
from tapfm.evaluation.study import TAPFM
from tapfm.reports.html.tables import interval_cell
from tapfm.reports.plain_table import markdown

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
END_TO_END = {"shots": [6], "strategy": "lora"}


def main() -> int:
    """Run the cohorts that are asked for; the table shows all ever run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pathpt_bench")
    arguments = parser.parse_args()
    path = RESULTS / "pathpt.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    changes = {"draws": arguments.draws, **(END_TO_END if arguments.end_to_end else {})}
    for cohort in arguments.cohorts:
        name = f"{cohort}, end to end" if arguments.end_to_end else f"{cohort}"
        results[name] = run_cohort(cohort, changes, arguments.work / str(cohort))
        path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        rewrite("pathpt", table(results))
    return 0


def run_cohort(cohort: int, changes: dict, work: Path) -> dict:
    """Paint a cohort and run PathPT on it; return figures and processor seconds."""
    about, data = facts("cpu"), work / "data"
    config = yaml.safe_load((CONFIGS / "cohorts" / "demo.yaml").read_text())["data"]
    for key, name in (("table", "cohort.csv"), ("index_dir", "index"), ("cache_dir", "cache")):
        config[key] = str(data / name)
    question = yaml.safe_load((CONFIGS / "pathpt" / "demo.yaml").read_text()) | changes
    work.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", {"data": config}), ("question", question)):
        (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
    subprocess.run([*TAPFM, "demo", "--seed", str(cohort), "--out", str(data)], check=True)
    began = cpu_seconds()
    asked = ["--config", work / "config.yaml", "--question", work / "question.yaml"]
    subprocess.run([*TAPFM, "pathpt", *asked, "--out", work / "out"], check=True)
    took = f"{round(cpu_seconds() - began)} processor seconds"
    return {**about, "took": took, **json.loads((work / "out" / "scores.json").read_text())}


def table(results: dict) -> str:
    """Return a row a cohort, number of shots and model."""
    lines = [["cohort", "draws", "shots", "model", "balanced accuracy [95 %]",
              "weighted F1 [95 %]", "minus best frozen [95 %]"]]  # fmt: skip
    notes = []
    for name, result in results.items():
        cohort = name.partition(",")[0]
        for shots, models in result["shots"].items():
            for model, figures in models.items():
                gain = figures.get("minus_best_frozen", {}).get("balanced_accuracy")
                cells = [cohort, str(result["draws"]), shots, model]
                cells += [interval_cell(figures["balanced_accuracy"])]
                cells += [interval_cell(figures["weighted_f1"]), interval_cell(gain, sign="+")]
                if cells not in lines:  # both ways of asking have the frozen rows, and alike
                    lines.append(cells)
        counts = ", ".join(f"{n} {name}" for name, n in result["subtypes"].items())
        notes.append(
            f"Cohort {name}: {result['slides']} test slides of {result['cases']} cases "
            f"({counts}), means over the draws, {result['took']}. "
            f"{result['machine']}; {result['date']}, commit {result['commit']}, "
            f"torch {result['torch']}, timm {result['timm']}.\n"
        )
    return markdown(lines) + "\n\n" + "\n".join(notes)


if __name__ == "__main__":
    sys.exit(main())
