"""The first screen of `tapfm fit --help`: the keys that matter, by subject."""

from __future__ import annotations

KEYS = {
    "What and where": {
        "--config FILE": "keys of a run in YAML, or the name of one that comes with tapfm (demo); "
        "repeat it, the last value of a key counts",
        "--run_dir FOLDER": "of the cohort's runs; each run has a folder there",
        "--data.table FILE": "a row a slide: case_id, slide_id, slide_path, split, labels",
        "--data.labels [A, B]": "columns to learn; all that have no other meaning",
        "--data.task NAME": "multilabel, multiclass, regression, survival and others",
    },
    "Model": {
        "--model.model KEY": "the foundation model, such as uni, h_optimus_0, virchow2",
        "--model.weights FILE": "its weights, or hub",
        "--model.strategy NAME": "what of it learns: full, lora, last_n, frozen and others",
        "--model.chunk N": "tiles at once; more is faster and takes more memory (tapfm plan)",
    },
    "Length": {
        "--trainer.max_epochs N": "epochs; a run continues where it was stopped",
        "--data.tiles_per_slide N": "tiles drawn from a slide each epoch; null is all",
    },
}  # fmt: skip
GROUPS = "data, model, model.steps, trainer, optimizer"
WIDTH, WRAP = 26, 72


def first_screen() -> str:
    """Return the help that fits a screen."""
    from textwrap import wrap

    lines = ["usage: tapfm fit --config FILE [--config FILE ...] [--KEY VALUE ...]", ""]
    for title, keys in KEYS.items():
        lines.append(title)
        for key, text in keys.items():
            first, *rest = wrap(text, WRAP - 2)
            lines.append(f"  {key:<{WIDTH}}{first}")
            lines += [f"  {'':<{WIDTH}}{line}" for line in rest]
        lines.append("")
    return "\n".join(
        [
            *lines,
            "tapfm fit --help data     the keys that begin with data (model, trainer, data.tiles)",
            "tapfm fit --help all      every key, of Lightning's trainer too",
            "tapfm fit --config FILE --print_config     every setting of a run with its value",
            "tapfm check --config FILE     what would go wrong, and how long it will take",
        ]
    )


def keys_that_begin(part: str, text: str) -> str:
    """Return the lines of the full help on keys that begin with a word.

    Args:
        part: a key, or the start of one: `data.tiles`.
        text: the full help.
    """
    shown, taken = [], False
    for line in text.splitlines():
        word = line.strip().split(" ")[0]
        if line.strip().startswith("--") or not line.startswith("  "):
            key = word.removeprefix("--").rstrip("+,")
            taken = line.strip().startswith("--") and f"{key}.".startswith(f"{part}.")
        if taken:
            shown.append(line)
    return "\n".join(shown) or f"no key begins with {part}; tapfm fit --help all lists them"
