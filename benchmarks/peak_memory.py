"""Peak memory of a training step against the number of tiles: two passes, and one graph.

    python -m benchmarks.peak_memory                                 demo_vit, on this machine
    python -m benchmarks.peak_memory --model h_optimus_0 --precision bf16 --recompute --cap-gib 24

The same slides (random uint8 tiles), the same model with random weights, the same slide model and
optimizers; only the way to the gradient differs. Each slide and method has a process of its own,
so that neither hides the other's peak, and is measured on its second step, when the optimizers'
moments exist. On the CPU the bytes that autograd holds are counted in a third step, since counting
costs memory too. Running out of memory is a row, not a crash.

Writes results/peak_memory_<device>.csv (a row a slide, method and phase; `slide` is the whole step)
and .png, and rewrites the tables between the markers in README.md from all such files.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.record import HERE, README, RESULTS, cores, facts, rewrite, write_rows
from tapfm.data.bag import Places
from tapfm.encoders import backbones
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.engine.master_weights import MasterAdamW
from tapfm.engine.memory import PhaseMeter, SavedBytes
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.tasks.losses import MaskedBCE

METHODS = {"two_pass": "two passes (tapfm)", "one_graph": "one graph"}
TILES = (16, 61, 127, 256, 509)
LABELS = ("A", "B", "C")
MIB = 2**20
COLUMNS = (
    "slide", "tiles", "method", "phase", "status", "allocated_gib", "reserved_gib", "autograd_mib",
    "rss_mib", "seconds", "model", "precision", "recompute", "chunk", "cap_gib", "machine", "date",
    "commit", "torch", "timm",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One slide by one method."""

    method: str
    tiles: int
    model: str
    device: str
    precision: str
    recompute: bool
    chunk: int
    cap_gib: float | None
    optimizer: str = "adamw"
    keep: int = 0
    """Chunks whose graphs pass 1 keeps."""


class Step:
    """A training step by either method, in the phases of `tapfm.training.module`."""

    def __init__(self, job: Job):
        torch.manual_seed(0)
        self.job, self.device = job, torch.device(job.device)
        with self.device:  # on a GPU the weights are drawn there: a ViT-g takes a minute on a CPU
            encoder = backbones.load(job.model, "random", recompute=job.recompute)
            model_config = ModelConfig(
                job.model, {"name": "tapfm"}, LABELS, encoder.row.tile_px, encoder.row.mpp,
                precision=job.precision,
            )  # fmt: skip
            self.model = SlideModel(model_config, encoder).to(self.device).train()
            self.loss = MaskedBCE([1.0] * len(LABELS)).to(self.device)
        self.labels_K = torch.tensor([1.0, torch.nan, 0.0], device=self.device)
        head, encoder = (
            [{"params": list(part.parameters()), "lr": 1e-6, "weight_decay": 1e-4}]
            for part in (self.model.aggregator, self.model.encoder)
        )
        plain = job.optimizer == "adamw"
        self.optimizers = [
            torch.optim.AdamW(head, fused=True),
            torch.optim.AdamW(encoder, fused=True)
            if plain
            else MasterAdamW(encoder, job.optimizer),
        ]
        self.model.round_weights()

    def tiles(self, count: int) -> torch.Tensor:
        """Return a slide, (T, 3, S, S) uint8, in host memory as in training."""
        side = self.model.model_config.tile_px
        return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)

    def __call__(self, tiles_TP: torch.Tensor, phase: Callable) -> None:
        """One slide; `phase(name)` gives the context each phase runs in."""
        encode, same = self.model.encode, {"seed": 0, "device": self.device}
        chunks = tiles_TP.split(self.job.chunk)
        two_pass = self.job.method == "two_pass"
        head, encoder = self.optimizers
        with phase("encode"):
            if two_pass:
                z_TD, score_T, kept = encode_bag(encode, chunks, **same, keep=self.job.keep)
            else:
                z_TD, score_T = map(torch.cat, zip(*map(encode, chunks), strict=True))
        with phase("aggregate"):
            tiles = TileSet.of(Places.unknown(len(z_TD)), z_TD, score_T)
            logits_K = self.model.aggregator(tiles).logits_K
            loss = self.loss(logits_K, self.labels_K)
            if two_pass:
                loss.backward()
                self.update(head)
        with phase("adapt"):
            if two_pass:
                adapt_bag(encode, chunks, z_TD.grad, score_T.grad, **same, kept=kept)
            else:
                loss.backward()
                self.update(head)
            self.update(encoder)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizers and clear gradients."""
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class AutogradCounter:
    """A counter of the peak bytes held by autograd in each phase."""

    def __init__(self, held: SavedBytes):
        self.held, self.mib = held, {}

    def __call__(self, name: str) -> AutogradCounter:
        """The context of a phase."""
        self.name, self.held.peak = name, self.held.live
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        self.mib[self.name] = self.held.peak / MIB


def measure(job: Job) -> list[dict]:
    """Return the rows of one slide by one method; runs in its own process."""
    torch.set_num_threads(cores())
    cuda = job.device.startswith("cuda")
    if cuda and job.cap_gib:
        total = torch.cuda.get_device_properties(job.device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_gib / total))
    autograd = {}
    try:
        step, meter = Step(job), PhaseMeter(job.device)
        step(step.tiles(min(job.chunk, job.tiles)), meter.phase)  # makes the moments
        meter.take()
        tiles_TP = step.tiles(job.tiles)
        step(tiles_TP, meter.phase)
        figures = meter.take()()
        if not cuda:
            with SavedBytes(but=step.model.parameters()) as held:
                count = AutogradCounter(held)
                step(tiles_TP, count)
            autograd = count.mib
    except torch.OutOfMemoryError:
        return [failed(job)]
    rows = [
        {
            "phase": phase,
            "allocated_gib": each.get("allocated_gib"),
            "reserved_gib": each.get("reserved_gib"),
            "autograd_mib": autograd.get(phase),
            "rss_mib": each["rss_gib"] * 1024 if "rss_gib" in each else None,
            "seconds": each["s"],
        }
        for phase, each in figures.items()
    ]
    whole = {"phase": "slide", "seconds": sum(row["seconds"] for row in rows)}
    for name in ("allocated_gib", "reserved_gib", "autograd_mib", "rss_mib"):
        found = [row[name] for row in rows if row[name] is not None]
        whole[name] = max(found) if found else None
    return [{**place(job), "status": "ok", **row} for row in (*rows, whole)]


def place(job: Job) -> dict:
    """Return the columns that identify a measurement."""
    return {
        "slide": f"random_{job.tiles}", "tiles": job.tiles, "method": job.method,
        "model": job.model, "precision": job.precision, "recompute": int(job.recompute),
        "chunk": job.chunk, "cap_gib": job.cap_gib,
    }  # fmt: skip


def failed(job: Job) -> dict:
    return {**place(job), "phase": "slide", "status": "out of memory"}


def fresh_process(job: Job) -> list[dict]:
    """Run `measure` in a new process; one that the system killed counts as out of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool:
            return [failed(job)]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quantities(rows: list[dict[str, str]]) -> list[tuple[str, str, float]]:
    """Return the measured quantities: column, title, and factor to the unit."""
    if any(row["allocated_gib"] for row in rows):
        return [("allocated_gib", "allocated, GiB", 1.0), ("reserved_gib", "reserved, GiB", 1.0)]
    return [("autograd_mib", "held by autograd, MiB", 1.0), ("rss_mib", "resident, GiB", 1 / 1024)]


def table(rows: list[dict[str, str]], picture: str) -> str:
    """Return one device's table as Markdown."""
    shown, first = quantities(rows), rows[0]
    whole = {(int(r["tiles"]), r["method"]): r for r in rows if r["phase"] == "slide"}
    extra = ", blocks recomputed" if first["recompute"] == "1" else ""
    extra += f", capped at {first['cap_gib']} GiB" if first["cap_gib"] else ""
    lines = [
        f"**{first['model']}**, {first['precision']}, chunks of {first['chunk']}{extra}. "
        f"{first['machine']}; {first['date']}, commit {first['commit']}, torch {first['torch']}, "
        f"timm {first['timm']}.",
        "",
        "| tiles | "
        + " | ".join(f"{name}: {title}" for _, title, _ in shown for name in METHODS.values())
        + " |",
        "|---" * (1 + len(METHODS) * len(shown)) + "|",
    ]
    for tiles in sorted({tiles for tiles, _ in whole}):
        cells = [
            cell(whole.get((tiles, method)), column, factor)
            for column, _, factor in shown
            for method in METHODS
        ]
        lines.append(f"| {tiles} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"![peak memory against tiles]({picture})"])


def cell(row: dict[str, str] | None, column: str, factor: float) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    value = float(row[column]) * factor
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw ours and the other, told apart by colour, marker and a label at the line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {"two_pass": ("#0072B2", "o"), "one_graph": ("#D55E00", "s")}  # Okabe and Ito's
    shown = quantities(rows)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    whole = [row for row in rows if row["phase"] == "slide"]
    most = max(int(row["tiles"]) for row in whole)
    for axes, (column, title, factor) in zip(panels, shown, strict=True):
        top = max((float(r[column]) * factor for r in whole if r[column]), default=1.0)
        for method, (colour, marker) in looks.items():
            mine = sorted(
                (r for r in whole if r["method"] == method), key=lambda r: int(r["tiles"])
            )
            good = [row for row in mine if row["status"] == "ok"]
            x, y = [int(r["tiles"]) for r in good], [float(r[column]) * factor for r in good]
            axes.plot(x, y, color=colour, marker=marker, linewidth=2)
            full = [int(row["tiles"]) for row in mine if row["status"] != "ok"]
            axes.plot(full, [top * 1.1] * len(full), "x", color=colour, markersize=9)
            for tiles in full[:1]:
                axes.annotate(
                    "out of memory", (tiles, top * 1.1), (-8, 0), textcoords="offset points",
                    color=colour, ha="right", va="center",
                )  # fmt: skip
            if good:
                above = method == "two_pass"
                axes.annotate(
                    METHODS[method], (x[-1], y[-1]), (0 if above else -12, 9 if above else 0),
                    textcoords="offset points", color=colour, weight="bold", ha="right",
                    va="bottom" if above else "center",
                )  # fmt: skip
        axes.set(
            xlabel="tiles of the slide", title=title, xlim=(0, most * 1.04), ylim=(0, top * 1.2)
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    what = "{model}, {precision}, chunks of {chunk}".format(**rows[0])
    figure.suptitle(f"Peak memory of a training step: {what}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def all_tables(results: Path) -> str:
    """Return the tables of all results."""
    return "\n\n".join(
        table(read_csv(path), f"{results.name}/{path.stem}.png")
        for path in sorted(results.glob("peak_memory_*.csv"))
    )


def slug(device: str, model: str) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    name = name if model == "demo_vit" else f"{name} {model}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.peak_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", default="demo_vit", help="its weights are random (%(default)s)")
    top.add_argument("--tiles", type=int, nargs="+", default=TILES, help="sizes of the slides")
    top.add_argument("--chunk", type=int, default=16, help="tiles at once (%(default)s)")
    top.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    top.add_argument("--recompute", action="store_true", help="recompute blocks in the backward")
    top.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--cap-gib", type=float, help="on a GPU: behave as a card of this size")
    return top


def main(argv: list[str] | None = None) -> int:
    given = parser().parse_args(argv)
    model = backbones.find(given.model).key
    job = Job(
        "", 0, model, given.device, given.precision, given.recompute, given.chunk, given.cap_gib
    )
    about, rows = facts(given.device), []
    for tiles in given.tiles:
        for method in given.methods:
            found = fresh_process(replace(job, method=method, tiles=tiles))
            rows, whole = rows + [{**row, **about} for row in found], found[-1]
            said = {k: v for k, v in whole.items() if isinstance(v, float) and k != "cap_gib"}
            print(f"{method:<10} {tiles:>6} tiles  {whole['status']}  "
                  + "  ".join(f"{k} {v:.4g}" for k, v in said.items()), flush=True)  # fmt: skip
    path = RESULTS / f"peak_memory_{slug(given.device, model)}.csv"
    write_rows(path, rows, COLUMNS)
    draw(read_csv(path), path.with_suffix(".png"))
    rewrite("peak_memory", all_tables(RESULTS))
    print(
        f"{path.relative_to(HERE.parent)}, its .png and {README.relative_to(HERE.parent)} written"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
