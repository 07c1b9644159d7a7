"""Messages between transformer and predictor: they arrive as they were sent, or are refused."""

import asyncio
import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.query import Event, History, ItemFilter, Query
from serving import metrics
from serving.predictor import Predictor
from serving.settings import ServeSettings
from serving.wire import (
    VERSION,
    AnswerError,
    Asked,
    ItemList,
    Limits,
    Part,
    Scored,
    read_answers,
    read_asks,
    write_answers,
    write_asks,
    write_missing,
)

LIMITS = Limits(instances=8, history=50, items=20, listed=100)
LIST = ItemList(["a", "b", "c", "d"], np.array([-1.0, -2.0, -2.0, -3.0]), -9.0)

IDS = st.text(min_size=1, max_size=5)
TIMES = st.floats(0, 1e10)
VALUES = st.none() | st.text(max_size=5) | st.floats(-9, 9) | st.lists(st.text(max_size=3))
FIELDS = st.dictionaries(IDS, VALUES, max_size=3)
EVENTS = st.lists(
    st.builds(Event, IDS, TIMES, st.none() | st.text(max_size=3), st.none() | st.floats(-9, 9)),
    max_size=6,
)
SETS = st.frozensets(IDS, max_size=3)
FILTERS = st.builds(ItemFilter, st.none() | SETS, SETS, st.dictionaries(IDS, SETS, max_size=2))
ASKED = st.builds(
    Asked,
    st.sampled_from(["score", "rate", "trend"]),
    st.builds(Query, EVENTS.map(History.of), TIMES, FIELDS, FIELDS, FILTERS, st.booleans()),
    st.integers(0, 10**9),
    st.lists(IDS, max_size=4),
    st.none(),
    st.none() | st.text(max_size=9),
    st.floats(0, 100),
    st.text(max_size=9),
)


@given(asked=st.lists(ASKED, max_size=3))
@settings(deadline=None)
def test_questions_arrive_as_they_were_sent(asked):
    read = read_asks(write_asks(asked), LIMITS)
    assert read.asked == asked
    assert read.parts == [None] * len(asked)


def test_a_list_is_named_and_sent_when_asked_for():
    asked = [Asked("score", Query([], 0.0), 3, part=Part(LIST, 1, 3))]
    read = read_asks(write_asks(asked), LIMITS)
    assert (read.parts, read.lists) == ([(LIST.name, 1, 3)], [])
    (sent,) = read_asks(write_asks(asked, [LIST]), LIMITS).lists
    assert (sent.name, sent.item_ids, sent.floor) == (LIST.name, LIST.item_ids, LIST.floor)
    np.testing.assert_array_equal(sent.log_q_T, LIST.log_q_T)
    assert read_answers(write_missing([LIST.name]), asked) == ([], [LIST.name])


def scored(dtype, explored):
    numbers = np.array([2.0, 1.0], dtype), np.array([np.nan], dtype), np.array([0.5, np.nan], dtype)
    extras = [np.arange(len(n), dtype=np.float64) for n in numbers] if explored else [None] * 3
    limits = [None if e is None else e + 1 for e in extras]
    rest = {"exhausted": True, "unknown_items": 3}
    return Scored("v", 0.5, ["x", "y"], *numbers, *extras, *limits, **rest)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("explored", [False, True])
def test_answers_arrive_as_they_were_sent(dtype, explored):
    asked = [Asked("score", Query([], 0.0), 2, ["i"], Part(LIST, 1, 3))] * 2
    sent = scored(dtype, explored)
    (answer, refused), _ = read_answers(write_answers([sent, InputError("no")]), asked)
    assert str(refused) == "no"
    for name in Scored.__dataclass_fields__:
        value, expected = getattr(answer, name), getattr(sent, name)
        if isinstance(expected, np.ndarray):
            assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected)
        else:
            assert value == expected


@pytest.mark.parametrize(
    "change",
    [
        {"affinity_C": np.array([1.0])},  # fewer than names
        {"affinity_C": np.array([np.nan, 1.0])},
        {"affinity_A": np.array([np.inf])},
        {"affinity_T": np.array([-np.inf, 1.0])},
        {"affinity_T": np.array([1.0])},
        {"beta": float("nan")},
        {"extra_C": np.array([np.nan, 0.0]), "extra_A": np.zeros(1), "extra_T": np.zeros(2)},
        {"extra_C": np.zeros(1), "extra_A": np.zeros(1), "extra_T": np.zeros(2)},
        {"limit_C": np.array([np.inf, 0.0]), "limit_A": np.zeros(1), "limit_T": np.zeros(2)},
    ],
)
def test_answers_that_make_no_sense_are_none(change):
    asked = [Asked("score", Query([], 0.0), 2, ["i"], Part(LIST, 1, 3))]
    values = {n: getattr(scored(np.float64, False), n) for n in Scored.__dataclass_fields__}
    assert read_answers(write_answers([Scored(**values)]), asked)
    with pytest.raises(AnswerError):
        read_answers(write_answers([Scored(**(values | change))]), asked)
    with pytest.raises(AnswerError):
        read_answers(write_answers([Scored(**values)] * 2), asked)


MESSAGE = msgspec.msgpack.decode(
    write_asks([Asked("score", Query([Event("i", 1.0, "t", 2.0)], 9.0), 2, ["j"])])
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"times": b"1234567"}, "as many"),
        ({"times": np.array([np.nan]).tobytes()}, "Unix seconds"),
        ({"times": np.array([-1.0]).tobytes()}, "Unix seconds"),
        ({"times": np.array([1e12]).tobytes()}, "Unix seconds"),
        ({"values": np.array([np.inf]).tobytes()}, "finite"),
        ({"values": np.array([1.0, 2.0]).tobytes()}, "as many"),
        ({"types": ["t", "t"]}, "as many"),
        ({"timestamp": float("nan")}, "Unix seconds"),
        ({"item_ids": ["i"] * 51, "times": np.zeros(51).tobytes(), "types": []}, "at most 50"),
        ({"filter": {"exclude": ["i"] * 21}}, "at most 20"),
    ],
)
def test_a_wrong_question_is_refused_and_its_neighbours_are_not(change, reason):
    (good,) = MESSAGE["asks"]
    message = MESSAGE | {"asks": [good, good | change, good]}
    first, wrong, last = read_asks(msgspec.msgpack.encode(message), LIMITS).asked
    assert isinstance(wrong, InputError) and reason in str(wrong)
    assert first == last and first.query.history[0] == Event("i", 1.0, "t", 2.0)


@pytest.mark.parametrize(
    "change",
    [
        {"version": VERSION + 1},
        {"asks": 5},
        {"asks": [{}]},
        {"asks": [MESSAGE["asks"][0] | {"top_n": -1}]},
        {"asks": [MESSAGE["asks"][0] | {"item_ids": ["i", 5]}]},
        {"asks": [MESSAGE["asks"][0] | {"user": {"f": {}}}]},
        {"asks": [MESSAGE["asks"][0] | {"exploration_weight": 101.0}]},
        {"asks": MESSAGE["asks"] * 9},
        {"lists": {"n": ["i"] * 101}},
    ],
)
def test_a_message_that_does_not_fit_is_refused(change):
    with pytest.raises(InputError):
        read_asks(msgspec.msgpack.encode(MESSAGE | change), LIMITS)


@given(noise=st.binary(max_size=80), at=st.integers(0, 200), whole=st.booleans())
@settings(max_examples=300, deadline=None)
def test_noise_is_refused(noise, at, whole):
    """Cut off, overwritten or anything at all: a message, or an error that is handled."""
    message = msgspec.msgpack.encode(MESSAGE)
    damaged = noise if whole else message[:at] + noise + message[at + len(noise) :]
    with contextlib.suppress(InputError):
        read_asks(damaged, LIMITS)
    with contextlib.suppress(AnswerError):
        read_answers(damaged, [])


def test_a_list_has_to_be_what_its_name_says():
    predictor = Predictor(ServeSettings())
    asked = [Asked("score", Query([], 0.0), 3, part=Part(LIST, 1, 3))]
    log_q_T = np.array([-1.0, -2.0])
    other_ids, repeated, other_trend, no_number, no_floor = (
        ItemList(["a", "b", "c", "e"], LIST.log_q_T, LIST.floor),
        ItemList(["a", "a"], log_q_T, -9.0),
        ItemList(LIST.item_ids, LIST.log_q_T - 1.0, LIST.floor),
        ItemList(["a", "b"], log_q_T * np.nan, -9.0),
        ItemList(["a", "b"], log_q_T, -np.inf),
    )
    other_ids.name = other_trend.name = LIST.name
    for other in (other_ids, repeated, other_trend, no_number, no_floor):
        message = write_asks(asked, [other])
        with pytest.raises(InputError, match="lists"):
            asyncio.run(predictor.answer_message(message, metrics.RequestRecord()))
