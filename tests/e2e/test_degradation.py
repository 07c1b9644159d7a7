"""The degradation ladder with real faults: Redis and the predictor killed, paused, slowed, lying.

The transformer reaches both through a wire that can delay, cut, or answer garbage. Whatever is
broken, every answer comes, is labelled and counted, and full service returns by itself.
"""

import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

from feature_repo.settings import FeatureStoreSettings
from model.errors import UnavailableError
from model.query import Event, Query
from model.recommender import Recommender
from model.trends import snapshot_from_counts
from serving.client import Client
from serving.launcher import LocalServing
from serving.settings import ServeSettings
from tests.e2e.processes import HISTORY, NOW, metric, random_bundle, until
from tests.feature_store import fill
from tests.servers import RedisServer

MAX_HISTORY = 50  # events; the store keeps more
PATIENCE = 5.0  # seconds for one answer whose deadlines add up to 1; machines under test are slow


class Wire:
    """A TCP relay on a free port; `fault` says what it does to the bytes that come back."""

    def __init__(self, port):
        self.target = port
        self.fault = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def faulty(self, fault):
        self.fault = fault
        self.cut()
        try:
            yield
        finally:
            self.fault = None
            self.cut()

    def cut(self):
        """Break the connections there are."""
        for sock in list(self._sockets):
            with suppress(OSError):  # already closed by its other end
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()
        self.cut()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            for source, sink, back in ((near, far, False), (far, near, True)):
                self._sockets |= {source}
                threading.Thread(target=self._relay, args=(source, sink, back), daemon=True).start()

    def _relay(self, source, sink, back):
        noise = random.Random(0)
        try:
            while data := source.recv(65536):
                if back and self.fault == "delay":
                    time.sleep(2.0)
                elif back and self.fault == "noise":
                    data = noise.randbytes(len(data))
                elif back and self.fault == "http":
                    data = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
                elif back and self.fault == "half":
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        except OSError:
            pass  # one end went away; so does the other
        finally:
            for sock in (source, sink):
                self._sockets.discard(sock)
                sock.close()


class Chain:
    """Redis, the feature store in it, the predictor, the transformer, and wires in between."""

    def __init__(self, folder, bundle):
        self.redis = RedisServer()
        self.redis_wire = Wire(self.redis.port)
        self.bundle = bundle
        self.trend = Recommender.load(bundle).trend
        self.store = FeatureStoreSettings(
            root=str(folder / "features"),
            online="redis",
            redis_url=f"redis://127.0.0.1:{self.redis_wire.port}/0",
        )
        settings = ServeSettings(
            feature_deadline_seconds=0.5,
            predictor_deadline_seconds=0.5,
            trend_refresh_seconds=0.2,
            trend_deadline_seconds=0.5,
            trend_stale_seconds=1.0,
            breaker_seconds=0.5,
            grace_seconds=3,
            max_history=MAX_HISTORY,
        ).with_free_ports()
        self.predictor_wire = Wire(settings.predictor_grpc_port)
        settings = settings.model_copy(
            update={"predictor_host": f"127.0.0.1:{self.predictor_wire.port}"}
        )
        self.serving = LocalServing(bundle, self.store, settings, folder / "logs")

    def fill(self):
        """The feature store as the pipeline would leave it."""
        fill(self.store, {"u1": [Event(item, float(at)) for item, at in HISTORY]}, self.trend)

    def metric(self, name, **labels):
        return metric(self.serving, "transformer", name, **labels)

    def close(self):
        self.serving.stop()
        self.redis_wire.close()
        self.predictor_wire.close()
        self.redis.close()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(folder, random_bundle(folder / "bundle"))
    try:
        chain.serving.start()
        yield chain
    finally:
        chain.close()


@pytest.fixture
def client(chain):
    with Client(chain.serving.url, timeout=PATIENCE) as client:
        yield client


def ask(client, **arguments):
    return client.recommend("u1", timestamp=NOW, num_results=10, **arguments)


def ids(answer):
    return [item.item_id for item in answer.items]


def whole(chain, answer):
    """Nothing is missing, and the trend is the chain's own, not one of the test before."""
    return answer.degraded == () and answer.trend_version == chain.trend.version


@pytest.fixture
def healthy(chain, client):
    """What a whole answer is; the test begins and ends with it."""
    answers = []

    def answered_whole():  # the answer itself: the next one may be degraded on a slow machine
        answers.append(ask(client))
        return whole(chain, answers[-1])

    until(answered_whole, 60)
    yield ids(answers[-1])
    until(lambda: whole(chain, ask(client)), 60)
    until(lambda: chain.metric("hrnn_circuit_open", dependency="features") == 0)
    assert chain.metric("hrnn_circuit_open", dependency="predictor") == 0
    assert chain.metric("hrnn_requests_total", task="recommend", outcome="error") == 0


def test_without_a_feature_store_the_models_own_trend_serves_until_there_is_one(chain, client):
    """First, as the store is empty: the pipeline has not run yet."""

    def has_a_trend():
        with suppress(UnavailableError):  # the predictor has only just come up
            return ask(client).trend_version is not None

    until(has_a_trend, 60)
    until(lambda: ask(client).model_version is not None, 60)
    answer = ask(client, history=[Event(item, float(at)) for item, at in HISTORY])
    assert set(answer.degraded) == {"features_unavailable", "trend_stale"}
    assert answer.trend_version == chain.trend.version
    (expected,) = Recommender.load(chain.bundle).recommend([_query(HISTORY)], 10, trend=chain.trend)
    assert ids(answer) == [item.item_id for item in expected]
    chain.fill()
    until(lambda: whole(chain, ask(client)), 60)
    assert ids(ask(client)) == ids(answer), "now from the store"


def _query(history):
    return Query([Event(item, float(at)) for item, at in history], NOW)


def test_what_is_stored_may_be_longer_than_what_is_sent(chain, client, healthy):
    """Histories and ids: limits of requests are no limits of what a store holds since before."""
    newest = [Event(f"i{k % 50:03}", float(NOW - 5000 + k)) for k in range(MAX_HISTORY)]
    oldest = [Event(f"i{k:03}", float(NOW - 9000 + k)) for k in range(100, 220)]
    strange = Event("x" * 600, NOW - 9500.0, "k" * 600)
    trend = snapshot_from_counts(
        [*chain.trend.item_ids, "y" * 5000],
        [*range(len(chain.trend.item_ids)), 10**6],
        num_items=501,
        smoothing=1.0,
        as_of=NOW + 1,
        window_seconds=0,
    )
    histories = {"long": [*oldest, *newest], "strange": [strange, *newest[:5]]}
    fill(chain.store, histories, trend)
    try:
        until(lambda: ask(client).trend_version == trend.version, 60)
        for user, known in (("long", newest), ("strange", newest[:5])):
            stored, sent = (
                client.recommend(
                    asked, history=history, timestamp=NOW, num_results=10, exclude_seen=True
                )
                for asked, history in ((user, None), ("new", known))
            )
            assert stored.degraded == () and stored.model_version is not None
            assert ids(stored) == ids(sent)
            assert stored.unknown_items == (user == "strange")
    finally:
        chain.fill()


@contextmanager
def redis_killed(chain):
    chain.redis.kill()
    try:
        yield
    finally:
        chain.redis.start()
        chain.fill()  # it kept nothing


@contextmanager
def redis_paused(chain):
    chain.redis.pause()
    try:
        yield
    finally:
        chain.redis.resume()


def redis_wire(fault):
    def manager(chain):
        return chain.redis_wire.faulty(fault)

    manager.__name__ = f"redis_{fault}"
    return manager


REDIS_FAULTS = [redis_killed, redis_paused, *map(redis_wire, ("delay", "noise", "http", "half"))]


@pytest.mark.parametrize("fault", REDIS_FAULTS, ids=lambda f: f.__name__)
def test_redis(chain, client, healthy, fault):
    refused = chain.metric("hrnn_feature_errors_total", read="user", kind="open_circuit")
    degraded = chain.metric("hrnn_fallbacks_total", reason="features_unavailable")
    with fault(chain):
        until(lambda: "features_unavailable" in ask(client).degraded)
        own = ask(client, history=[Event(item, float(at)) for item, at in HISTORY])
        assert own.degraded and ids(own) == healthy, "the request's own history is as good"
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(client), range(40)))
        assert all("features_unavailable" in a.degraded and len(a.items) == 10 for a in answers)
        until(lambda: "trend_stale" in ask(client).degraded)
        assert ask(client).trend_version == chain.trend.version, "the last good one"
        assert chain.metric("hrnn_circuit_open", dependency="features") == 1
        assert (
            chain.metric("hrnn_feature_errors_total", read="user", kind="open_circuit")
            >= refused + 20
        ), "most of the requests did not wait for a deadline"
        assert chain.metric("hrnn_fallbacks_total", reason="features_unavailable") >= degraded + 42


@contextmanager
def predictor_killed(chain):
    process = chain.serving.processes["predictor"]
    process.kill()
    process.wait()
    try:
        yield
    finally:
        process.stdin.close()
        chain.serving.start_one("predictor")
        chain.serving.wait_ready("predictor", 60)


@contextmanager
def predictor_paused(chain):
    process = chain.serving.processes["predictor"]
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def predictor_wire(fault):
    def manager(chain):
        return chain.predictor_wire.faulty(fault)

    manager.__name__ = f"predictor_{fault}"
    return manager


PREDICTOR_FAULTS = [
    predictor_killed,
    predictor_paused,
    *map(predictor_wire, ("delay", "noise", "http", "half")),
]


@pytest.mark.parametrize("fault", PREDICTOR_FAULTS, ids=lambda f: f.__name__)
def test_predictor(chain, client, healthy, fault):
    refused = chain.metric("hrnn_predictor_errors_total", kind="open_circuit")
    with fault(chain):
        until(lambda: "predictor_unavailable" in ask(client).degraded)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(client), range(40)))
        for answer in answers:
            # On a busy machine a read of features may miss its deadline as well.
            assert answer.degraded[-1] == "predictor_unavailable"
            assert (answer.model_version, answer.trend_version) == (None, chain.trend.version)
            assert ids(answer) == list(chain.trend.item_ids[:10]), "trending items"
        assert client.rate(["i001"], "u1").degraded == ("predictor_unavailable",)
        assert client.ready(), "degraded, but of use"
        assert chain.metric("hrnn_predictor_errors_total", kind="open_circuit") >= refused + 20
    until(lambda: whole(chain, ask(client)), 60)
    assert ids(ask(client)) == healthy


def test_a_connection_that_breaks_now_and_then_costs_no_answer(chain, client, healthy):
    """Scoring is repeated where that is safe."""
    retries = chain.metric("hrnn_predictor_retries_total")
    stopped = threading.Event()

    def cut():
        while not stopped.wait(0.3):
            chain.predictor_wire.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        until(lambda: ask(client) and chain.metric("hrnn_predictor_retries_total") > retries, 60)
    finally:
        stopped.set()
        cutter.join()


def test_everything_down_at_once_is_still_an_answer(chain, client, healthy):
    with redis_paused(chain), predictor_paused(chain):
        until(lambda: len(ask(client).degraded) == 3)
        answer = ask(client)
        assert set(answer.degraded) == {
            "features_unavailable",
            "trend_stale",
            "predictor_unavailable",
        }
        assert ids(answer) == list(chain.trend.item_ids[:10])


def test_too_much_at_once_is_refused_at_once_and_the_rest_is_answered(chain, client, healthy):
    limit = chain.serving.settings.max_in_flight
    body = {"instances": [{"user_id": "u1", "timestamp": NOW, "num_results": 10}]}
    shed = chain.metric("hrnn_requests_total", task="unknown", outcome="shed")

    def one(http):
        return http.post(chain.serving.predict_url, json=body)

    limits = httpx.Limits(max_connections=4 * limit)
    with httpx.Client(timeout=30, trust_env=False, limits=limits) as http, predictor_paused(chain):
        # Nothing is answered before the predictor's deadline, so that they pile up.
        with ThreadPoolExecutor(4 * limit) as pool:
            answers = list(pool.map(lambda _: one(http), range(4 * limit)))
        health = http.get(f"{chain.serving.url}/v2/health/ready")
    assert health.status_code == 200
    refused = [a for a in answers if a.status_code == 503]
    assert {a.status_code for a in answers} == {200, 503}
    assert all(a.headers["Retry-After"] == "1" for a in refused)
    assert "overloaded" in refused[0].json()["error"]
    assert chain.metric("hrnn_requests_total", task="unknown", outcome="shed") == shed + len(
        refused
    )
