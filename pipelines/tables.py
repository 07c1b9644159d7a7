"""What a run and an answer look like in a terminal."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from model.store import Version
from pipelines.endpoint import Run, Schedule
from serving.client import Prediction

NAMES = {
    "hrnn": "HRNN",
    "champion": "Champion",
    "popularity": "Popularity",
    "transition-counts": "Transitions",
}
READ_OUTS = {"every": "every event", "last": "last event"}


def console(stream: IO[str]) -> Console:
    """A console at least 100 columns wide when it is not a terminal."""
    return Console(file=stream, width=None if stream.isatty() else 100, highlight=False)


def evaluation_table(result: Mapping[str, Any], stream: IO[str]) -> None:
    """Metrics of the candidate next to the baselines."""
    metrics = result["metrics"]
    first = next(iter(metrics.values()))["every"]
    shown = ["ppl", *(m for m in first if m.split("@")[0] in ("mrr", "hit", "ndcg", "coverage"))]
    table = Table(
        title="Evaluation on held-out users, full ranking", title_justify="left", min_width=80
    )
    table.add_column("model")
    table.add_column("predicting")
    table.add_column("cases", justify="right")
    for name in shown:
        head = "perplexity" if name == "ppl" else name
        table.add_column(f"{head} {'↓' if name == 'ppl' else '↑'}", justify="right")
    for read_out, meaning in READ_OUTS.items():
        for model, values in metrics.items():
            row = values[read_out]
            numbers = [f"{row[n]:.1f}" if n == "ppl" else f"{row[n]:.4f}" for n in shown]
            table.add_row(NAMES.get(model, model), meaning, f"{row['cases']:,}", *numbers)
        table.add_section()
    console(stream).print(table)


def paths_table(result: Mapping[str, Any], stream: IO[str]) -> None:
    """Verdict, and where everything is."""
    rows = {
        "verdict": result["verdict"],
        "model version": result["model_version"],
        "report": _short(result["report"]),
        "data report": _short(result["data_report"]),
        "model bundle": _short(result["bundle"]),
        "model store": _short(result["model_store"]),
        "log": _short(result["log"]),
    }
    # Plain lines: a path must never be wrapped or cut.
    for name, value in rows.items():
        print(f"{name:<14} {value}", file=stream)


def _short(path: str) -> str:
    """Relative to the current folder where that is shorter to read."""
    if "://" in path:
        return path
    absolute = Path(path).absolute()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def recommendation_table(
    prediction: Prediction, titles: Mapping[str, str], stream: IO[str]
) -> None:
    """One answer with its parts."""
    table = Table()
    for name in ("#", "item", "title"):
        table.add_column(name, justify="right" if name == "#" else "left")
    explored = any(item.exploration for item in prediction.items)
    parts = ["value"] if prediction.ratings else ["score", "affinity", "trend"]
    for name in [*parts, *(["exploration"] if explored else [])]:
        table.add_column(name, justify="right")
    rows = [
        (i.item_id, [i.score, i.affinity, i.trend, *([i.exploration] if explored else [])])
        for i in prediction.items
    ] + [(r.item_id, [r.value]) for r in prediction.ratings]
    for rank, (item_id, numbers) in enumerate(rows, start=1):
        table.add_row(str(rank), item_id, titles.get(item_id, ""), *(f"{v:.3f}" for v in numbers))
    out = console(stream)
    out.print(table)
    if prediction.degraded:
        out.print(f"degraded: {', '.join(prediction.degraded)}")
    if prediction.unknown_items:
        out.print(f"{prediction.unknown_items} items that the model does not know")


def side_by_side(columns: Mapping[str, list[str]], title: str, stream: IO[str]) -> None:
    """Lists next to each other, one column per heading."""
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right", no_wrap=True, min_width=1)
    width = 88 // len(columns) - 2
    for heading in columns:
        table.add_column(heading, width=width, no_wrap=True, overflow="ellipsis")
    longest = max(len(values) for values in columns.values())
    for i in range(longest):
        cells = (values[i] if i < len(values) else "" for values in columns.values())
        table.add_row(str(i + 1), *cells)
    console(stream).print(table)


def versions_table(versions: Sequence[Version], stream: IO[str]) -> None:
    """The model store's versions; what each was measured to be, as far as it is recorded."""
    if not versions:
        print("the store holds no model", file=stream)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("version", "", "created", "MB", "ppl ↓", "ndcg@10 ↑", "gate"):
        # A version is there to be copied: it is never cut.
        table.add_column(
            name,
            justify="right" if name == "MB" or "↓" in name or "↑" in name else "left",
            no_wrap=name != "gate",
        )
    for v in versions:
        every = v.lineage.metrics.get("hrnn", {}).get("every", {}) if v.lineage else {}
        passed = v.lineage.verdict.get("passed") if v.lineage else None
        gate = {True: "passed", False: "refused", None: ""}[passed]
        if v.lineage and v.lineage.override:
            gate = "overridden"
        table.add_row(
            v.version,
            _place_of(v),
            v.created[:16].replace("T", " "),
            f"{v.bytes / 1e6:.1f}",
            f"{every['ppl']:.1f}" if "ppl" in every else "",
            f"{every['ndcg@10']:.4f}" if "ndcg@10" in every else "",
            v.problem or gate,
        )
    console(stream).print(table)


def _place_of(version: Version) -> str:
    """Champion or previous, and what a release of it came to where that is not plain."""
    state = "" if version.state == "released" else version.state.replace("_", " ")
    return ", ".join(filter(None, [version.role, state]))


def runs_table(runs: Sequence[Run], stream: IO[str]) -> None:
    """The newest runs; ids are there to be copied and stand whole."""
    rows = [
        (r.run_id, r.name, r.outcome, _minute(r.created_at), _took(r.created_at, r.finished_at))
        for r in runs
    ]
    _plain_table(("run", "name", "outcome", "began (UTC)", "took"), rows, stream)


def steps_table(run: Run, stream: IO[str]) -> None:
    """The steps of one run, in the order in which they began."""
    words = {"SKIPPED": "done before" if run.outcome != "refused" else "skipped"}
    rows = [(s.name, words.get(s.state, s.state.lower()), s.error) for s in run.steps]
    if any(error for _, _, error in rows):
        _plain_table(("step", "state", "error"), rows, stream)
    else:
        _plain_table(("step", "state"), [row[:2] for row in rows], stream)


def schedules_table(schedules: Sequence[Schedule], stream: IO[str]) -> None:
    """The recurring runs of an endpoint."""
    rows = [
        (s.schedule_id, s.name, s.trigger, "on" if s.enabled else "off", _minute(s.created_at))
        for s in schedules
    ]
    _plain_table(("schedule", "name", "when", "", "made (UTC)"), rows, stream)


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _took(began: str, ended: str) -> str:
    if not began or not ended:
        return ""
    seconds = int((datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds())
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, head in enumerate(heads):
        # The first column is there to be copied.
        table.add_column(head, overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    console(stream).print(table)
