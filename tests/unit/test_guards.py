"""The circuit breaker against a model of it, and the gate."""

import asyncio
import time
from collections import Counter
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import FeatureReader
from model.errors import UnavailableError
from serving.features import Features
from serving.guards import Breaker, Gate, OverloadedError
from serving.settings import ServeSettings
from tests.feature_sources import filled
from tests.servers import RedisServer


def is_open(name):
    return REGISTRY.get_sample_value("hrnn_circuit_open", {"dependency": name})


def test_opens_after_failures_in_a_row_tries_once_and_closes_on_success():
    now = [0.0]
    breaker = Breaker("test", failures=3, seconds=10.0, clock=lambda: now[0])
    for failing in (True, True, False, True, True):
        assert breaker.allows()
        breaker.failed() if failing else breaker.succeeded()
    assert is_open("test") == 0, "five failures, but not in a row"
    assert breaker.allows()
    breaker.failed()
    assert is_open("test") == 1
    assert not breaker.allows()
    now[0] = 10.0
    assert breaker.allows(), "the trial"
    assert not breaker.allows(), "one at a time"
    breaker.failed()
    now[0] = 19.0
    assert not breaker.allows(), "the wait starts anew"
    now[0] = 20.0
    assert breaker.allows()
    breaker.gave_up()
    assert breaker.allows(), "the cancelled trial taught nothing"
    breaker.succeeded()
    assert is_open("test") == 0
    assert breaker.allows() and breaker.allows()


@given(st.lists(st.sampled_from(["ask", "wait", "succeed", "fail", "give up"]), max_size=200))
def test_never_stays_closed_off_and_never_asks_more_than_once_while_open(steps):
    now = [0.0]
    breaker = Breaker("property", failures=2, seconds=1.0, clock=lambda: now[0])
    under_way = 0
    for step in steps:
        if step == "wait":
            now[0] += 1.0
        elif step == "ask":
            was_open = breaker.open
            if breaker.allows():
                under_way += 1
            else:
                assert was_open
        elif under_way:
            under_way -= 1
            {
                "succeed": breaker.succeeded,
                "fail": breaker.failed,
                "give up": breaker.gave_up,
            }[step]()
    while under_way:
        under_way -= 1
        breaker.gave_up()
    now[0] += 1.0
    assert breaker.allows(), "after the wait somebody may try again"


def test_few_wait_in_vain_for_a_store_that_hangs(tmp_path):
    """A real Redis that is stopped under a stream of requests: most are let go when a few have
    waited, and it is asked again when it goes on."""
    redis = RedisServer()
    where = FeatureStoreSettings(
        root=str(tmp_path / "features"), online="redis", redis_url=redis.database()
    )
    filled(where)
    settings = ServeSettings(feature_deadline_seconds=1.0, breaker_seconds=0.2)

    async def stream(features, requests):
        async def ask(n):
            try:
                return await features.user("u1" if n % 2 else "u2")
            except UnavailableError as error:
                return str(error)

        tasks = []
        for n in range(requests):
            tasks.append(asyncio.create_task(ask(n)))
            await asyncio.sleep(0.01)
        return await asyncio.gather(*tasks)

    async def run():
        features = Features(lambda: FeatureReader(where), settings, None)
        features.prepare()
        try:
            before = await stream(features, 5)
            redis.pause()
            during = await stream(features, 300)
            redis.resume()
            deadline = time.monotonic() + 60
            while isinstance(after := (await stream(features, 1))[0], str):
                assert time.monotonic() < deadline, after
                await asyncio.sleep(0.05)
            return before, during
        finally:
            await features.close()

    with closing(redis):
        before, during = asyncio.run(run())
    assert all(user.known for user in before)
    told = Counter(during)
    waited = told.pop("the feature store missed its deadline")
    assert told == {"the feature store failed several times just now": 300 - waited}
    # Some 100 had come before one could have been told; trials after that wait alone.
    assert settings.breaker_failures <= waited < 40


def test_the_gate_admits_up_to_its_limit_and_lets_the_next_in_when_one_leaves():
    gate = Gate(2)
    with gate.admit():
        with gate.admit():
            with pytest.raises(OverloadedError, match="try again in 1 s"), gate.admit():
                pass
            with pytest.raises(OverloadedError):
                gate.check()
        with gate.admit():
            pass
        with pytest.raises(KeyError), gate.admit():
            raise KeyError
        with gate.admit():
            pass
