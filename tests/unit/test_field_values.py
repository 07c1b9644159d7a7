"""Items that have one of some values are those that a look at every item finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.field_values import FieldValues
from model.schema import FieldKind

TEXTS = st.sampled_from(["", "a", "b", "a b", "7", "ä", "True"])
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, -2.0, -0.0, float("nan"), float("inf"), 2**53 + 1, True]),
)


@settings(max_examples=200, deadline=None)
@given(
    column=st.lists(st.none() | TEXTS | st.booleans() | st.integers(0, 9), max_size=12),
    wanted=st.frozensets(TEXTS | st.just("gone")),
)
def test_one_value_of_any_type_is_compared_as_text(column, wanted):
    got = FieldValues(column, FieldKind.CATEGORICAL).matching(wanted)
    np.testing.assert_array_equal(got, [v is not None and str(v) in wanted for v in column])


@settings(max_examples=200, deadline=None)
@given(
    column=st.lists(st.none() | st.lists(TEXTS, max_size=4), max_size=12),
    wanted=st.frozensets(TEXTS | st.just("gone")),
)
def test_one_of_several_values_is_enough(column, wanted):
    got = FieldValues(column, FieldKind.MULTI_CATEGORICAL).matching(wanted)
    np.testing.assert_array_equal(got, [v is not None and not wanted.isdisjoint(v) for v in column])


@settings(max_examples=200, deadline=None)
@given(column=st.lists(st.none() | NUMBERS, max_size=12), wanted=st.lists(NUMBERS, max_size=6))
def test_numbers_are_equal_as_numbers_and_nan_to_none(column, wanted):
    got = FieldValues(column, FieldKind.NUMERIC).matching([float(v) for v in wanted])
    by_hand = [v is not None and any(float(v) == float(w) for w in wanted) for v in column]
    np.testing.assert_array_equal(got, np.array(by_hand, dtype=bool))


@pytest.mark.parametrize("kind", FieldKind)
def test_no_items_and_no_values(kind):
    assert not len(FieldValues([], kind).matching(() if kind is FieldKind.NUMERIC else ("a",)))
    assert not FieldValues([None, None], kind).matching(()).any()
