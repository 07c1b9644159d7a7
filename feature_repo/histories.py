"""Histories as arrays of a feature view's row, and a user's two histories made one."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.query import Event, History


def events_of(row: Mapping[str, Any], prefix: str = "") -> History:
    """Events of a row with the arrays item_ids, timestamps, event_types, event_values."""
    columns = ("item_ids", "timestamps", "event_types", "event_values")
    items, times, types, values = (row[prefix + name] or [] for name in columns)
    if not len(items) == len(times) == len(types) == len(values):
        raise ValueError("columns of a history differ in length")
    value_L = np.array(values, dtype=np.float64)
    return History(
        list(items),
        np.array(times, dtype=np.float64),
        [kind or None for kind in types] if any(types) else None,
        None if np.isnan(value_L).all() else value_L,
    )


def values_of(events: Sequence[Event]) -> dict[str, list[Any]]:
    """Inverse of `events_of`."""
    return {
        "item_ids": [e.item_id for e in events],
        "timestamps": [math.floor(e.timestamp) for e in events],
        "event_types": [e.event_type or "" for e in events],
        "event_values": [math.nan if e.value is None else float(e.value) for e in events],
    }


def merge(run: Sequence[Event], live: Sequence[Event], length: int) -> History:
    """What the last run knew and what the event log knows; the newest `length`, oldest first.

    The two overlap when the run's tables came from the log. An event is recognised by its item
    and second, and one that is n times on one side and m times on the other is there max(n, m)
    times: two plays of one song in a second remain two. The log's form of it wins, and where
    times are equal its order.
    """
    run, live = History.of(run), History.of(live)
    if not len(run) or not len(live):
        return (run if len(run) else live)[-length:]
    held = Counter(zip(live.item_ids, live.time_L.tolist(), strict=True))
    more = []
    for k, key in enumerate(zip(run.item_ids, run.time_L.tolist(), strict=True)):
        if held[key] > 0:
            held[key] -= 1
        else:
            more.append(k)
    return run.take(more).followed_by(live).sorted()[-length:]
