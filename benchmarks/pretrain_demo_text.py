"""Aligns a small text tower with the demo encoder; writes encoders/weights/demo_text.safetensors.

    python -m benchmarks.pretrain_demo_text

Tiles are painted by `slides.demo.tissue_painter` from seeds and sites that no demo cohort uses, and
each gets captions from what was painted: which tissue, and of a tumour which traits it shows. The
demo encoder is frozen; a head on its feature and the text tower learn that a tile fits the captions
that are true of it. A caption may leave traits out, and is true of every tile that it says nothing
wrong of, so a batch has several right answers, each as good.

What this is not: unsupervised. The captions name the traits that the demo cohort's labels stand for
(see `tapfm/pathpt/text/words.py`, Limits). Everything follows from `SEED`.

Price: 15 minutes on one busy core, 1 GiB.

Source: Yang et al. 2022 (UniCL, arXiv 2204.03610) for the contrastive loss with several positives.

Shapes: N tiles, B of a batch, Q captions, D features, d joint width, R traits.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from slides.demo.tissue_painter import COMPARTMENTS, Specimen, compartments, paint, site_stain
from tapfm.encoders import backbones
from tapfm.pathpt.text.towers import tokenise
from tapfm.pathpt.text.words import FILE, WordTower, image_head
from tapfm.training.optim import warmup_cosine

SEED = 20_250_202
SITES, SPECIMENS = 48, 192
TILE, MPP = 112, 0.5
STEPS, BATCH, CAPTIONS, LR = 3000, 256, 96, 1e-3
TUMOUR_FROM, TISSUE_FROM = 0.6, 0.4  # shares of a tile from which it is called so
HELD_OUT = 0.15  # of the specimens, to say how well it does

OPENINGS = (
    "",
    "a histopathology image of",
    "an image of",
    "a tile of",
    "a photomicrograph of",
    "an h and e stained section of",
    "a microscopic view of",
    "histology of",
    "there is",
    "this tile shows",
    "presence of",
    "a slide with",
)
TISSUES = {
    "stroma": ("stroma", "fibrous stroma", "connective tissue"),
    "lymphoid": ("lymphocytes", "lymphoid tissue", "inflammation"),
    "gland": ("glands", "glandular epithelium", "benign glands"),
    "foamy": ("foamy macrophages", "foam cells", "histiocytes"),
}
NORMAL = ("normal tissue", "benign tissue", "tissue without tumour", "no tumour", "healthy tissue")
TUMOUR = ("tumour", "tumor", "carcinoma", "cancer", "malignant cells", "tumour cells")
TRAITS = (  # absent, present
    (
        ("smooth chromatin", "no nucleoli", "bland nuclei"),
        ("prominent nucleoli", "large nucleoli", "dark nucleoli"),
    ),
    (
        ("solid cytoplasm", "no vacuoles", "dense cytoplasm"),
        ("clear vacuoles", "vacuolated cytoplasm", "vacuoles"),
    ),
    (
        ("solid nuclei", "no inclusions", "intact nuclei"),
        ("nuclear inclusions", "pale inclusions", "inclusions"),
    ),
)
WORDS = sorted(
    {
        word
        for phrase in (
            *OPENINGS, *NORMAL, *TUMOUR, *(t for tissue in TISSUES.values() for t in tissue),
            *(p for trait in TRAITS for state in trait for p in state), "with and . x",
        )
        for word in phrase.split()
    }
)  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A sentence, and the facts it claims."""

    text: str
    tissue: int
    """Number in `COMPARTMENTS`; -1: any that is no tumour."""
    traits: tuple[int, ...] = (-1, -1, -1)
    """State that is claimed; -1: not mentioned."""


def main():
    """Paint, encode, train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--specimens", type=int, default=SPECIMENS)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    started = time.perf_counter()
    encoder = backbones.load("demo_vit").eval()
    features, tissues, traits, owners = [], [], [], []
    with ProcessPoolExecutor(arguments.workers) as pool:
        for number, (tiles, tissue_N, state) in enumerate(
            pool.map(painted_tiles, range(arguments.specimens))
        ):
            with torch.no_grad():
                features += [encoder(c)[0] for c in torch.from_numpy(tiles).split(64)]
            tissues += tissue_N
            traits += [state] * len(tissue_N)
            owners += [number] * len(tissue_N)
    z_ND, tissue_N = torch.cat(features), torch.tensor(tissues)
    traits_NR, owner_N = torch.tensor(traits), torch.tensor(owners)
    print(f"{len(z_ND)} tiles in {time.perf_counter() - started:.0f} s", flush=True)
    held_N = owner_N >= (1 - HELD_OUT) * arguments.specimens

    text, head = WordTower(WORDS), image_head(encoder.dim)
    log_scale = train(
        text, head, z_ND[~held_N], tissue_N[~held_N], traits_NR[~held_N], arguments.steps
    )
    figures = judge(text, head, z_ND[held_N], tissue_N[held_N], traits_NR[held_N])
    print("held-out specimens, share of tiles named right of two or more: " + figures)
    facts = {
        "model": "demo_text",
        "method": "captions of synthetic tissue, benchmarks/pretrain_demo_text.py",
        "words": json.dumps(WORDS),
        "logit_scale": f"{log_scale.exp().item():.6g}",
        "held_out": figures,
        "steps": str(arguments.steps),
        "specimens": str(arguments.specimens),
        "seed": str(SEED),
        "license": "Apache-2.0",
    }
    state = nn.ModuleDict({"text": text, "head": head}).state_dict()
    save_file({k: v.half().contiguous() for k, v in state.items()}, arguments.out, metadata=facts)
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {size:.2f} MB, {time.perf_counter() - started:.0f} s in all")


def painted_tiles(number: int) -> tuple[np.ndarray, list[int], tuple[int, ...]]:
    """Return tiles of one tissue each, uint8 (T, 3, S, S), the tissue, the specimen's traits."""
    rng = np.random.default_rng([SEED, number])
    state = tuple(int(s) for s in rng.integers(0, 2, 3))
    specimen = Specimen(
        seed=SEED * 1000 + number,
        stain=site_stain(SEED, number % SITES),
        traits=state,
        tumour_fraction=float(rng.uniform(0.3, 0.46)),
    )
    fine = number % 2 + 1
    rgb, _ = paint(specimen, MPP / fine)
    packed = io.BytesIO()  # as slides are kept: compression costs fine detail
    Image.fromarray(rgb).save(packed, "JPEG", quality=88)
    rgb = np.asarray(Image.open(packed).convert("RGB"))
    field = Image.fromarray(compartments(specimen))
    field = np.asarray(field.resize(rgb.shape[1::-1], Image.Resampling.NEAREST))
    side = TILE * fine
    h, w = rgb.shape[0] // side, rgb.shape[1] // side
    rgb = rgb[: h * side, : w * side].reshape(h * TILE, fine, w * TILE, fine, 3)
    rgb = rgb.mean((1, 3), dtype=np.float32).round().astype(np.uint8)
    tiles = rgb.reshape(h, TILE, w, TILE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
    cells = field[: h * side, : w * side].reshape(h, side, w, side).transpose(0, 2, 1, 3)
    shares_NF = np.stack([(cells == f).mean((2, 3)).ravel() for f in range(len(COMPARTMENTS))], 1)
    kept = [(n, tissue) for n, shares_F in enumerate(shares_NF) if (tissue := named(shares_F)) > 0]
    return tiles[[n for n, _ in kept]], [tissue for _, tissue in kept], state


def named(shares_F: np.ndarray) -> int:
    """Return the one tissue of a tile; 0 if it is mixed."""
    share = dict(zip(COMPARTMENTS, shares_F, strict=True))
    if share["tumour"] >= TUMOUR_FROM:
        return COMPARTMENTS.index("tumour")
    if share["tumour"] > 0 or share["glass"] > 1 - TISSUE_FROM:
        return 0
    share["gland"] += share["lumen"]
    best = max(TISSUES, key=share.get)
    return COMPARTMENTS.index(best) if share[best] >= TISSUE_FROM else 0


def draw_caption(rng: np.random.Generator) -> Caption:
    """Return a sentence that is true of some tiles."""
    claim, traits = rng.random(), (-1, -1, -1)
    if claim < 0.2:
        tissue, said = -1, rng.choice(NORMAL)
    elif claim < 0.45:
        name = rng.choice(list(TISSUES))
        tissue, said = COMPARTMENTS.index(name), rng.choice(TISSUES[name])
    else:
        tissue, said = COMPARTMENTS.index("tumour"), rng.choice(TUMOUR)
        traits = tuple(int(rng.integers(0, 2)) if rng.random() < 0.6 else -1 for _ in TRAITS)
        seen = [rng.choice(TRAITS[r][s]) for r, s in enumerate(traits) if s >= 0]
        rng.shuffle(seen)
        if seen:
            said += " with " + " and ".join(seen)
    opening = str(rng.choice(OPENINGS))
    if rng.random() < 0.3:  # so that long contexts, as learned prompts start from, are known
        opening = " ".join([opening] * int(rng.integers(2, 7)))
    words = f"{opening} {said} .".split()
    return Caption(" ".join(words[-60:]), tissue, traits)


def fits(captions: list[Caption], tissue_B: Tensor, traits_BR: Tensor) -> Tensor:
    """Return whether each caption is true of each tile, (B, Q)."""
    tumour = COMPARTMENTS.index("tumour")
    claim_Q = torch.tensor([c.tissue for c in captions])
    normal_B = tissue_B != tumour
    right_BQ = torch.where(claim_Q == -1, normal_B[:, None], tissue_B[:, None] == claim_Q)
    traits_QR = torch.tensor([c.traits for c in captions])
    return right_BQ & ((traits_QR == -1) | (traits_BR[:, None] == traits_QR)).all(2)


def train(
    text: WordTower, head: nn.Module, z_ND: Tensor, tissue_N: Tensor, traits_NR: Tensor, steps: int
) -> Tensor:
    """Minimise and print the two-way contrastive loss; return the logarithm of its scale."""
    log_scale = nn.Parameter(torch.tensor(10.0).log())
    parameters = [*text.parameters(), *head.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.05)
    rng, losses = np.random.default_rng(SEED), []
    # tumour tiles are a third; half of a batch are, since there is more to tell
    tumour_N = tissue_N == COMPARTMENTS.index("tumour")
    weight_N = torch.where(tumour_N, 0.5 / tumour_N.sum(), 0.5 / (~tumour_N).sum())
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LR * max(warmup_cosine(step / steps, 0.05), 1e-3)
        rows_B = torch.multinomial(weight_N, BATCH)
        captions = [draw_caption(rng) for _ in range(CAPTIONS)]
        right_BQ = fits(captions, tissue_N[rows_B], traits_NR[rows_B])
        z_BD = z_ND[rows_B] + 0.1 * torch.randn(BATCH, z_ND.shape[1])
        v_Bd = F.normalize(head(F.dropout(z_BD, 0.1)), dim=-1)
        ids_QL, mask_QL = tokenise(text, [c.text for c in captions])
        t_Qd = F.normalize(text(text.table(ids_QL), mask_QL), dim=-1)
        logits_BQ = log_scale.exp() * v_Bd @ t_Qd.T
        loss = several_right(logits_BQ, right_BQ) + several_right(logits_BQ.T, right_BQ.T)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            log_scale.clamp_(max=float(np.log(25)))  # KEEP's: sharper scales learn by heart
        losses.append(loss.item())
        if step % 250 == 0 or step == steps:
            print(f"step {step:5d}  loss {np.mean(losses[-250:]):.3f}", flush=True)
    return log_scale.detach()


def several_right(logits_BQ: Tensor, right_BQ: Tensor) -> Tensor:
    """Return the cross-entropy of rows with a right answer; right answers share the target."""
    rows_B = right_BQ.any(1)
    target_BQ = right_BQ[rows_B].float()
    return F.cross_entropy(logits_BQ[rows_B], target_BQ / target_BQ.sum(1, keepdim=True))


@torch.no_grad()
def judge(text: WordTower, head: nn.Module, z_ND, tissue_N, traits_NR) -> str:
    """Return the balanced accuracy of the nearest sentence: normal or tumour; each trait."""
    v_Nd = F.normalize(head(z_ND), dim=-1)

    def share(phrases: list[str], truth_N: Tensor, rows_N: Tensor) -> float:
        texts = [f"a histopathology image of {phrase} ." for phrase in phrases]
        ids_QL, mask_QL = tokenise(text, texts)
        t_Qd = F.normalize(text(text.table(ids_QL), mask_QL), dim=-1)
        called_N, truth_N = (v_Nd[rows_N] @ t_Qd.T).argmax(1), truth_N[rows_N].long()
        right = [(called_N[truth_N == k] == k).float().mean() for k in range(len(phrases))]
        return torch.stack(right).mean().item()

    tumour_N = tissue_N == COMPARTMENTS.index("tumour")
    said = [f"tumour {share(['normal tissue', 'tumour'], tumour_N, tumour_N >= 0):.3f}"]
    for r, (absent, present) in enumerate(TRAITS):
        phrases = [f"tumour with {absent[0]}", f"tumour with {present[0]}"]
        said.append(f"{present[0]} {share(phrases, traits_NR[:, r], tumour_N):.3f}")
    return ", ".join(said)


if __name__ == "__main__":
    main()
