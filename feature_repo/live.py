"""Online features that follow the event log.

A user's live row is computed from the log's state alone, so it does not matter in which order or
how often events arrive or are applied. Followers of one log take turns: whoever holds the log's
follower lock reads the changes since the checkpoint, writes the rows of the users concerned and
then the checkpoint. The checkpoint lies in the online store itself: a store that has lost rows
has lost its checkpoint with them, and is filled again from what is left of it. A follower that was
frozen while others went on sets the checkpoint back, and what it overwrote is written again.
"""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from feature_repo.connection import unavailable
from feature_repo.event_log import EventLog, UserState
from feature_repo.histories import values_of
from feature_repo.names import (
    CATALOGUE,
    CATALOGUE_ID,
    LIVE_CHECKPOINT,
    USER_HISTORY,
    USER_LIVE,
    USER_PROFILE,
)
from feature_repo.online import protos, write_rows
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import Session, forget

log = logging.getLogger("hrnn.features")

PORTION = 2000  # changes applied before the checkpoint moves
# Further behind, all users are written once instead of one by one in the order of their events.
REBUILD_AFTER = 100_000


class LiveFeatures:
    """One follower; not thread-safe.

    Raises:
        UnavailableError: here and in every method, when the online store or the log cannot be used.
    """

    def __init__(self, settings: FeatureStoreSettings, events: EventLog) -> None:
        self._settings = settings
        self._events = events
        self._done = 0  # the last change known to be applied
        with unavailable("open the feature store"):
            self._session = Session.open(settings)

    def follow(self) -> int:
        """Apply everything that is in the log; returns the number of the last change applied."""
        with self._events.follower_lock():
            self._session = self._session.current(self._settings)
            head = self._events.position()
            done = self._checkpoint(head.log_id)
            if done is None or not head.seq - REBUILD_AFTER <= done <= head.seq:
                done = self._write_all(head.seq)
                self._set_checkpoint(head.log_id, done)
            while done < self._events.position().seq:
                done = self._apply(done)
                self._set_checkpoint(head.log_id, done)
            self._done = done
            return done

    def lag(self) -> tuple[int, float | None]:
        """Changes not applied when last seen, and when the oldest event of them was received."""
        behind = self._events.position().seq - self._done
        return max(0, behind), self._events.oldest_after(self._done) if behind > 0 else None

    def rebuild(self) -> None:
        """Let the next `follow` write every user anew."""
        with self._events.follower_lock():
            self._set_checkpoint("", 0)

    def _checkpoint(self, log_id: str) -> int | None:
        """None: this store has not followed this log."""
        log_id_name, seq_name = f"{LIVE_CHECKPOINT}:log_id", f"{LIVE_CHECKPOINT}:seq"
        with unavailable("read the live features' checkpoint"):
            row = self._session.read_one([log_id_name, seq_name], CATALOGUE, CATALOGUE_ID)
        found, seq = (row[name.replace(":", "__")] for name in (log_id_name, seq_name))
        return seq if found == log_id else None

    def _set_checkpoint(self, log_id: str, seq: int) -> None:
        with unavailable("write the live features' checkpoint"):
            values = protos({"log_id": log_id, "seq": seq})
            write_rows(self._session.store, LIVE_CHECKPOINT, [(CATALOGUE_ID, values, 0)])

    def _apply(self, after: int) -> int:
        changes = self._events.changes(after, PORTION)
        self._write(changes.users, changes.deleted)
        return changes.upto

    def _write_all(self, head: int) -> int:
        """Every user once; what happens meanwhile is applied in between."""
        log.info("writing the live features of all users")
        started, users, last, done = time.monotonic(), 0, "", head
        while page := self._events.user_ids(after=last, limit=PORTION):
            self._write(page)
            users, last = users + len(page), page[-1]
            done = self._apply(done)
        log.info("wrote the live features of %d users in %.1f s", users, time.monotonic() - started)
        return done

    def _write(self, users: Sequence[str], deleted: Sequence[str] | None = None) -> None:
        """Write the rows of users; of those deleted (None: ever), also blank the run's rows."""
        states = self._events.states(users, self._session.history_length)
        with unavailable("write live features"):
            rows = ((user, _row(state), _newest(state)) for user, state in states.items())
            write_rows(self._session.store, USER_LIVE, rows)
        if deleted is None:
            deleted = [user for user, state in states.items() if state.deleted_at is not None]
        if deleted:
            forget(self._settings, {USER_PROFILE: deleted, USER_HISTORY: deleted})


def _row(state: UserState) -> dict[str, Any]:
    fields = json.dumps(dict(state.fields)) if state.fields else None
    history = values_of(state.history) if state.history else {}
    return protos({**history, "fields": fields, "deleted_at": state.deleted_at})


def _newest(state: UserState) -> float:
    return state.history[-1].timestamp if state.history else 0
