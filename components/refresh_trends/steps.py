"""Refresh trends: count the newest window of the log, put the new snapshot in force.

Models are not touched; serving takes the new snapshot within seconds.

"Now" is the log's own: the second after its newest event that is not from the future. On a live
log that is the clock, give or take the time between two events. The two differ when events stop
coming (a collector that is down, a quiet night, a log of 1998), and then the clock would be wrong:
an hour's window by the clock would be empty, q uniform, and all that is known of the trend lost.
Events from after the clock are left out, or one phone with a wrong date would move the window into
the future and keep it there.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from pydantic import Field

from components.engines import EngineName
from components.event_sources import EventSource, open_source
from components.features.popularity import window_counts
from feature_repo.refresh import catalogue_size, moment_in_force, publish_trend
from feature_repo.settings import FeatureStoreSettings
from feature_repo.snapshot import truncate
from feature_repo.sources import pull
from feature_repo.store import applied
from model.errors import InputError
from model.settings import SettingsBase
from model.trends import TrendSettings, TrendSnapshot, snapshot_from_counts

__all__ = ["RefreshTrendsSettings", "run"]


class RefreshTrendsSettings(SettingsBase):
    """Where and of what moment is counted; how, the features step has decided for good."""

    as_of: int | None = Field(None, ge=1)  # Unix seconds; None: the second after the last event
    engine: EngineName = "duckdb"  # for tables; an event log counts in its own database
    spark_master: str = "local[*]"
    memory_limit: str = "2GB"  # of the engine; beyond it spills to disk
    deadline_seconds: int = Field(600, ge=1)  # for one statement of a PostgreSQL event log


def run(
    interactions: str, feature_store: str, settings: dict[str, Any], output_dir: Path
) -> dict[str, Any]:
    """Write `summary.json` and `trend.json`; returns the summary.

    Args:
        interactions: clean tables of a run, a Parquet file, or the event log (sqlite:///PATH,
            postgresql://…); empty: what HRNN_EVENT_LOG says.
        feature_store: root folder; empty: what HRNN_FEATURE_ROOT and the like say.

    Raises:
        InputError: wrong settings, no log, an empty log, or no trend was ever counted.
        UnavailableError: the log or the feature store cannot be used.
    """
    config = RefreshTrendsSettings.parse(settings, "refresh_trends")
    where = (
        FeatureStoreSettings(root=feature_store)
        if feature_store
        else FeatureStoreSettings.from_env()
    )
    source_uri = interactions or os.environ.get("HRNN_EVENT_LOG", "")
    if not source_uri:
        raise InputError("no log to count: give interactions, or set HRNN_EVENT_LOG")
    pull(where)
    options = applied(where)[1]
    trend = options.trend
    if trend.window_seconds is None or trend.smoothing is None:
        raise InputError(
            f"the feature store in {where.path} does not say how trends are counted; run the"
            " pipeline (or its features step) first"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix=".refresh-", dir=where.path) as scratch,
        open_source(
            source_uri,
            config.engine,
            Path(scratch),
            config.memory_limit,
            config.spark_master,
            config.deadline_seconds,
        ) as source,
    ):
        as_of = config.as_of if config.as_of is not None else _now(source)
        # Items that came and went since the last refresh belong to the catalogue too.
        counts = source.collect(
            window_counts(source.events, as_of, trend.window_seconds, since=moment_in_force(where))
        )
        described = None if source.items is None else source.collect(source.items)
    counted = time.perf_counter()
    listed = counts.filter(pc.greater(counts["n"], 0))
    whole = snapshot_from_counts(
        listed["item_id"].to_pylist(),
        listed["n"].to_numpy(),
        num_items=catalogue_size(where, counts, described),
        smoothing=trend.smoothing,
        as_of=as_of,
        window_seconds=trend.window_seconds,
    )
    snapshot = truncate(whole, options.trend_top_items)
    published = publish_trend(where, snapshot, counts, trend.smoothing)
    summary = {
        "in_force": published.in_force,
        "as_of": as_of,
        "previous_as_of": published.previous_as_of,
        "trend_version": snapshot.version,
        "trend_items": len(snapshot.item_ids),
        "num_items": snapshot.num_items,
        "changed_items": published.changed_items,
        "events": int(listed["n"].to_numpy().sum()),
        "window_seconds": trend.window_seconds,
        "seconds": {
            "count": round(counted - started, 3),
            "publish": round(time.perf_counter() - counted, 3),
        },
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output_dir / "trend.json").write_text(json.dumps(snapshot.to_json()) + "\n")
    _describe(summary, trend, snapshot)
    return summary


def _now(source: EventSource) -> int:
    """The second after the newest event that is not from the future."""
    events = source.events
    past = events.filter(events.timestamp <= int(time.time()))
    last = source.collect(past.aggregate(last=past.timestamp.max()))["last"][0].as_py()
    if last is None:
        raise InputError("the log holds no events until now, so there is no trend to count")
    return int(last) + 1


def _describe(summary: dict[str, Any], trend: TrendSettings, snapshot: TrendSnapshot) -> None:
    span = f"{trend.window_seconds:,} s" if trend.window_seconds else "everything before"
    print(
        f"counted {summary['events']:,} events over {span}:"
        f" {len(snapshot.item_ids):,} of {summary['num_items']:,} items are listed"
    )
    if summary["in_force"]:
        print(
            f"trend {summary['trend_version']} is in force;"
            f" {summary['changed_items']:,} counts have changed"
        )
    else:
        print(
            f"trend {summary['trend_version']} was not put in force: the store holds one of"
            f" {summary['previous_as_of']}, which is newer than {summary['as_of']}"
        )
