"""What the model is asked: a history, a request time, fields; and what it answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

FieldValue = str | float | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Event:
    """One past interaction; `timestamp` in Unix seconds, `value` e.g. a rating."""

    item_id: str
    timestamp: float
    event_type: str | None = None
    value: float | None = None


class History(Sequence[Event]):
    """Events as columns: what serving passes from the feature store to the encoder.

    Reads like a list of `Event`; a hundred of those would cost more than encoding them does.
    """

    __slots__ = ("event_types", "item_ids", "time_L", "value_L")

    def __init__(
        self,
        item_ids: list[str],
        time_L: NDArray[np.float64],
        event_types: list[str | None] | None = None,
        value_L: NDArray[np.float64] | None = None,
    ) -> None:
        """
        Args:
            time_L: Unix seconds, float64 `[L]`.
            event_types: None: no event has one.
            value_L: float64 `[L]`, NaN where an event has none; None: no event has one.
        """
        self.item_ids = item_ids
        self.time_L = time_L
        self.event_types = event_types
        self.value_L = value_L

    @classmethod
    def of(cls, events: Sequence[Event]) -> "History":
        """The same events as columns."""
        if isinstance(events, History):
            return events
        types = [e.event_type for e in events]
        values = [e.value for e in events]
        return cls(
            [e.item_id for e in events],
            np.array([e.timestamp for e in events], dtype=np.float64),
            None if all(t is None for t in types) else types,
            None if all(v is None for v in values) else np.array(values, dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.item_ids)

    @overload
    def __getitem__(self, at: int) -> Event: ...
    @overload
    def __getitem__(self, at: slice) -> "History": ...
    def __getitem__(self, at: int | slice) -> "Event | History":
        types, value_L = self.event_types, self.value_L
        if isinstance(at, slice):
            return History(
                self.item_ids[at],
                self.time_L[at],
                None if types is None else types[at],
                None if value_L is None else value_L[at],
            )
        value = np.nan if value_L is None else float(value_L[at])
        return Event(
            self.item_ids[at],
            float(self.time_L[at]),
            None if types is None else types[at],
            None if np.isnan(value) else value,
        )

    def __iter__(self) -> Iterator[Event]:
        return (self[k] for k in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"History of {len(self)} events"

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "History":
        """The events at these places, in this order."""
        types, value_L = self.event_types, self.value_L
        return History(
            [self.item_ids[k] for k in rows],
            self.time_L[rows],
            None if types is None else [types[k] for k in rows],
            None if value_L is None else value_L[rows],
        )

    def copy(self) -> "History":
        """The same events in memory of their own: columns may be parts of a whole message."""
        value_L = self.value_L
        return History(
            self.item_ids.copy(),
            self.time_L.copy(),
            None if self.event_types is None else self.event_types.copy(),
            None if value_L is None else value_L.copy(),
        )

    def followed_by(self, other: "History") -> "History":
        """Both, one after the other."""
        types: list[str | None] | None = None
        if self.event_types is not None or other.event_types is not None:
            types = [*_types(self), *_types(other)]
        value_L: NDArray[np.float64] | None = None
        if self.value_L is not None or other.value_L is not None:
            value_L = np.concatenate([_values(self), _values(other)])
        return History(
            self.item_ids + other.item_ids,
            np.concatenate([self.time_L, other.time_L]),
            types,
            value_L,
        )

    def sorted(self) -> "History":
        """In order of time; ties keep their order."""
        if len(self) < 2 or bool((self.time_L[1:] >= self.time_L[:-1]).all()):
            return self
        return self.take(np.argsort(self.time_L, kind="stable"))

    def until(self, time: float) -> "History":
        """Those not after a moment; of a sorted history."""
        if not len(self) or self.time_L[-1] <= time:
            return self
        return self[: int(np.searchsorted(self.time_L, time, side="right"))]


def _types(history: History) -> list[str | None]:
    return [None] * len(history) if history.event_types is None else history.event_types


def _values(history: History) -> NDArray[np.float64]:
    return np.full(len(history), np.nan) if history.value_L is None else history.value_L


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """Which items may be recommended.

    An item passes when it is in `include` (if given), not in `exclude`, and for every field in
    `where` has at least one of the listed values.
    """

    include: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def restricts(self) -> bool:
        """Whether any item may fail to pass."""
        return self.include is not None or bool(self.exclude) or bool(self.where)


@dataclass(frozen=True, slots=True)
class Query:
    """One request p(a | h, t): events sorted by time, request time in Unix seconds.

    Items of the history that the catalogue does not know are skipped. An empty history is a new
    user. `user` and `context` hold field values by name.
    """

    history: Sequence[Event]
    timestamp: float
    user: Mapping[str, FieldValue] = field(default_factory=dict)
    context: Mapping[str, FieldValue] = field(default_factory=dict)
    filter: ItemFilter = ItemFilter()
    exclude_seen: bool = False


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One ranked item; score = affinity + trend (unnormalised log-probabilities) + exploration."""

    item_id: str
    score: float
    affinity: float
    trend: float
    exploration: float = 0.0  # the bonus of a request that explores
    # How probable the item was to come, given what the others got; None: not known.
    propensity: float | None = 1.0
