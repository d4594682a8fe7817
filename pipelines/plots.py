"""Pictures of a frontier: a PNG (matplotlib) and a page that stands alone (plotly)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

Points = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart with every common colour blindness; markers and dashes differ as well.
STYLES = {
    "plain": ("#7A7A7A", "s", "square", (0, (4, 2)), "dash"),
    "sum": ("#0072B2", "^", "triangle-up", (0, (1, 1.5)), "dot"),
    "rectified": ("#D55E00", "o", "circle", "solid", "solid"),
}
OTHERS = [
    ("#009E73", "D", "diamond", "solid", "solid"),
    ("#CC79A7", "v", "triangle-down", (0, (4, 2)), "dash"),
    ("#E69F00", "P", "cross", (0, (1, 1.5)), "dot"),
    ("#56B4E9", "X", "x", "solid", "solid"),
]
INK = "#222222"


def style(families: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Colour, matplotlib marker, plotly marker, matplotlib dash, plotly dash of each family."""
    rest = [family for family in families if family not in STYLES]
    return {**STYLES, **{family: OTHERS[place % len(OTHERS)] for place, family in enumerate(rest)}}


def stairs(points: Points) -> tuple[list[float], list[float]]:
    """Corners of the region that a family's frontier covers, from the retention axis to the unlearning axis."""
    best = sorted((p["unlearning"], p["retention"]) for p in points if p["on_family_frontier"])
    if not best:
        return [], []
    return [0.0, *(x for x, _ in best), best[-1][0]], [best[0][1], *(y for _, y in best), 0.0]


def labels(document: Mapping[str, Any]) -> tuple[str, str]:
    """Axis titles, with the metrics behind the two scores."""
    names = {key: str(value).replace("_", " ") for key, value in document["axes"].items()}
    heads = {key: f"{key}, from {name}" if name != key else key for key, name in names.items()}
    return f"{heads['unlearning']} (1 = forgotten)", f"{heads['retention']} (1 = as before)"


def legend(family: str, row: Mapping[str, Any]) -> str:
    """A family's legend line: budget and hypervolume."""
    return f"{family}: {row['trials']} trials, {row['points']} points, hypervolume {row['hypervolume']:.3f}"


def png(document: Mapping[str, Any], points: Points, path: Path) -> None:
    """Draws the frontier of each family over all evaluated points."""
    draw(document, points).savefig(path, metadata={"Software": None})


def draw(document: Mapping[str, Any], points: Points, size: tuple[float, float] = (8, 6), title: bool = True) -> Any:
    """The frontier of each family over all evaluated points, as a matplotlib figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = style(list(document["families"]))
    for family, row in document["families"].items():
        colour, marker, _, dash, _ = styles[family]
        mine = [point for point in points if point["family"] == family]
        best = [point for point in mine if point["on_family_frontier"]]
        rest = [point for point in mine if not point["on_family_frontier"]]
        axes.plot(*stairs(mine), drawstyle="steps-pre", color=colour, linestyle=dash, linewidth=1.6, zorder=2)
        axes.scatter(*_columns(rest), s=18, marker=marker, color=colour, alpha=0.35, linewidths=0, zorder=3)
        axes.scatter(
            *_columns(best), s=48, marker=marker, color=colour, edgecolors="white", linewidths=0.8, zorder=4,
            label=legend(family, row),
        )  # fmt: skip
    knee = document["knee"]
    if knee:
        spot = (knee["unlearning"], knee["retention"])
        axes.scatter(*spot, s=190, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=5, label=_knee(knee))
    across, up = labels(document)
    axes.set(xlabel=across, ylabel=up, xlim=(-0.02, 1.03), ylim=(-0.02, 1.05))
    warning = "" if document["comparable"] else "\nbudgets differ: hypervolumes not comparable"
    if title:
        heading = f"Forgetting against retention: {document['search']}{warning}"
        axes.set_title(heading, loc="left", color=INK, fontsize=12, pad=10)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9)
    return figure


def _knee(knee: Mapping[str, Any]) -> str:
    return f"knee: {knee['trial']}, step {knee['step']} ({knee['unlearning']:.3f}, {knee['retention']:.3f})"


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [point["unlearning"] for point in points], [point["retention"] for point in points]


def html(document: Mapping[str, Any], points: Points, path: Path) -> None:
    """Writes an interactive page that needs no network: figure, families, frontier points, notes."""
    figure = _figure(document, points).to_html(
        full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True}
    )
    page = PAGE.format(
        title=escape(str(document["search"])),
        figure=figure,
        families=_rows(*family_rows(document)),
        frontier=_rows(*frontier_rows(document)),
        notes="".join(f"<li>{escape(note)}</li>" for note in document["notes"]),
    )
    path.write_text(page, encoding="utf-8")


def _figure(document: Mapping[str, Any], points: Points) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    styles = style(list(document["families"]))
    for family in document["families"]:
        colour, _, marker, _, dash = styles[family]
        mine = [point for point in points if point["family"] == family]
        xs, ys = stairs(mine)
        figure.add_scatter(
            x=xs, y=ys, mode="lines", line={"shape": "vh", "color": colour, "dash": dash, "width": 2},
            legendgroup=family, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        for best in (False, True):
            some = [point for point in mine if point["on_family_frontier"] is best]
            look = {"color": colour, "symbol": marker, "size": 11 if best else 7, "opacity": 1.0 if best else 0.4}
            edge = {"color": "white", "width": 1 if best else 0}
            xs, ys = _columns(some)
            figure.add_scatter(
                x=xs, y=ys, mode="markers", name=family, legendgroup=family, showlegend=best,
                marker={**look, "line": edge}, text=[_hover(point) for point in some], hoverinfo="text",
            )  # fmt: skip
    if document["knee"]:
        xs, ys = _columns([document["knee"]])
        ring = {"symbol": "circle-open", "size": 20, "color": INK, "line": {"width": 2}}
        figure.add_scatter(x=xs, y=ys, mode="markers", name="knee", marker=ring, hoverinfo="skip")
    across, up = labels(document)
    grid = {"gridcolor": "#E4E4E4", "zerolinecolor": "#BBBBBB"}
    figure.update_layout(
        xaxis={"title": across, "range": [-0.02, 1.03], **grid},
        yaxis={"title": up, "range": [-0.02, 1.05], **grid},
        plot_bgcolor="white", font={"color": INK, "family": "system-ui, sans-serif"}, height=560,
        legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
        margin={"l": 70, "r": 20, "t": 40, "b": 90},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"color": INK}},
    )  # fmt: skip
    return figure


def _hover(point: Mapping[str, Any]) -> str:
    lines = [
        f"<b>{escape(point['trial'])}</b>, step {point['step']} ({escape(point['family'])})",
        f"unlearning {point['unlearning']:.4f}, retention {point['retention']:.4f}",
        *(f"{escape(key)} = {escape(short(value))}" for key, value in point["params"].items()),
    ]
    return "<br>".join(lines)


def short(value: object) -> str:
    """A value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def family_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: budget, points and hypervolume of each family."""
    keys = ["trials", "collapsed", "incomplete", "points", "on_frontier"]
    rows = [
        [family, *(str(row[key]) for key in keys), f"{row['hypervolume']:.3f}"]
        for family, row in document["families"].items()
    ]
    return ["family", *(key.replace("_", " ") for key in keys), "hypervolume"], rows


def frontier_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the points of the frontier by rising unlearning; the knee is marked."""
    keys = document["searched"]
    tails = [key.rpartition(".")[2] for key in keys]
    heads = [tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)]
    rows = []
    for point in document["frontier"]:
        scores = [f"{point['unlearning']:.3f}", f"{point['retention']:.3f}"]
        trial = f"{point['trial']} (knee)" if point["knee"] else point["trial"]
        values = [short(point["params"].get(key)) for key in keys]
        rows.append([trial, point["family"], str(point["step"]), *scores, *values])
    return ["trial", "family", "step", "unlearning", "retention", *heads], rows


def _rows(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        mark = ' class="knee"' if row[0].endswith("(knee)") else ""
        body += f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Frontier: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .4rem; }}
p {{ margin: .2rem 0 1rem; color: #555; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }}
.knee td {{ font-weight: 600; }}
</style></head><body>
<h1>Forgetting against retention: {title}</h1>
<p>Each mark is one evaluated step of one trial. Large marks lie on their family's frontier, whose line bounds the
region that the family covers; its area is the hypervolume. The ring is the knee. Click a family to hide it.</p>
{figure}
<h2>Families</h2><div class="wide">{families}</div>
<h2>Frontier of all families</h2><div class="wide">{frontier}</div>
<h2>Notes</h2><ul>{notes}</ul>
</body></html>
"""
