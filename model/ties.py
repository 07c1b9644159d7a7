"""Events of one user in the same second: is the order they are stored in the order they happened?

Logs with coarse clocks store simultaneous events in an order that may be the true one (a log
appended to) or any (an export). An arbitrary order is noise: training on a new one each epoch
keeps the network from learning it. A true order is signal that shuffling would destroy.

Shapes: E events, P pairs of successive simultaneous events.
"""

import numpy as np
from numpy.typing import NDArray

from model.sequences import Histories

SIGNIFICANCE = 3.0  # standard errors


def stored_order_matters(histories: Histories) -> bool:
    """Whether the stored order of simultaneous events foretells that of other users' events.

    Half of the users say how often item j came right after item i in the same second, and how
    often right before; the other half is asked which of the two orders it has. In an arbitrary
    order both are equally likely, and no count of one half helps to guess the other's.
    """
    same_second = np.diff(histories.timestamp_E) == 0
    same_user = np.diff(histories.user_E) == 0
    first_P = np.flatnonzero(same_second & same_user)
    before_P, after_P = histories.item_E[first_P], histories.item_E[first_P + 1]
    counted_P = histories.user_E[first_P] % 2 == 0
    num_items = int(histories.item_E.max(initial=0)) + 1
    forward_P, backward_P = before_P * num_items + after_P, after_P * num_items + before_P
    counts = np.unique(forward_P[counted_P], return_counts=True)
    seen = _lookup(counts, forward_P[~counted_P])
    reverse = _lookup(counts, backward_P[~counted_P])
    gain_P = np.log(2.0 * (seen + 0.5) / (seen + reverse + 1.0))  # nats over a coin
    if len(gain_P) < 2:
        return False
    return bool(gain_P.mean() > SIGNIFICANCE * gain_P.std(ddof=1) / np.sqrt(len(gain_P)))


def _lookup(
    counts: tuple[NDArray[np.int64], NDArray[np.int64]], key_P: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How often each key was counted; 0 where it was not."""
    known, count = counts
    if not len(known):
        return np.zeros(len(key_P), dtype=np.int64)
    place_P = np.searchsorted(known, key_P).clip(max=len(known) - 1)
    return np.where(known[place_P] == key_P, count[place_P], 0)


def shuffled_ties(histories: Histories, rng: np.random.Generator) -> NDArray[np.int64]:
    """A new order `[E]` of the events in which only a user's simultaneous ones change places."""
    return np.lexsort((rng.random(histories.num_events), histories.timestamp_E, histories.user_E))
