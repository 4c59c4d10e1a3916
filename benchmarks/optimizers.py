"""Deviation of each way of keeping bfloat16 weights from fp32 AdamW at a fine-tuning rate.

    python -m benchmarks.optimizers

200 updates of the demo encoder at a learning rate of 1e-6. All schemes get the gradients that fp32
AdamW meets on its way, of random tiles and a random linear target. What is compared
is the exact weights where a scheme has them, else the weights. Writes results/optimizers.json and
the table between the markers in README.md.

Price: two minutes on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, facts, rewrite
from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.encoders import backbones
from tapfm.engine.master_weights import SCHEMES, MasterAdamW

UPDATES, LR, TILES = 200, 1e-6, 4
BYTES = {"naive": 8, "master": 18, "offload": 6, "residual": 10.05}  # a parameter, gradient too
DESCRIPTIONS = {
    "naive": "bf16 weights and moments, no master weights",
    "master": "fp32 master weights on the same device",
    "offload": "fp32 master weights in host memory",
    "residual": "16-bit residuals, 8-bit moments",
}


class Rounded(torch.optim.AdamW):
    """AdamW on the bfloat16 weights themselves."""

    def __init__(self, groups: list[dict]):
        for group in groups:
            for weight in group["params"]:
                weight.data = weight.data.bfloat16()
        super().__init__(groups)


def gradients(encoder: nn.Module, target_D: Tensor, draw: torch.Generator) -> list[Tensor]:
    """Return the gradients of a mean of squares on tiles not used before."""
    side = encoder.tile_px
    tiles = torch.randint(0, 256, (TILES, 3, side, side), dtype=torch.uint8, generator=draw)
    z_TD, score_T = encoder(tiles)
    wanted_T = torch.randn(TILES, generator=draw)
    encoder.zero_grad()
    ((z_TD @ target_D - wanted_T).square().mean() + score_T.mean()).backward()
    return [parameter.grad for parameter in encoder.parameters()]


def main() -> int:
    """Run all schemes side by side and write the table."""
    torch.manual_seed(0)
    encoder = backbones.load("demo_vit")
    names = [name for name, _ in encoder.vit.named_parameters()]
    weights = list(encoder.vit.parameters())
    start = torch.cat([p.detach().flatten().clone() for p in weights])
    makers: dict[str, Callable] = {"naive": Rounded} | {
        name: lambda groups, name=name: MasterAdamW(groups, name) for name in SCHEMES
    }
    runs = {name: scheme_run(make, names, weights) for name, make in makers.items()}
    reference = torch.optim.AdamW(groups_of(names, weights), fused=True)
    draw = torch.Generator().manual_seed(1)
    target_D = torch.randn(encoder.dim, generator=draw) / encoder.dim**0.5
    for _ in range(UPDATES):
        grads = gradients(encoder, target_D, draw)
        for learns, optimizer, _ in runs.values():
            for parameter, grad in zip(learns, grads, strict=True):
                parameter.grad = grad.to(parameter.dtype)
            optimizer.step()
        reference.step()

    exact = torch.cat([p.detach().flatten() for p in weights])
    way = exact - start
    found = {}
    for name, (_, _, read) in runs.items():
        off = read() - exact
        found[name] = {
            "of the weights": float(off.norm() / exact.norm()),
            "of the way": float(off.norm() / way.norm()),
            "cosine of the ways": float(torch.cosine_similarity(read() - start, way, dim=0)),
        }
    result = {**facts("cpu"), "updates": UPDATES, "lr": LR, "schemes": found}
    (RESULTS / "optimizers.json").write_text(json.dumps(result, indent=1) + "\n")
    rewrite("optimizers", table(result))
    return 0


def groups_of(names: list[str], parameters: list[nn.Parameter]) -> list[dict]:
    return parameter_groups(zip(names, parameters, strict=True), LR, 1e-4)


def scheme_run(make: Callable, names: list[str], weights: list[nn.Parameter]) -> tuple:
    """Return a scheme's gradient holders, optimizer, and a function that reads exact weights."""
    mine = [nn.Parameter(p.detach().clone()) for p in weights]
    optimizer = make(groups_of(names, mine))
    if not isinstance(optimizer, MasterAdamW):
        return mine, optimizer, lambda: torch.cat([p.detach().float().flatten() for p in mine])
    by_weight = {id(kept.weight): (p, kept) for p, kept in optimizer.kept.items()}
    pairs = [by_weight[id(weight)] for weight in mine]
    return (
        [stand_in for stand_in, _ in pairs],
        optimizer,
        lambda: torch.cat([kept.read()[0].flatten() for _, kept in pairs]),
    )


def table(result: dict) -> str:
    """Return a row a scheme."""
    lines = ["| scheme | bytes a parameter | off, of the weights | off, of the way | cosine |"]
    lines.append("|---" * 5 + "|")
    for name, each in result["schemes"].items():
        lines.append(
            f"| {DESCRIPTIONS[name]} | {BYTES[name]} | {each['of the weights']:.1e} | "
            f"{each['of the way']:.1e} | {each['cosine of the ways']:.4f} |"
        )
    lines.append(
        f"\n{result['updates']} updates at {result['lr']:g}. {result['machine']}; "
        f"{result['date']}, commit {result['commit']}, torch {result['torch']}, "
        f"timm {result['timm']}.\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
