"""The command line. Each verb imports what it needs when it runs, so `--help` is instant.

A fault that the user can mend is printed as one error, without a traceback, and the exit code is 2;
that of a run that was asked to stop is 128 and the signal's number.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import pairwise

from slides.errors import printable
from slides.files import WriteError
from tapfm.following import say_next
from tapfm.verbs import Parser, cohorts, later, reading, training
from tapfm.verbs.fit_help import first_screen, keys_that_begin

VERBS = {
    "demo": (cohorts.demo, "write the demo cohort: slides, table, truth masks"),
    "labels": (cohorts.labels, "a table of labels, or a cohort, from mutation data"),
    "split": (cohorts.split, "deal a cohort's cases anew: folds, repeats, sites"),
    "index": (reading.index, "find the tissue tiles of a cohort or of slides"),
    "check": (training.check, "all that can go wrong with a run, on one page, before it"),
    "plan": (training.plan, "what fits on a GPU, before the run"),
    "probe": (training.probe, "which blocks a cohort's labels pull at: n for last_n"),
    "fit": (None, "train; `tapfm fit --help` lists the keys that matter; --continue-from RUN"),
    "fit-tiles": (None, "train on labelled tiles, and compare; `tapfm fit-tiles --help` likewise"),
    "test": (training.test, "runs against frozen baselines, with intervals"),
    "study": (training.study, "folds, seeds and strategies: one table, resumable"),
    "report": (training.report, "the runs' results, cases and settings as one page"),
    "compare": (training.compare, "runs against each other on one page: which one to take"),
    "view": (reading.view, "a run's slides in the browser: deep zoom, weights, single tiles"),
    "predict": (reading.predict, "probabilities and tile weights of any slides"),
    "heatmap": (reading.heatmap, "predict, and draw: PNG overlay and GeoJSON for QuPath"),
    "features": (reading.features, "features of every tile, for other tools to read"),
    "embed": (reading.embed, "a vector a slide by TITAN, PRISM, CARE, Madeleine or MOOZY"),
    "histaug": (reading.histaug, "fit the bag transform histaug to an encoder"),
    "pathpt": (training.pathpt, "name every tile by learned prompts, from few slides"),
    "export": (reading.export, "a model for other tools: timm, ONNX, TorchScript, peft"),
    "doctor": (training.doctor, "what is installed, and whether a model loads right"),
}
MACHINES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
            errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}  # fmt: skip
"""Errors that are the machine's or its owner's, not the program's."""
LIGHTNINGS = {
    "fit": "tapfm.evaluation.continued:run_fit",
    "fit-tiles": "tapfm.tile_training.fit:run_fit_tiles",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    expand_segments()
    try:
        if argv and argv[0] in LIGHTNINGS:  # the arguments are Lightning's to read
            if argv[0] == "fit" and argv[1:2] and argv[1] in ("-h", "--help"):
                return help_of_fit(argv[2:])
            return later(LIGHTNINGS[argv[0]])(arguments=argv[1:])
        flags = vars(parser().parse_args(argv))
        verb, do = flags.pop("verb"), flags.pop("do")
        code = do(**flags)
        if not code:
            say_next(verb, flags)
        return code
    except KeyboardInterrupt:
        print("tapfm: interrupted. The same command goes on there.", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in MACHINES and not isinstance(error, WriteError):
            raise
        print(f"tapfm: {printable(of_machine(error))}", file=sys.stderr)
        return 2
    except BaseException as error:  # that of a run that was asked to stop is no Exception
        if type(error).__module__.partition(".")[0] not in ("slides", "tapfm"):
            raise  # not one of ours: a fault of the program, with its traceback
        print(f"tapfm: {printable(str(error))}", file=sys.stderr)
        explain_config(argv, error)
        return getattr(error, "exit_code", 2)


def of_machine(error: OSError) -> str:
    """Return the message for an error of disk, permissions or limits, wherever it came up."""
    if isinstance(error, WriteError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{error.strerror}. Mend that, and run the same command again: what is finished is "
        "kept."
    )


def help_of_fit(parts: Sequence[str]) -> int:
    """Print the keys that matter, those that begin with a word, or with `all` every key."""
    if not parts:
        print(first_screen())
        return 0
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        later(LIGHTNINGS["fit"])(arguments=["--help"])
    print(text.getvalue() if parts[0] == "all" else keys_that_begin(parts[0], text.getvalue()))
    return 0


def expand_segments() -> None:
    """Set CUDA's allocator to grow its segments, unless the user has set how it allocates.

    Chunks of tiles of several sizes leave gaps in fixed segments: 3.5 to 14 % more is reserved than
    is allocated, with growing ones less than 1 %. It must be set before CUDA starts.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def parser() -> Parser:
    """Return the parser of all verbs; `do` of what it reads is the verb's function."""
    top = Parser(prog="tapfm", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (flags, text) in VERBS.items():
        verb = verbs.add_parser(name, help=text, add_help=flags is not None)
        if flags:
            verb.set_defaults(do=flags(verb))
    return top


def explain_config(argv: Sequence[str], error: Exception) -> None:
    """Print a config's opening comment if its cohort cannot be read."""
    from slides.errors import CohortError
    from tapfm.config import preamble
    from tapfm.config_paths import find_config

    if not isinstance(error, CohortError):
        return
    configs = [find_config(value) for key, value in pairwise(argv) if key == "--config"]
    if configs and (says := preamble(configs[0])):
        print(f"\n{configs[0]} says:\n{says}", file=sys.stderr)
