"""Time and memory of the last block for the CLS token alone, beside the whole block and a hook.

    python -m benchmarks.cls_tail [--device cuda] [--repeats 9]

Forward and backward of the last block of a ViT-L (width 1,024, 16 heads, LayerScale), final norm
and score, on random tokens as in front of it: 197 (UNI), 261 (H-optimus, 4 registers) and 1,029
(512 px at patch 16, 4 registers). Three ways to the same feature and score, in turn:

    tail    `encoders.tail`
    tap     the whole block, and one row of its attention (`encoders.attention`)
    hook    the whole block, and a forward hook that projects qkv once more and forms all N x N
            attention, with a graph, to take the one row from: the published manner

Time is processor time on a CPU, which other work on the machine hardly touches; the median. Bytes
are what autograd holds for the backward, parameters not counted, a tile. Writes
results/cls_tail_<device>.json and the table between the markers in README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor

from benchmarks.record import RESULTS, facts, rewrite
from tapfm.encoders.attention import prefix_mass
from tapfm.encoders.backbones import Encoder
from tapfm.encoders.registry import Backbone
from tapfm.engine.memory import saved_bytes

SIZES = {197: 1, 261: 5, 1029: 5}  # tokens, prefix tokens of them
WIDTH, TILES, MIB = 1024, 2, 2**20


def last_block(prefix: int, device: str) -> Encoder:
    """Return a ViT-L of one block, always the same."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch16_224", num_classes=0, depth=1, init_values=0.1,
        reg_tokens=prefix - 1, no_embed_class=True,
    )  # fmt: skip
    row = Backbone("block", "package", "", WIDTH, prefix, 0, "", tile_px=224)
    return Encoder(vit, row).to(device)


def tail(encoder: Encoder, x_CND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the CLS token alone."""
    with encoder.reading():
        return encoder.read(encoder.vit.norm(encoder.vit.blocks[-1](x_CND)))


def tap(encoder: Encoder, x_CND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the whole block, and one row of attention."""
    return encoder.read(encoder.vit.norm(encoder.vit.blocks[-1](x_CND)))


def hook(encoder: Encoder, x_CND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the whole block, and all of its attention once more."""
    attn, matrices = encoder.vit.blocks[-1].attn, []

    def again(_attn, args: tuple[Tensor, ...], _out: Tensor) -> None:
        qkv = attn.qkv(args[0]).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        matrices.append((qkv[0] @ qkv[1].transpose(-2, -1) * attn.scale).softmax(-1))

    handle = attn.register_forward_hook(again)
    tokens = encoder.vit.norm(encoder.vit.blocks[-1](x_CND))
    handle.remove()
    encoder.tap.take_score()
    row_CHN = matrices[0][:, :, 0]
    return tokens[:, 0], -prefix_mass(row_CHN.log(), encoder.vit.num_prefix_tokens)


WAYS = {"tail": tail, "tap": tap, "hook": hook}


def forward_and_backward(way: Callable, encoder: Encoder, x_CND: Tensor) -> None:
    """Run forward and backward of one chunk."""
    z_CD, score_C = way(encoder, x_CND)
    (z_CD.sum() + score_C.sum()).backward()


def seconds(work: Callable[[], object], device: str) -> float:
    """Return seconds of processor time."""
    if not device.startswith("cuda"):
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(device: str, repeats: int) -> list[dict]:
    """Return a row a size and way: median milliseconds, MiB a tile, difference from the tap."""
    rows = []
    for tokens, prefix in SIZES.items():
        encoder = last_block(prefix, device)
        draw = torch.Generator().manual_seed(1)
        x_CND = torch.randn(TILES, tokens, WIDTH, generator=draw).to(device).requires_grad_()
        spent = {name: [] for name in WAYS}
        for _ in range(repeats + 1):  # the first is to warm up
            for name, way in WAYS.items():
                work = partial(forward_and_backward, way, encoder, x_CND)
                spent[name].append(seconds(work, device))
        with torch.no_grad():
            right = tap(encoder, x_CND)
        for name, way in WAYS.items():
            held = saved_bytes(partial(way, encoder, x_CND), but=encoder.parameters())
            with torch.no_grad():
                found = way(encoder, x_CND)
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]
            rows.append({
                "tokens": tokens, "way": name, "seconds": spent[name][1:],
                "ms": 1e3 * statistics.median(spent[name][1:]) / TILES,
                "mib": held / MIB / TILES, "difference": max(errors),
            })  # fmt: skip
    return rows


def table(found: dict) -> str:
    """Return the table as Markdown."""
    said = found["facts"]
    lines = [
        f"**Last block of a ViT-L**, fp32, {TILES} tiles at once. {said['machine']}; "
        f"{said['date']}, commit {said['commit']}, torch {said['torch']}, timm {said['timm']}.",
        "",
        "| tokens | tail: ms, MiB a tile | tap: ms, MiB a tile | N x N hook: ms, MiB a tile "
        "| tap / tail | hook / tail |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in SIZES:
        ways = {row["way"]: row for row in found["rows"] if row["tokens"] == tokens}
        cells = [f"{ways[name]['ms']:.1f}, {ways[name]['mib']:.1f}" for name in WAYS]
        ratios = [
            f"{ways[name]['ms'] / ways['tail']['ms']:.1f}x time, "
            f"{ways[name]['mib'] / ways['tail']['mib']:.1f}x bytes"
            for name in ("tap", "hook")
        ]
        lines.append(f"| {tokens:,} | " + " | ".join(cells + ratios) + " |")
    worst = max(row["difference"] for row in found["rows"])
    lines += ["", f"Features and scores of all three agree to {worst:.0e}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.device, given.repeats)
    found = {"facts": facts(given.device), "tiles": TILES, "rows": rows}
    (RESULTS / f"cls_tail_{given.device}.json").write_text(json.dumps(found, indent=1) + "\n")
    rewrite("cls_tail", table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
