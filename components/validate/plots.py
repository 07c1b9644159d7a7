"""Figures of the data report as inline SVG: no pyplot state, no network, stable ids."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from components.validate.statistics import spell_seconds
from model.trends import DAY, HOUR

INK, MUTED, GRID = "#1f2933", "#64748b", "#e5e9ee"
TEAL, TEAL_LIGHT, AMBER = "#0f766e", "#99d5cf", "#c2570c"

_STYLE: Any = {
    "svg.fonttype": "path",  # looks the same on every machine
    "svg.hashsalt": "data-report",
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": GRID,
    "legend.frameon": False,
}
_SPANS: list[tuple[float, str]]
_SPANS = [(1, "1 s"), (10, "10 s"), (60, "1 min"), (600, "10 min"), (HOUR, "1 h"), (DAY, "1 day")]
_SPANS += [(7 * DAY, "1 week"), (30 * DAY, "30 days"), (365 * DAY, "1 year")]


def draw_all(log: Mapping[str, Any]) -> dict[str, str]:
    """Name → SVG of every figure the log has data for."""
    drawers = {
        "events_over_time": _events_over_time,
        "events_per_user": lambda ax, v: _histogram(ax, v["histogram"], "events", "users"),
        "events_per_item": lambda ax, v: _histogram(ax, v["histogram"], "events", "items"),
        "popularity": _popularity,
        "gaps": _gaps,
        "shift": _shift,
    }
    wide = {"events_over_time", "shift"}
    figures = {}
    with mpl.rc_context(_STYLE):
        for name, draw in drawers.items():
            values = log.get(name)
            if not values or (name == "gaps" and not values["histogram"]):
                continue
            if name == "shift" and not values["curves"]:
                continue
            figure = Figure(figsize=(9.4 if name in wide else 4.5, 2.7), layout="constrained")
            axes = figure.add_subplot()
            axes.grid(axis="y", linewidth=0.8)
            draw(axes, values)
            figures[name] = _svg(figure, name)
    return figures


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids are unique within a figure only; the page holds several.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def _thousands(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))


def shorten(value: float) -> str:
    """1234567 → '1.2M'."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _spans(axes: Axes, low: float, high: float) -> None:
    """Ticks of a logarithmic time axis in words."""
    axes.set_xscale("log")
    ticks = [(s, label) for s, label in _SPANS if low <= s <= high]
    # Words need room: at most some six of them across the axis.
    apart = math.log(high / low) / 6.5
    spaced = ticks[:1]
    for tick in ticks[1:]:
        if math.log(tick[0] / spaced[-1][0]) >= apart:
            spaced.append(tick)
    ticks = spaced
    if len(ticks) < 2:
        ticks = [(low, _nearest(low)), (high, _nearest(high))]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([s for s, _ in ticks], [label for _, label in ticks])


def _nearest(seconds: float) -> str:
    for size, unit in ((DAY, "days"), (HOUR, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def _events_over_time(axes: Axes, values: Mapping[str, Any]) -> None:
    width = values["bin_seconds"]
    edges = [*values["start"], values["start"][-1] + width]
    axes.xaxis_date(UTC)
    times = date2num([datetime.fromtimestamp(t, UTC) for t in edges])
    axes.stairs(values["events"], times, fill=True, color=TEAL_LIGHT, label="events")
    axes.stairs(values["events"], times, color=TEAL, linewidth=1.2)
    axes.stairs(values["users"], times, color=AMBER, linewidth=1.2, label="active users")
    locator = AutoDateLocator(minticks=4, maxticks=10)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_xlim(times[0], times[-1])
    axes.set_ylabel(f"per {_bin_name(width)}")
    axes.legend(loc="upper left", ncols=2)
    axes.set_ylim(0, max(values["events"]) * 1.22)
    _thousands(axes)


def _bin_name(seconds: int) -> str:
    names = {60: "minute", 600: "10 minutes", HOUR: "hour", 6 * HOUR: "6 hours", DAY: "day"}
    names |= {7 * DAY: "week", 28 * DAY: "4 weeks", 364 * DAY: "52 weeks"}
    return names.get(seconds, f"{seconds} s")


def _bars(axes: Axes, edges: Sequence[float], counts: Sequence[int]) -> None:
    # A hair of white between bars, in the proportion of a logarithmic axis.
    widths = [(b - a) * 0.94 for a, b in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", color=TEAL)


def _histogram(axes: Axes, values: Mapping[str, Any], across: str, up: str) -> None:
    axes.set_xscale("log")
    _bars(axes, values["edges"], values["counts"])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(values["edges"][0], values["edges"][-1])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    _thousands(axes)


def _popularity(axes: Axes, values: Mapping[str, Any]) -> None:
    axes.grid(axis="both", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(values["rank"], values["events"], color=TEAL, linewidth=2)
    axes.fill_between(values["rank"], values["events"], min(values["events"]), color=TEAL_LIGHT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank of the item")
    axes.set_ylabel("events")


def _gaps(axes: Axes, values: Mapping[str, Any]) -> None:
    edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
    if not counts:
        axes.text(0.5, 0.5, "every gap is 0 s", ha="center", color=MUTED, transform=axes.transAxes)
        return
    _spans(axes, edges[0], edges[-1])
    _bars(axes, edges, counts)
    axes.set_xlabel("time since the user's previous event")
    axes.set_ylabel("events")
    _thousands(axes)


def _shift(axes: Axes, values: Mapping[str, Any]) -> None:
    ages = [age for curve in values["curves"] for age in curve["age_seconds"]]
    _spans(axes, min(ages), max(ages))
    for i, curve in enumerate(values["curves"]):
        best = i == values["best"]
        axes.plot(
            curve["age_seconds"],
            curve["log_loss"],
            color=TEAL if best else TEAL_LIGHT,
            linewidth=2.2 if best else 1.6,
            marker="o",
            markersize=4 if best else 3,
            label=f"popularity counted over {spell_seconds(curve['window_seconds'])}"
            + (" (predicts best)" if best else ""),
        )
    uniform = values["uniform_log_loss"]
    axes.axhline(
        uniform, color=AMBER, linewidth=1.2, linestyle=(0, (4, 3)), label="guessing evenly"
    )
    axes.set_xlabel("age of the popularity")
    axes.set_ylabel("log-loss (nats per event)")
    top = max([uniform, *(v for c in values["curves"] for v in c["log_loss"])])
    low = min(v for c in values["curves"] for v in c["log_loss"])
    axes.set_ylim(low - 0.08 * (top - low) - 0.01, top + 0.45 * (top - low) + 0.01)
    axes.legend(loc="upper left", ncols=2)
