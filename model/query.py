"""What the model is asked: a history, a request time, fields; and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FieldValue = str | float | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Event:
    """One past interaction; `timestamp` in Unix seconds, `value` e.g. a rating."""

    item_id: str
    timestamp: float
    event_type: str | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """Which items may be recommended.

    An item passes when it is in `include` (if given), not in `exclude`, and for every field in
    `where` has at least one of the listed values.
    """

    include: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)


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
