"""Putting a newly counted trend in force: only what has changed is written, the snapshot last.

Offline each refresh adds a small file to the popularity sources; the next run of the pipeline
counts the whole log anew and clears them away. Online a reader sees the old snapshot or the new
one, never a mixture: a snapshot is one row, written in one transaction (SQLite) or one command
(Redis).
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo.connection import open_existing, unavailable
from feature_repo.names import (
    CATALOGUE_ID,
    CATALOGUE_POPULARITY,
    EVENT_TIMESTAMP,
    GROWING,
    ITEM,
    ITEM_METADATA,
    ITEM_POPULARITY,
    JOIN_KEY,
    REFRESH_PREFIX,
    TREND_SNAPSHOT,
)
from feature_repo.online import Row, protos, write_rows
from feature_repo.settings import FeatureStoreSettings
from feature_repo.snapshot import to_row
from feature_repo.sources import push
from model.trends import TrendSnapshot

if TYPE_CHECKING:
    from feast import FeatureStore

_MOMENT = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Published:
    """What a refresh wrote."""

    in_force: bool  # False: the store holds a newer snapshot, nothing was written
    changed_items: int  # rows of item_popularity, online and offline
    previous_as_of: int | None  # Unix seconds


def moment_in_force(settings: FeatureStoreSettings) -> int | None:
    """Unix second for which the snapshot in force was counted; None: there is none.

    Raises:
        UnavailableError: the store does not exist or cannot be read.
    """
    with unavailable("read the trend in force"):
        return _moment(open_existing(settings))


def _moment(store: "FeatureStore") -> int | None:
    row = store.get_online_features(
        features=[f"{TREND_SNAPSHOT}:as_of"], entity_rows=[{JOIN_KEY["catalogue"]: CATALOGUE_ID}]
    ).to_dict()
    return row["as_of"][0]


def publish_trend(
    settings: FeatureStoreSettings,
    snapshot: TrendSnapshot,
    counts: pa.Table,
    smoothing: float,
) -> Published:
    """Write counts (`item_id`, `n` ≥ 0) and the snapshot of them, unless a newer one is there.

    Safe to repeat. One refresh or pipeline run at a time per store.

    Raises:
        UnavailableError: the store does not exist or cannot be written.
    """
    with unavailable("publish the trend"):
        store = open_existing(settings)
        previous = _moment(store)
        if previous is not None and previous > snapshot.as_of:
            return Published(False, 0, previous)
        changed = _changed(settings, counts, snapshot.as_of)
        total = int(pc.sum(counts["n"]).as_py() or 0)
        moment = pa.scalar(snapshot.as_of * 1_000_000, pa.int64()).cast(_MOMENT)
        totals = {
            JOIN_KEY["catalogue"]: CATALOGUE_ID,
            "total": total,
            "smoothing": float(smoothing),
            "num_items": snapshot.num_items,
        }
        tables = {
            ITEM_POPULARITY: changed.append_column(
                EVENT_TIMESTAMP, pa.repeat(moment, changed.num_rows)
            ),
            CATALOGUE_POPULARITY: pa.table(
                {EVENT_TIMESTAMP: pa.array([moment]), **{k: [v] for k, v in totals.items()}}
            ),
        }
        for view in sorted(GROWING):
            _add(tables[view], settings.source(view).parent, snapshot.as_of)
        push(settings)
        write_rows(store, ITEM_POPULARITY, _rows(changed, snapshot.as_of))
        write_rows(store, CATALOGUE_POPULARITY, [(CATALOGUE_ID, protos(totals), snapshot.as_of)])
        write_rows(
            store, TREND_SNAPSHOT, [(CATALOGUE_ID, protos(to_row(snapshot)), snapshot.as_of)]
        )
        return Published(True, changed.num_rows, previous)


def catalogue_size(
    settings: FeatureStoreSettings, counts: pa.Table, described: pa.Table | None
) -> int:
    """M: items that the store knows, those counted now and those described (`item_id` each).

    The whole log is not read again for it: what it held, the pipeline and earlier refreshes have
    put into the store.
    """
    import duckdb

    with unavailable("read the items of the feature store"), duckdb.connect() as connection:
        connection.register("counts", counts)
        connection.register("described", counts if described is None else described)
        known = [str(settings.pattern(view)) for view in (ITEM_METADATA, ITEM_POPULARITY)]
        found = connection.execute(
            """
            SELECT count(*) FROM (
                SELECT item_id FROM read_parquet($1)
                UNION SELECT item_id FROM read_parquet($2)
                UNION SELECT item_id FROM counts UNION SELECT item_id FROM described
            )
            """,
            known,
        ).fetchone()
    assert found is not None  # noqa: S101 - an aggregate always returns a row
    return int(found[0])


def _changed(settings: FeatureStoreSettings, counts: pa.Table, as_of: int) -> pa.Table:
    """Items (`item_id`, `count`) whose count differs from the newest one before `as_of`.

    Items that are no longer counted have count 0. An item that an earlier attempt at `as_of` has
    found stays found.
    """
    import duckdb

    before = datetime.fromtimestamp(as_of, UTC)
    with duckdb.connect() as connection:
        connection.register("counts", counts)
        return connection.execute(
            f"""
            WITH stored AS (
                SELECT item_id,
                       arg_max(count, {EVENT_TIMESTAMP}) FILTER ({EVENT_TIMESTAMP} < $2) AS count
                FROM read_parquet($1) WHERE {EVENT_TIMESTAMP} <= $2 GROUP BY item_id
            )
            SELECT coalesce(counts.item_id, stored.item_id) AS {JOIN_KEY[ITEM]},
                   CAST(coalesce(counts.n, 0) AS BIGINT) AS count
            FROM counts FULL JOIN stored ON counts.item_id = stored.item_id
            WHERE coalesce(counts.n, 0) IS DISTINCT FROM stored.count
            """,  # noqa: S608 - our own names
            [str(settings.pattern(ITEM_POPULARITY)), before],
        ).to_arrow_table()


def _add(table: pa.Table, folder: Path, as_of: int) -> None:
    """Add a file to a source, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".refresh-", dir=folder) as scratch:
        path = Path(scratch) / "new"
        pq.write_table(table, path, compression="zstd")
        path.replace(folder / f"{REFRESH_PREFIX}{as_of}.parquet")


def _rows(changed: pa.Table, as_of: int) -> Iterator[Row]:
    for batch in changed.to_batches(max_chunksize=10_000):
        items, counts = (batch.column(name).to_pylist() for name in (JOIN_KEY[ITEM], "count"))
        for item, count in zip(items, counts, strict=True):
            yield item, protos({"count": count}), as_of
