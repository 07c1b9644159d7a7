"""Retrieval finds exactly what scoring every item finds, ties included."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import retrieval
from model.retrieval import Allowed, Ask, Method, Retrieval, brute_force, int8_products_are_exact

METHODS = [Method.FLOAT32, Method.INT8]


@pytest.fixture(autouse=True)
def small_scans(monkeypatch):
    """Catalogues of a test take the paths of large ones."""
    monkeypatch.setattr(retrieval, "SMALL", 0)
    monkeypatch.setattr(retrieval, "CHUNK", 160)
    monkeypatch.setattr(retrieval, "MANY_EXCLUDED", 20)
    monkeypatch.setattr(retrieval, "BATCH_SHARE", 1)
    monkeypatch.setattr(retrieval, "TOGETHER", 3)


def ask(x_D, top_n, allowed, bonus=None):
    bonus = bonus or {}
    items = np.array(sorted(bonus), dtype=np.int64)
    values = np.array([bonus[j] for j in sorted(bonus)], dtype=np.float32)
    return Ask(np.asarray(x_D, dtype=np.float32), top_n, allowed, items, values)


def agree(found, expected):
    np.testing.assert_array_equal(found.item_C, expected.item_C)
    np.testing.assert_array_equal(found.score_C, expected.score_C)
    assert found.exhausted == expected.exhausted


def positions(size):
    return st.sets(st.integers(0, size - 1), max_size=size).map(
        lambda s: np.array(sorted(s), dtype=np.int64)
    )


@st.composite
def searches(draw):
    """Numbers whose products and sums are exact in float32, so that ties are ties."""
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    size, width = draw(st.integers(1, 700)), draw(st.sampled_from([1, 2, 8, 17]))
    reach = draw(st.sampled_from([1, 3, 60]))
    w_MD = rng.integers(-reach, reach + 1, (size, width)).astype(np.float32)
    w_MD *= rng.choice([0.25, 1.0, 8.0], (size, 1)).astype(np.float32)
    b_M = rng.integers(-4, 5, size).astype(np.float32)
    asks = []
    for _ in range(draw(st.integers(1, 4))):
        x_D = rng.integers(-reach, reach + 1, width).astype(np.float32)
        kind = draw(st.sampled_from(["all", "include", "exclude", "mask", "everything"]))
        allowed = Allowed(size)
        if kind == "include":
            allowed = Allowed(size, include=draw(positions(size)), exclude=draw(positions(size)))
        elif kind == "exclude":
            allowed = Allowed(size, exclude=draw(positions(size)))
        elif kind == "mask":
            allowed = Allowed(size, mask=rng.random(size) < draw(st.sampled_from([0.02, 0.5, 1.0])))
        elif kind == "everything":
            mask = rng.random(size) < 0.8
            allowed = Allowed(size, draw(positions(size)), draw(positions(size)), mask)
        touched = rng.choice(size, min(size, draw(st.integers(0, 40))), replace=False)
        bonus = {int(j): float(rng.integers(0, 5)) for j in touched}
        one = ask(x_D, draw(st.integers(0, 40) | st.just(10**9)), allowed, bonus)
        if draw(st.integers(0, 3)) == 0:
            one = replace(one, extra_M=rng.integers(-40, 41, size) * 0.5)
        asks.append(one)
    return w_MD, b_M, asks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("together", [True, False])
@given(search=searches())
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(method, together, search):
    w_MD, b_M, asks = search
    index = Retrieval(w_MD, b_M, method)
    index.batch_from = 1 if together else 100
    for found, one in zip(index.top(asks), asks, strict=True):
        agree(found, brute_force(w_MD, b_M, one))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", ["gaussian", "heavy", "aligned"])
def test_real_numbers_agree_but_for_rounding(method, spread):
    """Popular items with long vectors, and vectors that nearly all point one way."""
    rng = np.random.default_rng(3)
    size, width = 5001, 32  # the last chunk is not full
    w_MD = rng.normal(size=(size, width)).astype(np.float32)
    if spread == "heavy":
        w_MD *= (rng.pareto(1.2, (size, 1)) + 0.01).astype(np.float32)
    elif spread == "aligned":
        w_MD = (5.0 + 0.01 * w_MD).astype(np.float32)
    b_M = rng.normal(size=size).astype(np.float32)
    index = Retrieval(w_MD, b_M, method)
    asks = [
        ask(
            scale * rng.normal(size=width),
            top_n,
            Allowed(size, exclude=np.sort(rng.choice(size, 15, replace=False))),
            {int(j): float(rng.random()) for j in rng.integers(0, size, 300)},
        )
        for top_n in (1, 10, 300, 2500)
        for scale in (1e-3, 1.0, 30.0)
    ]
    for batch_from in (1, 100):
        index.batch_from = batch_from
        for found, one in zip(index.top(asks), asks, strict=True):
            expected = brute_force(w_MD, b_M, one)
            tolerance = 1e-5 * (1.0 + float(np.abs(expected.score_C).max()))
            np.testing.assert_allclose(found.score_C, expected.score_C, atol=tolerance)
            # An item may be another one only where scores differ by rounding.
            truth_M = w_MD.astype(np.float64) @ one.x_D.astype(np.float64) + b_M
            truth_M[one.bonus_item_S] += one.bonus_S
            assert len(np.unique(found.item_C)) == one.top_n
            assert one.allowed.passes(found.item_C).all()
            left_M = one.allowed.dense()
            left_M[found.item_C] = False
            assert truth_M[left_M].max() <= truth_M[found.item_C].min() + tolerance


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 3000),
    count=st.integers(1, 60),
    kinds=st.integers(1, 3000),
    lowest=st.booleans(),
    seed=st.integers(0, 50),
)
def test_the_largest_values_are_found_among_ties_and_infinities(length, count, kinds, lowest, seed):
    value = np.random.default_rng(seed).integers(kinds, size=length).astype(np.float32)
    if lowest:
        value[value < kinds / 2] = -np.inf
    found = retrieval._largest(value, count)
    assert len(set(found.tolist())) == len(found) == min(count, length)
    np.testing.assert_array_equal(np.sort(value[found]), np.sort(value)[-count:])


def test_only_a_few_items_are_scored_twice(monkeypatch):
    """The bound is worth having: a fraction of the catalogue is read in float32."""
    monkeypatch.setattr(retrieval, "CHUNK", 16_384)
    monkeypatch.setattr(retrieval, "TOGETHER", 16)
    rng = np.random.default_rng(0)
    w_MD = rng.normal(0, 30, (50_000, 64)).round().astype(np.float32)
    index = Retrieval(w_MD, np.zeros(50_000, dtype=np.float32), Method.INT8)
    scored = []
    exact = index._plain
    monkeypatch.setattr(index, "_plain", lambda a, c: scored.append(len(c)) or exact(a, c))
    one = ask(rng.normal(0, 30, 64).round(), 50, Allowed(50_000))
    agree(index.top([one])[0], brute_force(w_MD, np.zeros(50_000, dtype=np.float32), one))
    assert sum(scored) < 50 * 10


def test_equal_items_come_by_position():
    w_MD = np.ones((500, 4), dtype=np.float32)
    index = Retrieval(w_MD, np.zeros(500, dtype=np.float32), Method.INT8)
    for batch_from in (1, 2):
        index.batch_from = batch_from
        exclude = np.array([0, 2], dtype=np.int64)
        [found] = index.top([ask(np.ones(4), 3, Allowed(500, exclude=exclude))])
        assert found.item_C.tolist() == [1, 3, 4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_vectors_of_any_size(method, scale):
    rng = np.random.default_rng(5)
    w_MD = (scale * rng.integers(-3, 4, (400, 6))).astype(np.float32)
    b_M = np.zeros(400, dtype=np.float32)
    index = Retrieval(w_MD, b_M, method)
    for one in (ask(np.zeros(6), 5, Allowed(400)), ask(rng.integers(-3, 4, 6), 5, Allowed(400))):
        found, expected = index.top([one])[0], brute_force(w_MD, b_M, one)
        np.testing.assert_allclose(found.score_C, expected.score_C, rtol=1e-5)


def test_an_empty_catalogue_is_exhausted():
    index = Retrieval(np.empty((0, 4), dtype=np.float32), np.empty(0, dtype=np.float32))
    [found] = index.top([ask(np.ones(4), 5, Allowed(0))])
    assert found.exhausted and len(found.item_C) == 0


def test_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(1)
    w_MD = rng.integers(-9, 10, (3000, 8)).astype(np.float32)
    b_M = np.zeros(3000, dtype=np.float32)
    index = Retrieval(w_MD, b_M, Method.INT8)
    asks = [ask(rng.integers(-9, 10, 8), 20, Allowed(3000)) for _ in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(lambda a: index.top([a])[0], asks), asks, strict=True):
            agree(found, brute_force(w_MD, b_M, one))


def test_the_method_is_measured_where_it_matters(monkeypatch):
    w_MD = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    b_M = np.zeros(2000, dtype=np.float32)
    assert Retrieval(w_MD, b_M).method is Method.FLOAT32
    monkeypatch.setattr(retrieval, "WORTH_MEASURING", 0)
    measured = Retrieval(w_MD, b_M)
    assert measured.method in METHODS
    assert measured.batch_from >= 2
    # A machine whose int8 products overflow never uses them, however fast.
    monkeypatch.setattr(retrieval, "int8_products_are_exact", lambda size: False)
    assert Retrieval(w_MD, b_M).method is Method.FLOAT32


@pytest.mark.parametrize("size", [1, 8, 64, 100, 128])
def test_int8_products_are_checked_against_integers(size, monkeypatch):
    truth = retrieval.torch._int_mm

    def overflowing(a, b, out):
        truth(a, b, out=out)
        return out.clamp_(-(2**14), 2**14 - 1)

    exact = int8_products_are_exact(size)
    monkeypatch.setattr(retrieval.torch, "_int_mm", overflowing)
    assert not int8_products_are_exact(size) or (exact and size == 1)
