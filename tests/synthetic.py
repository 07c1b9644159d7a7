"""Generated logs with known structure, for learning tests."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.catalogue import Catalogue
from model.schema import Schema
from model.sequences import Histories


def histories(items: list[list[int]], times: list[list[int]]) -> Histories:
    """Histories from per-user lists of catalogue positions and timestamps."""
    offset = np.r_[0, np.cumsum([len(u) for u in items])].astype(np.int64)
    return Histories(
        user_ids=tuple(f"u{i}" for i in range(len(items))),
        item_E=np.concatenate([np.asarray(u, np.int64) for u in items]),
        timestamp_E=np.concatenate([np.asarray(u, np.int64) for u in times]),
        offset_U1=offset,
    )


def gap_decides(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """The next item depends on the time gap only: item = position of the gap among `num_items`.

    Entropy floor given the gap: 0 nats, PPL 1. Without it: uniform, PPL = num_items.
    """
    rng = np.random.default_rng(seed)
    gaps = 4 ** np.arange(1, num_items + 1)
    item = rng.integers(num_items, size=(num_users, length))
    time = 1_000_000 + np.cumsum(gaps[item], axis=1)
    return histories(item.tolist(), time.tolist())


def successor(num_users: int, length: int, num_items: int, seed: int, p: float = 0.9) -> Histories:
    """With probability p item (7a + 1) mod M follows item a, else any item (M coprime to 7)."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(num_users):
        row = [int(rng.integers(num_items))]
        while len(row) < length:
            follow = rng.random() < p
            row.append((7 * row[-1] + 1) % num_items if follow else int(rng.integers(num_items)))
        items.append(row)
    start = rng.integers(0, 20 * 86_400, size=num_users)
    times = [(1_000_000_000 + s + 600 * np.arange(length)).tolist() for s in start]
    return histories(items, times)


def catalogue(num_items: int) -> Catalogue:
    """Items i000, i001, … without fields."""
    return Catalogue(tuple(f"i{j:03d}" for j in range(num_items)))


def clean_tables(path: Path, log: Histories, genres: bool = True) -> Path:
    """Write a log as a `clean/` directory; items are named i000, i001, …"""
    path.mkdir(parents=True, exist_ok=True)
    users = np.repeat(log.user_ids, np.diff(log.offset_U1))
    order = np.lexsort((np.arange(log.num_events), log.timestamp_E, users))
    table = {
        "user_id": pa.array(users[order].tolist(), pa.string()),
        "item_id": pa.array([f"i{j:03d}" for j in log.item_E[order]], pa.string()),
        "timestamp": pa.array(log.timestamp_E[order], pa.int64()),
    }
    pq.write_table(pa.table(table), path / "interactions.parquet")
    num_items = int(log.item_E.max()) + 1
    schema = Schema()
    if genres:
        pq.write_table(
            pa.table(
                {
                    "item_id": [f"i{j:03d}" for j in range(num_items)],
                    "title": [f"Item {j}" for j in range(num_items)],
                    "genres": [["even" if j % 2 == 0 else "odd"] for j in range(num_items)],
                    "year": [1990.0 + j % 5 for j in range(num_items)],
                }
            ),
            path / "items.parquet",
        )
        schema = Schema.parse(
            {"items": {"genres": "multi_categorical", "year": "numeric"}, "item_title": "title"}
        )
    schema.save(path / "schema.json")
    return path


def add_users(clean: Path) -> None:
    """Give clean tables a users table: age 20 … 69, two groups; every seventh user is absent."""
    ids = pq.read_table(clean / "interactions.parquet").column("user_id").unique().to_pylist()
    kept = [(n, user) for n, user in enumerate(sorted(ids)) if n % 7]
    pq.write_table(
        pa.table(
            {
                "user_id": [user for _, user in kept],
                "age": [20.0 + n % 50 for n, _ in kept],
                "group": ["ab"[n % 2] for n, _ in kept],
            }
        ),
        clean / "users.parquet",
    )
    schema = Schema.load(clean / "schema.json").model_dump(mode="json")
    schema["users"] = {"age": "numeric", "group": "categorical"}
    Schema.parse(schema).save(clean / "schema.json")
