"""Using the feature store: register, fill and read. Feast is imported when first used.

Both online stores are last-write-wins here (Redis with `skip_dedup`). So that no writer can undo
another's work, the pipeline and the followers of the event log (`feature_repo.live`) write
different views, and a reader puts a user together from both.
"""

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from feature_repo import fast_redis
from feature_repo import snapshot as snapshots
from feature_repo.batches import BATCH_ROWS
from feature_repo.connection import (
    open_existing,
    open_store,
    quiet,
    registry_stamp,
    unavailable,
)
from feature_repo.histories import events_of, merge, values_of
from feature_repo.names import (
    CATALOGUE,
    CATALOGUE_ID,
    CATALOGUE_POPULARITY,
    EVENT_TIMESTAMP,
    FIELD_TAG,
    FIRST_SEEN,
    HISTORY_LENGTH_TAG,
    JOIN_KEY,
    KIND_TAG,
    LIVE_CHECKPOINT,
    MATERIALISED,
    SERVING_TREND,
    SERVING_USER,
    SERVING_USER_V1,
    USER,
    USER_HISTORY,
    USER_LIVE,
    USER_PROFILE,
    VIEW_ENTITY,
    ViewOptions,
)
from feature_repo.online import (
    Row,
    erase_traces,
    overwrite,
    protos,
    read_row,
    rows_or_errors,
    write_rows,
)
from feature_repo.settings import FeatureStoreSettings, redis_connection
from feature_repo.sources import APPLIED
from model.errors import UnavailableError
from model.query import Event, FieldValue, History
from model.schema import MAX_TIMESTAMP, FieldKind, Schema, fits
from model.trends import TrendSnapshot

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView
    from redis.asyncio import Redis

__all__ = [
    "FeatureReader",
    "FeatureStoreSettings",
    "UserFeatures",
    "ViewOptions",
    "applied",
    "apply",
    "forget",
    "materialise",
]

log = logging.getLogger("hrnn.features")


@dataclass(frozen=True)
class UserFeatures:
    """What the store knows of a user; `profile` holds non-missing fields by the user's names."""

    known: bool
    profile: dict[str, FieldValue] = field(default_factory=dict)
    history: Sequence[Event] = field(default_factory=lambda: History.of(()))  # oldest first


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
    settings: FeatureStoreSettings, as_of: int, views: Sequence[str] = MATERIALISED
) -> dict[str, int]:
    """Load the sources into the online store; returns the rows written by view.

    Args:
        as_of: Unix seconds; rows that became visible later are left out.

    Raises:
        UnavailableError: a source or the online store cannot be used.
    """
    with unavailable("materialise the features"):
        store = open_existing(settings)
        overwrite(store)
        rows = {}
        for view in views:
            if view == USER_HISTORY:
                rows[view] = _materialise_histories(store, settings)
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
        erase_traces(store)  # where somebody reads, the next run or follower does it
    return rows


def forget(settings: FeatureStoreSettings, keys: Mapping[str, Iterable[str]]) -> None:
    """Blank the online rows of entities by view; a blanked user is unknown.

    Feast has no deletion of single rows: the key stays, its values go.

    Raises:
        UnavailableError: the online store cannot be written.
    """
    with unavailable("forget rows"):
        store = open_existing(settings)
        overwrite(store)
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
            self._session = Session.open(settings)
        self._now: int | None = None  # Unix seconds of the log; None: not read yet
        self._newest = 0  # Unix second of the newest event seen in a history
        self._generation = 0  # of live rows: older ones count no more
        self._redis: Redis | None = None  # of `read_users`

    @property
    def asynchronous(self) -> bool:
        """Whether `read_users` can be used, which needs no thread."""
        return self._settings.online == "redis"

    def user(self, user_id: str) -> UserFeatures:
        """Profile and history; an unknown user is no error."""
        (found,) = self.users([user_id])
        if isinstance(found, UnavailableError):
            raise found
        return found

    def users(self, user_ids: Sequence[str]) -> list[UserFeatures | UnavailableError]:
        """Several, by one read; of those whose own row cannot be read, why."""
        if self._now is None:
            self.trend()
        with unavailable("read users' features"):
            session = self._session
            rows = rows_or_errors(lambda some: session.read(session.user, USER, some), user_ids)
            return [self._user_or_error(session, row) for row in rows]

    async def read_users(self, user_ids: Sequence[str]) -> list[UserFeatures | UnavailableError]:
        """The same without blocking, for one event loop; from Redis only."""
        if self._now is None:
            await asyncio.to_thread(self.trend)
        with unavailable("read users' features"):
            if self._redis is None:
                address = redis_connection(self._settings.redis_url or "")
                self._redis = fast_redis.connect(address)
            session = self._session
            assert session.redis is not None  # noqa: S101 - see `asynchronous`
            rows = await session.redis.read(self._redis, user_ids)
            return [self._user_or_error(session, row) for row in rows]

    async def close(self) -> None:
        """Close what `read_users` opened."""
        if self._redis is not None:
            await self._redis.aclose()
            self._redis = None

    def _user_or_error(
        self, session: "Session", row: Mapping[str, Any] | Exception
    ) -> UserFeatures | UnavailableError:
        try:
            if isinstance(row, Exception):
                raise row
            return self._user(session, row)
        except Exception as error:
            return UnavailableError(f"a user's row cannot be read: {type(error).__name__}")

    def _user(self, session: "Session", row: Mapping[str, Any]) -> UserFeatures:
        events = events_of(row, f"{USER_HISTORY}__")
        known = row[f"{USER_PROFILE}__{FIRST_SEEN}"] is not None
        profile = {
            name: value
            for feature, (name, _) in session.profile_fields.items()
            if (value := row[f"{USER_PROFILE}__{feature}"]) is not None
        }
        if session.live:
            # A deletion is never taken back, not even by a log of before it.
            deleted_at = row[f"{USER_LIVE}__deleted_at"]
            if deleted_at is not None:
                known, profile = False, {}
                events = events.take(np.flatnonzero(events.time_L > deleted_at))
        if session.live and (row.get(f"{USER_LIVE}__generation") or 0) >= self._generation:
            events = merge(events, events_of(row, f"{USER_LIVE}__"), session.history_length)
            if text := row[f"{USER_LIVE}__fields"]:
                known = True
                profile = session.with_fields(profile, json.loads(text))
        if (
            events.time_L.min(initial=0) < 0
            or events.time_L.max(initial=0) > MAX_TIMESTAMP
            or (events.value_L is not None and np.isinf(events.value_L).any())
        ):
            raise ValueError("a time before 1970 or after 9999, or a value without bounds")
        newest = events.time_L[-1] if len(events) else 0
        if newest > self._newest:
            self._newest = int(newest)
        if not known and not len(events):
            return UNKNOWN
        if self._now and session.history_ttl:
            age = max(self._now, self._newest_event) - newest
            events = events[:0] if age > session.history_ttl else events
        return UserFeatures(known=True, profile=profile, history=events)

    def trend(self) -> TrendSnapshot | None:
        """The snapshot in force, exactly as written; None when there is none."""
        with unavailable("read the trend snapshot"):
            self._follow_registry()
            session = self._session
            snapshot = snapshots.from_row(session.read_trend())
            self._now = snapshot.as_of if snapshot else 0
            self._generation = session.read_generation()
            return snapshot

    def trend_lag(self) -> tuple[int, int]:
        """How far the log has gone on since the trend was counted, and how long a period is.

        The log's own time is that of the newest event seen in any history that was read (never
        later than the clock): on a historical log nothing goes on, and the trend stays current
        however old it is. A lag of several periods means that refreshes do not happen.

        Returns:
            Seconds from the snapshot's `as_of` to the newest event (0: none is later, or no
            snapshot was read yet), and the seconds between two refreshes (0: not known).
        """
        return (max(0, self._newest_event - self._now) if self._now else 0), self._session.period

    @property
    def _newest_event(self) -> int:
        """Unix second of the newest event seen in any history; never later than the clock."""
        return min(self._newest, int(time.time()))

    def _follow_registry(self) -> None:
        with self._lock:
            self._session = self._session.current(self._settings)


@dataclass(frozen=True)
class Session:
    """An opened store with the services looked up once (each look-up costs ~0.7 ms)."""

    store: "FeatureStore"
    user: "FeatureService"
    trend: "FeatureService"
    profile_fields: dict[str, tuple[str, FieldKind]]  # feature → the user's name for it, its kind
    history_ttl: float  # seconds, 0 = for ever
    history_length: int
    live: bool  # false: an older registry, without the views that follow the event log
    checkpoint: "FeatureView | None"  # of what is live; None: an older registry
    period: int  # seconds between two refreshes of the trend, 0 = not known
    redis: "fast_redis.RedisUsers | None"  # None: another online store
    stamp: Hashable  # of the registry it was opened on

    @classmethod
    def open(cls, settings: FeatureStoreSettings) -> "Session":
        stamp = registry_stamp(settings)  # before reading: a change meanwhile is seen later
        store = open_existing(settings)
        profile = store.get_feature_view(USER_PROFILE)
        history = store.get_feature_view(USER_HISTORY)
        live = SERVING_USER in {service.name for service in store.list_feature_services()}
        # Counts are valid for a period: that is how often they are expected anew.
        valid = store.get_feature_view(CATALOGUE_POPULARITY).ttl
        user = store.get_feature_service(SERVING_USER if live else SERVING_USER_V1)
        return cls(
            store=store,
            user=user,
            redis=fast_redis.RedisUsers(store, user) if settings.online == "redis" else None,
            trend=store.get_feature_service(SERVING_TREND),
            profile_fields={
                f.name: (f.tags[FIELD_TAG], FieldKind(f.tags[KIND_TAG]))
                for f in profile.features
                if FIELD_TAG in f.tags
            },
            history_ttl=history.ttl.total_seconds() if history.ttl else 0.0,
            history_length=int(history.tags[HISTORY_LENGTH_TAG]),
            live=live,
            checkpoint=store.get_feature_view(LIVE_CHECKPOINT) if live else None,
            period=int(valid.total_seconds()) if valid else 0,
            stamp=stamp,
        )

    def current(self, settings: FeatureStoreSettings) -> "Session":
        """This one, or one of the registry as it is now."""
        try:
            if registry_stamp(settings) == self.stamp:
                return self
            return Session.open(settings)
        except Exception:
            # Half written by an apply that is under way, or its database is away; the next call
            # tries again. Definitions change rarely: the old ones are right nearly always.
            log.warning("the feature registry cannot be read; the one read before stays in use")
            return self

    def read_one(
        self, features: "FeatureService | list[str]", entity: str, key: str
    ) -> dict[str, Any]:
        """Values by `view__feature`."""
        return self.read(features, entity, [key])[0]

    def read(
        self, features: "FeatureService | list[str]", entity: str, keys: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Values by `view__feature` of each key."""
        answer = self.store.get_online_features(
            features=features,
            entity_rows=[{JOIN_KEY[entity]: key} for key in keys],
            full_feature_names=True,
        )
        columns = answer.to_dict()
        return [{name: values[k] for name, values in columns.items()} for k in range(len(keys))]

    def read_generation(self) -> int:
        """Of the live rows that count; 0: all do."""
        if self.checkpoint is None:
            return 0
        found = read_row(self.store, self.checkpoint, CATALOGUE_ID).get("generation")
        return int(found or 0)

    def read_trend(self) -> dict[str, Any]:
        """The row of the trend snapshot, by feature."""
        row = self.read_one(self.trend, CATALOGUE, CATALOGUE_ID)
        return {name.partition("__")[2]: value for name, value in row.items()}

    def with_fields(
        self, profile: dict[str, FieldValue], live: Mapping[str, Any]
    ) -> dict[str, FieldValue]:
        """A profile with newer fields over it; null takes a field away.

        What the schema does not know, or what does not fit a field's kind, is left out: the model
        could not read it.
        """
        kinds = dict(self.profile_fields.values())
        fitting = {n: v for n, v in live.items() if n in kinds and (v is None or fits(kinds[n], v))}
        return {name: v for name, v in {**profile, **fitting}.items() if v is not None}


def _materialise_histories(store: "FeatureStore", settings: FeatureStoreSettings) -> int:
    rows = 0
    with pq.ParquetFile(settings.source(USER_HISTORY)) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            written: list[Row] = []
            for row in batch.to_pylist():
                events = events_of(row)
                # Visible one second after the last event, as in the source.
                seen = events[-1].timestamp + 1 if events else 0
                written.append((row[JOIN_KEY[USER]], protos(values_of(events)), seen))
            write_rows(store, USER_HISTORY, written)
            rows += len(written)
    return rows


def _count_keys(path: Path, key: str, start: datetime, end: datetime) -> int:
    import duckdb

    with duckdb.connect() as connection:
        query = (
            f'SELECT count(DISTINCT "{key}") FROM read_parquet($1)'  # noqa: S608 - our own name
            f" WHERE {EVENT_TIMESTAMP} BETWEEN $2 AND $3"
        )
        found = connection.execute(query, [str(path), start, end]).fetchone()
    return int(found[0]) if found else 0


def _applied_path(settings: FeatureStoreSettings) -> Path:
    return settings.path / APPLIED


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
