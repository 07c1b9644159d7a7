"""Features: clean tables → feature sources, registered and loaded into the online store."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow.parquet import read_metadata
from pydantic import Field

from components.engines import EngineName, open_engine
from components.features import sources
from components.features.popularity import write_popularity
from components.features.sources import Log
from components.tables import INTERACTIONS, ITEMS, USERS, connect, table_path
from feature_repo import store
from feature_repo.names import (
    CATALOGUE_POPULARITY,
    GROWING,
    ITEM_METADATA,
    ITEM_POPULARITY,
    MATERIALISED,
    REFRESH_PREFIX,
    TREND_SNAPSHOT,
    USER_HISTORY,
    USER_PROFILE,
    ViewOptions,
    source_name,
)
from feature_repo.settings import FeatureStoreSettings
from feature_repo.snapshot import truncate
from feature_repo.sources import pull, push
from model.settings import SettingsBase
from model.trends import ResolvedTrend, TrendSettings, choose_trend

__all__ = ["FeaturesSettings", "run"]

DAY = 86_400


class FeaturesSettings(SettingsBase):
    """Sizes of the features; how q is counted is in the section `trend`."""

    history_length: int = Field(100, ge=1)  # newest events of a user that serving reads
    history_ttl_days: int = Field(3650, ge=0)  # silence after which a history is dropped; 0: never
    trend_top_items: int = Field(10_000, ge=1)  # in the snapshot; all others share its floor
    popularity_max_rows: int = Field(20_000_000, ge=1)  # newest changes of counts kept
    memory_limit: str = "2GB"  # of DuckDB; beyond it spills to disk
    engine: EngineName = "duckdb"  # what counts the popularity
    spark_master: str = "local[*]"


def run(
    clean_dir: Path,
    feature_store: str,
    trend: dict[str, Any],
    settings: dict[str, Any],
    output_dir: Path,
) -> dict[str, Any]:
    """Write `summary.json` and `trend.json`; returns the summary.

    A re-run replaces every source and online row; users and items that are gone are blanked. One
    run at a time per store.

    Args:
        feature_store: root folder, created when absent, with SQLite online; empty: what
            HRNN_FEATURE_ROOT, HRNN_ONLINE_STORE, HRNN_REDIS_URL and HRNN_REGISTRY_URL say.
        output_dir: folder for the two files.

    Raises:
        InputError: wrong settings, no interactions, or field names that cannot be told apart.
        UnavailableError: the feature store cannot be written.
    """
    config = FeaturesSettings.parse(settings, "features")
    trend_settings = TrendSettings.parse(trend, "trend")
    where = (
        FeatureStoreSettings(root=feature_store)
        if feature_store
        else FeatureStoreSettings.from_env()
    )
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    rows: dict[str, int] = {}
    where.path.mkdir(parents=True, exist_ok=True)
    pull(where)
    output_dir.mkdir(parents=True, exist_ok=True)

    def timed(name: str, write: Callable[[], int]) -> None:
        begun = time.perf_counter()
        rows[name] = write()
        seconds[name] = round(time.perf_counter() - begun, 3)
        print(f"{name}: {rows[name]:,} rows in {seconds[name]:.1f} s", flush=True)

    # In the store's own folder, so that replacing a source is one atomic rename.
    with tempfile.TemporaryDirectory(prefix=".features-", dir=where.path) as scratch:
        new = Path(scratch) / "sources"
        new.mkdir()
        backend = connect(Path(scratch), config.memory_limit)
        try:
            log = Log.open(backend, clean_dir, Path(scratch))
            resolved = _resolve(log, trend_settings)
            snapshot = truncate(sources.count_snapshot(log, resolved), config.trend_top_items)
            timed(USER_PROFILE, lambda: sources.write_entities(log, USERS, new))
            timed(USER_HISTORY, lambda: sources.write_history(log, config.history_length, new))
            timed(ITEM_METADATA, lambda: sources.write_entities(log, ITEMS, new))
            timed(ITEM_POPULARITY, lambda: _popularity(config, log, resolved, Path(scratch), new))
            rows[CATALOGUE_POPULARITY] = read_metadata(
                new / source_name(CATALOGUE_POPULARITY)
            ).num_rows
            timed(TREND_SNAPSHOT, lambda: sources.write_snapshot(snapshot, new))
            vanished = sources.vanished(backend, where.sources, new)
        finally:
            backend.disconnect()
        if vanished:
            # Before the old sources go: a run that dies here finds the same keys again.
            store.forget(where, vanished)
            gone = ", ".join(f"{len(keys):,} of {view}" for view, keys in vanished.items())
            print(f"no longer in the log, blanked online: {gone}", flush=True)
        where.sources.mkdir(exist_ok=True)
        for view in MATERIALISED:
            where.source(view).parent.mkdir(exist_ok=True)
            (new / source_name(view)).replace(where.source(view))
        # What refreshes of the trends have added is counted anew in these files.
        for view in GROWING:
            for path in where.source(view).parent.glob(f"{REFRESH_PREFIX}*.parquet"):
                path.unlink()
    options = ViewOptions(
        history_length=config.history_length,
        history_ttl_seconds=config.history_ttl_days * DAY,
        popularity_ttl_seconds=resolved.period_seconds,
        trend=resolved.settings(),
        trend_top_items=config.trend_top_items,
    )
    store.apply(where, log.schema, options)
    push(where)
    begun = time.perf_counter()
    online = store.materialise(where, log.as_of)
    seconds["materialise"] = round(time.perf_counter() - begun, 3)
    print(
        f"online store ({where.online}): {sum(online.values()):,} rows"
        f" in {seconds['materialise']:.1f} s; trend {snapshot.version}",
        flush=True,
    )
    summary = {
        "rows": rows,
        "online_rows": online,
        "forgotten": {view: len(keys) for view, keys in vanished.items()},
        "seconds": {**seconds, "total": round(time.perf_counter() - started, 3)},
        "as_of": log.as_of,
        "trend": resolved.settings().model_dump(),
        "trend_version": snapshot.version,
        "trend_items": len(snapshot.item_ids),
        "num_items": log.num_items,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output_dir / "trend.json").write_text(json.dumps(snapshot.to_json()) + "\n")
    return summary


def _popularity(
    config: FeaturesSettings, log: Log, trend: ResolvedTrend, scratch: Path, folder: Path
) -> int:
    """Both popularity views, on the engine that is set; returns the rows of the items' one."""
    engine = open_engine(config.engine, scratch, config.memory_limit, config.spark_master)
    try:
        events = engine.read_parquet(str(table_path(log.clean, INTERACTIONS)))
        rows = write_popularity(
            engine,
            events,
            log.num_items,
            trend,
            log.as_of,
            config.popularity_max_rows,
            scratch,
            folder,
        )
    finally:
        engine.disconnect()
    return rows[ITEM_POPULARITY]


def _resolve(log: Log, settings: TrendSettings) -> ResolvedTrend:
    period, window, smoothing = (
        settings.period_seconds,
        settings.window_seconds,
        settings.smoothing,
    )
    if period and window is not None and smoothing is not None:
        return ResolvedTrend(period, window, smoothing)
    resolved = choose_trend(*log.for_choice(), settings, table_items=log.num_items)
    print(
        f"trend: refreshed every {resolved.period_seconds:,} s, counted over"
        f" {f'{resolved.window_seconds:,} s' if resolved.window_seconds else 'everything before'},"
        f" {resolved.smoothing:g} added to every item's count",
        flush=True,
    )
    return resolved
