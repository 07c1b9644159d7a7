"""Reasons are short, whatever was sent, and end where a character ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.reasons import MAX_QUOTED, MAX_REASON_BYTES, bounded, quoted
from tests.fuzzing import nested


@given(st.text(max_size=9), st.integers(0, 3000))
def test_what_fits_stays_and_what_does_not_is_cut(text, times):
    reason = text * times
    size = len(reason.encode())
    cut = bounded(reason)
    if size <= MAX_REASON_BYTES:
        assert cut == reason
    else:
        assert MAX_REASON_BYTES - 4 < len(cut.encode()) <= MAX_REASON_BYTES
        assert cut.endswith("…") and reason.startswith(cut[:-1])


@pytest.mark.parametrize("text", ["x" * 30, "Ж" * 30, "🎬" * 30])
def test_a_quoted_value_is_short_and_says_how_it_begins(text):
    assert quoted(5) == "5" and quoted({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    for width in range(1, 8):
        for depth in range(1, 6):
            for value in (nested(width, depth, text), [nested(width, depth, text)] * width):
                shown = quoted(value)
                assert len(shown) <= MAX_QUOTED
                assert shown.startswith(repr(value)[0])
