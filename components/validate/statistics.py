"""What a log looks like: counts, gaps, popularity, and how fast popularity goes stale.

Everything is aggregated by the engine; only small results come into Python.
"""

import math
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
from ibis.backends import BaseBackend
from numpy.typing import NDArray

from model.trends import DAY, HOUR

WEEK = 7 * DAY
BINS_PER_DECADE = 4
MAX_LAG = 8
SHIFT_WINDOWS = (HOUR, DAY, WEEK, 4 * WEEK)
STALE_SHARE = 0.1  # of popularity's predictive value that may be lost before a retrain is advised
CURVE_POINTS = 60


def describe_log(backend: BaseBackend, events: ir.Table) -> dict[str, Any]:
    """All statistics of `report.json` that depend on clean interactions only (JSON values)."""
    totals = backend.to_pyarrow(
        events.aggregate(
            events=events.count(),
            users=events.user_id.nunique(),
            items=events.item_id.nunique(),
            first=events.timestamp.min(),
            last=events.timestamp.max(),
        )
    ).to_pylist()[0]
    if not totals["events"]:
        return {"events": 0, "users": 0, "items": 0}
    per_item = _counts(backend, events, "item_id")
    return {
        **totals,
        "events_per_user": _distribution(_counts(backend, events, "user_id")),
        "events_per_item": _distribution(per_item),
        "popularity": _popularity(per_item),
        "event_types": _event_types(backend, events),
        "events_over_time": _over_time(backend, events, totals["first"], totals["last"]),
        "gaps": _gaps(backend, events),
        "repeats": _repeats(backend, events, totals["events"]),
        "exact_duplicates": _exact_duplicates(backend, events, totals["events"]),
        "shift": _shift(backend, events, totals),
    }


def _counts(backend: BaseBackend, events: ir.Table, key: str) -> NDArray[np.int64]:
    """Events per key, descending."""
    counts = events.group_by(key).agg(n=events.count()).select("n")
    return np.sort(backend.to_pyarrow(counts).column("n").to_numpy())[::-1]


def _distribution(count_K: NDArray[np.int64]) -> dict[str, Any]:
    """Quantiles and a histogram over logarithmic bins of counts ≥ 1."""
    edges = [1]
    while edges[-1] <= count_K[0]:
        step = len(edges) / BINS_PER_DECADE
        edges.append(max(edges[-1] + 1, math.ceil(10**step)))
    histogram, _ = np.histogram(count_K, bins=[*edges])
    quantiles = np.quantile(count_K, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        "min": int(count_K[-1]),
        "max": int(count_K[0]),
        "mean": float(count_K.mean()),
        "quantiles": dict(zip(["5%", "25%", "50%", "75%", "95%"], quantiles.tolist(), strict=True)),
        "histogram": {"edges": edges, "counts": histogram.tolist()},
    }


def _popularity(count_M: NDArray[np.int64]) -> dict[str, Any]:
    """Share of events by rank, and the share that the most popular items hold."""
    ranks = np.unique(np.geomspace(1, len(count_M), CURVE_POINTS).round().astype(int))
    share = np.cumsum(count_M) / count_M.sum()
    top = {
        f"{p}%": float(share[max(0, math.ceil(len(count_M) * p / 100) - 1)]) for p in (1, 10, 20)
    }
    return {
        "rank": ranks.tolist(),
        "events": count_M[ranks - 1].tolist(),
        "share_of_top": top,
        "items_with_one_event": int((count_M == 1).sum()),
    }


def _event_types(backend: BaseBackend, events: ir.Table) -> dict[str, int]:
    if "event_type" not in events.columns:
        return {}
    counts = events.group_by("event_type").agg(n=events.count()).order_by(ibis.desc("n")).limit(20)
    return {str(r["event_type"]): r["n"] for r in backend.to_pyarrow(counts).to_pylist()}


def _over_time(backend: BaseBackend, events: ir.Table, first: int, last: int) -> dict[str, Any]:
    """Events and active users in some 50 to 150 equal bins."""
    width = next(
        (w for w in (60, 600, HOUR, 6 * HOUR, DAY, WEEK, 4 * WEEK) if (last - first) / w <= 150),
        52 * WEEK,
    )
    binned = events.mutate(bin=(events.timestamp // width).cast("int64"))
    counts = binned.group_by("bin").agg(events=binned.count(), users=binned.user_id.nunique())
    rows = backend.to_pyarrow(counts.order_by("bin")).to_pylist()
    by_bin = {r["bin"]: r for r in rows}
    bins = range(rows[0]["bin"], rows[-1]["bin"] + 1)
    return {
        "bin_seconds": width,
        "start": [b * width for b in bins],
        "events": [by_bin[b]["events"] if b in by_bin else 0 for b in bins],
        "users": [by_bin[b]["users"] if b in by_bin else 0 for b in bins],
    }


def _gaps(backend: BaseBackend, events: ir.Table) -> dict[str, Any]:
    """Seconds between consecutive events of one user: histogram over logarithmic bins."""
    # Clean tables are ordered by user and time; ties need no order, their gap is 0 either way.
    window = ibis.window(group_by="user_id", order_by="timestamp")
    gap = (events.timestamp - events.timestamp.lag().over(window)).name("gap")
    gaps = events.select(gap).filter(lambda t: t.gap.notnull())
    positive = (gaps.gap > 0).ifelse((gaps.gap.log10() * BINS_PER_DECADE).floor().cast("int64"), -1)
    rows = backend.to_pyarrow(gaps.group_by(bin=positive).agg(n=gaps.count()).order_by("bin"))
    counts = {r["bin"]: r["n"] for r in rows.to_pylist()}
    total = sum(counts.values())
    if not total:
        return {"count": 0, "zero_share": 0.0, "quantiles": {}, "histogram": {}}
    zero = counts.pop(-1, 0)
    levels = (0.25, 0.5, 0.75, 0.95)
    quantiles = backend.to_pyarrow(
        gaps.aggregate(**{f"{q:.0%}": gaps.gap.approx_quantile(q) for q in levels})
    ).to_pylist()[0]
    bins = range(min(counts), max(counts) + 1) if counts else range(0)
    return {
        "count": total,
        "zero_share": zero / total,
        "quantiles": {name: float(value) for name, value in quantiles.items()},
        "histogram": {
            "edges": [10 ** (b / BINS_PER_DECADE) for b in (*bins, bins.stop)] if counts else [],
            "counts": [counts.get(b, 0) for b in bins],
        },
    }


def _repeats(backend: BaseBackend, events: ir.Table, total: int) -> float:
    """Share of events on an item the user has had before."""
    pairs = events.select("user_id", "item_id").distinct().count()
    return 1 - int(backend.to_pyarrow(pairs).as_py()) / total


def _exact_duplicates(backend: BaseBackend, events: ir.Table, total: int) -> int:
    """Events that repeat user, item, second and type of another one. They stay in the log."""
    keys = ["user_id", "item_id", "timestamp"]
    keys += [c for c in ("event_type",) if c in events.columns]
    return total - int(backend.to_pyarrow(events.select(*keys).distinct().count()).as_py())


def _shift(backend: BaseBackend, events: ir.Table, totals: dict[str, Any]) -> dict[str, Any]:
    """How the log-loss of a period's popularity grows with the age of that popularity.

    Popularity counted in one period of `window` seconds predicts the events of the period `lag`
    periods later. All lags are scored on the same events (from the `MAX_LAG`-th period on), so
    their losses can be compared. Of several windows the one that predicts best is described.
    """
    span = totals["last"] - totals["first"] + 1
    windows = [w for w in SHIFT_WINDOWS if span >= 2 * MAX_LAG * w]
    if not windows and span >= 2 * MAX_LAG:
        windows = [span // (2 * MAX_LAG)]
    uniform = math.log(totals["items"])
    curves: list[dict[str, Any]] = []
    for window in windows:
        loss = _staleness(backend, events, totals, window)
        if loss:
            curves.append(
                {
                    "window_seconds": window,
                    "age_seconds": [window * lag for lag in range(1, MAX_LAG + 1)],
                    "log_loss": loss,
                }
            )
    if not curves:
        return {"uniform_log_loss": uniform, "curves": [], "best": None, "advice": _TOO_SHORT}
    best = min(range(len(curves)), key=lambda c: curves[c]["log_loss"][0])
    stale_after, advice = _advise(curves[best], uniform)
    return {
        "uniform_log_loss": uniform,
        "curves": curves,
        "best": best,
        "stale_after_seconds": stale_after,
        "advice": advice,
    }


_TOO_SHORT = "The log is too short to see popularity age; retrain when it has grown."


def _staleness(
    backend: BaseBackend, events: ir.Table, totals: dict[str, Any], window: int
) -> list[float]:
    """Log-loss per event for lags 1 … MAX_LAG, with add-one smoothing over the catalogue.

    loss(L) = −Σ_p Σ_i n_{p,i} log((n_{p−L,i} + 1) / (N_{p−L} + M)) / Σ_p N_p
    """
    num_items = totals["items"]
    period = ((events.timestamp - totals["first"]) // window).cast("int64")
    cells = events.mutate(period=period).group_by("period", "item_id").agg(n=ibis._.count())
    sizes = cells.group_by("period").agg(size=cells.n.sum())
    size_of = {r["period"]: r["size"] for r in backend.to_pyarrow(sizes).to_pylist()}
    targets = {p: n for p, n in size_of.items() if p >= MAX_LAG}
    scored = sum(targets.values())
    if not scored:
        return []
    lagged = cells.mutate(lag=ibis.range(1, MAX_LAG + 1).unnest())
    older = lagged.select(
        "lag", "item_id", period=lagged.period + lagged.lag, log_n=(lagged.n + 1).ln()
    )
    # Items the older period has not seen add log 1 = 0, so an inner join is enough.
    hits = cells.filter(cells.period >= MAX_LAG).join(older, ["period", "item_id"])
    hits = hits.group_by("lag").agg(gained=(hits.n * hits.log_n).sum())
    gained = {r["lag"]: r["gained"] for r in backend.to_pyarrow(hits).to_pylist()}
    losses = []
    for lag in range(1, MAX_LAG + 1):
        norm = sum(n * math.log(size_of.get(p - lag, 0) + num_items) for p, n in targets.items())
        losses.append((norm - gained.get(lag, 0.0)) / scored)
    return losses


def _advise(curve: dict[str, Any], uniform: float) -> tuple[int | None, str]:
    """Age at which popularity has lost `STALE_SHARE` of its value, and one sentence on retraining.

    Its value is what it saves against guessing evenly: log M − loss(freshest).
    """
    loss, ages = curve["log_loss"], curve["age_seconds"]
    value = uniform - loss[0]
    if value <= 0.01:
        return None, "Popularity predicts next to nothing in this log, so it cannot go stale."
    longest = spell_seconds(ages[-1])
    for lag in range(1, len(loss)):
        # A loss that falls again later was a quirk of one period, not ageing.
        lost = (min(loss[lag:]) - loss[0]) / value
        if lost >= STALE_SHARE:
            return ages[lag], (
                f"Popularity that is {spell_seconds(ages[lag])} old has lost {lost:.0%} of its"
                f" predictive value: refresh trends every {spell_seconds(ages[0])}; without that,"
                f" retrain every {spell_seconds(ages[lag])}."
            )
    lost = max(0.0, (loss[-1] - loss[0]) / value)
    return None, (
        f"Popularity ages slowly here: after {longest} it has lost only {lost:.0%} of its"
        f" predictive value; retraining every {longest} is often enough."
    )


def spell_seconds(seconds: float) -> str:
    """'36 hours', '8 weeks': the largest unit that keeps the number at 2 or more, else 1."""
    for unit, name in ((7 * DAY, "week"), (DAY, "day"), (HOUR, "hour"), (60, "minute")):
        if seconds >= 2 * unit or seconds == unit:
            number = f"{seconds / unit:.3g}"
            return f"{number} {name}{'' if number == '1' else 's'}"
    return f"{seconds:.3g} second{'' if seconds == 1 else 's'}"
