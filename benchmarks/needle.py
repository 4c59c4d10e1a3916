"""The needle cohort: real tissue with known positive tiles, real weights; frozen and end to end.

    python -m benchmarks.needle            prepare, train every row on every fold, compare
    python -m benchmarks.needle --only full

90 slides of 40 real H&E tiles; in a positive, 2 to 6 tiles come from an adenoma's head. One
patient carries that class and its borders were drawn by eye, so this measures the trainer and is no
clinical claim; the RGB row says how much colour alone gives. Tiles: Pathology Atlas, CC BY 4.0,
Serdar Balci / Memorial Pathology, doi 10.5281/zenodo.6382734.

Folds: the cohort's own two parts are one of 18 slides to compare on, too few to tell rows apart. So
all 90 are dealt anew, slides that share a tile to one fold, a fifth to test, a fifth to validate.
The own parts also keep source regions and host slides apart; five folds do not, so tiles of train
and test may be neighbours in the tissue, which flatters every row.

Training tiles are neither turned nor recoloured, but in `full_turned`, which does both: the rows on
frozen features see them as they are, and which way is up tells much of this cohort. LoRA is on
all linear layers of the last six blocks; all weights, or those of the last four blocks, learn at a
twentieth of its rate, falling by .8 a block, as on the tissue cohort. No rate was chosen here.
`lora_each_slide` makes an update after each slide, not after eight that are balanced, as the tissue
cohort's recipe does. Each run saves its frozen control (", frozen, same head"). `tapfm study` does
the work: run again, it goes on where it stopped. A row and seed whose predictions are in
results/needle is not fitted again, on any machine. Writes results/needle.json and the table between
the markers in README.md. Price: some 10 minutes of one core a fit, 35 fits a seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from benchmarks.record import RESULTS, facts, rewrite, write_compact
from slides.files import write_json
from tapfm.config import overlaid, read_data
from tapfm.evaluation.study import plan_cells, prepare, read_study, run_study
from tapfm.evaluation.study_cells import Cell, Study
from tapfm.evaluation.study_table import CONTROL_OF_CELL, FINISHED, collect_runs, summary_of_runs
from tapfm.reports.plain_table import span
from tapfm.reports.rows import ResultRow
from tapfm.stats.bootstrap import Interval
from tapfm.stats.metrics import MACRO, auroc
from tapfm.tasks import make_task

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TAPFM_DATA", ROOT.parent / "shared" / "data"))
CONFIG = ROOT / "configs" / "cohorts" / "needle.yaml"
TABLE = ROOT / "data" / "needle" / "cohort.csv"
WEIGHTS = DATA / "weights" / "dinov2_vits14_timm_fp16.safetensors"
KEPT = RESULTS / "needle"  # predictions, a file a row and seed
FOLDS, LABEL = 5, "ADENOMA"
ATTENTION = "frozen, gated attention"
LORA = {  # the last 6 of 12 blocks: no worse than all, at half the time; alpha 8 changes too little
    "name": "lora", "alpha": 16.0, "targets": ["q", "k", "v", "proj", "mlp"], "last": 6,
}  # fmt: skip
FULL = {"name": "full", "layer_decay": 0.8}
ROWS = {  # aggregator, strategy, learning rate of the encoder
    "full": ("tapfm_gated", FULL, 5e-6),
    "lora": ("tapfm_gated", LORA, 1e-4),
    "lora_each_slide": ("tapfm_gated", LORA, 1e-4),
    "last_n": ("tapfm_gated", {"name": "last_n", "n": 4, "layer_decay": 0.8}, 5e-6),
    "learned": ("gated", FULL, 5e-6),
    "published": ("tapfm", FULL, 5e-6),
    "full_turned": ("tapfm_gated", FULL, 5e-6),
}
CHANGES = {  # what rows change besides
    "full_turned": {"data": {"turns": True, "colour": 0.1}},
    "lora_each_slide": {"data": {"sampler": "shuffled"}, "model": {"steps": {"accumulate": 1}}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "needle")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    about = facts("cpu")
    write_table()
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = arguments.out / "weights.yaml"
    weights.write_text(yaml.safe_dump({"model": {"weights": str(WEIGHTS)}}))
    todo = [each for each in product(arguments.only, arguments.seeds) if not kept(*each).exists()]
    for row, seed in todo:
        aggregator, strategy, lr = ROWS[row]
        own = arguments.out / f"{row if row in CHANGES else strategy['name']}.yaml"  # its name
        changes = {"model": {"strategy": strategy, "steps": {"encoder_lr": lr}}}
        own.write_text(yaml.safe_dump(overlaid(changes, CHANGES.get(row, {}))))
        flags = {"config": [CONFIG, weights], "out": arguments.out / "study", "folds": FOLDS,
                 "aggregators": [aggregator], "strategies": [str(own)],
                 "seeds": [seed], "jobs": arguments.jobs}  # fmt: skip
        study = read_study(None, flags)
        if run_study(study):
            return 2
        tables = prepare(study, read_data([Path(each) for each in study.config]))
        keep(kept(row, seed), plan_cells(study, tables), about)
        tabulate(about)
    if not todo:
        tabulate(about)
    return 0


def kept(row: str, seed: int) -> Path:
    """Return the file of a row's predictions."""
    return KEPT / str(seed) / f"{row}.json"


def keep(path: Path, cells: Sequence[Cell], about: Mapping[str, str]) -> None:
    """Write what the fits of a row and seed, their controls and the frozen rows predict."""
    _, runs, trained, saved = collect_runs(cells)
    predicted = {
        title: [[fold, slide, case, int(y), p] for fold, own in sorted(folds.items())
                for slide, case, (y,), (p,) in zip(own.slide_ids, own.case_ids,
                                                   own.y_NK.tolist(), own.p_NK.tolist(),
                                                   strict=True)]
        for title, seeds in runs.items() for folds in seeds.values()
    }  # fmt: skip
    seconds = [json.loads((cell.folder / FINISHED).read_text())["seconds"] for cell in cells]
    write_compact(path, {
        **about, "row": cells[0].row, "seed": cells[0].seed, "trained": trained,
        "saved": saved[cells[0].row],
        "minutes": [sum(each.values()) / 60 for each in seconds],
        "tile_auroc": tile_aurocs(cells), "predicted": predicted,
    })  # fmt: skip


def tabulate(about: Mapping[str, str]) -> None:
    """Write figures and table of the rows whose predictions are kept; older rows stay."""
    path = RESULTS / "needle.json"
    result = result_of(read_fits(), about)
    if path.exists():
        result = with_older(result, json.loads(path.read_text()))
    write_json(path, result)
    table = markdown(json.loads(path.read_text()))
    rewrite("needle", table)
    print(table)


def read_fits() -> list[dict[str, Any]]:
    """Return what is kept of each row and seed, in the order of `ROWS`."""
    places = {row: place for place, row in enumerate(ROWS)}
    files = sorted(KEPT.glob("*/*.json"), key=lambda path: (places[path.stem], path.parent.name))
    return [json.loads(file.read_text()) for file in files]


def result_of(fits: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> dict[str, Any]:
    """Return the figures of all rows, from the predictions of their fits."""
    runs: dict[str, dict[int, dict[int, ResultRow]]] = {}
    trained: dict[str, bool] = {}
    saved, tiles = defaultdict(list), defaultdict(list)
    for fit in fits:
        for title, lines in fit["predicted"].items():
            runs.setdefault(title, {})[fit["seed"]] = by_fold(title, lines, fit["trained"][title])
        trained |= fit["trained"]
        saved[fit["row"]] += fit["saved"]
        for title, value in fit["tile_auroc"].items():
            tiles[title].append(value)
    order = dict(sorted(trained.items(), key=lambda each: each[1]))  # the frozen ones first
    seeds = sorted({seed for each in runs.values() for seed in each})
    study = Study(config=(str(CONFIG),), out="", folds=FOLDS, seeds=tuple(seeds))
    task = make_task({"name": "multilabel"}, [LABEL])
    _, result, _ = summary_of_runs(study, FOLDS, task, runs, order, saved, {})
    return {
        **result, **about, "commits": sorted({fit["commit"] for fit in fits}),
        "tile_auroc": {title: float(np.mean(each)) for title, each in tiles.items()},
    }  # fmt: skip


def with_older(result: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with the rows that only an older one has."""
    arms, verdicts, tiles = dict(result["arms"]), [*result["verdicts"]], result["tile_auroc"]
    for title in (title for title in before["arms"] if title not in result["arms"]):
        arms[title] = before["arms"][title]
        verdicts += [each for each in before["verdicts"] if each.startswith(f"{title}:")]
    older = {title: value for title, value in before["tile_auroc"].items()
             if title not in result["arms"]}  # fmt: skip
    return {**result, "arms": arms, "verdicts": verdicts, "tile_auroc": {**tiles, **older}}


def by_fold(title: str, lines: Sequence[Sequence], end_to_end: bool) -> dict[int, ResultRow]:
    """Return a title's predictions by fold, from lines of fold, slide, case, label, prediction."""
    found = {}
    for fold in range(FOLDS):
        _, slides, cases, y_N, p_N = zip(*(line for line in lines if line[0] == fold), strict=True)
        y_N1, p_N1 = np.array(y_N, float)[:, None], np.array(p_N)[:, None]
        found[fold] = ResultRow(title, end_to_end, slides, cases, y_N1, p_N1)
    return found


def write_table() -> None:
    """Write the cohort's table in our columns; a case is the slides that share a tile."""
    with (DATA / "needle" / "slides.csv").open() as file:
        slides = list(csv.DictReader(file))
    case = {row["slide_id"]: row["slide_id"] for row in slides}
    holders = defaultdict(list)
    for row in truth_rows():
        holders[row["src"], row["src_x"], row["src_y"]].append(row["slide_id"])
    for first, *others in holders.values():
        for other in others:
            old, new = case[other], case[first]
            case = {slide: new if each == old else each for slide, each in case.items()}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["case_id", "slide_id", "slide_path", "split", LABEL])
        for row in slides:
            name = row["slide_id"]
            path = (DATA / "needle" / "slides" / f"{name}.tif").resolve()
            writer.writerow([case[name], name, path, row["split"], row["label"]])


def tile_aurocs(cells: Sequence[Cell]) -> dict[str, float]:
    """Return the mean AUROC of tile weights for the planted tiles over positive slides, by row."""
    truth, found = defaultdict(dict), defaultdict(list)
    for row in truth_rows():
        truth[row["slide_id"]][int(row["x"]), int(row["y"])] = int(row["target"])
    for cell in cells:
        for path in sorted((cell.folder / "run" / "weights_test").glob("*.h5")):
            with h5py.File(path) as file:
                weights, coords = file["weights"][:], file["coords"][:]
            target = np.array([truth[path.stem][tuple(xy)] for xy in coords.tolist()], float)
            if target.any():
                found[cell.row].append(auroc(target, weights))
    return {row: float(np.mean(each)) for row, each in found.items()}


def truth_rows() -> list[dict[str, str]]:
    """Return every tile: slide, place, source, and whether it is from the adenoma's head."""
    with (DATA / "needle" / "tiles.csv").open() as file:
        return list(csv.DictReader(file))


def markdown(result: dict) -> str:
    """Return a row a model."""
    lines = [
        "| model | seeds | AUROC, folds pooled [95 %] | mean of folds "
        "| minus frozen attention [95 %] | minus its control [95 %] | tile AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, row in result["arms"].items():
        if not row["seeds"]:
            continue
        others = ATTENTION, title + CONTROL_OF_CELL
        gains = [row["differences"].get(other) for other in others]
        over = (span(Interval(**gain["pooled"][MACRO]), sign="+") if gain else "" for gain in gains)
        tile = result["tile_auroc"].get(title)
        lines.append(
            f"| {title}{' (best frozen)' if title == result['reference'] else ''} "
            f"| {len(row['seeds'])} | {span(Interval(**row['figures']['pooled'][MACRO]))} "
            f"| {row['figures']['within_folds'][MACRO]['value']:.3f} "
            f"| {' | '.join(over)} "
            f"| {f'{tile:.3f}' if tile else ''} |"
        )
    lines.append(
        f"\n{result['slides']} slides of {result['cases']} cases, {FOLDS} folds; seeds are "
        f"averaged. "
        f"{result['machine']}; {result['date']}, torch {result['torch']}, timm {result['timm']}; "
        f"fits: commit {', '.join(result['commits'])}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
