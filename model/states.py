"""States of histories that were read lately, and what the next model needs to read them again.

Shapes: L events of one history, H hidden.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.query import FieldValue, History, Query

WHOLE = 64  # events: shorter histories are read from their first event on
PART = 4  # longer ones begin somewhere in the first of so many parts

RECENT_BYTES = 32 * 2**20  # of all histories that another model can be told of, as estimated
RECENT_SECONDS = 600.0  # how long it can
RECENT_LENGTH = 200  # newest events of one of them
ENTRY_BYTES, EVENT_BYTES = 1000, 100  # of one of them, besides the text of ids and fields
MOST_TEXT = 4000  # characters of a user's fields; users with more are not remembered


def beginning(time_L: NDArray[np.float64], key_L: NDArray[np.int64]) -> int:
    """The event that a reading begins with, found by what the events are.

    A history is cut to its newest events, so a long one loses its oldest with every new one; a
    state read from the oldest could never be advanced. Read instead from that event of the first
    quarter which has the greatest hash: it stays the same one while the history moves on by some
    thirteen events, on average over windows of a hundred (content-defined chunking: Muthitacharoen
    et al., "A Low-bandwidth Network File System", SOSP 2001, §3.1).

    Args:
        time_L: Unix seconds `[L]`, of which whole ones count.
        key_L: what stands for each event's item `[L]`.

    Returns:
        An index in [0, L/4]; 0 for fewer than WHOLE events.
    """
    if len(time_L) < WHOLE:
        return 0
    first = slice(len(time_L) // PART + 1)
    mixed = time_L[first].astype(np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= key_L[first].astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return int(np.argmax(mixed))


@dataclass(frozen=True, slots=True)
class Recent:
    """A history that was read; `at` in monotonic seconds."""

    query: Query  # the newest events, and the fields of the user that are read
    at: float
    size: int  # bytes, as estimated


class States:
    """States `[H]` by the digest of what was read; the least recently used goes. Thread-safe."""

    def __init__(
        self,
        limit: int,
        recent_bytes: int = RECENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            limit: states kept, one row of H numbers each; 0: none.
            recent_bytes: of the histories kept.
        """
        self.limit = limit
        self._recent_bytes, self._clock = recent_bytes, clock
        self._states: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._recent: OrderedDict[bytes, Recent] = OrderedDict()  # oldest first
        self._size = 0  # of the recent ones
        self._lock = threading.Lock()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The state under a digest `[H]`; None: it is not kept."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def keep(
        self,
        key: bytes,
        h_H: NDArray[np.float32],
        query: Query,
        fields: Sequence[str] = (),
        found: bytes | None = None,
        at: float | None = None,
    ) -> None:
        """Keep a state.

        Args:
            query: whose history was read; its last event was not, and neither was its time.
            fields: of the user, that are read.
            found: the digest of the state that was read on from: the history has grown since.
            at: monotonic seconds at which it was asked for, when that was before all that is
                kept; None: now.
        """
        now = self._clock()
        with self._lock:
            if at is None:
                self._states[key] = h_H.copy()  # not the whole batch
                self._states.move_to_end(key)
            elif key not in self._states:
                self._states[key] = h_H.copy()
                self._states.move_to_end(key, last=False)
            while len(self._states) > self.limit:
                self._states.popitem(last=False)
            self._note(key, query, fields, found, now, at)

    def _note(
        self,
        key: bytes,
        query: Query,
        fields: Sequence[str],
        found: bytes | None,
        now: float,
        at: float | None,
    ) -> None:
        """Remember what was read; nobody reads on from the history that it has grown from."""
        if found is not None and found != key:
            self._drop(found)
        if at is not None and key in self._recent:
            return
        known, read_at = self._drop(key), now if at is None else at
        recent = replace(known, at=read_at) if known else _recent(query, fields, read_at)
        if recent is not None:
            self._recent[key] = recent
            self._size += recent.size
            if at is not None:
                self._recent.move_to_end(key, last=False)
        self._expire(now)

    def _drop(self, key: bytes) -> Recent | None:
        dropped = self._recent.pop(key, None)
        if dropped is not None:
            self._size -= dropped.size
        return dropped

    def _expire(self, now: float) -> None:
        while self._recent:
            key, oldest = next(iter(self._recent.items()))
            if self._size <= self._recent_bytes and oldest.at > now - RECENT_SECONDS:
                return
            self._drop(key)

    def forget_old(self) -> None:
        """Forget histories that were read before the last RECENT_SECONDS, also if nobody asks."""
        now = self._clock()
        with self._lock:
            self._expire(now)

    def recent(self) -> list[Recent]:
        """The histories of the last RECENT_SECONDS, newest first."""
        self.forget_old()
        with self._lock:
            return list(reversed(self._recent.values()))


def _recent(query: Query, fields: Sequence[str], at: float) -> Recent | None:
    user = {name: value for name in fields if (value := query.user.get(name)) is not None}
    text = sum(map(_text, user.values()))
    if text > MOST_TEXT:
        return None
    history = History.of(query.history).sorted()[-RECENT_LENGTH:].copy()
    size = ENTRY_BYTES + EVENT_BYTES * len(history) + sum(map(len, history.item_ids)) + text
    return Recent(Query(history, query.timestamp, user), at, size)


def _text(value: FieldValue) -> int:
    """Characters of a field's value, and some for each part of it."""
    if isinstance(value, str):
        return len(value)
    return sum(50 + len(part) for part in value) if isinstance(value, Sequence) else 0
