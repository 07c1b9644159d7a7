"""Clean tables → the Parquet files the feature views read, with Ibis on DuckDB."""

from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend
from numpy.typing import NDArray

from components.engines import write_parquet
from components.features.popularity import event_timestamp, window_counts
from components.tables import INTERACTIONS, ITEMS, USERS, table_path
from feature_repo.names import (
    EVENT_TIMESTAMP,
    FIRST_SEEN,
    ITEM_METADATA,
    JOIN_KEY,
    MATERIALISED,
    TREND_SNAPSHOT,
    USER_HISTORY,
    USER_PROFILE,
    VIEW_ENTITY,
    feature_names,
    item_fields,
    source_name,
    source_pattern,
)
from feature_repo.snapshot import to_row
from model.errors import InputError
from model.schema import FieldKind, Schema
from model.trends import ResolvedTrend, TrendSnapshot, snapshot_from_counts


@dataclass(frozen=True)
class Log:
    """The clean tables behind one connection; `as_of` is the second after the last event."""

    backend: Backend
    clean: Path
    scratch: Path
    schema: Schema
    start: int
    as_of: int
    num_items: int

    @classmethod
    def open(cls, backend: Backend, clean: Path, scratch: Path) -> "Log":
        """
        Raises:
            InputError: there is no interaction.
        """
        events = backend.read_parquet(table_path(clean, INTERACTIONS))
        span = _row(backend, events.aggregate(start=events.timestamp.min(), n=events.count(),
                                              last=events.timestamp.max()))  # fmt: skip
        if not span["n"]:
            raise InputError(f"{table_path(clean, INTERACTIONS)} holds no interactions")
        log = cls(
            backend=backend,
            clean=clean,
            scratch=scratch,
            schema=Schema.load(clean / "schema.json"),
            start=span["start"],
            as_of=span["last"] + 1,
            num_items=0,
        )
        num_items = _row(backend, log.keys(ITEMS).aggregate(n=lambda t: t.count()))["n"]
        return cls(**{**vars(log), "num_items": num_items})

    def read(self, table: str) -> ir.Table:
        return self.backend.read_parquet(table_path(self.clean, table))

    def keys(self, table: str) -> ir.Table:
        """Every id of a side table and of the interactions, once."""
        key = {USERS: "user_id", ITEMS: "item_id"}[table]
        keys = self.read(INTERACTIONS).select(key).distinct()
        if table_path(self.clean, table).exists():
            keys = keys.union(self.read(table).select(key)).distinct()
        return keys

    def write(self, expression: ir.Table, path: Path) -> int:
        """Write to Parquet, compressed; returns the rows."""
        return write_parquet(self.backend, expression, path)

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Item position (in any fixed order) and timestamp of every event."""
        items = self.keys(ITEMS).mutate(position=ibis.row_number().over(order_by="item_id"))
        events = self.read(INTERACTIONS).select("item_id", "timestamp")
        found = self.backend.to_pyarrow(
            events.join(items, "item_id").select("position", "timestamp")
        )
        return (
            found["position"].to_numpy().astype(np.int64, copy=False),
            found["timestamp"].to_numpy().astype(np.int64, copy=False),
        )


def write_entities(log: Log, table: str, folder: Path) -> int:
    """`user_profile` or `item_metadata`: every entity with its fields, valid from its first event.

    The fields have no history of their own: they are taken to have been so from the start.
    """
    view, fields = {
        USERS: (USER_PROFILE, log.schema.users),
        ITEMS: (ITEM_METADATA, item_fields(log.schema)),
    }[table]
    key = JOIN_KEY[VIEW_ENTITY[view]]
    events = log.read(INTERACTIONS)
    rows = log.keys(table).left_join(events.group_by(key).agg(first=events.timestamp.min()), key)
    rows = rows.select(key, "first")
    seen = [rows["first"]]
    columns: dict[str, ir.Value] = {}
    if table_path(log.clean, table).exists():
        described = log.read(table).rename({f"{key}_described": key})
        rows = rows.left_join(described, rows[key] == described[f"{key}_described"])
        if table == ITEMS and "created_at" in described.columns and "created_at" not in fields:
            seen.append(rows.created_at)
        columns = {
            feature: _value(rows[name], fields[name])
            for name, feature in feature_names(fields).items()
        }
    else:
        columns = {
            feature: _value(ibis.null("string"), fields[name])
            for name, feature in feature_names(fields).items()
        }
    # DuckDB's least skips nulls. Nothing is from after the log, or before Unix time.
    first = ibis.greatest(
        ibis.least(ibis.coalesce(ibis.least(*seen) if len(seen) > 1 else seen[0], log.start),
                   log.as_of), 0
    ).cast("int64")  # fmt: skip
    rows = rows.select(rows[key], event_timestamp(first), first.name(FIRST_SEEN), **columns)
    return log.write(rows, folder / source_name(view))


def _value(column: ir.Value, kind: FieldKind) -> ir.Value:
    if kind is not FieldKind.MULTI_CATEGORICAL:
        return column.cast("float64" if kind is FieldKind.NUMERIC else "string")
    empty = ibis.literal([], type="array<string>")
    if not column.type().is_array():  # the all-null stand-in of an absent table
        return empty
    # Feast's string lists hold neither null lists nor null members.
    return ibis.coalesce(column.cast("array<string>").filter(lambda v: v.notnull()), empty)


def write_history(log: Log, length: int, folder: Path) -> int:
    """`user_history`: a user's newest `length` events, oldest first, ties by place in the log."""
    events = log.backend.read_parquet(table_path(log.clean, INTERACTIONS), file_row_number=True)
    row = events.file_row_number
    kind = events.event_type if "event_type" in events.columns else ibis.null("string")
    value = events.event_value if "event_value" in events.columns else ibis.null("float64")
    newest_first = ibis.window(
        group_by="user_id", order_by=[ibis.desc(events.timestamp), ibis.desc(row)]
    )
    events = events.select(
        "user_id",
        "item_id",
        "timestamp",
        row=row,
        # Lists of Feast hold no nulls.
        event_type=ibis.coalesce(kind, ""),
        event_value=ibis.coalesce(value.cast("float64"), ibis.literal(float("nan"))),
        rank=ibis.row_number().over(newest_first),
    )
    events = events.filter(events["rank"] < length)
    order = [events.timestamp, events.row]
    rows = events.group_by("user_id").agg(
        last=events.timestamp.max(),
        item_ids=events.item_id.collect(order_by=order),
        timestamps=events.timestamp.cast("int64").collect(order_by=order),
        event_types=events.event_type.collect(order_by=order),
        event_values=events.event_value.collect(order_by=order),
    )
    rows = rows.select(
        "user_id",
        # A moment sees only what is strictly before it.
        event_timestamp(rows["last"] + 1),
        "item_ids",
        "timestamps",
        "event_types",
        "event_values",
    )
    return log.write(rows, folder / source_name(USER_HISTORY))


def count_snapshot(log: Log, trend: ResolvedTrend) -> TrendSnapshot:
    """The trend at the log's end: events in [as_of − window, as_of)."""
    events = log.read(INTERACTIONS)
    counts = log.backend.to_pyarrow(window_counts(events, log.as_of, trend.window_seconds))
    return snapshot_from_counts(
        counts["item_id"].to_pylist(),
        counts["n"].to_numpy(),
        num_items=log.num_items,
        smoothing=trend.smoothing,
        as_of=log.as_of,
        window_seconds=trend.window_seconds,
    )


def write_snapshot(snapshot: TrendSnapshot, folder: Path) -> int:
    """`trend_snapshot`: one row."""
    row = to_row(snapshot)
    moment = pa.scalar(snapshot.as_of * 1_000_000, pa.int64()).cast(pa.timestamp("us", tz="UTC"))
    table = {name: pa.array([value]) for name, value in row.items()}
    table["item_ids"] = pa.array([row["item_ids"]], pa.list_(pa.string()))
    table["log_q"] = pa.array([row["log_q"]], pa.list_(pa.float64()))
    table[EVENT_TIMESTAMP] = pa.array([moment])
    pq.write_table(pa.table(table), folder / source_name(TREND_SNAPSHOT), compression="zstd")
    return 1


def vanished(backend: Backend, old: Path, new: Path) -> dict[str, list[str]]:
    """Keys that the sources in `old` hold and those in `new` do not, by view."""
    gone = {}
    for view in MATERIALISED:
        key = JOIN_KEY[VIEW_ENTITY[view]]
        if not (old / source_name(view)).exists():
            continue
        before = backend.read_parquet(old / source_pattern(view)).select(key).distinct()
        after = backend.read_parquet(new / source_name(view)).select(key).distinct()
        keys = backend.to_pyarrow(before.anti_join(after, key))[key].to_pylist()
        if keys:
            gone[view] = keys
    return gone


def _row(backend: Backend, expression: ir.Table) -> dict[str, int]:
    return backend.to_pyarrow(expression).to_pylist()[0]
