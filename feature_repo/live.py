"""Online features that follow the event log.

A user's live row is computed from the log's state alone, so it does not matter in which order or
how often events arrive or are applied. Followers of one log take turns: whoever holds the log's
follower lock reads the changes since the checkpoint, writes the rows of the users concerned and
then the checkpoint. The checkpoint lies in the online store itself: a store that has lost rows
has lost its checkpoint with them, and is filled again from what is left of it.

No online store can refuse the write of a follower that was frozen while others went on. So a
follower reads through the session that holds the lock, which fails once the lock is lost, and one
whose turn did not end well begins the next at the oldest change that it may have written over.

When all users are written anew, their rows belong to a new generation. Readers ignore older rows
once the checkpoint is of it: users that the log does not know (any more) are gone with them.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from feature_repo.batches import batches
from feature_repo.connection import unavailable
from feature_repo.event_log import EventLog, Position, Turn, UserState
from feature_repo.histories import values_of
from feature_repo.names import (
    CATALOGUE_ID,
    LIVE_CHECKPOINT,
    USER_HISTORY,
    USER_LIVE,
    USER_PROFILE,
)
from feature_repo.online import (
    erase_traces,
    is_wrong_type,
    overwrite,
    protos,
    read_rows,
    relax,
    remove_wrong_types,
    rows_or_errors,
    write_rows,
)
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import Session

log = logging.getLogger("hrnn.features")

PORTION = 2000  # changes applied before the checkpoint moves
# Further behind, all users are written once instead of one by one in the order of their events.
REBUILD_AFTER = 100_000
REGISTRY_SECONDS = 1.0  # how often a newly applied registry is looked for


@dataclass(frozen=True)
class Checkpoint:
    """How far a store has followed which log; `generation` of the rows that count."""

    log_id: str
    seq: int
    generation: int


class LiveFeatures:
    """One follower; not thread-safe.

    Raises:
        UnavailableError: here and in every method, when the online store or the log cannot be used.
    """

    def __init__(self, settings: FeatureStoreSettings, events: EventLog) -> None:
        self._settings = settings
        self._events = events
        self._done: int | None = None  # the last change known to be applied
        self._unsure: int | None = None  # what came later may be overwritten with older rows
        self.replaced = 0  # keys or rows of the online store that held no features
        self._traces = True  # of deleted rows may be in the store's files
        with unavailable("open the feature store"):
            self._use(Session.open(settings))

    def follow(self, progress: Callable[[int], None] = lambda seq: None) -> int:
        """Apply what is in the log by now; returns the number of the last change applied.

        Args:
            progress: told the same after each portion.
        """
        with self._events.follower_lock() as turn:
            self._follow_registry()
            head = turn.position()
            held = self._checkpoint()
            known = held.log_id == head.log_id
            first = min(held.seq, held.seq if self._unsure is None else self._unsure)
            self._unsure = first if known else 0
            if known and head.seq - REBUILD_AFTER <= first <= held.seq <= head.seq:
                at = replace(held, seq=first)
            else:
                at = self._write_all(turn, head, held)
            self._applied(at, progress)
            while at.seq < head.seq:
                at = self._apply(turn, at)
                self._set_checkpoint(turn, at)
                self._applied(at, progress)
            if self._traces:
                with unavailable("erase deleted rows"):
                    self._traces = not erase_traces(self._session.store)
        self._unsure = None
        return at.seq

    def lag(self) -> tuple[int, float | None] | None:
        """Changes not applied when last seen, and when the oldest event of them was received.

        None: not known, as the store could not be read yet.
        """
        if self._done is None:
            return None
        behind = self._events.position().seq - self._done
        return max(0, behind), self._events.oldest_after(self._done) if behind > 0 else None

    def rebuild(self) -> None:
        """Let the next `follow` write every user anew."""
        with self._events.follower_lock() as turn:
            self._set_checkpoint(turn, replace(self._checkpoint(), log_id="", seq=0))

    def close(self) -> None:
        """Give up the log's connections."""
        self._events.close()

    def _use(self, session: Session) -> None:
        self._session = session
        self._registry_read = time.monotonic()
        self._views = {
            name: session.store.get_feature_view(name)
            for name in (LIVE_CHECKPOINT, USER_LIVE, USER_PROFILE, USER_HISTORY)
        }
        relax(session.store)
        overwrite(session.store)

    def _follow_registry(self) -> None:
        if time.monotonic() - self._registry_read >= REGISTRY_SECONDS:
            self._registry_read = time.monotonic()
            session = self._session.current(self._settings)
            if session is not self._session:
                with unavailable("read the feature registry"):
                    self._use(session)

    def _applied(self, at: Checkpoint, progress: Callable[[int], None]) -> None:
        self._done = at.seq
        progress(at.seq)

    def _checkpoint(self) -> Checkpoint:
        """An empty `log_id`: this store has not followed any log."""
        with unavailable("read the live features' checkpoint"):
            (row,) = self._read(LIVE_CHECKPOINT, [CATALOGUE_ID])
        return Checkpoint(row.get("log_id") or "", row.get("seq") or 0, row.get("generation") or 0)

    def _set_checkpoint(self, turn: Turn, at: Checkpoint) -> None:
        turn.check()
        with unavailable("write the live features' checkpoint"):
            values = protos({"log_id": at.log_id, "seq": at.seq, "generation": at.generation})
            self._write(LIVE_CHECKPOINT, [(CATALOGUE_ID, values, 0)])

    def _apply(self, turn: Turn, at: Checkpoint) -> Checkpoint:
        changes = turn.changes(at.seq, PORTION)
        # Their rows may hold the only record of a deletion, which this would overwrite.
        self._repeat_deletions(turn, changes.users)
        self._write_users(turn, changes.users, at.generation, changes.deleted)
        return replace(at, seq=changes.upto)

    def _write_all(self, turn: Turn, head: Position, held: Checkpoint) -> Checkpoint:
        """Every user once; what happens meanwhile is applied in between."""
        log.info("writing the live features of all users")
        started, users, last = time.monotonic(), 0, ""
        # Later than any before, also where the store has lost its checkpoint.
        at = Checkpoint(head.log_id, head.seq, max(held.generation + 1, int(time.time())))
        while page := turn.user_ids(after=last, limit=PORTION):
            self._repeat_deletions(turn, page)
            self._write_users(turn, page, at.generation)
            users, last = users + len(page), page[-1]
            at = self._apply(turn, at)
        self._set_checkpoint(turn, at)
        log.info("wrote the live features of %d users in %.1f s", users, time.monotonic() - started)
        return at

    def _repeat_deletions(self, turn: Turn, users: Sequence[str]) -> None:
        """Delete from the log who was deleted from the store: a log restored from a backup of
        before the deletion has them again."""
        for batch in batches(users):
            with unavailable("read live features"):
                rows = self._read(USER_LIVE, batch, "deleted_at")
            online = {
                u: row["deleted_at"]
                for u, row in zip(batch, rows, strict=True)
                if "deleted_at" in row
            }
            if not online:
                continue
            states = turn.states(list(online), 1)
            missing = {u: at for u, at in online.items() if (states[u].deleted_at or -1) < at}
            if not missing:
                continue
            with self._events.write() as transaction:
                removed = sum(transaction.repeat_deletion(u, at) for u, at in missing.items())
            log.warning(
                "the event log lacked %d deletions of users that the online store knows: repeated,"
                " %d events removed",
                len(missing),
                removed,
            )

    def _write_users(
        self,
        turn: Turn,
        users: Sequence[str],
        generation: int,
        deleted: Sequence[str] | None = None,
    ) -> None:
        """Write the rows of users; of those deleted (None: ever), also blank the run's rows."""
        gone = set(deleted or ())
        for batch in batches(users):
            states = turn.states(batch, self._session.history_length)
            with unavailable("write live features"):
                self._write(
                    USER_LIVE,
                    ((u, _row(state, generation), _newest(state)) for u, state in states.items()),
                )
                if deleted is None:
                    gone = {u for u, state in states.items() if state.deleted_at is not None}
                for view in (USER_PROFILE, USER_HISTORY):
                    self._write(view, [(user, {}, 0) for user in batch if user in gone])
            self._traces = self._traces or not gone.isdisjoint(batch)

    def _write(self, view: str, rows: Any) -> None:
        self.replaced += write_rows(self._session.store, self._views[view], rows)

    def _read(self, name: str, keys: Sequence[str], *features: str) -> list[dict[str, Any]]:
        """Rows; one that cannot be read is as good as none, and is written anew by who asked."""
        store, view = self._session.store, self._views[name]

        def read(some: Sequence[str]) -> list[dict[str, Any]]:
            return read_rows(store, view, some, features)

        try:
            rows = rows_or_errors(read, keys)
        except Exception as error:
            if not is_wrong_type(error):
                raise
            self.replaced += remove_wrong_types(store, view, keys)
            rows = rows_or_errors(read, keys)
        readable = [{} if isinstance(row, Exception) else row for row in rows]
        if unreadable := sum(isinstance(row, Exception) for row in rows):
            self.replaced += unreadable
            log.warning("%d rows of the online store could not be read: replaced", unreadable)
        return readable


def _row(state: UserState, generation: int) -> dict[str, Any]:
    fields = json.dumps(dict(state.fields)) if state.fields else None
    history = values_of(state.history) if state.history else {}
    own = {"fields": fields, "deleted_at": state.deleted_at, "generation": generation}
    return protos({**history, **own})


def _newest(state: UserState) -> float:
    return state.history[-1].timestamp if state.history else 0
