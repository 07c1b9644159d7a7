"""The feature store as the other rooms use it: register, load, read, write."""

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_repo.settings import FeatureStoreSettings
from model.errors import HrnnError, UnavailableError
from model.query import Event
from model.schema import Schema
from model.trends import TrendSnapshot

if TYPE_CHECKING:
    from feast import FeatureStore

__all__ = [
    "FeatureReader",
    "FeatureStoreSettings",
    "FeatureWriter",
    "UserFeatures",
    "apply",
    "materialise",
    "open_store",
]


@dataclass(frozen=True)
class UserFeatures:
    """What the store knows of a user; `history` oldest first."""

    known: bool
    profile: dict[str, Any] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)


def open_store(settings: FeatureStoreSettings) -> "FeatureStore":
    """A Feast store on these settings."""
    from feast import FeatureStore

    return FeatureStore(config=settings.repo_config())


def apply(settings: FeatureStoreSettings, schema: Schema) -> "FeatureStore":
    """Register the definitions for a schema; what it no longer has is removed."""
    from feature_repo.definitions import build

    store = open_store(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast warns of its own experimental parts
        store.apply(build(schema, settings.sources).objects)
    return store


def materialise(settings: FeatureStoreSettings, as_of: int) -> None:
    """Load every view's newest rows up to `as_of` (Unix seconds, inclusive) into the online store.

    Over the whole past: Feast's incremental form silently loads nothing from historic logs.
    """
    start = datetime.fromtimestamp(0, UTC)
    end = datetime.fromtimestamp(as_of + 1, UTC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies' deprecations, once per view
        open_store(settings).materialize(start, end)


class FeatureReader:
    """Online reads. Thread-safe; calls block, the deadline is the caller's to keep."""

    def __init__(self, settings: FeatureStoreSettings) -> None:
        """
        Raises:
            UnavailableError: the registry cannot be read, or nothing was applied.
        """
        try:
            self._store = open_store(settings)
            # Looking a service up costs as much as reading from it: once.
            self._user_service = self._store.get_feature_service("serving_user_v1")
            self._trend_service = self._store.get_feature_service("serving_trend_v1")
        except HrnnError:
            raise
        except Exception as error:  # Feast's stores raise whatever their drivers do
            raise UnavailableError(
                f"feature store {settings.root}: {type(error).__name__}: {error}"
            ) from error

    def user(self, user_id: str) -> UserFeatures:
        """Profile and history; `known` is False for a user the store never saw.

        Raises:
            UnavailableError: the store cannot be read.
        """
        row = self._read(self._user_service, {"user_id": user_id})
        item_ids = row.get("item_ids")
        if item_ids is None and row.get("events") is None:
            return UserFeatures(known=False)
        profile = {
            name: value
            for name, value in row.items()
            if name not in ("user_id", "events", *_HISTORY) and not _missing(value)
        }
        history = [
            Event(item, float(time), kind or None, None if math.isnan(value) else value)
            for item, time, kind, value in zip(*(row[name] or [] for name in _HISTORY), strict=True)
        ]
        return UserFeatures(True, profile, history)

    def trend(self) -> TrendSnapshot | None:
        """The current snapshot, None when none was written.

        Raises:
            UnavailableError: the store cannot be read.
        """
        row = self._read(self._trend_service, {"catalogue_id": "all"})
        if row.get("as_of") is None:
            return None
        return TrendSnapshot(
            item_ids=tuple(row["item_ids"] or ()),
            log_q=np.asarray(row["log_q"] or (), dtype=np.float64),
            floor=row["floor"],
            as_of=row["as_of"],
            window_seconds=row["window_seconds"],
            num_items=row["num_items"],
        )

    def _read(self, service: Any, entity: Mapping[str, str]) -> dict[str, Any]:
        try:
            answer = self._store.get_online_features(
                features=service, entity_rows=[dict(entity)]
            ).to_dict()
        except Exception as error:  # Feast's stores raise whatever their drivers do
            raise UnavailableError(f"feature store: {type(error).__name__}: {error}") from error
        return {name: values[0] for name, values in answer.items()}


_HISTORY = ("item_ids", "timestamps", "event_types", "event_values")


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class FeatureWriter:
    """Writes of the online store. One writer per user at a time is the caller's to see to."""

    def __init__(self, settings: FeatureStoreSettings, history_length: int = 100) -> None:
        self._reader = FeatureReader(settings)
        self._store = open_store(settings)
        self._history_length = history_length
        self._lock = threading.Lock()

    def push_history(self, user_id: str, events: Sequence[Event]) -> list[Event]:
        """Merge events into a user's history and write it; returns the history.

        Merged and sorted here because the SQLite store keeps whatever was written last: a late
        event must not hide newer ones. An event already there (item, time) counts once.

        Raises:
            UnavailableError: the store cannot be read or written.
        """
        import pandas as pd

        with self._lock:
            known = self._reader.user(user_id).history
            merged = {(e.item_id, e.timestamp): e for e in [*known, *events]}
            history = sorted(merged.values(), key=lambda e: e.timestamp)[-self._history_length :]
            row = {
                "user_id": [user_id],
                "item_ids": [[e.item_id for e in history]],
                "timestamps": [[int(e.timestamp) for e in history]],
                "event_types": [[e.event_type or "" for e in history]],
                "event_values": [[math.nan if e.value is None else e.value for e in history]],
                "event_timestamp": [datetime.fromtimestamp(history[-1].timestamp, UTC)],
            }
            try:
                self._store.write_to_online_store("user_history", pd.DataFrame(row))
            except Exception as error:  # Feast's stores raise whatever their drivers do
                raise UnavailableError(f"feature store: {type(error).__name__}: {error}") from error
            return history
