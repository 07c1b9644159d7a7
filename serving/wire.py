"""What transformer and predictor say to each other, and its form on the wire.

The call is the Open Inference Protocol's ModelInfer over gRPC with one BYTES tensor of one value:
`asks` goes, `answers` comes. The value is MessagePack, read into the types below and refused where
it does not fit. Columns are raw little-endian numbers. Fields may be added with a default; anything
else is another VERSION, and the two sides then do not talk (the transformer degrades).

Most of what is asked is the same for everybody: the affinities of the trending items. Such a list
is sent once, with the trend itself, and then named by its digest; a predictor that does not hold it
(any more) says so. From the trend the predictor knows which β is right (`Recommender.beta_under`).

Shapes: L events, C best items, A items asked for, T items of a list's part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from model.errors import InputError
from model.query import History, ItemFilter, Query
from model.schema import MAX_TIMESTAMP

ASKS, ANSWERS = "asks", "answers"  # names of the tensors
VERSION = 2

Array = NDArray[np.float32] | NDArray[np.float64]


def _nothing() -> Array:
    return np.empty(0, dtype=np.float32)


class AnswerError(Exception):
    """The predictor's answer contradicts the protocol."""


class ItemList:
    """The trending items, best first, and their log q (`floor` for all others); named by what
    they are.
    """

    __slots__ = ("floor", "item_ids", "log_q_T", "name")

    def __init__(self, item_ids: Sequence[str], log_q_T: NDArray[np.float64], floor: float) -> None:
        self.item_ids, self.log_q_T, self.floor = item_ids, log_q_T, floor
        digest = blake2b("\0".join(item_ids).encode(), digest_size=16)
        digest.update(np.append(log_q_T, floor).astype("<f8").tobytes())
        self.name = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True, slots=True)
class Part:
    """Items `first` to `end` of a list."""

    of: ItemList
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to the predictor: a complete query, and what to return.

    Task score: the affinities of the `top_n` best items, of `items` and of `part`. Task rate: the
    predicted values of `items`. Task trend: the snapshot that the model was trained with.
    """

    task: Literal["score", "rate", "trend"]
    query: Query
    top_n: int = 0
    items: Sequence[str] = ()
    part: Part | None = None
    model_version: str | None = None  # the one that this search began with, if it began
    exploration_weight: float = 0.0
    seed: str = ""  # of the exploration


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer to one question; NaN for items that are unknown or not allowed.

    `item_ids`, `affinity_C`: allowed items by affinity descending, ties by item id; `exhausted`:
    all of them. `affinity_A`: of `items`; of task rate their values. `affinity_T`: of `part`.
    The `extra` arrays: what exploration added to these affinities, if it did; the `limit` arrays:
    the most that it could have added (None from predictors of before there were any).
    """

    model_version: str
    beta: float
    item_ids: list[str]
    affinity_C: Array = field(default_factory=_nothing)
    affinity_A: Array = field(default_factory=_nothing)
    affinity_T: Array = field(default_factory=_nothing)
    extra_C: Array | None = None
    extra_A: Array | None = None
    extra_T: Array | None = None
    limit_C: Array | None = None
    limit_A: Array | None = None
    limit_T: Array | None = None
    exhausted: bool = False
    unknown_items: int = 0  # of the history
    unknown_asked: int = 0  # of `items`
    trend: dict[str, Any] | None = None  # of task trend


# How long texts may be is decided where they come in (serving.schemas, the collector, validate).
# Here also passes what the feature store holds since before, and one refusal would be everybody's.
Values = dict[str, str | int | float | list[str] | None]


class _Filter(msgspec.Struct, omit_defaults=True):
    include: list[str] | None = None
    exclude: list[str] = []
    where: dict[str, list[str]] = {}


class _Ask(msgspec.Struct, omit_defaults=True, kw_only=True):
    task: Literal["score", "rate", "trend"] = "score"
    item_ids: list[str] = []
    times: bytes = b""  # float64 [L]
    types: list[str | None] = []  # [L], or none
    values: bytes = b""  # float64 [L], or none
    timestamp: float
    user: Values = {}
    context: Values = {}
    filter: _Filter | None = None
    exclude_seen: bool = False
    top_n: Annotated[int, Meta(ge=0)] = 0
    items: list[str] = []
    part: tuple[str, Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]] | None = None
    model_version: str | None = None
    exploration_weight: Annotated[float, Meta(ge=0, le=100)] = 0.0
    seed: str = ""


class _List(msgspec.Struct):
    item_ids: list[str]
    log_q: bytes  # float64
    floor: float


class _Asks(msgspec.Struct):
    version: int
    asks: list[_Ask]
    lists: dict[str, _List] = {}


class _Answer(msgspec.Struct, omit_defaults=True, kw_only=True):
    error: str | None = None  # the instance is wrong; nothing else is set
    model_version: str = ""
    beta: float = 0.0
    item_ids: list[str] = []
    wide: bool = False  # affinities are float64, not float32
    best: bytes = b""  # [C]
    items: bytes = b""  # [A]
    part: bytes = b""  # [T]
    extras: tuple[bytes, bytes, bytes] | None = None  # float64, of the three
    limits: tuple[bytes, bytes, bytes] | None = None  # likewise
    exhausted: bool = False
    unknown_items: int = 0
    unknown_asked: int = 0
    trend: dict[str, Any] | None = None


class _Answers(msgspec.Struct):
    version: int
    answers: list[_Answer] = []
    missing: list[str] = []  # lists to be sent; there are no answers then


_encoder = msgspec.msgpack.Encoder()
_asks = msgspec.msgpack.Decoder(_Asks)
_answers = msgspec.msgpack.Decoder(_Answers)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the predictor refuses to look at."""

    instances: int
    history: int
    items: int  # of a filter's list
    listed: int  # of a list that is sent


def write_asks(asked: Sequence[Asked], lists: Sequence[ItemList] = ()) -> bytes:
    """A message; `lists` are sent along for a predictor that may not hold them."""
    asks = []
    for one in asked:
        query, history = one.query, History.of(one.query.history)
        value_L, kept, part = history.value_L, None, one.part
        if query.filter.restricts:
            include = query.filter.include
            kept = _Filter(
                None if include is None else sorted(include),
                sorted(query.filter.exclude),
                {name: sorted(values) for name, values in query.filter.where.items()},
            )
        asks.append(
            _Ask(
                task=one.task,
                item_ids=history.item_ids,
                times=history.time_L.astype("<f8", copy=False).tobytes(),
                types=history.event_types or [],
                values=b"" if value_L is None else value_L.astype("<f8", copy=False).tobytes(),
                timestamp=query.timestamp,
                user=cast(Any, query.user),  # tuples are written as lists
                context=cast(Any, query.context),
                filter=kept,
                exclude_seen=query.exclude_seen,
                top_n=one.top_n,
                items=list(one.items),
                part=None if part is None else (part.of.name, part.first, part.end),
                model_version=one.model_version,
                exploration_weight=one.exploration_weight,
                seed=one.seed,
            )
        )
    sent = {
        one.name: _List(list(one.item_ids), one.log_q_T.astype("<f8").tobytes(), one.floor)
        for one in lists
    }
    return _encoder.encode(_Asks(VERSION, asks, sent))


@dataclass(frozen=True, slots=True)
class Message:
    """Questions as the predictor reads them; parts name lists that it has to look up."""

    asked: list[Asked | InputError]
    parts: list[tuple[str, int, int] | None]
    lists: list[ItemList]


def read_asks(message: bytes, limits: Limits) -> Message:
    """
    Raises:
        InputError: it is not a message of this version, or too large.
    """
    try:
        read = _asks.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{ASKS}: not a message of version {VERSION}: {error}") from None
    if read.version != VERSION:
        raise InputError(f"{ASKS}: version {read.version} is not supported (known: {VERSION})")
    if len(read.asks) > limits.instances:
        raise InputError(f"{ASKS}: more than {limits.instances} questions")
    if any(len(one.item_ids) > limits.listed for one in read.lists.values()):
        raise InputError(f"{ASKS}: a list of more than {limits.listed} items")
    asked: list[Asked | InputError] = []
    for ask in read.asks:
        try:
            asked.append(_read_ask(ask, limits))
        except InputError as error:
            asked.append(error)
    lists = [_read_list(name, one) for name, one in read.lists.items()]
    return Message(asked, [ask.part for ask in read.asks], lists)


def _read_list(name: str, read: _List) -> ItemList:
    log_q_T = _floats(read.log_q, len(read.item_ids), "lists.log_q")
    items = ItemList(read.item_ids, log_q_T, read.floor)
    if items.name != name or len(set(read.item_ids)) != len(read.item_ids):
        raise InputError("lists: one is not what its name says, or repeats items")
    if not np.isfinite(np.append(log_q_T, read.floor)).all():
        raise InputError("lists: a log q is not a finite number")
    return items


def _read_ask(ask: _Ask, limits: Limits) -> Asked:
    length = len(ask.item_ids)
    if length > limits.history:
        raise InputError(f"history: at most {limits.history} entries (got {length})")
    time_L = _floats(ask.times, length, "history.timestamp")
    if not 0 <= ask.timestamp <= MAX_TIMESTAMP:
        raise InputError("timestamp: must be Unix seconds")
    if length and not (time_L.min() >= 0 and time_L.max() <= MAX_TIMESTAMP):
        raise InputError("history.timestamp: must be Unix seconds")
    if len(ask.types) not in (0, length):
        raise InputError("history.event_type: not as many as events")
    value_L = _floats(ask.values, length, "history.value") if ask.values else None
    if value_L is not None and np.isinf(value_L).any():
        raise InputError("history.value: must be finite")
    item_filter = ItemFilter()
    if ask.filter is not None:
        include, exclude, where = ask.filter.include, ask.filter.exclude, ask.filter.where
        if max(len(include or ()), len(exclude), *map(len, where.values()), 0) > limits.items:
            raise InputError(f"filter: at most {limits.items} entries")
        item_filter = ItemFilter(
            None if include is None else frozenset(include),
            frozenset(exclude),
            {name: frozenset(values) for name, values in where.items()},
        )
    history = History(ask.item_ids, time_L, ask.types or None, value_L)
    return Asked(
        ask.task,
        Query(history, ask.timestamp, ask.user, ask.context, item_filter, ask.exclude_seen),
        ask.top_n,
        ask.items,
        None,
        ask.model_version,
        ask.exploration_weight,
        ask.seed,
    )


def _floats(column: bytes, length: int, name: str) -> NDArray[np.float64]:
    if len(column) != 8 * length:
        raise InputError(f"{name}: not as many as items")
    return np.frombuffer(column, dtype="<f8")


def write_missing(names: Sequence[str]) -> bytes:
    """Say that these lists have to be sent."""
    return _encoder.encode(_Answers(VERSION, missing=list(names)))


def write_answers(scored: Sequence[Scored | InputError]) -> bytes:
    """One answer or refusal per question."""
    answers = []
    for one in scored:
        if isinstance(one, InputError):
            answers.append(_Answer(error=str(one)))
            continue
        three = (one.affinity_C, one.affinity_A, one.affinity_T)
        wide = any(a.dtype == np.float64 for a in three)
        best, items, part = (
            a.astype("<f8" if wide else "<f4", copy=False).tobytes() for a in three
        )
        answers.append(
            _Answer(
                model_version=one.model_version,
                beta=one.beta,
                item_ids=one.item_ids,
                wide=wide,
                best=best,
                items=items,
                part=part,
                extras=_three(one.extra_C, one.extra_A, one.extra_T),
                limits=_three(one.limit_C, one.limit_A, one.limit_T),
                exhausted=one.exhausted,
                unknown_items=one.unknown_items,
                unknown_asked=one.unknown_asked,
                trend=one.trend,
            )
        )
    return _encoder.encode(_Answers(VERSION, answers))


def _three(c: Array | None, a: Array | None, t: Array | None) -> tuple[bytes, bytes, bytes] | None:
    if c is None or a is None or t is None:
        return None
    c, a, t = (column.astype("<f8", copy=False) for column in (c, a, t))
    return c.tobytes(), a.tobytes(), t.tobytes()


def read_answers(
    message: bytes, asked: Sequence[Asked]
) -> tuple[list[Scored | InputError], list[str]]:
    """Answers, and lists that have to be sent before there are any.

    Raises:
        AnswerError: it is not what a predictor answers to these questions.
    """
    try:
        read = _answers.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AnswerError(str(error)) from None
    if read.version != VERSION:
        raise AnswerError(f"version {read.version}, not {VERSION}")
    if read.missing:
        return [], read.missing
    if len(read.answers) != len(asked):
        raise AnswerError(f"{len(read.answers)} answers to {len(asked)} questions")
    return [_read_answer(*one) for one in zip(read.answers, asked, strict=True)], []


def _read_answer(answer: _Answer, asked: Asked) -> Scored | InputError:
    if answer.error is not None:
        return InputError(answer.error)
    lengths = (
        len(answer.item_ids),
        len(asked.items),
        0 if asked.part is None or asked.task != "score" else asked.part.end - asked.part.first,
    )
    columns = (answer.best, answer.items, answer.part)
    dtype = "<f8" if answer.wide else "<f4"
    best, items, part = (_column(*one, dtype) for one in zip(columns, lengths, strict=True))
    extras, limits = (_optional(three, lengths) for three in (answer.extras, answer.limits))
    if asked.task == "trend" and answer.trend is None:
        raise AnswerError("no trend")
    scored = Scored(
        answer.model_version,
        answer.beta,
        answer.item_ids,
        affinity_C=best,
        affinity_A=items,
        affinity_T=part,
        extra_C=extras[0],
        extra_A=extras[1],
        extra_T=extras[2],
        limit_C=limits[0],
        limit_A=limits[1],
        limit_T=limits[2],
        exhausted=answer.exhausted,
        unknown_items=answer.unknown_items,
        unknown_asked=answer.unknown_asked,
        trend=answer.trend,
    )
    # NaN stands for items that may not come; the best ones may.
    finite = np.isfinite(answer.beta) and np.isfinite(best).all()
    if not finite or np.isinf(items).any() or np.isinf(part).any():
        raise AnswerError("an affinity, a value or beta is not a finite number")
    if any(e is not None and not np.isfinite(e).all() for e in (*extras, *limits)):
        raise AnswerError("a bonus is not a finite number")
    return scored


def _optional(
    three: tuple[bytes, bytes, bytes] | None, lengths: Sequence[int]
) -> list[Array] | list[None]:
    if three is None:
        return [None] * 3
    return [_column(*one, "<f8") for one in zip(three, lengths, strict=True)]


def _column(column: bytes, length: int, dtype: str) -> Array:
    if len(column) != length * int(dtype[-1]):
        raise AnswerError(f"{len(column)} bytes for {length} numbers")
    values: Array = np.frombuffer(column, dtype=dtype)
    return values
