"""States of histories that were read lately, and what the next model needs to read them again.

Shapes: H hidden.
"""

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from model.query import History, Query

RECENT_EVENTS = 200_000  # of all histories that another model can be told of; some 80 bytes each
RECENT_LENGTH = 200  # newest events of one of them


class States:
    """States `[H]` by the digest of what was read; the least recently used goes. Thread-safe."""

    def __init__(self, limit: int, recent_events: int = RECENT_EVENTS) -> None:
        """
        Args:
            limit: states kept, one row of H numbers each; 0: none.
            recent_events: events kept, of the histories that were read last.
        """
        self.limit = limit
        self._recent_events = recent_events
        self._states: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._recent: OrderedDict[bytes, Query] = OrderedDict()
        self._num_events = 0  # of the recent ones
        self._lock = threading.Lock()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The state under a digest `[H]`; None: it is not kept."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def keep(
        self, key: bytes, h_H: NDArray[np.float32], query: Query, found: bytes | None = None
    ) -> None:
        """Keep a state.

        Args:
            query: whose history was read; its last event was not, and neither was its time.
            found: the digest of the state that was read on from: the history has grown since.
        """
        with self._lock:
            self._states[key] = h_H.copy()  # not the whole batch
            self._states.move_to_end(key)
            while len(self._states) > self.limit:
                self._states.popitem(last=False)
            self._note(key, query, found)

    def _note(self, key: bytes, query: Query, found: bytes | None) -> None:
        """Remember what was read; nobody reads on from the history that it has grown from."""
        if found is not None and found != key and found in self._recent:
            self._num_events -= len(self._recent.pop(found).history)
        if key in self._recent:
            self._recent.move_to_end(key)
            return
        events = History.of(query.history).sorted()[-RECENT_LENGTH:]
        self._recent[key] = Query(events.copy(), query.timestamp, query.user)
        self._num_events += len(events)
        while self._num_events > self._recent_events:
            _, oldest = self._recent.popitem(last=False)
            self._num_events -= len(oldest.history)

    def recent(self) -> list[Query]:
        """The histories that were read last, newest first, with the fields of their users."""
        with self._lock:
            return list(reversed(self._recent.values()))
