"""Using the feature store: register, fill, read and push. Feast is imported when first used.

Both online stores are last-write-wins here (Redis with `skip_dedup`), so whatever must not go
back in time is merged or compared before it is written. Reads and writes of one user by several
processes at once can lose a push between its read and its write; the event log repairs that.
"""

import contextlib
import json
import logging
import math
import os
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq

from feature_repo import snapshot as snapshots
from feature_repo.connection import open_existing, open_store, quiet, unavailable
from feature_repo.names import (
    CATALOGUE_ID,
    EVENT_TIMESTAMP,
    FIELD_TAG,
    FIRST_SEEN,
    HISTORY_LENGTH_TAG,
    JOIN_KEY,
    SERVING_TREND,
    SERVING_USER,
    TREND_SNAPSHOT,
    USER,
    USER_HISTORY,
    USER_PROFILE,
    VIEW_ENTITY,
    ViewOptions,
)
from feature_repo.online import BATCH_ROWS, Row, batches, protos, write_rows
from feature_repo.settings import FeatureStoreSettings
from model.errors import UnavailableError
from model.query import Event, FieldValue
from model.schema import Schema
from model.trends import TrendSnapshot

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

__all__ = [
    "FeatureReader",
    "FeatureStoreSettings",
    "FeatureWriter",
    "UserFeatures",
    "ViewOptions",
    "applied",
    "apply",
    "forget",
    "materialise",
]

log = logging.getLogger("hrnn.features")

HISTORY_FEATURES = ("item_ids", "timestamps", "event_types", "event_values", "log_end")


@dataclass(frozen=True)
class UserFeatures:
    """What the store knows of a user; `profile` holds non-missing fields by the user's names."""

    known: bool
    profile: dict[str, FieldValue] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)  # oldest first


UNKNOWN = UserFeatures(known=False)


def apply(
    settings: FeatureStoreSettings, schema: Schema, options: ViewOptions | None = None
) -> "FeatureStore":
    """Register entities, views and services; safe to repeat and after a change of the schema.

    Raises:
        InputError: field names that cannot be told apart.
        UnavailableError: the registry or the online store cannot be written.
    """
    options = options or ViewOptions()
    with unavailable("register the features"):
        from feature_repo.definitions import build

        definitions = build(settings.sources, schema, options)
        settings.sources.mkdir(parents=True, exist_ok=True)
        document = {"schema": schema.model_dump(mode="json"), "options": options.model_dump()}
        _write_atomically(_applied_path(settings), json.dumps(document, indent=2) + "\n")
        if settings.online == "sqlite":
            # Readers in other processes then never wait for a writer; a property of the file.
            with contextlib.closing(sqlite3.connect(settings.online_path)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        store = open_store(settings)
        with quiet():
            store.apply(definitions.objects())
    return store


def applied(settings: FeatureStoreSettings) -> tuple[Schema, ViewOptions]:
    """Schema and options of the last `apply`.

    Raises:
        UnavailableError: nothing was applied yet.
    """
    path = _applied_path(settings)
    if not path.exists():
        raise UnavailableError(
            f"no feature store in {settings.path}; run the pipeline (or its features step) first"
        )
    document = json.loads(path.read_text())
    return (
        Schema.parse(document["schema"], path.name),
        ViewOptions.parse(document["options"], path.name),
    )


def materialise(
    settings: FeatureStoreSettings, as_of: int, views: Sequence[str] = tuple(VIEW_ENTITY)
) -> dict[str, int]:
    """Load the sources into the online store; returns the rows written by view.

    Pushed events at or after `as_of` stay in a history; everything before it comes from the log.

    Args:
        as_of: Unix seconds; rows that became visible later are left out.

    Raises:
        UnavailableError: a source or the online store cannot be used.
    """
    with unavailable("materialise the features"):
        store = open_existing(settings)
        rows = {}
        for view in views:
            if view == USER_HISTORY:
                rows[view] = _materialise_histories(store, settings, as_of)
                continue
            ttl = store.get_feature_view(view).ttl
            end = datetime.fromtimestamp(as_of, UTC)
            start = end - ttl if ttl else datetime.fromtimestamp(0, UTC)
            # Not materialize_incremental: on data of past years it loads nothing, silently.
            with quiet():
                store.materialize(start, end, feature_views=[view])
            rows[view] = _count_keys(
                settings.pattern(view), JOIN_KEY[VIEW_ENTITY[view]], start, end
            )
    return rows


def forget(settings: FeatureStoreSettings, keys: Mapping[str, Iterable[str]]) -> None:
    """Blank the online rows of entities by view; a blanked user is unknown.

    Feast has no deletion of single rows: the key stays, its values go.

    Raises:
        UnavailableError: the online store cannot be written.
    """
    with unavailable("forget rows"):
        store = open_existing(settings)
        for view, gone in keys.items():
            write_rows(store, view, ((key, {}, 0) for key in gone))


class FeatureReader:
    """Reads the online store; thread-safe.

    A call blocks until the store answers (Redis: at most its socket time-outs); deadlines are the
    caller's. Feast does not enforce a view's TTL online, so it is checked here against the
    log's own time, the newest snapshot's `as_of`. A newly applied registry is noticed by `trend`.

    Raises:
        UnavailableError: here and in every method, when the store cannot be read.
    """

    def __init__(self, settings: FeatureStoreSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        with unavailable("open the feature store"):
            self._session = _Session.open(settings)
        self._now: int | None = None  # Unix seconds of the log; None: not read yet

    def user(self, user_id: str) -> UserFeatures:
        """Profile and history; an unknown user is no error."""
        if self._now is None:
            self.trend()
        with unavailable("read a user's features"):
            session = self._session
            row = session.read_one(session.user, USER, user_id)
            history = _History.of(row)
            if row[FIRST_SEEN] is None and not history.events:
                return UNKNOWN
            events = history.events
            if self._now and session.history_ttl and events:
                age = self._now - events[-1].timestamp
                events = [] if age > session.history_ttl else events
            profile = {
                name: value
                for feature, name in session.profile_fields.items()
                if (value := row[feature]) is not None
            }
            return UserFeatures(known=True, profile=profile, history=events)

    def trend(self) -> TrendSnapshot | None:
        """The snapshot in force, exactly as written; None when there is none."""
        with unavailable("read the trend snapshot"):
            self._follow_registry()
            session = self._session
            snapshot = snapshots.from_row(
                session.read_one(session.trend, "catalogue", CATALOGUE_ID)
            )
            self._now = snapshot.as_of if snapshot else 0
            return snapshot

    def _follow_registry(self) -> None:
        if _stamp(self._settings.registry_path) == self._session.stamp:
            return
        with self._lock:
            try:
                self._session = _Session.open(self._settings)
            except Exception:
                # Half written by an apply that is under way; the next call tries again.
                log.warning("the feature registry has changed but cannot be read yet")


class FeatureWriter:
    """Pushes live data into the online store; thread-safe within a process.

    Raises:
        UnavailableError: here and in every method, when the store cannot be used.
    """

    def __init__(self, settings: FeatureStoreSettings) -> None:
        with unavailable("open the feature store"):
            self._session = _Session.open(settings)
        self._lock = threading.Lock()

    def push_history(self, user_id: str, events: Sequence[Event]) -> None:
        """Add one user's events; see `push_histories`."""
        self.push_histories({user_id: events})

    def push_histories(self, events: Mapping[str, Sequence[Event]]) -> None:
        """Add events to histories, in any order: late ones are sorted in, repeats count once.

        The newest `history_length` events are kept. Timestamps are floored to whole seconds.
        """
        users = [user for user, new in events.items() if new]
        with self._lock, unavailable("push events"):
            store, length = self._session.store, self._session.history_length
            for batch in batches(users):
                stored = _read_histories(store, batch)
                merged = (
                    (user, _History(_merge(old.events, events[user], length), old.log_end))
                    for user, old in zip(batch, stored, strict=True)
                )
                write_rows(store, USER_HISTORY, (_history_row(user, h) for user, h in merged))

    def push_trend(self, snapshot: TrendSnapshot) -> bool:
        """Put a snapshot in force unless a newer one is; returns whether it was written."""
        with self._lock, unavailable("push a trend snapshot"):
            session = self._session
            current = session.read_one(session.trend, "catalogue", CATALOGUE_ID)
            if current["as_of"] is not None and current["as_of"] > snapshot.as_of:
                return False
            values = protos(snapshots.to_row(snapshot))
            write_rows(session.store, TREND_SNAPSHOT, [(CATALOGUE_ID, values, snapshot.as_of)])
            return True


@dataclass(frozen=True)
class _Session:
    """An opened store with the services looked up once (each look-up costs ~0.7 ms)."""

    store: "FeatureStore"
    user: "FeatureService"
    trend: "FeatureService"
    profile_fields: dict[str, str]  # feature → the user's name for it
    history_ttl: float  # seconds, 0 = for ever
    history_length: int
    stamp: tuple[int, int]

    @classmethod
    def open(cls, settings: FeatureStoreSettings) -> "_Session":
        stamp = _stamp(settings.registry_path)  # before reading: a change meanwhile is seen later
        store = open_existing(settings)
        profile = store.get_feature_view(USER_PROFILE)
        history = store.get_feature_view(USER_HISTORY)
        return cls(
            store=store,
            user=store.get_feature_service(SERVING_USER),
            trend=store.get_feature_service(SERVING_TREND),
            profile_fields={
                f.name: f.tags[FIELD_TAG] for f in profile.features if FIELD_TAG in f.tags
            },
            history_ttl=history.ttl.total_seconds() if history.ttl else 0.0,
            history_length=int(history.tags[HISTORY_LENGTH_TAG]),
            stamp=stamp,
        )

    def read_one(self, service: "FeatureService", entity: str, key: str) -> dict[str, Any]:
        answer = self.store.get_online_features(
            features=service, entity_rows=[{JOIN_KEY[entity]: key}]
        )
        return {name: values[0] for name, values in answer.to_dict().items()}


class _History(NamedTuple):
    """The newest events, oldest first; those before `log_end` (Unix seconds) are from the log."""

    events: list[Event]
    log_end: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "_History":
        events = [
            Event(item, time, kind or None, None if math.isnan(value) else value)
            for item, time, kind, value in zip(
                row["item_ids"] or (),
                row["timestamps"] or (),
                row["event_types"] or (),
                row["event_values"] or (),
                strict=True,
            )
        ]
        return cls(events, row["log_end"] or 0)


def _merge(old: Sequence[Event], new: Sequence[Event], length: int) -> list[Event]:
    """Union by event time, old before new in one second, newest `length` kept.

    An event present n times on one side and m times on the other ends up max(n, m) times: a
    repeated push changes nothing, yet two plays of one song in a second remain two.
    """
    held = Counter(old)
    merged = list(old)
    for event in new:
        event = Event(event.item_id, math.floor(event.timestamp), event.event_type, event.value)
        if held[event] > 0:
            held[event] -= 1
        else:
            merged.append(event)
    merged.sort(key=lambda e: e.timestamp)
    return merged[-length:]


def _materialise_histories(
    store: "FeatureStore", settings: FeatureStoreSettings, as_of: int
) -> int:
    length = int(store.get_feature_view(USER_HISTORY).tags[HISTORY_LENGTH_TAG])
    rows = 0
    with pq.ParquetFile(settings.source(USER_HISTORY)) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            new = {r[JOIN_KEY[USER]]: _History.of(r) for r in batch.to_pylist()}
            stored = _read_histories(store, [*new])
            merged = []
            for (user, history), old in zip(new.items(), stored, strict=True):
                # Older events of the store are the log's business: it may have been corrected.
                live = [e for e in old.events if e.timestamp >= max(old.log_end, as_of)]
                events = _merge(history.events, live, length)
                merged.append(_history_row(user, _History(events, as_of)))
            write_rows(store, USER_HISTORY, merged)
            rows += len(merged)
    return rows


def _read_histories(store: "FeatureStore", users: Sequence[str]) -> list[_History]:
    if not users:
        return []
    columns = store.get_online_features(
        features=[f"{USER_HISTORY}:{name}" for name in HISTORY_FEATURES],
        entity_rows=[{JOIN_KEY[USER]: user} for user in users],
    ).to_dict()
    return [
        _History.of({name: columns[name][i] for name in HISTORY_FEATURES})
        for i in range(len(users))
    ]


def _history_row(user: str, history: _History) -> Row:
    events = history.events
    values = {
        "item_ids": [e.item_id for e in events],
        "timestamps": [int(e.timestamp) for e in events],
        "event_types": [e.event_type or "" for e in events],
        "event_values": [math.nan if e.value is None else float(e.value) for e in events],
        "log_end": history.log_end,
    }
    # Visible one second after the last event, as in the source.
    return user, protos(values), (events[-1].timestamp + 1 if events else 0)


def _count_keys(path: Path, key: str, start: datetime, end: datetime) -> int:
    import duckdb

    with duckdb.connect() as connection:
        query = (
            f'SELECT count(DISTINCT "{key}") FROM read_parquet($1)'  # noqa: S608 - our own name
            f" WHERE {EVENT_TIMESTAMP} BETWEEN $2 AND $3"
        )
        found = connection.execute(query, [str(path), start, end]).fetchone()
    return int(found[0]) if found else 0


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _applied_path(settings: FeatureStoreSettings) -> Path:
    return settings.path / "applied.json"


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
