"""How much of what is chosen is new: film catalogues hardly change, a newspaper's does every hour.

Shapes: E events, M items.
"""

import numpy as np

from model.sequences import Histories

TAIL = 0.1  # of the events


def new_item_share(histories: Histories) -> float:
    """Share of the log's last events whose items were not chosen before these began.

    What a model trained on the first nine tenths of the log would have had to know by the fields
    alone. 0 for a log too short to have a tail, or without any time.
    """
    time_E, item_E = histories.timestamp_E, histories.item_E
    if len(time_E) == 0:
        return 0.0
    begin = int((1.0 - TAIL) * len(time_E))
    cut = np.partition(time_E, begin)[begin]
    first_M = np.full(int(item_E.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_M, item_E, time_E)
    tail_E = time_E >= cut
    if tail_E.all():
        return 0.0
    return float(np.mean(first_M[item_E[tail_E]] >= cut))
