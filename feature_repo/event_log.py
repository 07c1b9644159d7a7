"""The event log: durable appends, each event once, and what its followers read.

`feature_repo.event_tables` has the tables and the order they promise.
"""

import fcntl
import hashlib
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from feature_repo import event_tables
from feature_repo.batches import batches
from feature_repo.event_tables import (
    ERASE_WAIT_MILLISECONDS,
    WRITES,
    cause,
    deleted_events,
    deleted_users,
    events,
    items,
    log_head,
    open_engine,
    users,
)
from model.errors import InputError, UnavailableError
from model.query import Event, FieldValue

Fields = Mapping[str, FieldValue]

_FOLLOWERS = 0x68726E6F  # advisory lock of PostgreSQL
AHEAD_SECONDS = 86_400  # events further in the future do not move a deletion's moment
FROZEN_SECONDS = 15  # without a sign of life, a follower or a writer loses its lock


class RefusedError(InputError):
    """The database cannot hold a value of the write; nothing of it was kept."""


class StorageFullError(UnavailableError):
    """The log's disk is full; nothing of the refused write was kept."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """One event to append; `timestamp` in whole Unix seconds."""

    event_id: str
    user_id: str
    item_id: str
    timestamp: int
    event_type: str | None = None
    event_value: float | None = None
    impression: tuple[str, ...] | None = None  # items shown
    context: Fields | None = None  # fields of the request


class Outcome(StrEnum):
    """What became of an event."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # this event_id is in the log already
    USER_DELETED = "user_deleted"  # of before the deletion of the user's data


@dataclass(frozen=True, slots=True)
class Item:
    """An item as last written to the log; `created_at` in Unix seconds."""

    item_id: str
    fields: Fields
    created_at: int | None
    seq: int


@dataclass(frozen=True, slots=True)
class Position:
    """Number of the newest change of a log, and which log it is."""

    log_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed in (after, upto]: ids of users whose events, fields or deletion did."""

    users: tuple[str, ...]
    deleted: tuple[str, ...]
    upto: int


@dataclass(frozen=True, slots=True)
class UserState:
    """All that online features need to know of a user; a function of the log's state alone."""

    history: tuple[Event, ...] = ()  # the newest ones, oldest first; ties in the log's order
    fields: Fields = field(default_factory=dict)
    deleted_at: int | None = None  # Unix seconds: what happened until then is gone


class Transaction:
    """Writes that become durable together; see `EventLog.write`."""

    def __init__(self, connection: sa.Connection, now: float) -> None:
        self._connection = connection
        self._now = now
        # Also the lock that other writers wait for, until this transaction ends.
        self.seq: int = connection.execute(
            sa.update(log_head).values(seq=log_head.c.seq).returning(log_head.c.seq)
        ).scalar_one()

    def append(self, new: Sequence[NewEvent]) -> list[Outcome]:
        """Add events; the first one with an `event_id` counts."""
        known = self._event_ids(e.event_id for e in new)
        deleted = self._deleted({e.user_id for e in new})
        gone = self._gone([e.event_id for e in new if e.user_id in deleted])
        outcomes, rows = [], []
        for event in new:
            if event.event_id in known:
                outcomes.append(Outcome.DUPLICATE)
                continue
            if event.timestamp <= deleted.get(event.user_id, -1) or event.event_id in gone:
                outcomes.append(Outcome.USER_DELETED)
                continue
            known.add(event.event_id)
            outcomes.append(Outcome.STORED)
            rows.append(
                {
                    "seq": self._next(),
                    "event_id": event.event_id,
                    "user_id": event.user_id,
                    "item_id": event.item_id,
                    "timestamp": event.timestamp,
                    "event_type": event.event_type,
                    "event_value": event.event_value,
                    "impression": None if event.impression is None else list(event.impression),
                    "context": None if event.context is None else dict(event.context),
                    "received_at": self._now,
                }
            )
        if rows:
            self._connection.execute(events.insert(), rows)
        return outcomes

    def known(self, key: str, ids: Iterable[str]) -> set[str]:
        """Those that have fields in the log already, or are deleted; `key`: user_id or item_id."""
        tables = {"user_id": (users, deleted_users), "item_id": (items,)}[key]
        found: set[str] = set()
        for batch in batches(ids):
            for table in tables:
                query = sa.select(table.c[key]).where(table.c[key].in_(batch))
                found.update(self._connection.scalars(query))
        return found

    def put_user(self, user_id: str, fields: Fields) -> None:
        """Set all fields of a user."""
        self._put(users, user_id=user_id, fields=dict(fields), received_at=self._now)

    def put_item(self, item_id: str, fields: Fields, created_at: int | None = None) -> None:
        """Set all fields of an item."""
        self._put(
            items,
            item_id=item_id,
            fields=dict(fields),
            created_at=created_at,
            received_at=self._now,
        )

    def delete_user(self, user_id: str) -> int:
        """Remove a user's events and fields; returns the number of events removed.

        The id stays in `deleted_users`, so that features, copies and late events of the past can
        be recognised and removed too, and digests of the events' ids in `deleted_events`, so that
        none of them is stored again, whatever time it has then.
        """
        own = events.c.user_id == user_id
        deleted_at = int(self._now)
        ahead = self._connection.scalar(
            # Clocks differ: an event may lie somewhat in the future.
            sa.select(sa.func.max(events.c.timestamp)).where(
                own, events.c.timestamp < self._now + AHEAD_SECONDS
            )
        )
        return self._remove(user_id, max(deleted_at, ahead or 0), own, users.c.user_id == user_id)

    def repeat_deletion(self, user_id: str, deleted_at: int) -> int:
        """The same as it was done before, as of then; what happened later stays."""
        return self._remove(
            user_id,
            deleted_at,
            sa.and_(events.c.user_id == user_id, events.c.timestamp <= deleted_at),
            sa.and_(users.c.user_id == user_id, users.c.received_at < deleted_at + 1),
        )

    def _remove(self, user_id: str, deleted_at: int, of_events: Any, of_users: Any) -> int:
        found = self._connection.execute(sa.select(events.c.event_id).where(of_events))
        for batch in batches(found.scalars()):
            # An id may have been removed with another user before, and used again since.
            known = self._gone(batch)
            digests = [{"digest": _digest(i)} for i in batch if i not in known]
            if digests:
                self._connection.execute(deleted_events.insert(), digests)
        gone = self._connection.execute(events.delete().where(of_events))
        self._connection.execute(users.delete().where(of_users))
        self._put(deleted_users, user_id=user_id, deleted_at=deleted_at)
        return gone.rowcount

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _finish(self) -> None:
        self._connection.execute(sa.update(log_head).values(seq=self.seq))

    def _put(self, table: sa.Table, **row: Any) -> None:
        (key,) = table.primary_key.columns
        # A plain delete and insert, the same on both databases; the lock makes it one step.
        self._connection.execute(table.delete().where(key == row[key.name]))
        self._connection.execute(table.insert(), {**row, "seq": self._next()})

    def _event_ids(self, ids: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for batch in batches(ids):
            query = sa.select(events.c.event_id).where(events.c.event_id.in_(batch))
            found.update(self._connection.scalars(query))
        return found

    def _deleted(self, user_ids: Iterable[str]) -> dict[str, int]:
        return _deleted(self._connection, user_ids)

    def _gone(self, event_ids: Sequence[str]) -> set[str]:
        """Those that were removed with their user."""
        by_digest = {_digest(event_id): event_id for event_id in event_ids}
        found: set[str] = set()
        for batch in batches(by_digest):
            query = sa.select(deleted_events.c.digest).where(deleted_events.c.digest.in_(batch))
            found.update(by_digest[bytes(d)] for d in self._connection.scalars(query))
        return found


class Reads(ABC):
    """What can be read of a log."""

    @abstractmethod
    def _read(self) -> AbstractContextManager[sa.Connection]:
        """A connection for one read."""

    def position(self) -> Position:
        """How far the log goes."""
        with self._read() as connection:
            return Position(*connection.execute(sa.select(log_head.c.log_id, log_head.c.seq)).one())

    def last_deletion(self) -> int:
        """Number of the newest deletion of a user; 0: there was none."""
        with self._read() as connection:
            return connection.scalar(sa.select(sa.func.max(deleted_users.c.seq))) or 0

    def oldest_after(self, seq: int) -> float | None:
        """When the first event after `seq` was received, Unix seconds; None: there is none."""
        query = (
            sa.select(events.c.received_at)
            .where(events.c.seq > seq)
            .order_by(events.c.seq)
            .limit(1)
        )
        with self._read() as connection:
            return connection.scalar(query)

    def changes(self, after: int, limit: int = 2000) -> Changes:
        """The users of the next changes after a number, at most `limit` of each kind."""
        tables = (events, users, deleted_users)
        with self._read() as connection:
            upto = connection.execute(sa.select(log_head.c.seq)).scalar_one()
            if upto <= after:
                return Changes((), (), after)
            of_each = [
                sa.select(sa.literal_column(str(kind)).label("kind"), table.c.seq, table.c.user_id)
                .where(table.c.seq > after, table.c.seq <= upto)
                .order_by(table.c.seq)
                .limit(limit)
                .subquery()
                for kind, table in enumerate(tables)
            ]
            # One question for all three, and the same state of the log behind all answers.
            found = connection.execute(sa.union_all(*(sa.select(each) for each in of_each))).all()
        found_of = [sorted(r.seq for r in found if r.kind == kind) for kind in range(len(tables))]
        # Where as many as asked for were found, further ones may follow: come back for them.
        upto = min([upto, *(seqs[-1] for seqs in found_of if len(seqs) == limit)])
        rows = sorted(
            ((r.seq, r.user_id, tables[r.kind]) for r in found if r.seq <= upto),
            key=lambda row: row[0],
        )
        return Changes(
            users=tuple(dict.fromkeys(user for _, user, _ in rows)),
            deleted=tuple(user for _, user, table in rows if table is deleted_users),
            upto=upto,
        )

    def user_ids(self, after: str = "", limit: int = 2000) -> list[str]:
        """All users of the log in the database's order, `limit` at a time."""
        of_each = [
            sa.select(table.c.user_id)
            .distinct()
            .where(table.c.user_id > after)
            .order_by(table.c.user_id)
            .limit(limit)
            .subquery()
            for table in (events, users, deleted_users)
        ]
        query = sa.union(*(sa.select(each.c.user_id) for each in of_each))
        with self._read() as connection:
            return list(connection.scalars(query.order_by("user_id").limit(limit)))

    def states(self, user_ids: Sequence[str], length: int) -> dict[str, UserState]:
        """The newest `length` events, the fields and the deletion of users."""
        histories: dict[str, tuple[Event, ...]] = {}
        fields: dict[str, Fields] = {}
        deleted: dict[str, int] = {}
        with self._read() as connection:
            for batch in batches(dict.fromkeys(user_ids)):
                histories.update(_newest(connection, batch, length))
                query = sa.select(users.c.user_id, users.c.fields).where(users.c.user_id.in_(batch))
                fields.update({row.user_id: row.fields for row in connection.execute(query)})
                deleted.update(_deleted(connection, batch))
        return {
            user: UserState(histories.get(user, ()), fields.get(user, {}), deleted.get(user))
            for user in user_ids
        }

    def items(self, after: int = 0, limit: int = 1000) -> list[Item]:
        """Items written after a number, in the order of their newest writes."""
        query = (
            sa.select(items.c.item_id, items.c.fields, items.c.created_at, items.c.seq)
            .where(items.c.seq > after)
            .order_by(items.c.seq)
            .limit(limit)
        )
        with self._read() as connection:
            return [Item(*row) for row in connection.execute(query)]


class EventLog(Reads):
    """One log; thread-safe.

    Raises:
        UnavailableError: here and in every method, when the database cannot be used.
        StorageFullError: when its disk is full.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, url: str, *, create: bool = False) -> Self:
        """Open the log at a URL; see `open_engine`."""
        return cls(open_engine(url, create=create))

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """One transaction: durable when the block has ended, or nothing of it happened."""
        with _errors("write to"), self.engine.connect() as connection:
            connection = connection.execution_options(**{WRITES: True})
            with connection.begin():
                if connection.dialect.name == "postgresql":
                    # A writer that froze must not keep all others from writing.
                    connection.exec_driver_sql(
                        f"SET LOCAL idle_in_transaction_session_timeout = '{FROZEN_SECONDS}s'"
                    )
                transaction = Transaction(connection, time.time())
                yield transaction
                transaction._finish()

    @contextmanager
    def follower_lock(self) -> Iterator["Turn"]:
        """Held by one follower at a time; freed when its process ends, however it does.

        Raises:
            UnavailableError: another one has held it for `LOCK_SECONDS`; or, out of the block, this
                one has lost it.
        """
        if self.engine.dialect.name == "sqlite":
            # The kernel frees it when the process ends and not before.
            with _file_lock(Path(f"{self.engine.url.database}.follower")):
                yield Turn(self._read)
            return
        with _errors("follow"), self.engine.connect() as connection, connection.begin():
            connection.exec_driver_sql(
                f"SET LOCAL idle_in_transaction_session_timeout = '{FROZEN_SECONDS}s';"
                f" SELECT pg_advisory_xact_lock({_FOLLOWERS})"
            )
            # Each statement sees what was committed before it: no snapshot is kept.
            yield Turn(lambda: nullcontext(connection))

    def erase_traces(self) -> bool | None:
        """Let the database give up the bytes of deleted rows that it still holds.

        SQLite has overwritten them in the table, but its write-ahead log still has the old pages.
        It waits for those who read them, with all writers behind it, so not for long.

        Returns:
            Whether it is done; false: somebody still reads an old state, try again. None: that is
            up to the database (PostgreSQL's VACUUM, on its schedule).
        """
        if self.engine.dialect.name != "sqlite":
            return None
        with _errors("write to"), self.engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {ERASE_WAIT_MILLISECONDS}")
            try:
                busy, _, _ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
            finally:  # the connection goes back to the pool
                wait = 1000 * event_tables.LOCK_SECONDS
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {wait}")
            return not busy

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        """One state of the log: all queries in the block see the same."""
        with _errors("read"), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection


class Turn(Reads):
    """A follower's turn: it reads through the session that holds the lock.

    A read is a sign of life, and fails once the lock is lost: a follower that was frozen for so
    long that another took over finds out before it writes.
    """

    def __init__(self, read: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        self._session = read

    def _read(self) -> AbstractContextManager[sa.Connection]:
        return self._session()

    def check(self) -> None:
        """See that the lock is still held.

        Raises:
            UnavailableError: it is not.
        """
        with self._read() as connection:
            connection.exec_driver_sql("SELECT 1")


def _newest(
    connection: sa.Connection, user_ids: Sequence[str], length: int
) -> dict[str, tuple[Event, ...]]:
    def newest(of: Any) -> sa.Select[Any]:
        """The index gives them in this order: only `length` rows are read, however many exist."""
        return (
            sa.select(
                events.c.user_id,
                events.c.item_id,
                events.c.timestamp,
                events.c.event_type,
                events.c.event_value,
            )
            .where(events.c.user_id == of)
            .order_by(events.c.timestamp.desc(), events.c.seq.desc())
            .limit(length)
        )

    found: dict[str, list[Event]] = defaultdict(list)
    if connection.dialect.name == "postgresql":
        array = sa.cast(list(user_ids), sa.ARRAY(sa.Text))
        asked = sa.func.unnest(array).table_valued("user_id").render_derived("asked")
        each = newest(asked.c.user_id).lateral()
        rows: Iterable[Any] = connection.execute(
            sa.select(each).select_from(asked.join(each, sa.true()))
        )
        for user, *event in rows:
            found[user].append(Event(*event))
    else:
        query = newest(sa.bindparam("asked"))
        for user in user_ids:
            for _, *event in connection.execute(query, {"asked": user}):
                found[user].append(Event(*event))
    return {user: tuple(reversed(newest_first)) for user, newest_first in found.items()}


def _digest(event_id: str) -> bytes:
    return hashlib.blake2b(event_id.encode(), digest_size=16).digest()


def _deleted(connection: sa.Connection, user_ids: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for batch in batches(user_ids):
        query = sa.select(deleted_users.c.user_id, deleted_users.c.deleted_at).where(
            deleted_users.c.user_id.in_(batch)
        )
        found.update(tuple(row) for row in connection.execute(query))
    return found


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + event_tables.LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UnavailableError("another process follows the event log") from None
                time.sleep(0.005)
        yield


@contextmanager
def _errors(action: str) -> Iterator[None]:
    try:
        yield
    except (sa.exc.DataError, sa.exc.IntegrityError) as error:
        raise RefusedError(f"the event log refuses a value: {cause(error)}") from error
    except sa.exc.SQLAlchemyError as error:
        # Only the type: messages hold rows, addresses and sometimes passwords.
        message = f"cannot {action} the event log: {cause(error)}"
        if _is_full(error):
            raise StorageFullError(f"{message}: its disk is full or refuses writes") from error
        raise UnavailableError(message) from error


def _is_full(error: sa.exc.SQLAlchemyError) -> bool:
    original = getattr(error, "orig", None)
    names = (getattr(original, "sqlite_errorname", ""), getattr(original, "sqlstate", "") or "")
    return names[0] in ("SQLITE_FULL", "SQLITE_IOERR_WRITE") or names[1] == "53100"
