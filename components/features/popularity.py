"""Counts of items per period as Ibis expressions: the same on DuckDB and on Spark.

Moments: q is refreshed at the start of every period, and once more at the log's end (`as_of`).
Moments are numbered: number k ≤ `last_period` is second k·period, the number after it is `as_of`.
An event at second t is counted at moment m when m − window ≤ t < m.
"""

from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import numpy as np
from ibis.backends import BaseBackend

from components.engines import write_parquet
from feature_repo.names import (
    CATALOGUE_ID,
    CATALOGUE_POPULARITY,
    EVENT_TIMESTAMP,
    ITEM_POPULARITY,
    JOIN_KEY,
    source_name,
)
from model.trends import ResolvedTrend

TIMESTAMP = dt.Timestamp(timezone="UTC", scale=6)  # microseconds: what DuckDB and Feast agree on


@dataclass(frozen=True)
class Moments:
    """When q is refreshed; `window` 0 counts everything before. All in seconds."""

    period: int
    window: int
    as_of: int

    @property
    def last_period(self) -> int:
        return self.as_of // self.period

    @property
    def last(self) -> int:
        """Number of the moment `as_of`."""
        return self.last_period + bool(self.as_of % self.period)

    def second(self, moment: ir.IntegerValue) -> ir.IntegerValue:
        """Unix second of a moment's number."""
        return (moment <= self.last_period).ifelse(moment * self.period, self.as_of)


def event_timestamp(second: ir.IntegerValue) -> ir.TimestampValue:
    """Unix seconds as the column Feast reads time from."""
    return second.cast("int64").as_timestamp("s").cast(TIMESTAMP).name(EVENT_TIMESTAMP)


def window_counts(events: ir.Table, as_of: int, window: int, since: int | None = None) -> ir.Table:
    """Events per item (`item_id`, `n`) at one moment: those in [as_of − window, as_of).

    Args:
        since: items whose events are all before the window are listed too, with 0, when one of
            them is from this second or later.
    """
    counted = events.filter(events.timestamp < as_of)
    if not window:
        return counted.group_by("item_id").agg(n=counted.count())
    start = as_of - window
    counted = counted.filter(counted.timestamp >= (start if since is None else min(start, since)))
    inside = (counted.timestamp >= start).ifelse(1, 0).sum().cast("int64")
    return counted.group_by("item_id").agg(n=inside)


def count_changes(events: ir.Table, moments: Moments) -> ir.Table:
    """By how much each item's count changes at each moment: `item_id`, `moment`, `change`.

    An item's first row may have change 0: its events came and left between two moments.
    """
    t = events.timestamp.cast("int64")
    period, window = moments.period, moments.window
    changes = events.select("item_id", moment=(t // period).cast("int64") + 1, change=1)
    if window:
        leave = ((t + window) // period).cast("int64") + 1
        at_the_end = (t < moments.as_of - window) & (moments.last > moments.last_period)
        leave = ibis.cases(
            (leave <= moments.last_period, leave),
            (at_the_end, moments.last),
            else_=ibis.null("int64"),
        )
        left = events.select("item_id", moment=leave.cast("int64"), change=-1)
        changes = changes.union(left.filter(left.moment.notnull()))
    changes = changes.group_by("item_id", "moment").agg(change=_sum(changes.change))
    # As a column first: a filter on a window does not compile for Spark.
    changes = changes.mutate(start=changes.moment.min().over(ibis.window(group_by="item_id")))
    return changes.filter((changes.change != 0) | (changes.moment == changes.start)).drop("start")


def _whole(value: ir.IntegerValue) -> ir.IntegerValue:
    """A sum as int64: DuckDB's is HUGEINT, which Parquet stores as a float.

    Through float64, as Ibis leaves out a cast to what it believes is the type already; exact up to
    2^53 events.
    """
    return value.cast("float64").cast("int64")


def _sum(column: ir.IntegerColumn) -> ir.IntegerScalar:
    return _whole(column.sum())


def write_popularity(
    backend: BaseBackend,
    events: ir.Table,
    num_items: int,
    trend: ResolvedTrend,
    as_of: int,
    max_rows: int,
    scratch: Path,
    folder: Path,
) -> dict[str, int]:
    """`item_popularity` and `catalogue_popularity` at every moment; returns the rows of each.

    An item has a row where its count changes, none before its first event, so a point-in-time
    read of the newest row before a moment is exact and the rows do not grow with the number of
    periods. The catalogue has a row at every moment: what log q also needs.

    Args:
        max_rows: of each view; when there would be more, the earliest moments are left out.
    """
    moments = Moments(trend.period_seconds, trend.window_seconds, as_of)
    # Written out: it is read four times below.
    write_parquet(backend, count_changes(events, moments), scratch / "changes.parquet")
    changes = backend.read_parquet(str(scratch / "changes.parquet"))
    first = _first_moment(backend, changes, moments, max_rows)
    counts = _in_force(changes, "item_id", moments.last, first)
    rows = {}
    for view in (ITEM_POPULARITY, CATALOGUE_POPULARITY):
        (folder / source_name(view)).parent.mkdir(parents=True, exist_ok=True)
    rows[ITEM_POPULARITY] = write_parquet(
        backend,
        counts.select(
            "item_id", event_timestamp(moments.second(counts.moment)), count=counts["count"]
        ),
        folder / source_name(ITEM_POPULARITY),
    )
    totals = changes.group_by("moment").agg(change=_sum(changes.change))
    totals = _in_force(totals, None, moments.last, first)
    every = totals.select(
        total=totals["count"],
        moment=ibis.range(totals.moment, totals.until).unnest().cast("int64"),
    )
    rows[CATALOGUE_POPULARITY] = write_parquet(
        backend,
        every.select(
            ibis.literal(CATALOGUE_ID).name(JOIN_KEY["catalogue"]),
            event_timestamp(moments.second(every.moment)),
            total=every.total,
            # Through text: DuckDB writes literal numbers as DECIMAL and INT32.
            smoothing=ibis.literal(repr(trend.smoothing)).cast("float64"),
            num_items=ibis.literal(str(num_items)).cast("int64"),
        ),
        folder / source_name(CATALOGUE_POPULARITY),
    )
    return rows


def _in_force(changes: ir.Table, key: str | None, last: int, first: int) -> ir.Table:
    """Changes → the count in force during [moment, until), from moment `first` on."""
    over = ibis.window(group_by=key, order_by="moment")
    running = ibis.cumulative_window(group_by=key, order_by="moment")
    counts = changes.mutate(
        count=_whole(changes.change.sum().over(running)),
        until=ibis.coalesce(changes.moment.lead().over(over), last + 1).cast("int64"),
    ).drop("change")
    counts = counts.filter(counts.until > first)
    return counts.mutate(moment=ibis.greatest(counts.moment, first).cast("int64"))


def _first_moment(backend: BaseBackend, changes: ir.Table, moments: Moments, max_rows: int) -> int:
    """The earliest moment from which on the rows of both views fit `max_rows`."""
    items = changes.group_by("item_id").agg(moment=changes.moment.min())
    started = items.group_by("moment").agg(started=items.count())
    at = changes.group_by("moment").agg(rows=changes.count())
    found = at.left_join(started, "moment").select(
        "moment", "rows", started=ibis.coalesce(started.started, 0)
    )
    table = backend.to_pyarrow(found.order_by("moment"))
    moment_P, row_P, started_P = (table[name].to_numpy() for name in ("moment", "rows", "started"))
    # From moment p on: a row of every item known by then, and one for each later change.
    kept_P = np.cumsum(started_P) + row_P.sum() - np.cumsum(row_P)
    fits = np.flatnonzero(kept_P <= max_rows)
    # The last moment always stays: serving reads it.
    first = int(moment_P[fits[0]]) if len(fits) else moments.last
    first = min(max(first, moments.last + 1 - max_rows), moments.last)
    if first > moment_P[0]:
        print(
            f"{ITEM_POPULARITY}: changes before moment {first} of {moments.last} are left out"
            f" (popularity_max_rows={max_rows:,})"
        )
    return first
