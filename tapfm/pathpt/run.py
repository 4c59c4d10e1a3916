"""`tapfm pathpt`: predict subtypes from few training slides, beside frozen baselines.

For each number of shots and each draw of that many training slides a subtype: choose zero-shot
prompts on them, label their tiles, train, and predict every test slide. The frozen baselines get
the same image features and slides, and choose rate and epoch on the whole val split, which PathPT
does not use. Tile classes are drawn for the first draw with the most shots.

    <out>/report.md, scores.json                    the table, with intervals
    <out>/<shots>_shots/draw_<n>/pathpt.safetensors    and predictions.csv, pathpt_losses.csv
    <out>/tile_classes/<slide>.png, .geojson        predicted tile classes, for people and QuPath

Source: PathPT (arXiv 2508.15904): shots, draws and a fixed test set.
Differs: intervals by test case and paired differences to the frozen rows are ours.

Shapes: N tiles, K classes of a tile, d joint width, S test slides, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from slides.cohort.table import SlideRow
from slides.progress import progress_bar
from slides.streaming.settings import Source
from slides.streaming.tile_source import TileSource
from slides.tiling.index_file import TileIndex
from slides.wsi.reader import Slide
from tapfm.adapt.strategies import make_optimizer, make_strategy, strategy_spec
from tapfm.config import read_cohort_of, read_data, read_source
from tapfm.frozen.baselines import fit_gated_attention, fit_mean_pool_mlp
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.pathpt import pseudo
from tapfm.pathpt.few import draw_slides
from tapfm.pathpt.findings import draw_classes, write_calls, write_losses, write_report
from tapfm.pathpt.model import PathPT, PathPTConfig, save_pathpt
from tapfm.pathpt.question import Question, QuestionError, read_question, subtypes
from tapfm.pathpt.text.prompts import ClassPrompts
from tapfm.pathpt.tiles import (
    EncodedSlide,
    Towers,
    encode_slide,
    load_towers,
    read_slides,
)
from tapfm.pathpt.train import ImageTower, LabelledSlide, train_pathpt
from tapfm.pathpt.vote import vote
from tapfm.tasks.multilabel import Multilabel

ZERO, MEAN, GATED, PATHPT, JOINED = (
    "zero-shot, chosen prompts",
    "frozen, mean-pool MLP",
    "frozen, gated attention",
    "PathPT",
    "PathPT, end to end",
)
BASELINES = {MEAN: fit_mean_pool_mlp, GATED: fit_gated_attention}


def run_pathpt(
    configs: Sequence[Path],
    question_file: Path,
    out: Path,
    *,
    seed: int = 0,
    chunk: int = 16,
    drawn: int = 4,
    device: str | None = None,
) -> int:
    """Train and test a question on a cohort; return 0.

    Args:
        configs: YAML files with the cohort's data part.
        question_file: YAML of the question.
        out: folder.
        seed: seed of draws, training and bootstrap.
        chunk: tiles on the device at once.
        drawn: test slides whose tile classes are drawn.
        device: device to run on; None is CUDA if there is one.

    Raises:
        QuestionError: the question is invalid or does not fit the cohort.
        TextError, BackboneError: a tower is unavailable.
        SlideError: a slide cannot be read and the config does not skip such slides.
    """
    question = read_question(question_file)
    data = read_data(configs)
    cohort = read_cohort_of({
        **data, "labels": question.columns, "task": None, "features_dir": None
    })  # fmt: skip
    source = read_source(configs)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    towers = load_towers(device, **question.towers)
    subtype = subtypes(question, question.columns, cohort.rows)
    rows = [row for row in cohort.rows if subtype[row.slide_id] is not None]
    few_of(question, rows, subtype, seed)  # faults are reported before hours of work
    print(f"{len(rows)} of {len(cohort.rows)} slides have one of the subtypes")
    slides = read_slides(source, rows, subtype, towers, out, chunk)
    few = few_of(question, [each.row for each in slides.values()], subtype, seed)
    test = [each for each in slides.values() if each.row.split == "test"]
    prompts = [towers.teacher.encode_text(each) for each in question.sentences()]
    called: dict[int, dict[str, list[list[int]]]] = {}
    for shots, draws in few.items():
        called[shots] = {}
        for n, ids in enumerate(progress_bar(draws, desc=f"{shots} shots", unit="draw")):
            here = out / f"{shots}_shots" / f"draw_{n}"
            show = drawn if (shots, n) == (max(question.shots), 0) else 0
            chosen = [slides[name] for name in ids]
            answer = one_draw(question, towers, source, prompts, chosen, slides, here, seed + n,
                              chunk, show)  # fmt: skip
            for name, calls_S in answer.items():
                called[shots].setdefault(name, []).append(calls_S)
            write_calls(here / "predictions.csv", question, test, answer)
    print(write_report(out, question, test, called, BASELINES, seed))
    return 0


def few_of(
    question: Question, rows: Sequence[SlideRow], subtype: Mapping[str, int | None], seed: int
) -> dict[int, list[list[str]]]:
    """Return ids of the training slides, by shots and draw.

    Raises:
        QuestionError: a split has too few slides.
    """
    for split, fewest in (("test", 2), ("val", 1)):
        there = {subtype[row.slide_id] for row in rows if row.split == split}
        if len(there) < fewest:
            raise QuestionError(
                f"the {split} split has slides of {len(there)} of the subtypes, and {fewest} or "
                "more are needed. Split the cohort anew (`tapfm split`), or ask another question."
            )
    names = question.names[1:]
    return {
        shots: [
            draw_slides(rows, subtype, names, shots, [seed, shots, n])
            for n in range(question.draws)
        ]
        for shots in question.shots
    }


def one_draw(
    question: Question,
    towers: Towers,
    source: Source,
    prompts: Sequence[Tensor],
    chosen: Sequence[EncodedSlide],
    slides: Mapping[str, EncodedSlide],
    here: Path,
    seed: int,
    chunk: int,
    drawn: int,
) -> dict[str, list[int]]:
    """Return each model's prediction of each test slide, trained on these slides."""
    test = [each for each in slides.values() if each.row.split == "test"]
    zero_Kd = pseudo.select_prompts(
        prompts, [each.joint_Nd for each in chosen], [each.subtype for each in chosen], seed
    )
    answer = {ZERO: [vote(each.joint_Nd @ zero_Kd.T) for each in test]}
    answer |= baselines(question, chosen, slides, seed)
    tile_source, mark = TileSource.of(source), towers.mark()
    models = [PATHPT] + [JOINED] * (question.strategy is not None)
    for name in models:
        joined = name == JOINED
        few = [
            LabelledSlide(
                each.z_Nd, each.places_N2,
                pseudo.tile_labels(each.joint_Nd, zero_Kd, each.subtype), each.subtype,
                tile_source.tiles(each.row) if joined else None,
            )
            for each in chosen
        ]  # fmt: skip
        own = load_towers(towers.device, **question.towers) if joined else towers
        image = image_tower(question, own, chunk) if joined else None
        model, losses = fit(question, own, few, seed, image)
        with torch.no_grad():
            classes_Kd = model.prompts(own.teacher.text)
        stem = "pathpt_end_to_end" if joined else "pathpt"
        vit = own.encoder.vit  # all of it is frozen unless it is trained
        trained = {name: p for name, p in vit.named_parameters() if p.requires_grad}
        model_config = PathPTConfig(
            tuple(question.names), classes_Kd.shape[1], question.scale, question.towers, mark,
            strategy_spec(make_strategy(question.strategy)) if joined else None,
            asdict(source.tiles), source.stain,
        )  # fmt: skip
        save_pathpt(here / f"{stem}.safetensors", model, classes_Kd, model_config, trained)
        write_losses(here / f"{stem}_losses.csv", losses)
        answer[name] = []
        tuned = tile_source.streamed([each.row for each in test] if joined else [], source.workers)
        z_by_slide = {row.slide_id: encode_slide(own, tiles, chunk) for row, tiles in tuned}
        for number, each in enumerate(test):
            with torch.no_grad():
                z_Nd = z_by_slide.get(each.row.slide_id, each.z_Nd)
                logits_NK = model(z_Nd, each.places_N2, classes_Kd)
            answer[name].append(vote(logits_NK))
            if number < drawn and name == models[-1]:
                folder, index = here.parent.parent / "tile_classes", tile_source.index(each.row)
                draw_tile_classes(folder, question, each, index, logits_NK, answer[name][-1])
    return answer


def draw_tile_classes(
    folder: Path,
    question: Question,
    test: EncodedSlide,
    index: TileIndex,
    logits_NK: Tensor,
    called: int,
) -> None:
    """Draw the tile classes of a test slide, its true subtype in the title."""
    row, p_NK = test.row, logits_NK.softmax(1).cpu().numpy()
    true = f", is {question.names[test.subtype + 1]}"
    with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
        draw_classes(folder, slide, index, question.names, p_NK, called, true)


def fit(
    question: Question,
    towers: Towers,
    few: Sequence[LabelledSlide],
    seed: int,
    image: ImageTower | None,
) -> tuple[PathPT, list[float]]:
    """Return a trained model, and the loss of each epoch."""
    text = towers.teacher.text if question.mode != "embedding" else None
    dim = few[0].z_Nd.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        how = question.mode, question.init, question.context
        prompts = ClassPrompts(question.names, dim, text, *how)
        model = PathPT(dim, prompts, question.scale).to(towers.device)
    if towers.student:
        model.standardise([each.z_Nd for each in few])
    return model, train_pathpt(model, text, few, question, seed, image)


def image_tower(question: Question, towers: Towers, chunk: int) -> ImageTower:
    """Return the image tower with the question's strategy applied."""
    strategy, vit = make_strategy(question.strategy), towers.encoder.vit
    strategy.prepare(vit)
    lr = strategy.lr if question.encoder_lr is None else question.encoder_lr
    optimizer = make_optimizer(strategy, strategy.parameters(vit, lr, 0.0))
    towers.encoder.train()  # for a strategy's dropout; `encode_slide` sets eval mode
    return ImageTower(towers.encode, optimizer, torch.device(towers.device), chunk)


def baselines(
    question: Question,
    chosen: Sequence[EncodedSlide],
    slides: Mapping[str, EncodedSlide],
    seed: int,
) -> dict[str, list[int]]:
    """Return the frozen slide models' predictions from the same slides, chosen on val."""
    names = question.names[1:]

    def frozen(each: EncodedSlide) -> FrozenSlide:
        y_C = torch.zeros(len(names))
        y_C[each.subtype] = 1
        return FrozenSlide.of(each.row.slide_id, each.row.case_id, each.z_Nd.cpu(), y_C)

    val = [frozen(each) for each in slides.values() if each.row.split == "val"]
    test = [frozen(each) for each in slides.values() if each.row.split == "test"]
    few, answer = [frozen(each) for each in chosen], {}
    task = Multilabel.learn(tuple(names), (), torch.stack([each.target_Y for each in few]).numpy())
    for name, fitted in BASELINES.items():
        model = fitted(few, val, task, seed=seed)
        answer[name] = [int(model.predict(each)[0].argmax()) for each in test]
    return answer
