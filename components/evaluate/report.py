"""The evaluation report: one HTML file with inline plots, readable with no network."""

import io
from datetime import UTC, datetime
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from model.evaluation import Outcomes, later_events
from model.sequences import Histories

COLOURS = {
    "hrnn": "#2563eb",
    "champion": "#059669",
    "popularity": "#9ca3af",
    "transition-counts": "#f59e0b",
}
NAMES = {
    "hrnn": "HRNN, this model",
    "champion": "Champion, serving now",
    "popularity": "Popularity",
    "transition-counts": "Transition counts",
}
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
    k = document["protocol"]["k"]
    sections: list[tuple[str, list[tuple[str, str, str]]]] = [
        (
            "Learning, and does it last",
            [
                (
                    "Learning curve",
                    "Perplexity per epoch; the weights of the lowest validation point are kept.",
                    _learning_curve(curve),
                ),
                (
                    "Over time",
                    "Perplexity in stretches of time with equally many test events, oldest first; "
                    "bands are the intervals. A model that ages gets worse to the right.",
                    _over_time(document),
                ),
            ],
        ),
        (
            "For whom it is good, and for whom not",
            [
                (
                    "By length of history",
                    "Perplexity of the next item after so many events of the user. Popularity "
                    "cannot improve with history; a sequence model should.",
                    _by_history(results, test),
                ),
                (
                    "Cold start",
                    f"NDCG@{k} where little is known: of the user (first rows) and of the chosen "
                    "item (last rows), with intervals.",
                    _cold_start(document),
                ),
                (
                    "By popularity of the item that was chosen",
                    "Share of cases with the chosen item in the top k, for the head and the tail "
                    "of the catalogue (fifths of the test cases, by training popularity).",
                    _by_popularity(results, test, train_item_counts),
                ),
                (
                    "By time since the last event",
                    "Perplexity against the gap between the request and the user's last event.",
                    _by_gap(results, test),
                ),
            ],
        ),
        (
            "What it recommends",
            [
                (
                    "Popularity of what is recommended",
                    f"How popular the items of each top {k} are on average, from 0 (the rarest "
                    "of the catalogue) to 1 (the most frequent): all lists of all test cases.",
                    _recommended_popularity(results, test),
                ),
                (
                    "Coverage",
                    "Share of the catalogue that appears in anybody's top k. Popularity recommends "
                    "the same few items to everybody.",
                    _coverage(results),
                ),
            ],
        ),
        (
            "Is it as sure as it may be",
            [
                (
                    "Calibration of perplexity",
                    "Tenths of the cases by predicted uncertainty: the perplexity the model "
                    "expected against the one it had. On the line: calibrated; above: too sure.",
                    _calibration_perplexity(document),
                ),
                (
                    "Calibration of the first item",
                    "Tenths of the cases by the probability of the first item, against the share "
                    "in which it was chosen. Below the line: too sure.",
                    _calibration_first(document),
                ),
                (
                    "Effect of the request's time",
                    f"The same histories asked later: share of the top {k} that stays, and of "
                    "users whose first item changes. Trend left out: this is the user's own time.",
                    _request_time(document),
                ),
            ],
        ),
    ]
    environment = Environment(
        loader=PackageLoader("components.evaluate"), autoescape=select_autoescape()
    )
    return environment.get_template("report.html.j2").render(
        document=document,
        names=NAMES,
        sections=[
            (heading, [(t, caption, Markup(svg)) for t, caption, svg in plots if svg])  # noqa: S704
            for heading, plots in sections
        ],
        facts=model_facts,
        k=k,
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
    figure, axes = plt.subplots(figsize=(5.2, 3.1))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _learning_curve(curve: list[dict[str, float]]) -> str:
    figure, axes = _axes("epoch", "perplexity (log scale)")
    trained = [entry for entry in curve if "train_loss" in entry]  # not the beginning
    train_ppl = [float(np.exp(e["train_loss"])) for e in trained]
    axes.plot([e["epoch"] for e in trained], train_ppl, color="#9ca3af", label="exp(training loss)")
    epoch = [entry["epoch"] for entry in curve]
    axes.plot(epoch, [e["valid_ppl"] for e in curve], color="#2563eb", label="validation")
    best = min(curve, key=lambda e: e["valid_loss"])
    axes.plot([best["epoch"]], [best["valid_ppl"]], "o", color="#2563eb")
    axes.annotate(
        f"{best['valid_ppl']:.3g}",
        (best["epoch"], best["valid_ppl"]),
        textcoords="offset points",
        xytext=(0, 8),
        ha="center",
    )
    _log_scale(axes)
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
    _legend_below(axes)
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


def _over_time(document: dict[str, Any]) -> str:
    frames = document["frames"]
    if len(frames) < 2:
        return ""
    figure, axes = _axes("", "perplexity (log scale)")
    x = np.arange(len(frames))
    for name, all_figures in document["models"].items():
        figures = [all_figures["frames"][f["name"]]["ppl"] for f in frames]
        value, low, high = (
            np.array([f[part] for f in figures]) for part in ("value", "low", "high")
        )
        axes.plot(x, value, marker="o", markersize=3.5, color=COLOURS[name], label=NAMES[name])
        axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    labels = [datetime.fromtimestamp(f["start"], UTC) for f in frames]
    days = (frames[-1]["end"] - frames[0]["start"]) / 86_400
    form = "%d %b\n%H:%M" if days < 10 else "%d %b\n%Y"
    axes.set_xticks(x, [label.strftime(form) for label in labels], fontsize=8)
    axes.set_xlabel("start of the stretch (UTC)")
    _log_scale(axes)
    _legend_below(axes)
    return _svg(figure)


def _cold_start(document: dict[str, Any]) -> str:
    metric = f"ndcg@{document['protocol']['k']}"
    rows = {
        "history/first": "user: first event",
        "history/1-4": "user: 1 to 4 events",
        "history/20+": "user: 20 or more",
        "item/never": "item: never trained on",
        "item/1-4": "item: 1 to 4 times",
        "item/50+": "item: 50 or more",
    }
    models = document["models"]
    rows = {s: text for s, text in rows.items() if metric in models["hrnn"]["slices"][s]}
    figure, axes = _axes(metric.upper(), "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.25)
    step = 0.7 / len(models)
    for i, (name, all_figures) in enumerate(models.items()):
        figures = [all_figures["slices"][s][metric] for s in rows]
        value = np.array([f["value"] for f in figures])
        bounds = np.array([[f["value"] - f["low"], f["high"] - f["value"]] for f in figures])
        y = np.arange(len(rows)) + (i - (len(models) - 1) / 2) * step
        axes.errorbar(
            value,
            y,
            xerr=np.clip(bounds.T, 0, None),
            fmt="o",
            markersize=4,
            linewidth=1.4,
            color=COLOURS[name],
            label=NAMES[name],
        )
    axes.set_yticks(range(len(rows)), list(rows.values()), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    _legend_below(axes)
    return _svg(figure)


def _recommended_popularity(results: dict[str, Outcomes], test: Histories) -> str:
    figure, axes = _axes("mean popularity of the list", "share of lists")
    edges = np.linspace(0, 1, 31)
    for name, result in results.items():
        value_N = result.popularity[result.k][later_events(test)]
        value_N = value_N[np.isfinite(value_N)]
        if not len(value_N):
            continue
        share = np.histogram(value_N, edges)[0] / len(value_N)
        axes.stairs(share, edges, color=COLOURS[name], linewidth=1.6, label=NAMES[name])
    axes.set_xlim(0, 1)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks([0, 0.01, 0.1, 1.0], ["0", "1%", "10%", "100%"])
    axes.minorticks_off()
    _legend_below(axes)
    return _svg(figure)


def _coverage(results: dict[str, Outcomes]) -> str:
    figure, axes = _axes("k", "share of the catalogue")
    for name, result in results.items():
        ks = sorted(result.coverage)
        axes.plot(
            ks,
            [result.coverage[k] for k in ks],
            marker="o",
            markersize=3.5,
            color=COLOURS[name],
            label=NAMES[name],
        )
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    _legend_below(axes)
    return _svg(figure)


def _calibration_perplexity(document: dict[str, Any]) -> str:
    tenths = document["calibration"]["perplexity"]
    if not tenths:
        return ""
    figure, axes = _axes("perplexity the model expected", "perplexity it had")
    predicted, measured = (np.array([t[n] for t in tenths]) for n in ("predicted", "measured"))
    both = np.concatenate([predicted, measured])
    ends = both.min() * 0.9, both.max() * 1.1
    axes.plot(ends, ends, color="#9ca3af", linewidth=1, linestyle="--", label="calibrated")
    axes.plot(predicted, measured, marker="o", color=COLOURS["hrnn"], label="tenths of the cases")
    _log_scale(axes)
    axes.set_xscale("log")
    _label_logs(axes.xaxis)
    axes.legend(frameon=False)
    return _svg(figure)


def _calibration_first(document: dict[str, Any]) -> str:
    tenths = document["calibration"]["first_item"]
    if not tenths:
        return ""
    figure, axes = _axes("probability of the first item", "share in which it was chosen")
    predicted, measured = (np.array([t[n] for t in tenths]) for n in ("predicted", "measured"))
    end = max(predicted.max(), measured.max()) * 1.08
    axes.plot((0, end), (0, end), color="#9ca3af", linewidth=1, linestyle="--", label="calibrated")
    axes.plot(predicted, measured, marker="o", color=COLOURS["hrnn"], label="tenths of the cases")
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda v, _: f"{v:.0%}" if end > 0.1 else f"{v:.1%}")
    axes.legend(frameon=False)
    return _svg(figure)


def _request_time(document: dict[str, Any]) -> str:
    effect = document["request_time"]
    if not effect["users"]:
        return ""
    figure, axes = _axes("time of the request after the last event", "")
    names = [d["delay"] for d in effect["delays"]]
    x = np.arange(len(names))
    for part, label, colour in (
        ("overlap", f"top {effect['k']} as after a minute", COLOURS["hrnn"]),
        ("first_changed", "first item is another", "#dc2626"),
    ):
        values = [d[part] for d in effect["delays"]]
        axes.plot(x, values, marker="o", markersize=4, color=colour, label=label)
    axes.set_xticks(x, [n.replace(" ", "\n", 1) for n in names], fontsize=8.5)
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.legend(frameon=False)
    return _svg(figure)


def _log_scale(axes: Any) -> None:
    axes.set_yscale("log")
    _label_logs(axes.yaxis)


def _label_logs(axis: Any) -> None:
    """1, 2, 5, 10, …: powers of ten alone would leave most of these axes without a number."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _legend_below(axes: Any) -> None:
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.26),
        columnspacing=1.4,
        handlelength=1.6,
    )
