"""Pictures of a report: SVG that stands in the page itself, without scripts, fonts or links of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import plots

Series = Sequence[tuple[int, float]]
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5F6B76"
"""Of Okabe and Ito's palette; dashes and markers differ as well."""
FONT = 9.5
RC: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and printed sharp
    "svg.hashsalt": "gru",  # the same picture has the same bytes
    "text.parse_math": False,  # a name with dollars in it is a name
    "font.size": FONT,
    "axes.edgecolor": "#8A949E",
    "axes.labelcolor": plots.INK,
    "xtick.color": plots.INK,
    "ytick.color": plots.INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EA",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": FONT,
    "lines.linewidth": 1.8,
}


def _axes(width: float, height: float, steps: bool = True) -> tuple[Any, Any]:
    """A figure of a size in inches and its axes, whose lower one counts steps, or names bars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if steps:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def svg(figure: Any, name: str, alt: str) -> str:
    """The figure as an ``<svg>`` element; ``name`` keeps its ids apart from those of other pictures in the page."""
    from html import escape

    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(RC):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text.replace("xlink:href=", "href="))
    head, _, body = text.partition(">")
    head = re.sub(r'\s(?:width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", head)  # HTML knows; the page sizes it
    return f'{head} role="img" aria-label="{escape(alt)}">{body}'


def frontier(document: Mapping[str, Any], points: plots.Points, chosen: Mapping[str, Any] | None) -> str:
    """The frontier of each family, the chosen point ringed."""
    from matplotlib import rc_context

    with rc_context(RC):
        figure = plots.draw({**document, "knee": None}, points, size=(7.2, 5.0), title=False)
        axes = figure.axes[0]
        if chosen:
            spot = (chosen["unlearning"], chosen["retention"])
            axes.scatter(*spot, s=190, facecolors="none", edgecolors=plots.INK, linewidths=1.5, zorder=5)
            label = {"xytext": (11, 11), "textcoords": "offset points", "color": plots.INK, "fontweight": "bold"}
            axes.annotate("chosen", spot, **label)
    found = ", ".join(f"{name} {row['hypervolume']:.3f}" for name, row in document["families"].items())
    alt = f"Retention against unlearning, a mark for each evaluated step. Hypervolume: {found}."
    return svg(figure, "frontier", alt)


def scores(series: Mapping[str, Series], chosen: int | None) -> str:
    """Unlearning and retention over the steps of a run."""
    from matplotlib import rc_context

    with rc_context(RC):
        figure, axes = _axes(7.2, 2.7)
        for name, colour, dash, marker in (("unlearning", ORANGE, "-", "o"), ("retention", BLUE, "--", "s")):
            axes.plot(*_columns(series[name]), color=colour, linestyle=dash, marker=marker, markersize=5, label=name)
        _mark(axes, chosen)
        axes.set(xlabel="step", ylabel="score", ylim=(-0.04, 1.06))
        _legend(figure, axes)
    return svg(figure, "scores", _ends(series, ("unlearning", "retention")))


def losses(series: Mapping[str, Series], chosen: int | None) -> str:
    """Both losses over the steps of a run, logarithmic where they span more than a factor of 30."""
    from matplotlib import rc_context

    with rc_context(RC):
        figure, axes = _axes(7.2, 2.5)
        drawn = [name for name in ("forget_loss", "retain_loss") if series[name]]
        looks = {"forget_loss": (ORANGE, "-", "loss on rows to forget"), "retain_loss": (BLUE, "--", "on rows to keep")}
        for name in drawn:
            colour, dash, label = looks[name]
            axes.plot(*_columns(series[name]), color=colour, linestyle=dash, label=label)
        values = [value for name in drawn for _, value in series[name]]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _mark(axes, chosen)
        axes.set(xlabel="step", ylabel="loss")
        _legend(figure, axes)
    return svg(figure, "losses", _ends(series, drawn))


def conflicts(series: Mapping[str, Series], chosen: int | None) -> str:
    """The cosine between the two gradients over the steps of a run; below 0 they are in conflict."""
    from matplotlib import rc_context

    with rc_context(RC):
        figure, axes = _axes(7.2, 2.3)
        steps, cosines = _columns(series["cosine"])
        axes.axhspan(-1.05, 0, color=ORANGE, alpha=0.08, linewidth=0)
        axes.axhline(0, color=GREY, linewidth=0.9)
        axes.plot(steps, cosines, color=plots.INK, linewidth=1.2)
        low = [(step, cosine) for step, cosine in series["cosine"] if cosine < 0]
        axes.scatter(*_columns(low), s=16, color=ORANGE, zorder=3, label="step in conflict")
        _mark(axes, chosen)
        edge = max(0.1, *(abs(cosine) for cosine in cosines)) * 1.15
        axes.set(xlabel="step", ylabel="cosine", ylim=(-min(edge, 1.05), min(edge, 1.05)))
        _legend(figure, axes)
    return svg(figure, "conflicts", f"Cosine between the gradients: below 0 at {len(low)} of {len(steps)} steps.")


def relearning(found: Mapping[str, Any], name: str) -> str:
    """The forget metric while the forgotten is taught again."""
    from matplotlib import rc_context

    curves = found["curves"][name]
    with rc_context(RC):
        figure, axes = _axes(7.2, 2.7)
        axes.plot(*_columns(curves["model"]), color=ORANGE, marker="o", markersize=5, label="this model")
        if curves["retain_model"]:
            axes.plot(
                *_columns(curves["retain_model"]), color=BLUE, linestyle="--", marker="s", markersize=4,
                label="retain model, taught the same",
            )  # fmt: skip
        _levels(axes, found)
        axes.set(xlabel="steps of training again", ylabel=found["metric"].replace("_", " "))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _legend(figure, axes)
    said = ", ".join(f"{value:.3f} after {step}" for step, value in curves["model"])
    return svg(figure, name.replace("_", "-"), f"{found['metric']} while the model is trained again: {said} steps.")


def few_bits(found: Mapping[str, Any]) -> str:
    """The forget metric after the weights were rounded."""
    from matplotlib import rc_context

    bars = [("as trained", found["end"])] if found["end"] is not None else []
    bars += [(f"{bits} bit", value) for bits, value in found["bits"]]
    with rc_context(RC):
        figure, axes = _axes(7.2, 2.5, steps=False)
        drawn = axes.bar([name for name, _ in bars], [value for _, value in bars], width=0.5, color=ORANGE)
        axes.bar_label(drawn, fmt="%.3f", padding=2)
        _levels(axes, found)
        axes.set(ylabel=found["metric"].replace("_", " "), xlim=(-0.6, len(bars) - 0.4))
        axes.grid(False, axis="x")
        axes.margins(y=0.15)
        _legend(figure, axes)
    said = ", ".join(f"{name} {value:.3f}" for name, value in bars)
    return svg(figure, "bits", f"{found['metric']} after rounding the weights: {said}.")


def _levels(axes: Any, found: Mapping[str, Any]) -> None:
    """The two ends between which a forget metric moves."""
    for key, label, dash in (("start", "starting model", (0, (5, 2))), ("retain", "retain model", (0, (1, 1.5)))):
        if found[key] is not None:
            axes.axhline(found[key], color=GREY, linestyle=dash, linewidth=1.3, label=label)


def _mark(axes: Any, chosen: int | None) -> None:
    if chosen is not None:
        axes.axvline(chosen, color=GREY, linestyle=(0, (2, 2)), linewidth=1.3, label=f"chosen: step {chosen}")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=4)


def _columns(series: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in series], [value for _, value in series]


def _ends(series: Mapping[str, Series], names: Sequence[str]) -> str:
    parts = []
    for name in names:
        if series[name]:
            (first, a), (last, b) = series[name][0], series[name][-1]
            parts.append(f"{name.replace('_', ' ')} from {a:.3f} at step {first} to {b:.3f} at step {last}")
    return "; ".join(parts) + "."
