"""Clean tables → the Parquet files the feature views read, with Ibis on DuckDB."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from model.trends import (
    ResolvedTrend,
    TrendSnapshot,
    items_for_choice,
    snapshot_from_counts,
)


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

    def for_choice(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Item position and timestamp of the events that `choose_trend` looks at, and M of them."""
        keys = self.backend.to_pyarrow(self.keys(ITEMS).order_by("item_id"))["item_id"]
        events = self.read(INTERACTIONS).select("item_id", "timestamp")
        total = int(self.backend.to_pyarrow(events.count()).as_py())
        sampled = keys.filter(pa.array(items_for_choice(keys.to_pylist(), total)))
        items = ibis.memtable(
            pa.table({"item_id": sampled, "position": pa.array(np.arange(len(sampled)))})
        )
        found = self.backend.to_pyarrow(
            events.join(items, "item_id").select("position", "timestamp")
        )
        return (
            found["position"].to_numpy().astype(np.int64, copy=False),
            found["timestamp"].to_numpy().astype(np.int64, copy=False),
            len(sampled),
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
    """`user_history`: a user's newest `length` events, oldest first, ties by place in the log.

    Clean tables are sorted by user and time, so one pass over the file sees every history in one
    piece: memory is that of a batch, however long the log is. (Collected by the engine, lists of
    100 million events do not spill.)
    """
    path = table_path(log.clean, INTERACTIONS)
    rows = 0
    with pq.ParquetFile(path) as file:
        names = [c for c in _HISTORY_COLUMNS if c in file.schema_arrow.names]
        target = folder / source_name(USER_HISTORY)
        with pq.ParquetWriter(target, _HISTORY_SCHEMA, compression="zstd") as writer:
            held: pa.Table | None = None  # the user that the next batch may go on with
            for batch in file.iter_batches(batch_size=_HISTORY_ROWS, columns=names):
                table = pa.Table.from_batches([batch])
                if held is not None:
                    table = pa.concat_tables([held, table]).combine_chunks()
                start_R = _run_starts(table["user_id"])
                last = int(start_R[-1])
                held = table.slice(max(last, table.num_rows - length))
                if len(start_R) > 1:
                    rows += _write_histories(writer, table.slice(0, last), start_R[:-1], length)
            if held is not None:
                one = np.zeros(1, dtype=np.int64)
                rows += _write_histories(writer, held.combine_chunks(), one, length)
    return rows


_HISTORY_COLUMNS = ("user_id", "item_id", "timestamp", "event_type", "event_value")
_HISTORY_ROWS = 500_000
_HISTORY_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        EVENT_TIMESTAMP: pa.timestamp("us", tz="UTC"),
        "item_ids": pa.list_(pa.string()),
        "timestamps": pa.list_(pa.int64()),
        "event_types": pa.list_(pa.string()),
        "event_values": pa.list_(pa.float64()),
    }
)


def _run_starts(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Rows at which a new value starts `[R]`."""
    encoded = pc.run_end_encode(column.combine_chunks(), run_end_type=pa.int64())
    return np.r_[0, encoded.run_ends.to_numpy()[:-1]].astype(np.int64)


def _write_histories(
    writer: pq.ParquetWriter,
    events: pa.Table,
    start_R: NDArray[np.int64],
    length: int,
) -> int:
    """Write the histories of R whole users; returns R."""
    end_R = np.r_[start_R[1:], events.num_rows]
    kept_R = np.minimum(end_R - start_R, length)
    offset_R1 = np.r_[0, np.cumsum(kept_R)]
    kept = np.arange(offset_R1[-1]) + np.repeat(end_R - kept_R - offset_R1[:-1], kept_R)
    newest, last = events.take(kept), events.take(end_R - 1)

    def lists(values: pa.ChunkedArray) -> pa.Array:
        return pa.ListArray.from_arrays(offset_R1.astype(np.int32), values.combine_chunks())

    def column(name: str, kind: pa.DataType, missing: Any) -> pa.ChunkedArray:
        # Lists of Feast hold no nulls.
        if name not in newest.column_names:
            return pa.chunked_array([pa.repeat(pa.scalar(missing, kind), newest.num_rows)])
        return pc.fill_null(newest[name].cast(kind), pa.scalar(missing, kind))

    # A moment sees only what is strictly before it.
    visible = pc.multiply(pc.add(last["timestamp"].cast(pa.int64()), 1), 1_000_000)
    columns = {
        "user_id": last["user_id"].cast(pa.string()),
        EVENT_TIMESTAMP: visible.cast(pa.timestamp("us", tz="UTC")),
        "item_ids": lists(newest["item_id"].cast(pa.string())),
        "timestamps": lists(newest["timestamp"].cast(pa.int64())),
        "event_types": lists(column("event_type", pa.string(), "")),
        "event_values": lists(column("event_value", pa.float64(), math.nan)),
    }
    writer.write_table(pa.table(columns, schema=_HISTORY_SCHEMA))
    return len(start_R)


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
