"""How much of each run's change was saved: the curve over a, as a panel and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tapfm.reports.html.panels import WIDE, panel
from tapfm.reports.html.tables import Html, html, interval_cell, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def adapting(verdicts: Sequence[Mapping]) -> Iterator[str]:
    """Yield the choice of each run, given the verdicts of metrics_<split>.json."""
    yield (
        "<p>a is the share of the encoder's change that is kept: at 0 the encoder is frozen. A "
        "slide model was fitted at each a, and validation chose: the smallest a whose loss, of "
        "calibrated logits, is above the least by no more than the standard error of that "
        "difference.</p>"
    )
    for verdict in verdicts:
        choice = verdict["choice"]
        yield f"<h3>{html(verdict['run'])}</h3>"
        yield (
            f"<p>a = {choice['a']:g} of the {html(choice['source'])}: {html(choice['reason'])}.</p>"
        )
        yield f'<div class="panels">{curve_panel(verdict["run"], choice)}</div>'
        header = ["a", "", "validation loss", "standard error of its difference to the least",
                  f"validation {verdict['figure']}", "slide model"]  # fmt: skip
        yield table(header, [
            [f"{p['a']:g}", "saved" if p["a"] == choice["a"] else "", f"{p['loss']:.4f}",
             f"{p['error']:.4f}", "" if p["figure"] is None else f"{p['figure']:.4f}", p["head"]]
            for p in choice["curve"]
        ])  # fmt: skip
        if facts := verdict.get("robustness"):
            yield robustness_table(verdict["figure"], facts)
        if facts := verdict.get("sites"):
            yield sites_table(facts)


def robustness_table(figure: str, facts: Mapping) -> Html:
    """Return what `tapfm test --robustness` measured, of the adapted and the frozen encoder."""
    rows = [["linear CKA to the frozen features", f"{facts['cka']:.3f}", "1", ""]]
    if drop := facts.get("drop"):
        cells = (interval_cell(drop[kind], sign="+") for kind in ("run", "control", "more"))
        rows.append([f"{figure} lost under stain draws", *cells])
    for kind, name in (("ri", "RI"), ("mari", "MaRI")):
        if index := facts.get(kind):
            own, frozen = index["run"], index["control"]
            rows.append([name, f"{own:.3f}", f"{frozen:.3f}", f"{own - frozen:+.3f}"])
    rows += [[what, why, "", ""] for what, why in facts["left_out"].items()]
    return table(["robustness", "adapted", "frozen", "difference"], rows)


def sites_table(facts: Mapping) -> Html:
    """Return how well embeddings tell sites, of the adapted and the frozen encoder."""
    cells = [interval_cell(facts["run"]), interval_cell(facts["control"]),
             interval_cell(facts["more"], sign="+")]  # fmt: skip
    name = f"site told by the nearest slides' (chance {facts['chance']:.2f})"
    return table(["slide embeddings", "adapted", "frozen", "difference"], [[name, *cells]])


def curve_panel(run: str, choice: Mapping) -> Html:
    """Return the validation loss against a, with `Point.error`; the saved a is ringed."""
    shares, losses, errors = (
        [point[key] for point in choice["curve"]] for key in ("a", "loss", "error")
    )

    def draw(axis: Axes) -> None:
        axis.errorbar(shares, losses, errors, color="#0072b2", marker="o", capsize=3)
        saved = losses[shares.index(choice["a"])]
        axis.plot(choice["a"], saved, "o", markersize=13, fillstyle="none", color="#d55e00")
        axis.set(xlabel="a, share of the change that is kept", xlim=(-0.06, 1.06))
        axis.set_title(
            "validation loss, and the error of its difference to the least; ringed: saved"
        )

    return panel(draw, f"validation loss of {run} against a", WIDE)
