"""Tables of the event log, in SQLite or PostgreSQL by URL; the contract of who writes and reads it.

The log is the truth: online histories, training runs and popularity are rebuilt from it. Every
change has a sequence number `seq` from one counter (`log_head`) that a writer holds locked until
it commits. So numbers ascend in the order in which changes become visible, across tables and
writers, and a reader that has seen everything up to `log_head.seq` misses nothing.

- `events`: who did what when; `event_id` is unique. `timestamp` is whole Unix seconds as in all
  other tables. `impression` (item ids shown) and `context` (fields of the request) are JSON.
- `users`, `items`: the newest fields of each, a JSON object; a new write replaces the row.
- `deleted_users`: users whose rows were removed on request. Rows of such a user with a higher
  `seq` are from after they came back.
"""

import sqlite3
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from model.errors import InputError, UnavailableError

metadata = sa.MetaData()

# An INTEGER PRIMARY KEY is SQLite's own row number: no second index.
_Seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_Json = sa.JSON(none_as_null=True)

log_head = sa.Table(
    "log_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # the one row: 1
    sa.Column("seq", sa.BigInteger, nullable=False),  # of the newest change, 0 in an empty log
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("log_id", sa.Text, nullable=False),  # random: tells a new log from an emptied one
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", _Seq, primary_key=True, autoincrement=False),
    sa.Column("event_id", sa.Text, nullable=False, unique=True),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("item_id", sa.Text, nullable=False),
    sa.Column("timestamp", sa.BigInteger, nullable=False),
    sa.Column("event_type", sa.Text),
    sa.Column("event_value", sa.Double),
    sa.Column("impression", _Json),
    sa.Column("context", _Json),
    sa.Column("received_at", sa.Double, nullable=False),  # Unix seconds, by the collector's clock
    sa.Index("events_of_user", "user_id", "timestamp", "seq"),
    sa.Index("events_in_time", "timestamp"),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("fields", _Json, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("received_at", sa.Double, nullable=False),
)

items = sa.Table(
    "items",
    metadata,
    sa.Column("item_id", sa.Text, primary_key=True),
    sa.Column("fields", _Json, nullable=False),
    sa.Column("created_at", sa.BigInteger),  # Unix seconds, as the caller says
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("received_at", sa.Double, nullable=False),
)

deleted_users = sa.Table(
    "deleted_users",
    metadata,
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("deleted_at", sa.BigInteger, nullable=False),  # Unix seconds
)

# What was removed with a user, so that an event that is sent again does not come back.
deleted_events = sa.Table(
    "deleted_events",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),  # of the event_id
)

FORMAT = 1  # of these tables
LOCK_SECONDS = 5  # a writer waits this long for another
STATEMENT_SECONDS = 60
ERASE_WAIT_MILLISECONDS = 50  # for readers, while nobody can write
WRITES = "hrnn_writes"  # execution option of connections that write


def parse_url(url: str) -> URL:
    """A `sqlite:///path` or `postgresql://user@host/database` URL.

    Raises:
        InputError: neither; the message does not repeat the URL, which may hold a password.
    """
    try:
        parsed = make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        parsed = None
    kind = parsed.get_backend_name() if parsed is not None else ""
    if parsed is None or kind not in ("sqlite", "postgresql") or not parsed.database:
        raise InputError(
            "the event log's address is not sqlite:///PATH or postgresql://USER@HOST/DATABASE"
        )
    return parsed.set(drivername="sqlite" if kind == "sqlite" else "postgresql+psycopg")


def open_engine(url: str, *, create: bool = False) -> sa.Engine:
    """An engine whose committed transactions survive kill −9 and power loss.

    Connections with the execution option `WRITES` take SQLite's write lock when they begin;
    others read a snapshot and never wait for a writer.

    Args:
        create: make the file and the tables where they are missing.

    Raises:
        InputError: not an address of an event log, or no log is there and `create` is false.
        UnavailableError: the database cannot be reached or used.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite(parsed, create)
    else:
        engine = sa.create_engine(
            parsed,
            pool_pre_ping=True,
            pool_size=4,
            connect_args={
                "connect_timeout": LOCK_SECONDS,
                # A peer that vanished without a word must not hold a thread here, nor a lock there.
                "tcp_user_timeout": STATEMENT_SECONDS * 1000,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "options": "-c synchronous_commit=on"
                " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
                f" -c lock_timeout={LOCK_SECONDS}s -c statement_timeout={STATEMENT_SECONDS}s"
                # Text is stored as sent, whatever the client's locale.
                " -c client_encoding=UTF8",
            },
        )
    try:
        if create:
            _create(engine)
        elif not sa.inspect(engine).has_table("log_head"):
            raise InputError("there is no event log at this address: its tables are missing")
        with engine.connect() as connection:
            found = connection.scalar(sa.select(log_head.c.format))
        if found != FORMAT:
            raise InputError(
                f"the event log has format {found}, this program reads format {FORMAT}"
            )
    except sa.exc.SQLAlchemyError as error:
        engine.dispose()
        # Only the type: messages hold addresses and sometimes passwords.
        raise UnavailableError(f"cannot open the event log: {cause(error)}") from error
    except InputError:
        engine.dispose()
        raise
    except OSError as error:
        engine.dispose()
        raise UnavailableError(f"cannot open the event log: {error.strerror}") from error
    return engine


def cause(error: BaseException) -> str:
    """What a database error is, without its text."""
    original = getattr(error, "orig", None)
    return type(original or error).__name__


def _sqlite(url: URL, create: bool) -> sa.Engine:
    path = Path(url.database or "")
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise InputError(f"{path}: no event log there")
    engine = sa.create_engine(url, connect_args={"timeout": LOCK_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        _use_wal(connection)
        for pragma in (
            "synchronous=FULL",  # in WAL mode NORMAL loses acknowledged commits with the power
            "secure_delete=ON",  # a deleted user's bytes are overwritten
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get(WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: Any) -> None:
    """Where two do this to a new file at once, SQLite refuses one of them without waiting."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _create(engine: sa.Engine) -> None:
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            # CREATE TABLE IF NOT EXISTS races with itself.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x68726E6E)))
        metadata.create_all(connection)
        if connection.execute(sa.select(log_head.c.seq)).first() is None:
            row = {"id": 1, "seq": 0, "format": FORMAT, "log_id": uuid4().hex}
            connection.execute(log_head.insert(), row)
