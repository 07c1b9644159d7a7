"""Requests and answers of both processes: typed, limited, unknown fields refused.

Validation is strict (no "5" for 5) and every refusal names the field. Each process reads a list
of JSON objects, `instances`, and answers `predictions` in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    model_validator,
)

from model.errors import InputError
from model.query import Event, FieldValue, History, ItemFilter, Query
from model.schema import MAX_ID, MAX_TIMESTAMP
from serving.reasons import bounded, quoted
from serving.settings import ServeSettings
from serving.wire import Asked

TASKS = ("recommend", "rank", "rate")
MAX_FIELDS = 100
MAX_TEXT = 10_000
SHOWN_PROBLEMS = 5


def _timestamp(value: float) -> float:
    if value < 0:
        raise ValueError("must not be negative (Unix seconds)")
    if value > MAX_TIMESTAMP:
        raise ValueError("must be Unix seconds, not milliseconds")
    return value


def _field_value(value: Any) -> FieldValue:
    match value:
        case None:
            return None
        case str() if len(value) <= MAX_TEXT:
            return value
        case bool():
            pass
        case int() | float() if math.isfinite(value):
            return value  # 5 stays 5: a categorical field may hold "5", not "5.0"
        case list() if len(value) <= MAX_FIELDS and all(
            isinstance(v, str) and len(v) <= MAX_TEXT for v in value
        ):
            return tuple(value)
    raise ValueError(f"must be text, a finite number, a list of up to {MAX_FIELDS} texts, or null")


def _task(value: Any) -> Any:
    if value not in TASKS:
        raise ValueError(f"is not supported (supported: {', '.join(TASKS)})")
    return value


def _some(values: Any) -> Any:
    if not values:
        raise ValueError("must not be empty: nothing could pass; leave it out to let all pass")
    return values


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID)]
Timestamp = Annotated[FiniteFloat, AfterValidator(_timestamp)]
Weight = Annotated[FiniteFloat, Field(ge=0, le=100)]
Value = Annotated[Any, AfterValidator(_field_value)]
Fields = Annotated[dict[Id, Value], Field(max_length=MAX_FIELDS)]


class Request(BaseModel):
    """Base of request objects."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class HistoryEvent(Request):
    """One past interaction; `timestamp` in Unix seconds, `value` e.g. a rating.

    The model reads the type and the value as feedback on the item.
    """

    item_id: Id
    timestamp: Timestamp
    event_type: Annotated[str, StringConstraints(max_length=MAX_ID)] | None = None
    value: FiniteFloat | None = None


class Filter(Request):
    """Items must be in `include` (if given), not in `exclude`, and match every field of `where`.

    A filter that no item could ever pass, whatever the catalogue, is a mistake and refused.
    """

    include: Annotated[list[Id], AfterValidator(_some)] | None = None
    exclude: list[Id] = []
    where: Annotated[
        dict[Id, Annotated[list[str], AfterValidator(_some)]], Field(max_length=MAX_FIELDS)
    ] = {}

    @model_validator(mode="after")
    def _can_pass(self) -> Self:
        if self.include is not None and set(self.include) <= set(self.exclude):
            raise ValueError("contradicts itself: every item of include is in exclude too")
        return self

    def to_filter(self) -> ItemFilter:
        return ItemFilter(
            include=None if self.include is None else frozenset(self.include),
            exclude=frozenset(self.exclude),
            where={name: frozenset(values) for name, values in self.where.items()},
        )


class Instance(Request):
    """One request to the transformer: who, when, and what is wanted."""

    user_id: Id | None = None
    user: Fields = {}
    history: list[HistoryEvent] | None = None  # replaces the stored one
    timestamp: Timestamp | None = None  # None: now
    context: Fields = {}  # of the request: device, language, …
    task: Annotated[Literal["recommend", "rank", "rate"], BeforeValidator(_task)] = "recommend"
    items: list[Id] | None = None  # of tasks rank and rate
    num_results: Annotated[int, Field(ge=1)] | None = None
    exclude_seen: bool = False
    filter: Filter = Filter()
    trend_weight: Weight = 1.0
    exploration_weight: Weight = 0.0


class ScoreInstance(Request):
    """One request to the predictor: a complete query, and what to return.

    Task score: the affinities of the `top_n` best items and of `score_items`. Task rate: the
    predicted values of `score_items`, and no affinities. Task trend: the snapshot that the model
    was trained with, and no affinities.
    """

    task: Literal["score", "rate", "trend"] = "score"
    history: list[HistoryEvent] = []
    timestamp: Timestamp
    user: Fields = {}
    context: Fields = {}
    filter: Filter = Filter()
    exclude_seen: bool = False
    top_n: Annotated[int, Field(ge=0)]
    score_items: list[Id] = []
    model_version: str | None = None  # the one that this search began with, if it began
    exploration_weight: Weight = 0.0
    seed: Annotated[str, StringConstraints(max_length=MAX_ID)] = ""  # of the exploration

    def to_asked(self) -> Asked:
        query = Query(
            history=to_history(self.history),
            timestamp=self.timestamp,
            user=self.user,
            context=self.context,
            filter=self.filter.to_filter(),
            exclude_seen=self.exclude_seen,
        )
        return Asked(
            self.task,
            query,
            self.top_n,
            self.score_items,
            None,
            self.model_version,
            self.exploration_weight,
            self.seed,
        )


class RecommendedItem(BaseModel):
    """score = affinity + trend + exploration: unnormalised log-probabilities and a bonus."""

    item_id: str
    score: float
    affinity: float
    trend: float
    exploration: float = 0.0  # only there when the request explores, as is the next
    propensity: float | None = 1.0  # of being in the answer, given what the other items got


class RatedItem(BaseModel):
    """`value`: the event value predicted for the item, on the scale of the training log."""

    item_id: str
    value: float


class Prediction(BaseModel):
    """One answer of the transformer. `degraded` lists what was missing, usually nothing.

    `items`: best first; of task rate, in the order asked for.
    """

    model_config = ConfigDict(protected_namespaces=())

    recommendation_id: str
    model_version: str | None  # None: the predictor did not answer
    trend_version: str | None  # None: no trend snapshot was available, or none was needed
    degraded: list[str]
    items: list[RecommendedItem] | list[RatedItem]
    unknown_items: int = 0


def to_history(events: Sequence[HistoryEvent]) -> History:
    """Events in order of time; ties keep their order."""
    return History.of(
        [Event(e.item_id, e.timestamp, e.event_type, e.value) for e in events]
    ).sorted()


def parse_instances(raw: Sequence[Any], settings: ServeSettings) -> list[Instance]:
    """Validate the transformer's instances.

    Raises:
        InputError: names the fields that are wrong and why.
    """
    _check_sizes(raw, settings)
    instances = _parse(Instance, raw)
    for i, instance in enumerate(instances):
        where = f"instances[{i}]"
        if instance.task != "recommend":
            if not instance.items:
                raise InputError(
                    f"{where}.items: task {instance.task!r} needs a list of item ids to "
                    f"{instance.task}"
                )
        elif instance.items is not None:
            raise InputError(
                f"{where}.items: only tasks 'rank' and 'rate' take items; "
                "use filter.include to restrict recommendations"
            )
    counts = [one.num_results or settings.default_num_results for one in instances]
    _check_results(counts, "num_results", settings)
    return instances


def parse_score_instances(raw: Sequence[Any], settings: ServeSettings) -> list[ScoreInstance]:
    """Validate the predictor's instances.

    Raises:
        InputError: names the fields that are wrong and why.
    """
    _check_sizes(raw, settings, ("history",))
    instances = _parse(ScoreInstance, raw)
    _check_results([one.top_n for one in instances], "top_n", settings)
    return instances


def _check_results(count_B: Sequence[int], name: str, settings: ServeSettings) -> None:
    """Refuse answers too large to be made and sent."""
    for i, count in enumerate(count_B):
        if count > settings.max_num_results:
            raise InputError(
                f"instances[{i}].{name}: must be at most {settings.max_num_results} (got {count})"
            )
    if sum(count_B) > settings.max_total_results:
        raise InputError(
            f"instances: {name} add up to {sum(count_B)}, more than "
            f"{settings.max_total_results} in one request; split it"
        )


R = TypeVar("R", bound=Request)


def _parse(kind: type[R], raw: Sequence[Any]) -> list[R]:
    parsed = []
    for i, values in enumerate(raw):
        try:
            parsed.append(kind.model_validate(values))
        except ValidationError as error:
            raise InputError(explain(f"instances[{i}]", error, kind)) from None
    return parsed


def explain(where: str, error: ValidationError, kind: type[BaseModel]) -> str:
    """The first problems, each with the field's name; short, whatever was sent."""
    problems = []
    found = error.errors(include_url=False, include_context=False)
    for e in found[:SHOWN_PROBLEMS]:
        # Keys come from the request: never repeat a long one in full.
        path = where + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part:.80}" for part in e["loc"]
        )
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            known = f" (known: {', '.join(kind.model_fields)})" if len(e["loc"]) == 1 else ""
            problems.append(f"{path}: no such field{known}")
        elif e["type"] == "missing":
            problems.append(f"{path}: is required")
        else:
            problems.append(f"{path}: {message} (got {quoted(e['input'])})")
    if len(found) > SHOWN_PROBLEMS:
        problems.append(f"and {len(found) - SHOWN_PROBLEMS} more problems")
    return bounded("; ".join(problems))


def _check_sizes(
    raw: Sequence[Any],
    settings: ServeSettings,
    names: Sequence[str] = ("history", "items", "include", "exclude", "where"),
) -> None:
    """Refuse what is too long before any time is spent on validating it."""
    if not raw:
        raise InputError("instances: must hold at least one instance")
    if len(raw) > settings.max_instances:
        raise InputError(
            f"instances: at most {settings.max_instances} in one request (got {len(raw)})"
        )
    for i, instance in enumerate(raw):
        if not isinstance(instance, Mapping):
            raise InputError(f"instances[{i}]: must be a JSON object (got {quoted(instance)})")
        item_filter = instance.get("filter")
        if not isinstance(item_filter, Mapping):
            item_filter = {}
        where = item_filter.get("where")
        lists = {
            "history": (instance.get("history"), settings.max_history),
            "items": (instance.get("items"), settings.max_items),
            "include": (item_filter.get("include"), settings.max_items),
            "exclude": (item_filter.get("exclude"), settings.max_items),
        }
        if isinstance(where, Mapping):
            longest = max(where.values(), key=_length, default=None)
            lists["where"] = (longest, settings.max_items)
        for name, (values, limit) in lists.items():
            if name in names and _length(values) > limit:
                path = name if name in ("history", "items") else f"filter.{name}"
                raise InputError(
                    f"instances[{i}].{path}: at most {limit} entries (got {_length(values)})"
                )


def _length(values: Any) -> int:
    return len(values) if isinstance(values, list) else 0
