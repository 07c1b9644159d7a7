"""Kinds of cases: by how much is known of the user, of the item, and of the session.

Shapes: E events, M items.
"""

import numpy as np
from numpy.typing import NDArray

from model.sequences import Histories

HISTORY_SLICES = {"first": 0, "1-4": 1, "5-19": 5, "20+": 20}  # smallest number of earlier events
ITEM_SLICES = {"never": 0, "1-4": 1, "5-49": 5, "50+": 50}  # smallest number of training events


def slices(
    histories: Histories,
    train_count_M: NDArray[np.int64],
    session_gap_seconds: int | None = None,
) -> dict[str, NDArray[np.bool_]]:
    """Which events `[E]` belong to each slice: name, such as `history/1-4`, → mask.

    Slices with the same word before the slash are a partition of the events.

    Args:
        train_count_M: training events of each item; the slices `item/…` go by the chosen item.
        session_gap_seconds: a longer time without an event starts a session; None: no such slices.
    """
    start_E = histories.offset_U1[:-1][histories.user_E]
    earlier_E = np.arange(histories.num_events) - start_E
    named = {
        **_ranges("history", earlier_E, HISTORY_SLICES),
        **_ranges("item", train_count_M[histories.item_E], ITEM_SLICES),
    }
    if session_gap_seconds is not None:
        gap_E = np.diff(histories.timestamp_E, prepend=0)
        opens_E = (earlier_E == 0) | (gap_E > session_gap_seconds)
        named |= {"session/first": opens_E, "session/within": ~opens_E}
    return named


def _ranges(
    kind: str, number_E: NDArray[np.int64], smallest: dict[str, int]
) -> dict[str, NDArray[np.bool_]]:
    group_E = np.searchsorted(list(smallest.values()), number_E, side="right") - 1
    return {f"{kind}/{name}": group_E == g for g, name in enumerate(smallest)}
