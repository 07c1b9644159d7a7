"""What the collector takes: events, fields of users and items; what is wrong, and why."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from uuid import uuid4

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from feature_repo.event_log import NewEvent
from model.schema import MAX_ID, MAX_TIMESTAMP, FieldKind, fits
from serving.schemas import Fields, Request, explain

MAX_IMPRESSION = 1000  # items


def _storable(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("bad_text", "must not hold the character NUL")
    return value


def _not_negative(value: float) -> float:
    if value < 0:
        raise PydanticCustomError("negative_timestamp", "must not be negative (Unix seconds)")
    if value > MAX_TIMESTAMP:
        raise PydanticCustomError("future_timestamp", "must be Unix seconds, not milliseconds")
    return value


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID), AfterValidator(_storable)]
Timestamp = Annotated[FiniteFloat, AfterValidator(_not_negative)]


class Event(Request):
    """One interaction. Sent again with the same `event_id`, it counts once."""

    event_id: Id | None = Field(None, description="Made and returned by the collector if absent.")
    user_id: Id
    item_id: Id = Field(description="May be unknown: the item can follow later.")
    timestamp: Timestamp | None = Field(
        None, description="Unix seconds, floored; now if absent. Late events are sorted in."
    )
    event_type: (
        Annotated[str, StringConstraints(max_length=MAX_ID), AfterValidator(_storable)] | None
    ) = None
    event_value: FiniteFloat | None = Field(None, description="A rating, price, dwell time…")
    impression: Annotated[list[Id], Field(max_length=MAX_IMPRESSION)] | None = Field(
        None, description="Items that were shown, this one among them."
    )
    context: Fields | None = Field(None, description="Fields of the request, such as the device.")


class Batch(Request):
    """Several events; each is accepted or refused by itself."""

    events: Annotated[list[Event], Field(min_length=1)]


class UserFields(Request):
    """All fields of a user, instead of what was there before."""

    fields: Fields


class ItemFields(Request):
    """All fields of an item, instead of what was there before."""

    fields: Fields
    created_at: Timestamp | None = Field(None, description="Unix seconds")


class EventStatus(BaseModel):
    """What became of one event: stored, duplicate, user_deleted or invalid."""

    event_id: str | None
    status: str
    reason: str | None = None  # of an invalid one
    error: str | None = None


class EventsAnswer(BaseModel):
    """`events` in the order sent. All that are stored or duplicate are durable.

    `visible`: the next recommendation sees them; false: it will soon.
    """

    stored: int
    duplicates: int
    refused: int
    visible: bool
    events: list[EventStatus]


class WriteAnswer(BaseModel):
    """The write is durable; `visible`: the online store has it too."""

    visible: bool


class DeleteAnswer(WriteAnswer):
    """What was removed from the log. Later events of this id start a new history.

    `erased`: the log's file holds no bytes of it any more; false: soon (SQLite, while somebody
    reads an older state), or when the database does it by itself (PostgreSQL's VACUUM).
    """

    events: int
    erased: bool


class ItemRow(BaseModel):
    item_id: str
    fields: dict[str, Any]
    created_at: int | None
    seq: int


class ItemsAnswer(BaseModel):
    """Items in the order of their newest writes; ask again with the last one's `seq`.

    `log_id` and `seq`: which log, and its newest change. Another log, or a `seq` before the one
    asked after (an older log was restored): begin again at 0.
    """

    log_id: str
    seq: int
    items: list[ItemRow]


class Problem(BaseModel):
    """What is wrong and what to do; `reason` is one of a fixed set of words."""

    error: str
    reason: str


@dataclass(frozen=True)
class Invalid:
    """A refused event or body."""

    reason: str
    error: str


REASONS = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "string_too_long": "too_long",
    "too_long": "too_long",
    "string_too_short": "empty_id",
    "bad_text": "bad_text",
    "negative_timestamp": "negative_timestamp",
    "future_timestamp": "future_timestamp",
}


R = TypeVar("R", bound=Request)


def parse(kind: type[R], raw: Any, where: str) -> R | Invalid:
    """A validated object, or what is wrong with it."""
    if not isinstance(raw, Mapping):
        return Invalid("wrong_type", f"{where}: must be a JSON object")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return Invalid(REASONS.get(first["type"], "wrong_type"), explain(where, error, kind))


def parse_events(
    raw: Sequence[Any], max_ahead: float, now: float | None = None
) -> list[NewEvent | Invalid]:
    """One result per event, in order.

    Args:
        max_ahead: seconds that an event may lie in the future, by this machine's clock.
        now: Unix seconds.
    """
    now = time.time() if now is None else now
    return [_event(values, f"events[{i}]", max_ahead, now) for i, values in enumerate(raw)]


def _event(raw: Any, where: str, max_ahead: float, now: float) -> NewEvent | Invalid:
    event = parse(Event, raw, where)
    if isinstance(event, Invalid):
        return event
    moment = now if event.timestamp is None else event.timestamp
    if moment > now + max_ahead:
        return Invalid(
            "future_timestamp",
            f"{where}.timestamp: is {moment - now:.0f} s in the future (allowed: {max_ahead:.0f})",
        )
    return NewEvent(
        event_id=uuid4().hex if event.event_id is None else event.event_id,
        user_id=event.user_id,
        item_id=event.item_id,
        timestamp=math.floor(moment),
        event_type=event.event_type,
        event_value=event.event_value,
        impression=None if event.impression is None else tuple(event.impression),
        context=event.context,
    )


def check_kinds(
    fields: Mapping[str, Any], kinds: Mapping[str, FieldKind], where: str
) -> Invalid | None:
    """Whether values fit the kinds of the fields that the model knows.

    Others are kept for the next training run.
    """
    for name, value in fields.items():
        kind = kinds.get(name)
        if kind is not None and value is not None and not fits(kind, value):
            return Invalid(
                "wrong_kind", f"{where}.fields.{name:.80}: must be {_KIND_TEXT[kind]}, or null"
            )
    return None


_KIND_TEXT = {
    FieldKind.NUMERIC: "a number",
    FieldKind.CATEGORICAL: "text",
    FieldKind.TEXT: "text",
    FieldKind.MULTI_CATEGORICAL: "a list of texts",
}
