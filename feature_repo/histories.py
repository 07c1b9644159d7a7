"""Histories as arrays of a feature view's row, and a user's two histories made one."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from model.query import Event


def events_of(row: Mapping[str, Any], prefix: str = "") -> list[Event]:
    """Events of a row with the arrays item_ids, timestamps, event_types, event_values."""
    columns = ("item_ids", "timestamps", "event_types", "event_values")
    return [
        Event(item, time, kind or None, None if math.isnan(value) else value)
        for item, time, kind, value in zip(
            *(row[prefix + name] or () for name in columns), strict=True
        )
    ]


def values_of(events: Sequence[Event]) -> dict[str, list[Any]]:
    """Inverse of `events_of`."""
    return {
        "item_ids": [e.item_id for e in events],
        "timestamps": [math.floor(e.timestamp) for e in events],
        "event_types": [e.event_type or "" for e in events],
        "event_values": [math.nan if e.value is None else float(e.value) for e in events],
    }


def merge(run: Sequence[Event], live: Sequence[Event], length: int) -> list[Event]:
    """What the last run knew and what the event log knows; the newest `length`, oldest first.

    The two overlap when the run's tables came from the log. An event is recognised by its item
    and second, and one that is n times on one side and m times on the other is there max(n, m)
    times: two plays of one song in a second remain two. The log's form of it wins, and where
    times are equal its order.
    """
    if not run or not live:
        return list(run or live)[-length:]
    held = Counter((e.item_id, e.timestamp) for e in live)
    merged = []
    for event in run:
        key = (event.item_id, event.timestamp)
        if held[key] > 0:
            held[key] -= 1
        else:
            merged.append(event)
    merged += live
    merged.sort(key=lambda e: e.timestamp)
    return merged[-length:]
