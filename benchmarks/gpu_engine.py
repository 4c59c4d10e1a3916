"""The engine on one GPU: largest bag, peaks and speed, beside keeping the graph of every tile.

    python -m benchmarks.gpu_engine                        five encoders, under a 23.3 GiB cap
    python -m benchmarks.gpu_engine --models uni --largest 20000

Random weights of the true architectures, random tiles in host memory, the trainer's own step
(`peak_memory.Step`). Both sides run in one process per encoder, three times, and the median counts.

    bags        the largest bag that trains: ours up to `--largest`, and the official scheme (fp32
                weights, autocast, one graph of all tiles, AdamW), found by halving
    peaks       of 64 tiles, and of four times as many: the slope; beside what `tapfm plan` says
    speed       tiles/s of two passes, of one graph of all tiles, and of two passes whose blocks are
                recomputed under autocast (as GradCache with timm's checkpointing does); and seconds
                a tile over four forwards of the same chunk, the least that two passes can take

Speed is measured without the cap, since one graph of 64 tiles does not fit under it. Writes
results/gpu_engine.json after each encoder, and the tables between the markers in README.md.

Price: a minute or two an encoder on an H200.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from benchmarks.peak_memory import Job, Step
from benchmarks.record import RESULTS, facts, rewrite
from tapfm.encoders.backbones import find
from tapfm.planning.footprint import CONTEXT_GIB, Footprint, Setup

MODELS = ("uni", "virchow2", "uni2_h", "gigapath", "h_optimus_0")
LARGEST = {"uni": 20_000, "virchow2": 5_000, "uni2_h": 5_000}  # tiles; 5,000 for the others too
CAP_GIB, CHUNK, TILES, REPEATS = 23.3, 16, 64, 3
SCHEMES = {  # ours, by name: precision, optimizer, blocks recomputed
    "master": ("bf16-true", "master", False),
    "offload": ("bf16-true", "offload", False),
    "residual": ("bf16-true", "residual", False),
    "residual, recompute": ("bf16-true", "residual", True),
    "adamw": ("bf16", "adamw", False),
    "adamw, recompute": ("bf16", "adamw", True),
}
GIB = 2**30


class Bench:
    """Steps of one encoder in this process."""

    def __init__(self, model: str, device: str, cap_gib: float | None):
        self.model, self.device, self.cap = model, torch.device(device), cap_gib
        self.cuda = self.device.type == "cuda"
        if self.cuda and self.device.index is None:  # torch's limit of memory wants a number
            self.device = torch.device("cuda", torch.cuda.current_device())
        total = torch.cuda.get_device_properties(self.device).total_memory if self.cuda else 0
        self.total_gib = total / GIB

    def job(self, scheme: str, method: str = "two_pass") -> Job:
        """Return one of `SCHEMES` as the trainer would run it."""
        precision, optimizer, recompute = SCHEMES[scheme]
        return Job(
            method, 0, self.model, str(self.device), precision, recompute, CHUNK, None,
            optimizer, keep=int(method == "two_pass"),
        )  # fmt: skip

    def limit(self, cap: bool) -> None:
        """Limit torch to the memory of a 24 GB card, or remove the limit."""
        if self.cuda:
            share = min(1.0, self.cap / self.total_gib) if cap and self.cap else 1.0
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def clear(self) -> None:
        """Free everything of the previous step."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of one turn, including the device's work."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def trains(self, step: Step, tiles: int) -> float | None:
        """Return the seconds of a step on that many tiles; None if they do not fit.

        The tiles are drawn before the clock starts. Memory is given back only after a failure: a
        training run keeps its allocator's blocks from step to step.
        """
        drawn = step.tiles(tiles)
        try:
            return self.seconds(lambda: step(drawn, lambda _: nullcontext()))
        except torch.OutOfMemoryError:
            for optimizer in step.optimizers:
                optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        return None

    def step(self, job: Job) -> Step | None:
        """Return a model and its moments; None if these alone do not fit."""
        self.clear()
        try:
            step = Step(job)
            encoder = step.model.encoder
            if encoder.row.feature == "cls" and encoder.no_tail:
                raise SystemExit(
                    f"{job.model}: its last block is computed whole: {encoder.no_tail}"
                )
            return step if self.trains(step, 1) is not None else None
        except torch.OutOfMemoryError:
            return None


def measure(model: str, device: str, cap_gib: float | None, largest: int, tiles: int) -> dict:
    """Return all figures of one encoder."""
    torch.manual_seed(0)
    bench = Bench(model, device, cap_gib)
    row = find(model)
    footprint = Footprint(row)
    found = {"chunk": CHUNK, "tiles": tiles, "cap_gib": cap_gib, "peaks": {}, "bags": {},
             "attention": attention(footprint.vit, bench.device)}  # fmt: skip

    bench.limit(cap=True)
    for scheme in SCHEMES:
        step = bench.step(bench.job(scheme))
        setup = Setup(*SCHEMES[scheme])
        expected = max(footprint.peaks(setup, footprint.cost(setup), CHUNK).values()) - CONTEXT_GIB
        peaks = []
        for count in (tiles, 4 * tiles):
            bench.clear()
            fits = step is not None and bench.trains(step, count) is not None
            if fits and bench.cuda:
                allocated = torch.cuda.max_memory_allocated(bench.device)
                peaks.append((allocated / GIB, torch.cuda.max_memory_reserved(bench.device) / GIB))
        found["peaks"][scheme] = {"expected": expected, "allocated_reserved": peaks}
        fitting = step is not None and len(peaks) == 2
        if fitting and "ours" not in found["bags"]:  # the first scheme that fits
            spent = bench.trains(step, largest)
            found["bags"]["ours"] = {"scheme": scheme, "tiles": largest if spent else 0,
                                     "seconds": spent}  # fmt: skip
        del step

    step = bench.step(bench.job("adamw", "one_graph"))
    found["bags"]["official"] = {"tiles": most(bench, step, largest) if step else 0}
    del step

    bench.limit(cap=False)
    found["speed"] = speed(bench, tiles)
    return found


def attention(vit: nn.Module, device: torch.device) -> dict[str, str]:
    """Return which kernel `scaled_dot_product_attention` takes here for a chunk, by dtype."""
    made, tokens = vit.blocks[0].attn, vit.pos_embed.shape[1] + vit.num_prefix_tokens
    shape = CHUNK, made.num_heads, tokens, made.head_dim
    chosen = {}
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.empty(shape, dtype=dtype, device=device)
        backend = SDPBackend(torch._fused_sdp_choice(q, q, q))
        chosen[str(dtype).removeprefix("torch.")] = backend.name.lower()
    return chosen


def most(bench: Bench, step: Step, largest: int) -> int:
    """Return the largest bag that trains, found by doubling, then halving."""
    fits, fails = 1, 2
    while fails <= largest and bench.trains(step, fails) is not None:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if bench.trains(step, middle) is None:
            fails = middle
        else:
            fits = middle
    return fits


def speed(bench: Bench, tiles: int) -> dict[str, float | None]:
    """Return tiles per second, the median of `REPEATS` turns after a warm-up."""
    ways = {
        "two passes": bench.job("master"),
        "two passes, recomputed under autocast": replace(bench.job("adamw, recompute"), keep=0),
        "one graph": bench.job("master", "one_graph"),
        "one graph, autocast (official)": bench.job("adamw", "one_graph"),
    }
    rates: dict[str, float | None] = {}
    for name, job in ways.items():
        step = bench.step(job)
        if step is None or bench.trains(step, tiles) is None:
            rates[name] = None
            continue
        times = [bench.trains(step, tiles) for _ in range(REPEATS)]
        rates[name] = tiles / statistics.median(times)
        if name == "two passes":
            drawn = step.tiles(tiles)
            forward = [
                bench.seconds(functools.partial(forwards, step, drawn)) for _ in range(REPEATS + 1)
            ]
            rates["forward"] = tiles / statistics.median(forward[1:])
        del step
    return rates


@torch.no_grad()
def forwards(step: Step, tiles_TP: torch.Tensor) -> None:
    """Run the encoder's forward on a slide, and nothing else."""
    for chunk in tiles_TP.split(CHUNK):
        step.model.encode(chunk)


def main() -> int:
    """Measure each encoder in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap-gib", type=float, default=CAP_GIB)
    parser.add_argument("--largest", type=int, default=None, help="tiles of the largest bag")
    parser.add_argument("--tiles", type=int, default=TILES)
    given = parser.parse_args()
    cap = given.cap_gib if given.device.startswith("cuda") else None
    path = RESULTS / f"gpu_engine{'' if cap else '_cpu'}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for model in given.models:
        largest = given.largest or LARGEST.get(model, 5_000)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            job = pool.submit(measure, model, given.device, cap, largest, given.tiles)
            results[model] = {**facts(given.device), **job.result()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({model: results[model]}, indent=1), flush=True)
    if cap:
        rewrite("gpu_engine", tables(results))
    return 0


def tables(results: dict) -> str:
    """Return the results as Markdown."""
    lines = ["| encoder | largest bag, ours | official | seconds of ours |", "|---|---|---|---|"]
    for model, each in results.items():
        ours, official = each["bags"].get("ours", {"tiles": 0}), each["bags"]["official"]
        seconds = f"{ours['seconds']:.0f}" if ours.get("seconds") else ""
        scheme = f" ({ours['scheme']})" if ours["tiles"] else ""
        lines.append(f"| {model} | {ours['tiles']:,}{scheme} | {official['tiles']:,} | {seconds} |")
    lines += [
        "",
        "| encoder, scheme | predicted GiB | allocated | reserved | GiB per 1,000 tiles |",
    ]
    lines.append("|---" * 5 + "|")
    for model, each in results.items():
        for scheme, peak in each["peaks"].items():
            cells = ["does not fit", "", ""]
            if len(peak["allocated_reserved"]) == 2:
                (few, reserved), (many, _) = peak["allocated_reserved"]
                slope = (many - few) / (3 * each["tiles"]) * 1000
                cells = [f"{few:.2f}", f"{reserved:.2f}", f"{slope:.2f}"]
            start = f"| {model}, {scheme} | {peak['expected']:.2f} | "
            lines.append(start + " | ".join(cells) + " |")
    names = [name for name in next(iter(results.values()))["speed"] if name != "forward"]
    lines += ["", "| tiles/s | " + " | ".join(names) + " | over four forwards |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for model, each in results.items():
        rates = each["speed"]
        cells = [f"{rates[name]:.1f}" if rates[name] else "does not fit" for name in names]
        floor = rates["forward"] / rates["two passes"] / 4 if rates.get("two passes") else None
        cells.append(f"{floor:.2f}" if floor else "")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    first = next(iter(results.values()))
    kernels = ", ".join(f"{kernel} in {dtype}" for dtype, kernel in first["attention"].items())
    lines += [
        "",
        f"Chunks of {first['chunk']}, {first['tiles']} tiles, peaks and bags under a cap of "
        f"{first['cap_gib']} GiB. Attention: {kernels}. {first['machine']}; {first['date']}, "
        f"commit {first['commit']}, torch {first['torch']}, timm {first['timm']}.\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
