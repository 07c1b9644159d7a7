"""Features: clean tables → Feast sources → online store, and the current trend snapshot."""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from components.tables import INTERACTIONS, ITEMS, USERS, connect, table_path
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import apply, materialise
from model.errors import InputError
from model.schema import Schema
from model.settings import SettingsBase
from model.trends import (
    ResolvedTrend,
    TrendSettings,
    TrendSnapshot,
    choose_trend,
    snapshot_from_counts,
)


class FeaturesSettings(SettingsBase):
    """What is kept for serving."""

    history_length: int = 100  # newest events per user
    trend_items: int = 10_000  # items listed in the snapshot; the rest share the floor
    memory_limit: str = "2GB"  # of DuckDB; beyond it spills to disk


def run(
    clean: Path,
    feature_store: str,
    output: Path,
    *,
    trend: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write the sources, register them, load the online store; returns the summary.

    Args:
        feature_store: root folder; empty: the store that HRNN_FEATURE_ROOT names.
        output: folder for summary.json and trend.json.

    Raises:
        InputError: wrong settings or field names.
    """
    config = FeaturesSettings.parse(settings, "features")
    trend_settings = TrendSettings.parse(trend, "trend")
    store = (
        FeatureStoreSettings(root=feature_store)
        if feature_store
        else FeatureStoreSettings.from_env()
    )
    schema = Schema.load(clean / "schema.json")
    store.sources.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # Sources are written aside and swapped in whole: a killed run leaves the old ones.
    work = Path(tempfile.mkdtemp(prefix=".sources-", dir=store.sources.parent))
    try:
        connection = connect(work / "scratch", config.memory_limit)
        summary, snapshot = _write_sources(connection, clean, work, schema, config, trend_settings)
        connection.disconnect()
        shutil.rmtree(work / "scratch", ignore_errors=True)
        schema.save(work / "schema.json")
        work.chmod(0o755)
        if store.sources.exists():
            shutil.rmtree(store.sources)
        work.rename(store.sources)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    print(f"sources written in {time.perf_counter() - started:.1f} s: {summary['rows']}")
    started = time.perf_counter()
    if store.online == "sqlite":
        # Rows of users that left the log must not be served for ever.
        (Path(store.root) / "online_store.db").unlink(missing_ok=True)
    apply(store, schema)
    materialise(store, snapshot.as_of)
    print(f"registered and loaded online in {time.perf_counter() - started:.1f} s")
    output.mkdir(parents=True, exist_ok=True)
    summary["trend_version"] = snapshot.version
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (output / "trend.json").write_text(json.dumps(snapshot.to_json()) + "\n")
    return summary


def _write_sources(
    connection: Backend,
    clean: Path,
    sources: Path,
    schema: Schema,
    config: FeaturesSettings,
    trend_settings: TrendSettings,
) -> tuple[dict[str, Any], TrendSnapshot]:
    log = connection.read_parquet(table_path(clean, INTERACTIONS), table_name="log")
    bounds = log.aggregate(first=_.timestamp.min(), last=_.timestamp.max()).to_pyarrow().to_pylist()
    first, as_of = bounds[0]["first"], bounds[0]["last"] + 1
    item_ids = _item_ids(connection, clean, log)
    resolved = _resolve(log, item_ids, trend_settings)
    snapshot = _snapshot(log, len(item_ids), resolved, as_of, config.trend_items)
    tables = {
        "user_profile": _entities(connection, clean, USERS, "user_id", log, schema, first),
        "user_history": _histories(log, config.history_length),
        "item_metadata": _entities(connection, clean, ITEMS, "item_id", log, schema, first),
        "item_popularity": _item_popularity(log, resolved, as_of),
        "catalogue_popularity": _catalogue_popularity(log, resolved, as_of),
    }
    rows = {}
    for name, table in tables.items():
        path = sources / f"{name}.parquet"
        table.to_parquet(path)
        rows[name] = pq.read_metadata(path).num_rows
    _write_snapshot(snapshot, sources / "trend_snapshot.parquet")
    rows["trend_snapshot"] = 1
    return {"rows": rows, "as_of": as_of, "trend": asdict(resolved)}, snapshot


def _item_ids(connection: Backend, clean: Path, log: Table) -> list[str]:
    ids = log.select("item_id").distinct()
    if table_path(clean, ITEMS).exists():
        items = connection.read_parquet(table_path(clean, ITEMS), table_name="item_table")
        ids = ids.union(items.select("item_id"), distinct=True)
    return sorted(ids.to_pyarrow().column("item_id").to_pylist())


def _resolve(log: Table, item_ids: list[str], settings: TrendSettings) -> ResolvedTrend:
    events = log.select("item_id", "timestamp").to_pyarrow()
    encoded = events.column("item_id").combine_chunks().dictionary_encode()
    resolved = choose_trend(
        encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        events.column("timestamp").to_numpy(),
        len(item_ids),
        settings,
    )
    if resolved.window_seconds % resolved.period_seconds:
        raise InputError(
            f"trend.window_seconds {resolved.window_seconds} is not a multiple of "
            f"trend.period_seconds {resolved.period_seconds}"
        )
    return resolved


def _snapshot(
    log: Table, num_items: int, trend: ResolvedTrend, as_of: int, listed: int
) -> TrendSnapshot:
    oldest = as_of - trend.window_seconds if trend.window_seconds else 0
    counts = (
        log.filter(_.timestamp >= oldest)
        .group_by("item_id")
        .aggregate(count=_.count())
        .to_pyarrow()
    )
    snapshot = snapshot_from_counts(
        counts.column("item_id").to_pylist(),
        counts.column("count").to_numpy(),
        num_items=num_items,
        smoothing=trend.smoothing,
        as_of=as_of,
        window_seconds=trend.window_seconds,
    )
    return truncate(snapshot, listed)


def truncate(snapshot: TrendSnapshot, listed: int) -> TrendSnapshot:
    """Keep the `listed` most popular items; the others share the mass that is left."""
    if len(snapshot.item_ids) <= listed:
        return snapshot
    log_q_T = snapshot.log_q[:listed]
    left = -np.expm1(np.log(np.exp(log_q_T).sum()))
    return replace(
        snapshot,
        item_ids=snapshot.item_ids[:listed],
        log_q=log_q_T,
        floor=float(np.log(left / (snapshot.num_items - listed))),
    )


def _moment(seconds: Any) -> Any:
    return (
        ibis.literal(seconds, "int64").as_timestamp("s")
        if isinstance(seconds, int)
        else (seconds.as_timestamp("s"))
    )


def _entities(
    connection: Backend,
    clean: Path,
    table: str,
    key: str,
    log: Table,
    schema: Schema,
    first: int,
) -> Table:
    """Fields of every user or item, valid since the log's first event."""
    fields = schema.users if table == USERS else schema.items
    counted = log.group_by(key).aggregate(events=_.count())
    if table_path(clean, table).exists():
        source = connection.read_parquet(table_path(clean, table), table_name=f"{table}_fields")
        source = source.select(key, *fields)
        joined = source.outer_join(counted, key)
        result = joined.select(
            **{key: ibis.coalesce(joined[key], joined[f"{key}_right"])},
            events=joined.events.fill_null(0).cast("int64"),
            **{name: joined[name] for name in fields},
        )
    else:
        result = counted.mutate(events=_.events.cast("int64"))
    return result.mutate(event_timestamp=_moment(int(first)))


def _histories(log: Table, length: int) -> Table:
    """Newest events of each user, oldest first; the file's order breaks ties."""
    columns = set(log.columns)
    events = log.mutate(
        event_type=(_.event_type.fill_null("") if "event_type" in columns else ibis.literal("")),
        event_value=(
            _.event_value.cast("float64").fill_null(float("nan"))
            if "event_value" in columns
            else ibis.literal(float("nan"), "float64")
        ),
        position=ibis.row_number(),
    )
    newest = events.mutate(
        age=ibis.row_number().over(
            ibis.window(group_by="user_id", order_by=[_.timestamp.desc(), _.position.desc()])
        )
    ).filter(_.age < length)
    order = [newest.age.desc()]
    return newest.group_by("user_id").aggregate(
        item_ids=newest.item_id.collect(order_by=order),
        timestamps=newest.timestamp.collect(order_by=order),
        event_types=newest.event_type.collect(order_by=order),
        event_values=newest.event_value.collect(order_by=order),
        event_timestamp=newest.timestamp.max().as_timestamp("s"),
    )


def _changes(log: Table, keys: list[str], trend: ResolvedTrend, as_of: int) -> Table:
    """Window counts per period in which they change: +n when events enter, −n when they leave.

    Events of period p count from the start of p + 1 on (never for their own period), and for
    `window_seconds`.
    """
    periods = trend.window_seconds // trend.period_seconds
    per_period = (
        log.mutate(period=(_.timestamp // trend.period_seconds).cast("int64") + 1)
        .group_by([*keys, "period"])
        .aggregate(change=_.count().cast("int64"))
    )
    if periods:
        leaving = per_period.mutate(period=_.period + periods, change=-_.change)
        per_period = per_period.union(leaving.select(per_period.columns), distinct=False)
    changed = per_period.group_by([*keys, "period"]).aggregate(change=_.change.sum())
    over = ibis.window(group_by=keys or None, order_by="period", preceding=None, following=0)
    return (
        changed.mutate(count=_.change.sum().over(over).cast("int64"))
        .filter(_.period * trend.period_seconds <= as_of)
        .mutate(event_timestamp=(_.period * trend.period_seconds).as_timestamp("s"))
    )


def _item_popularity(log: Table, trend: ResolvedTrend, as_of: int) -> Table:
    return _changes(log, ["item_id"], trend, as_of).select("item_id", "count", "event_timestamp")


def _catalogue_popularity(log: Table, trend: ResolvedTrend, as_of: int) -> Table:
    changes = _changes(log, [], trend, as_of)
    return changes.select(
        catalogue_id=ibis.literal("all"), total=_["count"], event_timestamp=_.event_timestamp
    )


def _write_snapshot(snapshot: TrendSnapshot, path: Path) -> None:
    row = {
        "catalogue_id": pa.array(["all"]),
        "item_ids": pa.array([list(snapshot.item_ids)], pa.list_(pa.string())),
        "log_q": pa.array([snapshot.log_q.tolist()], pa.list_(pa.float64())),
        "floor": pa.array([snapshot.floor]),
        "as_of": pa.array([snapshot.as_of], pa.int64()),
        "window_seconds": pa.array([snapshot.window_seconds], pa.int64()),
        "num_items": pa.array([snapshot.num_items], pa.int64()),
        "event_timestamp": pa.array([snapshot.as_of * 1_000_000], pa.timestamp("us", "UTC")),
    }
    pq.write_table(pa.table(row), path)
