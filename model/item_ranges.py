"""A log gone through by items: those of a range of items at a time, so that memory is bounded.

What is counted of each item on its own (what follows it, when it was popular) needs that item's
events alone. The log is read once for every range, front to back, from wherever its columns are;
ranges hold about as many events as asked for, so a log that is no larger is read once.

Shapes: E events, M items, K events of a piece.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.columns import READ_EVENTS


def item_ranges(
    item_E: NDArray[np.int64], num_items: int, events: int
) -> Iterator[tuple[int, int, Iterator[NDArray[np.int64]]]]:
    """Yield (first item, end, pieces) over all items, ascending; the pieces name all their events.

    A piece holds places in the log, ascending, of about `events` events at most. A range has more
    than one only if it is a single item with more events than that.
    """
    total_M1 = np.zeros(num_items + 1, dtype=np.int64)
    for start in range(0, len(item_E), READ_EVENTS):
        part = item_E[start : start + READ_EVENTS]
        total_M1[1:] += np.bincount(part, minlength=num_items)
    total_M1.cumsum(out=total_M1)
    first = 0
    while first < num_items:
        most = total_M1[first] + events
        end = max(first + 1, int(np.searchsorted(total_M1, most, side="right")) - 1)
        yield first, end, _pieces(item_E, first, end, events)
        first = end


def _pieces(
    item_E: NDArray[np.int64], first: int, end: int, events: int
) -> Iterator[NDArray[np.int64]]:
    held: list[NDArray[np.int64]] = []
    size, step = 0, min(events, READ_EVENTS)
    for start in range(0, len(item_E), step):
        part = item_E[start : start + step]
        found = np.flatnonzero((part >= first) & (part < end)) + start
        if held and size + len(found) > events:
            yield np.concatenate(held)
            held, size = [], 0
        held.append(found)
        size += len(found)
    if size:
        yield np.concatenate(held)
