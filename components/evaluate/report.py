"""The evaluation report: one HTML file with inline plots, readable with no network."""

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from model.evaluation import Outcomes, later_events
from model.sequences import Histories

COLOURS = {"hrnn": "#2563eb", "popularity": "#9ca3af", "transition-counts": "#f59e0b"}
NAMES = {"hrnn": "HRNN", "popularity": "Popularity", "transition-counts": "Transition counts"}
# Every event first: it has a hundred times the cases.
READ_OUTS = {
    "every": "Every event of every test user but the first",
    "last": "The last event of every test user",
}


def render(
    *,
    document: dict[str, Any],
    results: dict[str, Outcomes],
    test: Histories,
    train_item_counts: NDArray[np.int64],
    curve: list[dict[str, float]],
    model_facts: dict[str, str],
) -> str:
    """The page as a string. Every figure is an inline SVG with a caption that says what to see."""
    plots = [
        (
            "Learning curve",
            "Perplexity per epoch; the weights of the lowest validation point are kept.",
            _learning_curve(curve),
        ),
        (
            "By length of history",
            "Perplexity of the next item after so many events of the user. Popularity cannot "
            "improve with history; a sequence model should.",
            _by_history(results, test),
        ),
        (
            "By time since the last event",
            "Perplexity against the gap between the request and the user's last event.",
            _by_gap(results, test),
        ),
        (
            "By popularity of the item that was chosen",
            "Share of cases with the chosen item in the top k, for the head and the tail of the "
            "catalogue (fifths of the test cases, by training popularity).",
            _by_popularity(results, test, train_item_counts),
        ),
    ]
    environment = Environment(
        loader=PackageLoader("components.evaluate"), autoescape=select_autoescape()
    )
    return environment.get_template("report.html.j2").render(
        document=document,
        names=NAMES,
        plots=[(title, caption, Markup(svg)) for title, caption, svg in plots],  # noqa: S704
        facts=model_facts,
        k=document["protocol"]["k"],
        read_outs=READ_OUTS,
        kinds=_slice_tables(document["protocol"]["session_gap_seconds"]),
    )


def _slice_tables(session_gap_seconds: int) -> list[tuple[str, dict[str, str]]]:
    """Tables of kinds of cases: heading, and what each slice is called in its rows."""
    return [
        (
            "What is known of the user",
            {
                "history/first": "nothing: the first event",
                "history/1-4": "1 to 4 earlier events",
                "history/5-19": "5 to 19 earlier events",
                "history/20+": "20 earlier events or more",
            },
        ),
        (
            "How often the chosen item was trained on",
            {
                "item/never": "never",
                "item/1-4": "1 to 4 times",
                "item/5-49": "5 to 49 times",
                "item/50+": "50 times or more",
            },
        ),
        (
            "Place in the session (one starts after "
            f"{_duration(session_gap_seconds)} without an event)",
            {"session/first": "first event", "session/within": "later event"},
        ),
    ]


def _duration(seconds: int) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds} s"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _learning_curve(curve: list[dict[str, float]]) -> str:
    figure, axes = _axes("epoch", "perplexity (log scale)")
    epoch = [entry["epoch"] for entry in curve]
    train_ppl = [float(np.exp(e["train_loss"])) for e in curve]
    axes.plot(epoch, train_ppl, color="#9ca3af", label="exp(training loss)")
    axes.plot(epoch, [e["valid_ppl"] for e in curve], color="#2563eb", label="validation")
    best = min(curve, key=lambda e: e["valid_loss"])
    axes.plot([best["epoch"]], [best["valid_ppl"]], "o", color="#2563eb")
    axes.annotate(
        f"{best['valid_ppl']:.0f}",
        (best["epoch"], best["valid_ppl"]),
        textcoords="offset points",
        xytext=(0, 8),
        ha="center",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return _svg(figure)


def _group_ppl(
    results: dict[str, Outcomes], event_N: NDArray[np.int64], group_N: NDArray[np.int64]
) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [
            (int(g), float(np.exp(result.nll_E[event_N[group_N == g]].mean())))
            for g in np.unique(group_N)
        ]
        for name, result in results.items()
    }


def _bars(
    groups: dict[str, list[tuple[int, float]]], labels: list[str], x_label: str, y_label: str
) -> str:
    figure, axes = _axes(x_label, y_label)
    width = 0.8 / len(groups)
    for i, (name, points) in enumerate(groups.items()):
        x = [g + (i - (len(groups) - 1) / 2) * width for g, _ in points]
        axes.bar(x, [v for _, v in points], width, color=COLOURS[name], label=NAMES[name])
    axes.set_xticks(range(len(labels)), labels, fontsize=8.5)
    axes.legend(frameon=False)
    return _svg(figure)


def _by_history(results: dict[str, Outcomes], test: Histories) -> str:
    edges = [1, 6, 21, 51, 101]
    labels = ["0", "1-5", "6-20", "21-50", "51-100", "> 100"]
    length_U = np.diff(test.offset_U1)
    past_E = np.arange(test.num_events) - np.repeat(test.offset_U1[:-1], length_U)
    events = np.arange(test.num_events)
    groups = _group_ppl(results, events, np.searchsorted(edges, past_E, side="right"))
    return _bars(groups, labels, "events before the request", "perplexity")


def _by_gap(results: dict[str, Outcomes], test: Histories) -> str:
    edges = [1, 60, 3600, 86_400, 7 * 86_400]
    labels = ["0 s", "< 1 min", "< 1 h", "< 1 day", "< 1 week", "more"]
    event_N = later_events(test)
    gap_N = test.timestamp_E[event_N] - test.timestamp_E[event_N - 1]
    groups = _group_ppl(results, event_N, np.searchsorted(edges, gap_N, side="right"))
    return _bars(groups, labels, "time since the last event", "perplexity")


def _by_popularity(
    results: dict[str, Outcomes], test: Histories, train_item_counts: NDArray[np.int64]
) -> str:
    event_N = later_events(test)
    count_N = train_item_counts[test.item_E[event_N]]
    edges = np.quantile(count_N, [0.2, 0.4, 0.6, 0.8])
    group_N = np.searchsorted(edges, count_N, side="left")
    k = next(iter(results.values())).k
    groups = {
        name: [
            (int(g), float((result.rank_E[event_N[group_N == g]] <= k).mean()))
            for g in np.unique(group_N)
        ]
        for name, result in results.items()
    }
    labels = ["tail", "2", "3", "4", "head"]
    return _bars(groups, labels, "popularity of the chosen item", f"hit@{k}")
