"""Few-shot draws: a number of training slides of each subtype, chosen anew for each draw.

Slides come from the train split, one a patient, so that shots are patients. The same seed, cohort
and question give the same draw, whatever models are trained on it.

Source: PathPT (arXiv 2508.15904): 1, 5 and 10 slides a class, ten draws, a fixed test set.
Differs: a patient gives one slide to a draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slides.cohort.table import SlideRow
from tapfm.pathpt.question import QuestionError


def draw_slides(
    rows: Sequence[SlideRow],
    subtype: Mapping[str, int | None],
    names: Sequence[str],
    shots: int,
    seed: Sequence[int],
) -> list[str]:
    """Return ids of `shots` training slides of each subtype, subtype by subtype.

    Args:
        rows: the cohort's slides.
        subtype: each slide's subtype, from `question.subtypes`.
        names: names of the subtypes, for messages.
        shots: number of slides, each of another case.
        seed: seed of this draw.

    Raises:
        QuestionError: a subtype has fewer training cases than shots.
    """
    rng, chosen = np.random.default_rng(seed), []
    for number, name in enumerate(names):
        own = [r for r in rows if r.split == "train" and subtype[r.slide_id] == number]
        cases = sorted({row.case_id for row in own})
        if len(cases) < shots:
            raise QuestionError(
                f"shots: {shots} slides of {name!r} were asked for, and the train split has "
                f"{len(cases)} cases of it. Ask for fewer shots."
            )
        for case in rng.permutation(cases)[:shots]:
            slides = sorted(row.slide_id for row in own if row.case_id == case)
            chosen.append(slides[rng.integers(len(slides))])
    return chosen
