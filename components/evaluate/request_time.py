"""What the time of the request changes: the same histories, asked at other moments (Table 2).

Shapes: U users, D delays, M items, K recommended items.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.bundle import Bundle
from model.query import Event, Query
from model.recommender import Recommender
from model.sequences import Histories

DELAYS = {
    "1 minute": 60,
    "10 minutes": 600,
    "1 hour": 3600,
    "6 hours": 6 * 3600,
    "1 day": 86_400,
    "1 week": 7 * 86_400,
    "30 days": 30 * 86_400,
}
USERS = 200


def request_time_effect(bundle: Bundle, test: Histories, k: int, seed: int) -> dict[str, Any]:
    """How far a request's delay changes what is recommended, trend left out.

    For up to USERS test users, asked at each delay after their last event: `overlap`, the mean
    share of the top k that is also in the top k one minute after it; `first_changed`, the share of
    users whose first item is another.
    """
    rng = np.random.default_rng(seed)
    users = np.flatnonzero(np.diff(test.offset_U1) > 0)
    users = np.sort(rng.permutation(users)[:USERS])
    if not len(users):
        return {"users": 0, "k": k, "delays": []}
    recommender = Recommender(bundle)
    top_DUK = np.stack(
        [_top(recommender, bundle, test, users, delay, k) for delay in DELAYS.values()]
    )
    delays = []
    for name, top_UK in zip(DELAYS, top_DUK, strict=True):
        shared_U = [len(np.intersect1d(a, b)) for a, b in zip(top_UK, top_DUK[0], strict=True)]
        delays.append(
            {
                "delay": name,
                "seconds": DELAYS[name],
                "overlap": float(np.mean(shared_U)) / top_UK.shape[1],
                "first_changed": float((top_UK[:, 0] != top_DUK[0][:, 0]).mean()),
            }
        )
    return {"users": len(users), "k": k, "delays": delays}


def _top(
    recommender: Recommender,
    bundle: Bundle,
    test: Histories,
    users: NDArray[np.int64],
    delay: int,
    k: int,
) -> NDArray[np.int64]:
    rows = []
    for start in range(0, len(users), 32):
        queries = [_query(bundle, test, int(u), delay) for u in users[start : start + 32]]
        phi_BM = recommender.affinities(queries)
        rows.append(np.argsort(-phi_BM, axis=1, kind="stable")[:, :k])
    return np.concatenate(rows)


def _query(bundle: Bundle, test: Histories, user: int, delay: int) -> Query:
    events = range(test.offset_U1[user], test.offset_U1[user + 1])
    types, values = test.event_type_E, test.value_E
    history = [
        Event(
            bundle.catalogue.item_ids[test.item_E[e]],
            float(test.timestamp_E[e]),
            None if types is None else types[e],
            None if values is None or np.isnan(values[e]) else float(values[e]),
        )
        for e in events
    ]
    fields = {name: column[user] for name, column in test.user_fields.items()}
    return Query(history, history[-1].timestamp + delay, user=fields)
