"""Small sources of the feature store, as the features step writes them, with harsh values."""

import math
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.names import feature_names
from feature_repo.store import apply, materialise
from model.schema import Schema
from model.trends import snapshot_from_counts

AS_OF = 893_286_639  # April 1998
HARSH = ['say "hi"', "it's", "☃🎬 é", "line\nbreak", "a|b,c;d", "", " ", "\\", "NULL", "[1, 2]"]
SCHEMA = Schema.parse(
    {
        "users": {"age": "numeric", "Lieblings-Farbe": "categorical", "tags": "multi_categorical"},
        "items": {"genres": "multi_categorical", "age": "numeric"},
        "item_title": "title",
    }
)


def filled(settings):
    """A store with the sources of `write_sources`, applied and materialised; its settings."""
    write_sources(settings)
    apply(settings, SCHEMA)
    materialise(settings, AS_OF)
    return settings


def moments(*seconds):
    return pa.array([s * 1_000_000 for s in seconds], pa.timestamp("us", "UTC"))


def snapshot(counts=(7, 7, 1), as_of=AS_OF):
    ids = [f"i{j}" for j in range(len(counts))]
    return snapshot_from_counts(
        ids, counts, num_items=len(ids) + 2, smoothing=0.3, as_of=as_of, window_seconds=3600
    )


def write_sources(settings, users=("u1", "u2"), history=None, trend=None, as_of=AS_OF):
    settings.sources.mkdir(parents=True, exist_ok=True)
    colour = feature_names(SCHEMA.users)["Lieblings-Farbe"]
    n = len(users)
    profile = {
        "user_id": pa.array(users, pa.string()),
        "event_timestamp": moments(*[100] * n),
        "first_seen": pa.array([100] * n, pa.int64()),
        "age": pa.array([30.5, *[None] * (n - 1)], pa.float64()),
        colour: pa.array([HARSH[0], *[None] * (n - 1)], pa.string()),
        "tags": pa.array([HARSH, *[[]] * (n - 1)], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(profile), settings.source("user_profile"))
    history = history or {user: [(HARSH[1], AS_OF - 10), ("i1", AS_OF - 5)] for user in users}
    rows = [
        {
            "user_id": user,
            "event_timestamp": datetime.fromtimestamp(events[-1][1] + 1, UTC),
            "item_ids": [e[0] for e in events],
            "timestamps": [e[1] for e in events],
            "event_types": ["play"] + [""] * (len(events) - 1),
            "event_values": [math.nan] * (len(events) - 1) + [4.5],
        }
        for user, events in history.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), settings.source("user_history"))
    items = {
        "item_id": ["i0"],
        "event_timestamp": moments(100),
        "first_seen": [100],
        "title": ["Toy Story"],
        "genres": [["a", "b"]],
        "age": [3.0],
    }
    pq.write_table(pa.table(items), settings.source("item_metadata"))
    popularity = {"item_id": ["i0"], "event_timestamp": moments(as_of), "count": [7]}
    totals = {
        "catalogue_id": ["all"],
        "event_timestamp": moments(as_of),
        "total": [9],
        "smoothing": [0.5],
        "num_items": [3],
    }
    for view, table in {"item_popularity": popularity, "catalogue_popularity": totals}.items():
        settings.source(view).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(table), settings.source(view))
    row = (trend or snapshot(as_of=as_of)).to_json()
    table = pa.Table.from_pylist([{"catalogue_id": "all", **row}])
    pq.write_table(
        table.append_column("event_timestamp", moments(row["as_of"])),
        settings.source("trend_snapshot"),
    )
