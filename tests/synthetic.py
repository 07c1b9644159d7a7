"""Generated logs with known structure, for learning tests."""

from dataclasses import dataclass, replace
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


def homes(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """With probability ½ an item that is the user's own, else any of the `num_items` shared ones.

    Entropy floor where the home is known: ½·(ln 2 + ln 2 + ln num_items) nats.
    """
    rng = np.random.default_rng(seed)
    at_home = rng.random((num_users, length)) < 0.5
    home = num_items + np.arange(num_users)[:, None]
    item = np.where(at_home, home, rng.integers(num_items, size=(num_users, length)))
    times = [(1_000_000_000 + 600 * np.arange(length)).tolist()] * num_users
    return histories(item.tolist(), times)


def feedback_decides(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """The next item is named by the event type (upper half) and sign of the value before it.

    Item = 2·type + (value > 0): floor 1 with feedback, `num_items` without.
    """
    rng = np.random.default_rng(seed)
    item = rng.integers(num_items, size=(num_users, length))
    follows = np.c_[item[:, 1:], item[:, :1]].ravel()  # feedback of event k names item k + 1
    log = histories(item.tolist(), np.tile(1000 * np.arange(length), (num_users, 1)).tolist())
    return replace(
        log,
        event_type_E=np.array([f"type{j // 2}" for j in follows], dtype=object),
        value_E=np.where(follows % 2, 1.0, -1.0) * rng.uniform(1.0, 2.0, len(follows)),
    )


def user_decides(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """Every event of a user is drawn from the items of the user's group and tag.

    Two groups × `num_items` / 4 tags, two items each, changing at random: floor 2 from the first
    event on with user fields; without, a user's first event is uniform.
    """
    rng = np.random.default_rng(seed)
    kind = rng.integers(num_items // 2, size=num_users)
    item = 2 * kind[:, None] + rng.integers(2, size=(num_users, length))
    log = histories(item.tolist(), np.tile(1000 * np.arange(length), (num_users, 1)).tolist())
    return log.with_user_fields(
        {"group": ["ab"[k % 2] for k in kind], "tags": [[f"t{k // 2}", "all"] for k in kind]}
    )


def context_decides(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """The item is named by the device of the request; the devices are random: floors 1 and M."""
    rng = np.random.default_rng(seed)
    item = rng.integers(num_items, size=(num_users, length))
    log = histories(item.tolist(), np.tile(1000 * np.arange(length), (num_users, 1)).tolist())
    device = np.array([f"d{j}" for j in log.item_E], dtype=object)
    return replace(log, context_fields={"device": device})


def sessions_restart(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """Items 0, 1, 2, … in a session; after a long gap (one in four) the next one starts at 0."""
    rng = np.random.default_rng(seed)
    items, times = [], []
    for _ in range(num_users):
        item, time, row, when = 0, 1_000_000, [], []
        for _ in range(length):
            row.append(item)
            when.append(time)
            restart = item == num_items - 1 or rng.random() < 0.25
            item = 0 if restart else item + 1
            time += int(rng.uniform(86_400, 200_000) if restart else rng.uniform(5, 60))
        items.append(row)
        times.append(when)
    return histories(items, times)


@dataclass(frozen=True)
class Toy:
    """The toy of Table 1: a log, its item genres, and the floor of each row of the table."""

    log: Histories
    catalogue: Catalogue
    floors: dict[str, float]


def toy(num_users: int, length: int, seed: int) -> Toy:
    """100 equally popular items in two genres; the last item leaves three candidates.

    Item a is followed by π_c(a), with c = (user's group + feedback on a) mod 3 and feedback
    uniform. The π_c are permutations, so all items stay equally popular; almost all pairs stay in
    their genre.
    """
    rng = np.random.default_rng(seed)
    num_items, genre = 100, np.arange(100) // 50
    follow = np.stack([np.r_[rng.permutation(50), 50 + rng.permutation(50)] for _ in range(3)])
    for a in range(6):  # six swaps across the genres: 12 of 300 pairs leave theirs
        follow[0, [a, 50 + a]] = follow[0, [50 + a, a]]
    group = rng.integers(3, size=num_users)
    item = np.empty((num_users, length), dtype=np.int64)
    feedback = rng.integers(3, size=(num_users, length))
    item[:, 0] = rng.integers(num_items, size=num_users)
    for k in range(1, length):
        item[:, k] = follow[(group + feedback[:, k - 1]) % 3, item[:, k - 1]]
    log = histories(item.tolist(), np.tile(1000 * np.arange(length), (num_users, 1)).tolist())
    log = replace(
        log,
        event_type_E=np.array([f"f{f}" for f in feedback.ravel()], dtype=object),
        user_fields={"group": [f"g{g}" for g in group]},
    )

    def perplexity(p_j: np.ndarray) -> float:
        return float(np.exp(-(p_j[p_j > 0] * np.log(p_j[p_j > 0])).sum()))

    next_given_item = np.zeros((num_items, num_items))
    for c in range(3):
        next_given_item[np.arange(num_items), follow[c]] += 1 / 3
    by_genre = [next_given_item[genre == g].mean(axis=0) for g in (0, 1)]
    floors = {
        "nothing": perplexity(next_given_item.mean(axis=0)),
        "item": float(np.exp(np.mean([np.log(perplexity(p)) for p in by_genre]))),
        "sequence": float(np.exp(np.mean([np.log(perplexity(p)) for p in next_given_item]))),
        "everything": 1.0,
    }
    ids = tuple(f"i{j:03d}" for j in range(num_items))
    return Toy(log, Catalogue(ids, {"genre": [f"g{g}" for g in genre]}), floors)


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
