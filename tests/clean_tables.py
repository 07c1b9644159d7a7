"""Clean tables of a small log with every oddity, and popularity counted by the definition."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.schema import Schema

START = 893_286_000  # April 1998, not on a period's boundary
PERIOD = 900
HARSH = ['"quoted"', "it's", "🎬", "line\nbreak", "a|b", "", "\\"]


def make_log(seed=0, users=25, items=12, events=400, span=20 * PERIOD + 17):
    """(user, item, second, type, value), sorted as clean tables are, with ties."""
    rng = np.random.default_rng(seed)
    rows = [
        (
            f"u{rng.integers(users)}",
            f"i{int(items * rng.random() ** 2)}",
            START + int(rng.integers(span)) // 5 * 5,  # multiples of 5: ties, period starts
            ["view", "buy", None][rng.integers(3)],
            None if rng.random() < 0.3 else float(rng.normal()),
        )
        for _ in range(events)
    ]
    # Events exactly at a period's start and one second before it.
    boundary = (START // PERIOD + 5) * PERIOD
    rows += [("u0", "i1", boundary, "view", 1.0), ("u0", "i1", boundary - 1, "view", 1.0)]
    rows.sort(key=lambda r: (r[0], r[2]))
    return rows


def write_clean(folder, rows, *, users=True, items=True, extra_items=("cold",)):
    folder.mkdir(parents=True, exist_ok=True)
    names = ["user_id", "item_id", "timestamp", "event_type", "event_value"]
    types = [pa.string(), pa.string(), pa.int64(), pa.string(), pa.float64()]
    columns = zip(*rows, strict=True)
    pq.write_table(
        pa.table({n: pa.array(list(c), t) for n, t, c in zip(names, types, columns, strict=True)}),
        folder / "interactions.parquet",
    )
    schema = {}
    if users:
        ids = [*sorted({r[0] for r in rows})[1:], "silent"]  # one user is not described
        table = {
            "user_id": ids,
            "Some field, odd": pa.array([HARSH[j % 7] for j in range(len(ids))], pa.string()),
            "tags": pa.array([HARSH] * (len(ids) - 2) + [None, ["a", None]]),
        }
        pq.write_table(pa.table(table), folder / "users.parquet")
        schema["users"] = {"Some field, odd": "categorical", "tags": "multi_categorical"}
    if items:
        ids = sorted({r[1] for r in rows} | set(extra_items))
        table = {
            "item_id": ids,
            "title": [f"Title {i}" for i in ids],
            "year": pa.array([1990.5] * (len(ids) - 1) + [None], pa.float64()),
            "created_at": pa.array([START - 100] * (len(ids) - 1) + [None], pa.int64()),
        }
        pq.write_table(pa.table(table), folder / "items.parquet")
        schema |= {"items": {"year": "numeric"}, "item_title": "title"}
    Schema.parse(schema).save(folder / "schema.json")
    return folder


def naive_count(rows, item, moment, window):
    oldest = moment - window if window else -1
    return sum(1 for r in rows if r[1] == item and oldest <= r[2] < moment)


def naive_q(rows, item, moment, window, alpha, num_items):
    """(count, log q) in force at `moment`, by the definition."""
    total = sum(1 for r in rows if (not window or r[2] >= moment - window) and r[2] < moment)
    count = naive_count(rows, item, moment, window)
    return count, np.log((count + alpha) / (total + alpha * num_items))
