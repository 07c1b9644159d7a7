"""Both processes' models in this process: contract, exactness, bad input, degradation."""

import asyncio
import gc
import io
import json
import logging
import os
import re
import time
import weakref
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from model import approximate
from model.errors import InputError, UnavailableError
from model.query import Event, ItemFilter, Query
from model.recommender import Retrieved
from model.retrieval import Allowed
from model.trends import snapshot_from_counts
from serving import collector_metrics, metrics, wire
from serving.exploration import uncertainty, uniform
from serving.features import Features
from serving.guards import Gate
from serving.kserve_api import ModelRepository, pb, pb_grpc
from serving.predictor import MOST_TOGETHER, LoadedModel, Predictor, _cost_of
from serving.process import BackgroundHandler, freeze_garbage_collection, parse_arguments
from serving.schemas import parse_instances
from serving.scoring import PredictorError
from serving.server import Plane, Rest, Servicer, StatusInterceptor
from serving.settings import ServeSettings
from serving.transformer import Transformer

ITEMS = tuple(f"i{j:03}" for j in range(300))
SETTINGS = ServeSettings(feature_deadline_seconds=0.2, predictor_deadline_seconds=0.3)
PREDICT = "/v1/models/hrnn-meta:predict"
INFER = "/v2/models/hrnn-meta/infer"


class FakeScorer:
    """Answers that depend on all of a query, so that passing it on is visible."""

    version = "v-test"
    item_ids = ITEMS
    beta = 0.7
    recall = 1.0
    rates = True

    def beta_under(self, item_ids, log_q_T, floor):
        """Answers are under the trend that is sent, never under the bundle's own."""
        assert len(item_ids) == len(log_q_T)
        return self.beta + (log_q_T is SNAPSHOT.log_q)

    @property
    def trend(self):
        return SNAPSHOT

    def affinities(self, queries):
        return np.stack([self._one(q) for q in queries]) if queries else np.empty((0, len(ITEMS)))

    def _one(self, query):
        seed = hash(tuple(e.item_id for e in query.history)) % 2**32
        phi = np.random.default_rng(seed).normal(0, 2, len(ITEMS))
        phi += np.sin(query.timestamp / 86_400 + np.arange(len(ITEMS)))
        phi += float(query.user.get("age") or 0.0) * np.cos(np.arange(len(ITEMS)))
        phi += len(query.context.get("device", "")) * np.sin(np.arange(len(ITEMS)))
        feedback = sum((e.value or 0.0) + len(e.event_type or "") for e in query.history)
        phi += 0.01 * feedback * np.arange(len(ITEMS))
        return phi.astype(np.float32)

    def rate(self, queries, items):
        assert queries, "not asked for nothing"
        return [
            [(i, float(phi_M[ITEMS.index(i)]) + 3.0) for i in ids if i in ITEMS]
            for phi_M, ids in zip(self.affinities(queries), items, strict=True)
        ]

    def check(self, query):
        if isinstance(query.user.get("age"), str):
            raise InputError("user.age: expected numeric, got str")
        if not isinstance(query.context.get("device", ""), str):
            raise InputError("context.device: expected categorical")

    def allowed(self, query):
        allowed = np.ones(len(ITEMS), dtype=bool)
        seen = {e.item_id for e in query.history} if query.exclude_seen else set()
        for j, item in enumerate(ITEMS):
            if query.filter.include is not None and item not in query.filter.include:
                allowed[j] = False
            if item in query.filter.exclude or item in seen:
                allowed[j] = False
        for name, values in query.filter.where.items():
            if name != "parity":
                raise InputError(f"filter.where: items have no field {name!r} (fields: parity)")
            allowed &= np.array([["even", "odd"][j % 2] in values for j in range(len(ITEMS))])
        return allowed

    def unknown(self, item_ids):
        return sum(item not in ITEMS for item in item_ids)

    def restriction(self, query):
        return Allowed(len(ITEMS), mask=self.allowed(query))

    def passing(self, restriction, items):
        return [i for i in items if i in ITEMS and restriction.mask[ITEMS.index(i)]]

    def asks(self, queries, restrictions, top_n, extras):
        return list(zip(queries, restrictions, top_n, extras, strict=True))

    def listed(self, item_ids):
        return item_ids

    def recent(self):
        return []

    def forget_old(self):
        pass

    def prepare_filters(self):
        pass

    def read_ahead(self, recent):
        raise AssertionError("there are none")

    def retrieve(self, asks, items, lists):
        answers = []
        for (query, allowed, n, extra_M), more, listed in zip(asks, items, lists, strict=True):
            phi_M = self._one(query) + (0.0 if extra_M is None else extra_M)
            phi = dict(zip(ITEMS, phi_M.tolist(), strict=True))
            passing = self.passing(allowed, ITEMS)
            best = sorted(passing, key=lambda i: (-phi[i], i))[:n]
            groups = best, more, listed or []
            affinities = [np.array([phi[i] if i in passing else np.nan for i in g]) for g in groups]
            extras = [None] * 3
            if extra_M is not None:
                extra = dict(zip(ITEMS, extra_M.tolist(), strict=True))
                extras = [np.array([extra.get(i, 0.0) for i in g]) for g in groups]
            answers.append(Retrieved(best, *affinities, n >= len(passing), *extras))
        return answers


SNAPSHOT = snapshot_from_counts(
    ITEMS[::2], np.arange(150) ** 2, num_items=300, smoothing=1.0, as_of=1000, window_seconds=0
)


class FakeReader:
    """A feature store that knows two users, and can be made to fail."""

    def __init__(self):
        self.delay = 0.0
        self.fail = False
        self.bad_rows = set()
        self.profile = {"age": 0.5}
        self.reads = 0
        self.snapshot = SNAPSHOT
        self.lag = 0, 3600

    asynchronous = False

    def users(self, user_ids):
        self.reads += 1
        return [
            UnavailableError("a row") if user_id in self.bad_rows else self.user(user_id)
            for user_id in user_ids
        ]

    async def close(self): ...

    def user(self, user_id):
        time.sleep(self.delay)
        if self.fail:
            raise UnavailableError("down")
        known = user_id in ("u1", "u2")
        history = [
            Event("i001", 100.0, "play", 4.0),
            Event("i007", 200.0, "skip"),
            Event("i009", 500.0, None, 1.5),
        ]
        return SimpleNamespace(
            known=known,
            profile=self.profile if known and user_id == "u1" else {},
            history=history if known else [],
        )

    def trend(self):
        if self.fail:
            raise UnavailableError("down")
        return self.snapshot

    def trend_lag(self):
        return self.lag


class DirectPredictors:
    """The predictor without the wire, and with faults on demand."""

    def __init__(self):
        self.predictor = Predictor(SETTINGS, FakeScorer())
        self.fault = None
        self.calls = []

    async def open(self): ...

    async def close(self): ...

    async def trend(self, timeout):
        raise PredictorError("unavailable")

    async def score(self, asked, timeout):
        self.calls.append(asked)
        if self.fault:
            raise PredictorError(self.fault)
        lists = [one.part.of for one in asked if one.part is not None]
        record = metrics.RequestRecord()
        message = wire.write_asks(asked)
        answer = await self.predictor.answer_message(message, record)
        _, missing = wire.read_answers(answer, asked)
        if missing:
            message = wire.write_asks(asked, lists)
            answer = await self.predictor.answer_message(message, record)
        answers, missing = wire.read_answers(answer, asked)
        assert not missing
        return answers


class Service:
    def __init__(self, settings=SETTINGS):
        self.reader = FakeReader()
        self.predictors = DirectPredictors()
        self.transformer = Transformer(settings, lambda: self.reader, self.predictors)
        self.settings = settings

    @asynccontextmanager
    async def client(self, model=None):
        model = model or self.transformer
        if not model.ready:
            model.load()
        registry = ModelRepository()
        registry.update(model)
        app = Rest(Plane(registry), self.settings).application()
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    def post(self, *instances, path=PREDICT, model=None, **arguments):
        async def run():
            async with self.client(model) as client:
                body = arguments or {"json": {"instances": list(instances)}}
                return await client.post(path, **body)

        return asyncio.run(run())

    def predict(self, *instances):
        response = self.post(*instances)
        assert response.status_code == 200, response.text
        return response.json()["predictions"]


@pytest.fixture
def service():
    return Service()


def brute_force(query_instance, k, weight=1.0):
    """Expected items for a predictor instance, over the whole catalogue."""
    from serving.schemas import parse_score_instances

    values = {"top_n": 1, **query_instance}
    (instance,) = parse_score_instances([values], SETTINGS)
    scorer, query = FakeScorer(), instance.to_asked().query
    phi = scorer.affinities([query])[0].astype(float)
    bias = weight * scorer.beta * SNAPSHOT.dense(ITEMS)
    rows = [
        {"item_id": item, "score": a + t, "affinity": a, "trend": t}
        for item, a, t, ok in zip(ITEMS, phi, bias, scorer.allowed(query), strict=True)
        if ok
    ]
    return sorted(rows, key=lambda r: (-r["score"], r["item_id"]))[:k]


def test_the_answer_is_the_brute_force_top_k(service):
    history = [{"item_id": "i003", "timestamp": 50}]
    (answer,) = service.predict({"history": history, "timestamp": 90, "num_results": 7})
    assert answer["items"] == brute_force({"history": history, "timestamp": 90}, 7)
    assert answer["model_version"] == "v-test"
    assert answer["trend_version"] == SNAPSHOT.version
    assert answer["degraded"] == []
    assert len(answer["recommendation_id"]) == 32
    assert "unknown_items" not in answer


def test_k_beyond_the_catalogue_returns_all_and_softmax_is_possible(service):
    (answer,) = service.predict({"timestamp": 5, "num_results": 5000})
    assert len(answer["items"]) == len(ITEMS)
    assert answer["items"] == brute_force({"timestamp": 5}, 5000)


@pytest.mark.parametrize("weight", [0.0, 0.4, 3.0])
def test_trend_weight(service, weight):
    (answer,) = service.predict({"timestamp": 5, "num_results": 9, "trend_weight": weight})
    assert answer["items"] == brute_force({"timestamp": 5}, 9, weight)


def test_stored_features_are_used_and_explicit_ones_win(service):
    stored = [
        {"item_id": "i001", "timestamp": 100, "event_type": "play", "value": 4},
        {"item_id": "i007", "timestamp": 200, "event_type": "skip", "value": None},
    ]
    by_id, explicit, other_age = service.predict(
        {"user_id": "u1", "timestamp": 300},
        {"user_id": "u9", "history": stored, "user": {"age": 0.5}, "timestamp": 300},
        {"user_id": "u1", "user": {"age": 30}, "timestamp": 300},
    )
    # The stored event at 500 is after the request time and is no part of the history.
    assert by_id["items"] == explicit["items"]
    assert by_id["items"] != other_age["items"]
    replaced = service.predict({"user_id": "u1", "history": [], "timestamp": 300})[0]
    assert replaced["items"] != by_id["items"]


def test_feedback_of_stored_events_is_passed_on(service):
    service.predict({"user_id": "u1", "timestamp": 600})
    ((asked,),) = service.predictors.calls
    sent = [(e.item_id, e.event_type, e.value) for e in asked.query.history]
    assert sent == [("i001", "play", 4.0), ("i007", "skip", None), ("i009", None, 1.5)]


def test_context_is_passed_on_checked_and_changes_the_answer(service):
    tv, phone = service.predict(
        {"timestamp": 5, "context": {"device": "tv"}},
        {"timestamp": 5, "context": {"device": "phone"}},
    )
    assert tv["items"] != phone["items"]
    assert tv["items"] == brute_force({"timestamp": 5, "context": {"device": "tv"}}, 25)
    response = service.post({}, {"context": {"device": 5}})
    assert response.status_code == 400
    assert response.json()["error"] == "instances[1].context.device: expected categorical"


def expected_values(query_instance, items):
    phi = {row["item_id"]: row["affinity"] for row in brute_force(query_instance, 300, 0.0)}
    return [{"item_id": i, "value": phi[i] + 3.0} for i in items]


def test_rate_gives_values_in_the_order_asked_for(service):
    items = ["i005", "nope", "i002", "i005", "i100"]
    history = [{"item_id": "i003", "timestamp": 1, "value": 2.5}, {"item_id": "x", "timestamp": 2}]
    (answer,) = service.predict(
        {"task": "rate", "items": items, "timestamp": 5, "history": history}
    )
    query = {"timestamp": 5, "history": history}
    assert answer["items"] == expected_values(query, ["i005", "i002", "i100"])
    assert answer["unknown_items"] == 2  # one to rate, one in the history
    assert (answer["model_version"], answer["degraded"]) == ("v-test", [])
    assert answer["trend_version"] is None  # the trend has no part in it


def test_rate_honours_filters_and_num_results_as_rank_does(service):
    items = ["i005", "i002", "i007", "i001", "i100"]
    asked = {"task": "rate", "items": items, "timestamp": 5}
    few, filtered, seen = service.predict(
        asked | {"num_results": 2},
        asked | {"filter": {"where": {"parity": ["even"]}, "exclude": ["i002"]}},
        asked | {"exclude_seen": True, "history": [{"item_id": "i005", "timestamp": 1}]},
    )
    assert [i["item_id"] for i in few["items"]] == items[:2]
    assert [i["item_id"] for i in filtered["items"]] == ["i100"]
    assert [i["item_id"] for i in seen["items"]] == items[1:]


def test_tasks_of_one_request_are_one_call(service):
    instances = [
        {"task": "rate", "items": ["i001"], "timestamp": 5},
        {"timestamp": 5, "num_results": 3},
        {"task": "rank", "items": ["i001", "i002"], "timestamp": 5},
        {"task": "rate", "items": ["i009", "nope"], "timestamp": 90},
    ]
    batch = service.predict(*instances)
    assert len(service.predictors.calls) == 1
    for instance, answer in zip(instances, batch, strict=True):
        (single,) = service.predict(instance)
        assert single["items"] == answer["items"]
        assert single.get("unknown_items") == answer.get("unknown_items")


def test_many_items_are_rated_in_blocks(service, monkeypatch):
    instances = [
        {"task": "rate", "items": list(ITEMS[:n]), "timestamp": n + 1} for n in (3, 9, 1, 1, 2, 6)
    ]
    whole = [answer["items"] for answer in service.predict(*instances)]
    monkeypatch.setattr("serving.predictor.RATED_AT_ONCE", 4)
    blocks = []
    rate = FakeScorer.rate

    def counted(self, queries, items):
        blocks.append([len(ids) for ids in items])
        return rate(self, queries, items)

    monkeypatch.setattr(FakeScorer, "rate", counted)
    assert [answer["items"] for answer in service.predict(*instances)] == whole
    assert blocks == [[3], [9], [1, 1, 2], [6]]


def test_a_model_that_cannot_rate_says_so_and_does_the_rest(service, monkeypatch):
    monkeypatch.setattr(FakeScorer, "rates", False)
    rate = {"task": "rate", "items": ["i001"]}
    response = service.post({}, rate)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.startswith("instances[1].task: this model cannot rate")
    tensor = {"name": "instances", "shape": [1], "datatype": "BYTES", "data": [json.dumps(rate)]}
    response = service.post(path=INFER, json={"inputs": [tensor]})
    assert response.status_code == 400 and "cannot rate" in response.json()["error"]
    assert service.predict({}, rate | {"task": "rank"})[1]["items"]


def test_rate_does_not_need_a_trend(service):
    service.reader.snapshot = None
    rated, recommended = service.predict({"task": "rate", "items": ["i001"]}, {})
    assert rated["degraded"] == [] and rated["items"]
    assert recommended["degraded"] == ["trend_unavailable"]


def test_request_time_is_passed_through_and_defaults_to_now(service):
    early, late, _ = service.predict(
        {"timestamp": 300}, {"timestamp": 300 + 86_400}, {"num_results": 1}
    )
    assert early["items"] != late["items"]
    sent = [one.query.timestamp for one in service.predictors.calls[0]]
    assert sent[:2] == [300, 86_700]
    assert abs(sent[2] - time.time()) < 60


def test_now_is_never_before_the_newest_event(service):
    future = time.time() + 1000
    service.predict({"history": [{"item_id": "i001", "timestamp": future}]})
    (asked,) = service.predictors.calls[0]
    assert asked.query.timestamp == future
    assert len(asked.query.history) == 1


def test_filters_and_exclude_seen(service):
    (answer,) = service.predict(
        {
            "history": [{"item_id": "i010", "timestamp": 1}],
            "timestamp": 5,
            "exclude_seen": True,
            "num_results": 300,
            "filter": {"where": {"parity": ["even"]}, "exclude": ["i000"]},
        }
    )
    assert {i["item_id"] for i in answer["items"]} == set(ITEMS[::2]) - {"i000", "i010"}
    (none,) = service.predict({"filter": {"include": ["nope"]}})
    assert none["items"] == [] and none["degraded"] == []


def test_rank_orders_the_given_items_and_counts_unknown_ones(service):
    items = ["i005", "nope", "i002", "i005", "i100"]
    (answer,) = service.predict({"task": "rank", "items": items, "timestamp": 5})
    expected = brute_force({"timestamp": 5, "filter": {"include": items}}, 10)
    assert answer["items"] == expected
    assert answer["unknown_items"] == 1


def test_unknown_items_of_a_history_are_counted(service):
    history = [{"item_id": i, "timestamp": 1} for i in ("i001", "gone", "lost")]
    (answer,) = service.predict({"history": history})
    assert answer["unknown_items"] == 2


def test_a_batch_equals_single_requests_and_is_one_call(service):
    instances = [{"user_id": u, "timestamp": 600 + i} for i, u in enumerate(["u1", "x", "u2"] * 5)]
    batch = service.predict(*instances)
    assert len(service.predictors.calls) == 1
    for instance, answer in zip(instances, batch, strict=True):
        (single,) = service.predict(instance)
        assert single["items"] == answer["items"]


def test_open_inference_protocol_carries_the_same(service):
    (v1,) = service.predict({"timestamp": 5, "num_results": 3})
    tensor = {
        "name": "instances",
        "shape": [1],
        "datatype": "BYTES",
        "data": [json.dumps({"timestamp": 5, "num_results": 3})],
    }
    response = service.post(path=INFER, json={"id": "r-1", "inputs": [tensor]})
    body = response.json()
    assert response.status_code == 200, response.text
    assert (body["id"], body["model_version"]) == ("r-1", "v-test")
    (output,) = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("predictions", "BYTES", [1])
    assert json.loads(output["data"][0])["items"] == v1["items"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "inputs"),
        ([], "JSON object"),
        ({"inputs": []}, "one tensor named 'instances'"),
        ({"inputs": [5]}, "inputs"),
        ({"inputs": [{"name": "instances"}]}, "datatype"),
        ({"inputs": [{"name": "x", "shape": [0], "datatype": "BYTES", "data": []}]}, "'instances'"),
        (
            {"inputs": [{"name": "instances", "shape": [1], "datatype": "INT64", "data": [1]}]},
            "BYTES",
        ),
        (
            {"inputs": [{"name": "instances", "shape": [2], "datatype": "BYTES", "data": ["{}"]}]},
            "shape",
        ),
        (
            {"inputs": [{"name": "instances", "shape": [1], "datatype": "BYTES", "data": ["{"]}]},
            "instances[0]",
        ),
        (
            {"inputs": [{"name": "instances", "shape": [1], "datatype": "BYTES", "data": [5]}]},
            "instances[0]",
        ),
        (
            {"inputs": [{"name": "instances", "shape": [0], "datatype": "BYTES", "data": []}]},
            "at least one",
        ),
        ({"id": 5, "inputs": []}, "id"),
        ({"surprise": 5, "inputs": []}, "surprise"),
    ],
)
def test_open_inference_protocol_refuses(service, body, reason):
    response = service.post(path=INFER, json=body)
    assert response.status_code == 400
    assert reason in response.json()["error"]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ({"content": b'{"inst'}, 400, "not valid JSON"),
        ({"content": b""}, 400, "not valid JSON"),
        ({"content": b"\xff\xfe"}, 400, "not valid JSON"),
        ({"content": b'{"instances":' + b"[" * 100_000}, 400, "not valid JSON"),
        ({"content": b'{"instances":[{"timestamp":NaN}]}'}, 400, "not valid JSON"),
        ({"content": b'{"instances":[{"timestamp":1e999}]}'}, 400, "not valid JSON"),
        ({"content": b'{"instances":[{"user_id":"\\ud800"}]}'}, 400, "not valid JSON"),
        ({"content": b" " * (5 * 2**20)}, 413, "larger than"),
        ({"json": []}, 400, "JSON object"),
        ({"json": {"instances": {}}}, 400, "instances"),
        ({"json": {"instances": [{}], "parameters": {}}}, 400, "parameters"),
        ({"json": {"instances": [{"num_results": -1}]}}, 400, "instances[0].num_results"),
        ({"json": {"instances": [{"filter": {"where": {"x": ["y"]}}}]}}, 400, "filter.where"),
        ({"data": {"a": "b"}}, 415, "application/json"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "application/json"),
        ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 415, "Content-Encoding"),
    ],
)
def test_bad_requests(service, arguments, status, reason):
    response = service.post(**arguments)
    assert response.status_code == status, response.text
    assert reason in response.json()["error"]


def test_unusual_but_correct_content_types(service):
    body = b'{"instances":[{}]}'
    for headers in ({}, {"content-type": "application/json; charset=utf-8"}):
        assert service.post(content=body, headers=headers).status_code == 200
    # Headers of CloudEvents make KServe read the body in another way; here they do nothing.
    cloud = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "x", "ce-type": "y"}
    assert service.post(content=body, headers=cloud).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/repository/models/hrnn-meta/unload", 404),
        ("POST", "/v1/models/hrnn-meta:explain", 405),
        ("GET", PREDICT, 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/hrnn-meta", 200),
        ("GET", "/v2", 200),
        ("GET", "/v2/models/hrnn-meta", 200),
        ("GET", "/v2/models/hrnn-meta/ready", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/metrics", 200),
    ],
)
def test_routes(service, method, path, status):
    async def run():
        async with service.client() as client:
            return await client.request(method, path, **({"json": {}} if method == "POST" else {}))

    response = asyncio.run(run())
    assert response.status_code == status
    if status >= 400:
        assert "error" in response.json()


def test_a_model_that_is_not_ready_is_neither_used_nor_reported_ready(service):
    async def run():
        async with service.client() as client:
            service.transformer.ready = False
            return await client.get("/v2/health/ready"), await client.post(
                PREDICT, json={"instances": [{}]}
            )

    for response in asyncio.run(run()):
        assert response.status_code == 503


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        *("user_id", "user", "history", "timestamp", "context", "task", "items", "num_results"),
        *("exclude_seen", "filter", "trend_weight", "exploration_weight", "surprise"),
    ]
)
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"item_id": st.sampled_from(ITEMS[:5]) | JSON, "timestamp": st.integers(0, 999) | JSON},
        optional={"event_type": st.text(max_size=3) | JSON, "value": st.floats() | JSON},
    )
)
VALUES = {
    "user_id": st.sampled_from(["u1", "x"]),
    "history": EVENTS,
    "items": st.lists(st.sampled_from([*ITEMS[:5], "nope"])),
    "task": st.sampled_from(["recommend", "rank", "rate", "guess"]),
    "context": st.fixed_dictionaries({"device": st.sampled_from(["tv", "x"]) | JSON}),
    "num_results": st.integers(-1, 400),
    "timestamp": st.floats(),
    "filter": st.dictionaries(st.sampled_from(["include", "exclude", "where"]), JSON),
}


@st.composite
def wild_instances(draw):
    names = draw(st.sets(NAMES, max_size=4))
    return {n: draw(VALUES.get(n, JSON) | JSON) for n in names}


@given(instances=st.lists(wild_instances() | JSON, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_makes_a_500(instances):
    response = Service().post(content=json.dumps({"instances": instances}).encode())
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]


def count(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_features_down_uses_the_requests_own_history(service):
    service.predict({})  # the trend was read while the store was up
    service.reader.fail = True
    before = count("hrnn_fallbacks_total", reason="features_unavailable")
    history = [{"item_id": "i003", "timestamp": 50}]
    own, nothing = service.predict(
        {"user_id": "u1", "history": history, "timestamp": 90, "num_results": 4},
        {"user_id": "u1", "timestamp": 90, "num_results": 4},
    )
    assert own["degraded"] == nothing["degraded"] == ["features_unavailable"]
    assert own["items"] == brute_force({"history": history, "timestamp": 90}, 4)
    assert nothing["items"] == brute_force({"timestamp": 90}, 4)
    assert count("hrnn_fallbacks_total", reason="features_unavailable") == before + 2


def test_a_bad_row_hurts_its_user_alone_and_opens_no_circuit(service):
    service.predict({})
    service.reader.bad_rows = {"u1"}
    labels = {"read": "user", "kind": "bad_row"}
    before = count("hrnn_feature_errors_total", **labels)
    ask = {"timestamp": 600, "num_results": 4}
    for _ in range(SETTINGS.breaker_failures + 1):
        bad, good, new = service.predict(*({"user_id": u, **ask} for u in ("u1", "u2", "new")))
        assert bad["degraded"] == ["features_unavailable"]
        assert good["degraded"] == new["degraded"] == []
    (alone,) = service.predict({"user_id": "u1", **ask})
    assert alone["items"] == bad["items"] == brute_force({"timestamp": 600}, 4)
    assert count("hrnn_circuit_open", dependency="features") == 0
    assert count("hrnn_feature_errors_total", **labels) == before + SETTINGS.breaker_failures + 2
    service.reader.bad_rows = set()
    assert service.predict({"user_id": "u1", **ask})[0]["degraded"] == []


def test_a_stored_profile_that_does_not_fit_the_model_hurts_its_user_alone(service):
    """The model reads `age` as a number; the store still holds what an older schema had."""
    labels = {"read": "user", "kind": "bad_row"}
    rows, answers = (
        (lambda: count("hrnn_feature_errors_total", **labels)),
        (lambda: count("hrnn_fallbacks_total", reason="features_unavailable")),
    )
    ask = {"timestamp": 600, "num_results": 4}
    stored = [{"item_id": "i001", "timestamp": 100, "event_type": "play", "value": 4},
              {"item_id": "i007", "timestamp": 200, "event_type": "skip"},
              {"item_id": "i009", "timestamp": 500, "value": 1.5}]  # fmt: skip
    (good,) = service.predict({"user_id": "u2", **ask})
    service.reader.profile = {"age": "30-40", "zip": "5"}
    before = rows(), answers()
    tasks = [ask, {"task": "rank", "items": ["i001", "i002"], **ask},
             {"task": "rate", "items": ["i001"], **ask}]  # fmt: skip
    bad, ranked, rated, other = service.predict(
        *({"user_id": "u1", **task} for task in tasks), {"user_id": "u2", **ask}
    )
    for answer in (bad, ranked, rated):
        assert answer["degraded"] == ["features_unavailable"]
        assert answer["items"] and answer["model_version"] == "v-test"
    assert bad["items"] == brute_force({"history": stored, "timestamp": 600}, 4)
    assert other["degraded"] == [] and other["items"] == good["items"]
    assert (rows(), answers()) == (before[0] + 3, before[1] + 3)
    # What the request says itself counts, and needs nothing of the store.
    (own,) = service.predict({"user_id": "u1", "user": {"age": 3}, **ask})
    assert own["degraded"] == []
    assert own["items"] == brute_force({"history": stored, "timestamp": 600, "user": {"age": 3}}, 4)
    # What the client gives stays the client's mistake.
    for profile in ({"age": "30-40"}, {"zip": "5"}, {}):
        service.reader.profile = profile
        service.predictors.calls.clear()
        response = service.post({"user_id": "u1", "user": {"age": "old"}, **ask})
        assert response.status_code == 400
        assert response.json()["error"] == "instances[0].user.age: expected numeric, got str"
        assert len(service.predictors.calls) == 1
    service.reader.profile = {"age": "30-40"}
    response = service.post({"user_id": "u2"}, {"user_id": "u1", "context": {"device": 5}})
    assert response.json()["error"] == "instances[1].context.device: expected categorical"
    assert (rows(), answers()) == (before[0] + 3, before[1] + 3)


def test_one_failed_read_of_many_users_counts_once(service):
    service.predict({})
    service.reader.fail = True
    many = [{"user_id": f"v{n}"} for n in range(2 * SETTINGS.breaker_failures)]
    for reads in range(1, SETTINGS.breaker_failures):
        service.reader.reads = 0
        answers = service.predict(*many)
        assert {tuple(a["degraded"]) for a in answers} == {("features_unavailable",)}
        assert service.reader.reads == 1
        assert count("hrnn_circuit_open", dependency="features") == 0, reads
    service.predict(*many)
    assert count("hrnn_circuit_open", dependency="features") == 1


def test_slow_features_miss_their_deadline(service):
    service.predict({})
    service.reader.delay = 1.0
    start = time.perf_counter()

    async def run():  # measured inside: leaving the loop waits for the slow thread
        async with service.client() as client:
            body = {"instances": [{"user_id": "u1"}]}
            response = await client.post(PREDICT, json=body)
            return response, time.perf_counter() - start

    response, seconds = asyncio.run(run())
    assert response.json()["predictions"][0]["degraded"] == ["features_unavailable"]
    assert seconds < 0.8


def test_no_trend_snapshot_means_affinity_alone():
    service = Service()
    service.reader.snapshot = None
    (answer,) = service.predict({"timestamp": 5, "num_results": 4})
    assert (answer["degraded"], answer["trend_version"]) == (["trend_unavailable"], None)
    expected = brute_force({"timestamp": 5}, 4, weight=0.0)
    assert [i["item_id"] for i in answer["items"]] == [i["item_id"] for i in expected]
    assert all(i["trend"] == 0.0 for i in answer["items"])


def test_a_snapshot_that_could_not_be_refreshed_is_used_and_labelled():
    service = Service(SETTINGS.model_copy(update={"trend_stale_seconds": 1e-9}))
    (answer,) = service.predict({"timestamp": 5, "num_results": 4})
    assert (answer["degraded"], answer["trend_version"]) == (["trend_stale"], SNAPSHOT.version)
    assert answer["items"] == brute_force({"timestamp": 5}, 4)


@pytest.mark.parametrize(
    ("lag", "period", "stale"),
    [(0, 3600, False), (10_800, 3600, False), (10_801, 3600, True), (10**9, 0, False)],
)
def test_a_trend_that_the_log_has_left_behind_is_used_and_labelled(lag, period, stale):
    service = Service()
    service.reader.lag = lag, period
    recommended, rated = service.predict(
        {"timestamp": 5, "num_results": 4}, {"task": "rate", "items": ["i001"]}
    )
    assert recommended["degraded"] == ["trend_stale"] * stale
    assert recommended["trend_version"] == SNAPSHOT.version
    assert recommended["items"] == brute_force({"timestamp": 5}, 4)
    assert rated["degraded"] == []
    assert count("hrnn_trend_lag_seconds") == lag
    assert count("hrnn_trend_period_seconds") == period


@pytest.mark.parametrize("fault", ["unavailable", "deadline", "invalid_answer"])
def test_predictor_down_means_trending_items(service, fault):
    service.predictors.fault = fault
    seen = [{"item_id": SNAPSHOT.item_ids[0], "timestamp": 5}]
    plain, filtered, ranked, where, rated = service.predict(
        {"num_results": 5},
        {"num_results": 2, "history": seen, "exclude_seen": True,
         "filter": {"exclude": [SNAPSHOT.item_ids[1]]}},
        {"task": "rank", "items": ["i001", SNAPSHOT.item_ids[3]]},
        {"filter": {"where": {"parity": ["even"]}}},
        {"task": "rate", "items": ["i001"]},
    )  # fmt: skip
    assert [i["item_id"] for i in plain["items"]] == list(SNAPSHOT.item_ids[:5])
    assert [i["item_id"] for i in filtered["items"]] == list(SNAPSHOT.item_ids[2:4])
    assert [i["item_id"] for i in ranked["items"]] == [SNAPSHOT.item_ids[3]]  # that is known
    assert where["items"] == []  # nothing is known to pass
    assert rated["items"] == []  # nothing is known of values
    for answer in (plain, filtered, ranked, where, rated):
        assert answer["degraded"] == ["predictor_unavailable"]
        assert answer["model_version"] is None
    service.predictors.fault = None
    assert service.predict({})[0]["degraded"] == []


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_the_predictor_only_known_items_come(service, weight):
    """Items of the snapshot exist; of all others only the predictor could tell."""
    service.predictors.fault = "unavailable"
    known, common = SNAPSHOT.item_ids[5], {"num_results": 300, "trend_weight": weight}
    answers = service.predict(
        {"filter": {"include": ["zzz", known]}},
        {"filter": {"include": ["zzz"]}},
        {"task": "rank", "items": ["zzz", known, "yyy"]},
        {"task": "rank", "items": ["zzz"], "exploration_weight": 3.0},
        common,
    )
    found = [[i["item_id"] for i in answer["items"]] for answer in answers]
    assert found[:4] == [[known], [], [known], []]
    assert found[4] == list(SNAPSHOT.item_ids)
    assert all(answer["degraded"] == ["predictor_unavailable"] for answer in answers)


def test_nothing_left_to_answer_with_is_503():
    service = Service()
    service.reader.snapshot = None
    service.predictors.fault = "unavailable"
    response = service.post({})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "predictor" in response.json()["error"]


def test_a_store_that_comes_up_later_is_used():
    service = Service(SETTINGS.model_copy(update={"trend_refresh_seconds": 0.05}))
    service.reader.fail = True

    async def run():
        service.transformer.load()
        await service.transformer.open()
        async with service.client() as client:
            body = {"instances": [{"timestamp": 5}]}
            first = (await client.post(PREDICT, json=body)).json()["predictions"][0]
            service.reader.fail = False
            for _ in range(600):
                await asyncio.sleep(0.05)
                second = (await client.post(PREDICT, json=body)).json()["predictions"][0]
                if not second["degraded"]:
                    break
        await service.transformer.close()
        return first, second

    first, second = asyncio.run(run())
    assert first["degraded"] == ["trend_unavailable"]
    assert second["degraded"] == [] and second["trend_version"] == SNAPSHOT.version


@pytest.mark.parametrize("turns", range(8))
def test_stopping_while_a_read_of_the_trend_ends_takes_no_time(turns):
    """The read ends some turns of the event loop before it is told to stop."""

    async def no_trend(timeout):
        raise UnavailableError("none")

    async def run():
        quick = SETTINGS.model_copy(update={"trend_refresh_seconds": 0.0})
        features = Features(FakeReader, quick, no_trend)
        features.prepare()
        loop, reads = asyncio.get_running_loop(), []
        loop.run_in_executor = lambda *_: reads.append(loop.create_future()) or reads[-1]
        await features.open()
        while not reads:
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        reads[0].set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        closing = asyncio.create_task(features.close())
        await asyncio.wait([closing], timeout=1)
        stopped = closing.done()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # so that a failure is one, and no hang
        return stopped

    assert asyncio.run(run())


def test_the_predictor_over_v1(service):
    predictor = service.predictors.predictor
    response = service.post({"timestamp": 5, "top_n": 2, "score_items": ["i004", "nope"]},
                            model=predictor)  # fmt: skip
    (answer,) = response.json()["predictions"]
    expected = brute_force({"timestamp": 5}, 2, weight=0.0)
    assert answer["item_ids"] == [i["item_id"] for i in expected]
    assert answer["affinities"] == [i["affinity"] for i in expected]
    assert set(answer["scored"]) == {"i004"}
    assert (answer["exhausted"], answer["beta"]) == (False, 1.7)
    assert answer["unknown_score_items"] == 1
    assert answer["values"] == {}
    rate = {"timestamp": 5, "top_n": 2, "score_items": ["i004", "nope", "i001"], "task": "rate"}
    (answer,) = service.post(rate, model=predictor).json()["predictions"]
    assert list(answer["values"]) == ["i004", "i001"]
    assert (answer["item_ids"], answer["scored"], answer["unknown_score_items"]) == ([], {}, 1)
    assert service.post({"timestamp": 5}, model=predictor).status_code == 400


def test_a_model_change_between_rounds_starts_the_search_again(service, monkeypatch):
    monkeypatch.setattr("serving.ranking.MIN_ASK", 1)
    monkeypatch.setattr("serving.ranking.MAX_ASK", 1)  # several rounds
    score = service.predictors.score
    asked = []

    async def changing(questions, timeout):
        asked.append(questions[0].top_n)
        answers = await score(questions, timeout)
        return [replace(a, model_version="v1" if len(asked) == 1 else "v2") for a in answers]

    service.predictors.score = changing
    (answer,) = service.predict({"timestamp": 5, "num_results": 3})
    # Again from the beginning, and by doubling until one answer proves it.
    assert asked[:4] == [4, 8, 4, 8] and asked[4:] == [2**n for n in range(4, len(asked))]
    assert answer["model_version"] == "v2"
    assert answer["items"] == brute_force({"timestamp": 5}, 3)


@pytest.mark.parametrize("extra", [{}, {"trend_weight": 0.0}, {"exploration_weight": 30.0}])
@pytest.mark.parametrize("k", [1, 3, 140, 160, 400])
def test_replicas_that_never_agree_end_a_search_with_one_answer(service, monkeypatch, k, extra):
    """They hold different new items, and answer in turn."""
    monkeypatch.setattr("serving.ranking.MIN_ASK", 1)
    monkeypatch.setattr("serving.ranking.MAX_ASK", 1)  # several rounds
    score = service.predictors.score
    asked = []

    async def in_turn(questions, timeout):
        asked.append(len(questions))
        answers = await score(questions, timeout)
        return [replace(a, model_version=f"v+r{len(asked) % 2}") for a in answers]

    ask = {"timestamp": 5, "num_results": k, **extra}
    (expected,) = service.predict(ask)
    service.predictors.score = in_turn
    (answer,) = service.predict(ask)
    assert len(asked) <= 3 + len(ITEMS).bit_length()  # every question twice as deep as the last
    assert answer["degraded"] == [] and answer["model_version"] == "v"
    if "exploration_weight" not in extra:  # drawn by the answer's id
        assert (
            answer["items"]
            == expected["items"]
            == brute_force({"timestamp": 5}, k, extra.get("trend_weight", 1.0))
        )
    assert len(answer["items"]) == min(k, len(ITEMS))


@pytest.mark.parametrize("first_ask", [1, 16_384])
def test_exploration_is_exact_and_can_be_drawn_again(service, monkeypatch, caplog, first_ask):
    caplog.set_level("INFO", "hrnn.exploration")
    monkeypatch.setattr("serving.ranking.MIN_ASK", min(first_ask, 1))
    monkeypatch.setattr("serving.ranking.MAX_ASK", first_ask)
    plain = {i["item_id"]: i for i in brute_force({"timestamp": 5}, 300)}
    sigma = dict(zip(ITEMS, uncertainty(SNAPSHOT, ITEMS), strict=True))
    ask = {"timestamp": 5, "num_results": 12, "exploration_weight": 30.0}
    draws = []
    for instance in (ask, ask, ask | {"task": "rank", "items": list(ITEMS[40:80])}):
        (answer,) = service.predict(instance)
        draw = dict(zip(ITEMS, uniform(answer["recommendation_id"], len(ITEMS)), strict=True))
        bonus = {item: 30.0 * sigma[item] * draw[item] for item in ITEMS}
        among = instance.get("items", ITEMS)
        best = sorted(among, key=lambda i: (-plain[i]["score"] - bonus[i], i))[:12]
        assert [i["item_id"] for i in answer["items"]] == best
        for item in answer["items"]:
            expected = plain[item["item_id"]]
            assert item["exploration"] == pytest.approx(bonus[item["item_id"]])
            assert item["affinity"] == pytest.approx(expected["affinity"])
            assert item["trend"] == expected["trend"]
            parts = item["affinity"] + item["trend"] + item["exploration"]
            assert item["score"] == pytest.approx(parts)
            # The best of what did not come is what an item would have had to beat.
            left_out = max(plain[i]["score"] + bonus[i] for i in among if i not in best)
            room = left_out - item["affinity"] - item["trend"]
            chance = 1.0 if room <= 0 else 1 - room / (30.0 * sigma[item["item_id"]])
            assert item["propensity"] == pytest.approx(chance)
        (line,) = [r.data for r in caplog.records if r.name == "hrnn.exploration"]
        caplog.clear()
        assert line["recommendation_id"] == answer["recommendation_id"]
        assert (line["exploration_weight"], line["model_version"]) == (30.0, "v-test")
        logged = [[i["item_id"], i["exploration"], i["propensity"]] for i in answer["items"]]
        assert line["items"] == logged
        assert not {"user_id", "user", "history", "context"} & line.keys()
        draws.append(bonus)
    assert draws[0] != draws[1], "another request, another draw"
    usual = service.predict({"timestamp": 5, "num_results": 12})[0]["items"]
    assert "exploration" not in usual[0]
    assert count("hrnn_explored_items_total") > 0
    service.predictors.fault = "unavailable"
    (answer,) = service.predict(ask)
    assert answer["degraded"] == ["predictor_unavailable"]
    assert {(i["exploration"], i["propensity"]) for i in answer["items"]} == {(0.0, 1.0)}
    assert not [r for r in caplog.records if r.name == "hrnn.exploration"], "nothing was drawn"


def test_a_search_ends_with_the_model_it_began_with_and_then_that_is_let_go(service):
    predictor = Predictor(SETTINGS, FakeScorer())
    newer = FakeScorer()
    newer.version = "v-newer"

    def version(**pinned):
        (answer,) = service.post({"timestamp": 5, "top_n": 1, **pinned}, model=predictor).json()[
            "predictions"
        ]
        return answer["model_version"]

    before = predictor._models[0]
    predictor._use(LoadedModel(newer))
    assert version() == version(model_version="v-unheard-of") == "v-newer"
    assert version(model_version="v-test") == "v-test"
    predictor._forget(before)
    assert version(model_version="v-test") == "v-newer"
    gone = weakref.ref(before)
    del before
    gc.collect()
    assert gone() is None, "the memory of a model that was replaced"
    predictor._forget(predictor._models[0])  # a model that came back is in use
    assert version() == "v-newer"


def test_metrics_count_requests_by_task_and_outcome(service):
    before = count("hrnn_requests_total", task="recommend", outcome="ok")
    invalid = count("hrnn_requests_total", task="unknown", outcome="invalid")
    service.predict({})
    service.post({"num_results": -1})
    service.post(content=b"{")
    service.predict({"task": "rate", "items": ["i001"]})
    assert count("hrnn_requests_total", task="rate", outcome="ok") >= 1
    assert count("hrnn_requests_total", task="recommend", outcome="ok") == before + 1
    assert count("hrnn_requests_total", task="unknown", outcome="invalid") == invalid + 2
    assert count("hrnn_model_info", version="v-test") == 1
    assert count("hrnn_requests_in_flight") == 0


def refusals():
    """By outcome; of the predictor's questions, too."""
    return [
        sum(
            count("hrnn_requests_total", task=task, outcome=outcome) or 0
            for task in ("unknown", "score")
        )
        for outcome in ("invalid", "unavailable", "error", "shed")
    ]


def test_every_refused_prediction_is_counted_once_over_rest(service):
    tensor = {"name": "instances", "shape": [1], "datatype": "BYTES", "data": ["{}"]}
    service.predict({})
    for path, body, place in [
        (PREDICT, {}, 0),
        (PREDICT, {"instances": [{"num_results": -1}]}, 0),
        ("/v1/models/other:predict", {"instances": [{}]}, 0),
        (INFER, {"inputs": []}, 0),
        (INFER, {"inputs": [tensor | {"datatype": "FP64"}]}, 0),
        (INFER, {"inputs": [tensor | {"datatype": "NONE"}]}, 0),
    ]:
        before = refusals()
        assert 400 <= service.post(path=path, json=body).status_code < 500, body
        after = refusals()
        assert [b - a for a, b in zip(before, after, strict=True)] == [
            float(k == place) for k in range(4)
        ], body


def test_every_refused_prediction_is_counted_once_over_grpc(service):
    service.predict({})

    async def run(model, gate, ask, message):
        registry = ModelRepository()
        registry.update(model)
        server = grpc.aio.server(interceptors=(StatusInterceptor(gate),))
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(Plane(registry), None), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{ask}")
            try:
                await call(message, timeout=10)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            finally:
                await server.stop(0)
        return "OK"

    def infer(model_name="hrnn-meta", contents=(b"{}",), **tensor):
        values = {"name": "instances", "datatype": "BYTES", "shape": [len(contents)]} | tensor
        tensor = pb.ModelInferRequest.InferInputTensor(
            contents=pb.InferTensorContents(bytes_contents=contents), **values
        )
        return pb.ModelInferRequest(model_name=model_name, inputs=[tensor]).SerializeToString()

    asks = infer(contents=[b"{}", b"{}"], name=wire.ASKS), infer(name=wire.ASKS)
    full = Gate(1)
    transformer, predictor = service.transformer, service.predictors.predictor
    with full.admit():
        for model, gate, ask, message, status, changed in [
            (transformer, Gate(1), "ModelInfer", infer(), "OK", None),
            (transformer, Gate(1), "ServerLive", b"\xff", "INVALID_ARGUMENT", None),
            (transformer, Gate(1), "ModelInfer", b"\xff", "INVALID_ARGUMENT", 0),
            (transformer, Gate(1), "ModelInfer", infer("other"), "NOT_FOUND", 0),
            (transformer, Gate(1), "ModelInfer", infer(contents=[b"{"]), "INVALID_ARGUMENT", 0),
            (transformer, Gate(1), "ModelInfer", infer(datatype="NONE"), "INVALID_ARGUMENT", 0),
            (transformer, full, "ModelInfer", infer(), "UNAVAILABLE", 3),
            (predictor, Gate(1), "ModelInfer", asks[0], "INVALID_ARGUMENT", 0),
            (predictor, Gate(1), "ModelInfer", asks[1], "INVALID_ARGUMENT", 0),
        ]:
            before = refusals()
            assert asyncio.run(run(model, gate, ask, message)) == status
            after = refusals()
            assert [b - a for a, b in zip(before, after, strict=True)] == [
                float(k == changed) for k in range(4)
            ], (ask, message)


def test_logs_hold_no_ids(service, caplog):
    service.predict({"user_id": "secret-user"})
    service.post({"user_id": "secret-user", "num_results": -1})
    service.reader.fail = True
    service.predict({"user_id": "secret-user"})
    assert "secret-user" not in caplog.text


def test_flags_override_the_environment(monkeypatch):
    monkeypatch.setenv("HRNN_MODEL_DIR", "/from-env")
    monkeypatch.setenv("HRNN_HOST", "0.0.0.0")  # noqa: S104
    settings = parse_arguments("predictor", ["--http-port", "9", "--model-dir", "/flag"])
    assert (settings.predictor_http_port, settings.model_dir) == (9, "/flag")
    assert settings.host == "0.0.0.0"  # noqa: S104
    # What the KServe controller passes to a transformer.
    controller = ["--predictor_host", "p:81", "--model_name", "m", "--predictor_protocol=grpc-v2"]
    settings = parse_arguments("transformer", controller)
    assert (settings.predictor_address, settings.model_name) == ("p:81", "m")
    with pytest.raises(InputError, match="http_port"):
        parse_arguments("predictor", ["--http-port", "0"])


DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_documented_requests_are_valid():
    examples = re.findall(r"```json\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        assert parse_instances(json.loads(example)["instances"], ServeSettings())


def test_the_documented_metrics_are_the_exported_ones():
    assert collector_metrics.REQUESTS  # imported, so that the registry holds the collector's too
    documented = set(re.findall(r"^\| `(hrnn_\w+)` \|", DOCS.read_text(), flags=re.MULTILINE))
    exported = {
        name if metric.type != "counter" else f"{name}_total"
        for metric in REGISTRY.collect()
        if (name := metric.name).startswith("hrnn_")
    }
    assert documented == exported


class Unbuildable(FakeScorer):
    """Items that come in are more than it can take."""

    def readable(self, items):
        return items, 0

    def with_items(self, items):
        raise MemoryError


def test_items_that_cannot_be_built_stop_neither_a_start_nor_a_champion():
    feed = SimpleNamespace(
        changed=True, items={"new": {}}, rebase=lambda select: None, poll=lambda select: None
    )
    predictor, model = Predictor(SETTINGS), LoadedModel(Unbuildable())
    before = metrics.ITEM_FEED_ERRORS.labels("build")._value.get()
    assert predictor._with_known_items(feed, model) is model
    assert metrics.ITEM_FEED_ERRORS.labels("build")._value.get() == before + 1
    assert feed.changed  # they are tried again


def test_a_call_that_fails_does_not_spoil_those_asked_at_the_same_time():
    class Fragile(FakeScorer):
        def check(self, query):
            if query.context.get("device") == "bug":
                raise RuntimeError("a bug")

    predictor = Predictor(SETTINGS, Fragile())
    calls = [[wire.Asked("score", Query([], 1.0, context={"device": d}), 1)] for d in ("a", "bug")]

    async def together():
        asked = [*calls, calls[0]]
        return await asyncio.gather(*map(predictor._in_parts, asked), return_exceptions=True)

    first, failed, last = asyncio.run(together())
    assert isinstance(failed, RuntimeError)
    assert first[0].item_ids == last[0].item_ids != []


def large_call(count=256):
    return [wire.Asked("score", Query([], 1.0 + b), 1) for b in range(count)]


def asked_of(predictor, monkeypatch):
    """Sizes of the uses of the model from now on."""
    sizes = []
    asks = FakeScorer.asks

    def counted(self, queries, *others):
        sizes.append(len(queries))
        return asks(self, queries, *others)

    monkeypatch.setattr(FakeScorer, "asks", counted)
    return sizes


def test_between_the_parts_of_a_large_call_others_get_their_turn(monkeypatch):
    predictor = Predictor(SETTINGS, FakeScorer())
    sizes, ended = asked_of(predictor, monkeypatch), []

    async def ask(name, call):
        answers = await predictor._in_parts(call)
        ended.append(name)
        return answers

    async def together():
        return await asyncio.gather(ask("large", large_call()), ask("small", large_call(1)))

    large, small = asyncio.run(together())
    assert ended == ["small", "large"]
    assert max(sizes) <= MOST_TOGETHER + 1 and sum(sizes) == 257
    assert [a.item_ids for a in large[:1]] == [a.item_ids for a in small]
    expected = Predictor(SETTINGS, FakeScorer())._models[0].score(large_call())
    assert [a.item_ids for a in large] == [a.item_ids for a in expected]


def test_nothing_is_worked_on_for_a_caller_who_has_gone(monkeypatch):
    predictor = Predictor(SETTINGS, FakeScorer())
    sizes = asked_of(predictor, monkeypatch)

    async def give_up():
        call = asyncio.create_task(predictor._in_parts(large_call()))
        while not sizes:  # the first part is in work
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await predictor._in_parts(large_call(1))

    asyncio.run(give_up())
    assert sum(sizes) <= 2 * MOST_TOGETHER + 1


def test_a_large_call_is_answered_by_one_model_whatever_happens_meanwhile(monkeypatch):
    class Newer(FakeScorer):
        version = "newer"

    predictor = Predictor(SETTINGS, FakeScorer())
    between, newer = LoadedModel(Newer()), LoadedModel(Newer())
    asks = FakeScorer.asks

    async def ask():
        loop = asyncio.get_running_loop()

        def swapping(self, queries, *others):
            if predictor.version != "newer":
                loop.call_soon_threadsafe(predictor._use, between)  # the first is let go
                loop.call_soon_threadsafe(predictor._use, newer)
            return asks(self, queries, *others)

        monkeypatch.setattr(FakeScorer, "asks", swapping)
        return await predictor._in_parts(large_call()), await predictor._in_parts(large_call(1))

    answers, (after,) = asyncio.run(ask())
    assert {a.model_version for a in answers} == {FakeScorer.version}
    assert after.model_version == "newer"


@pytest.mark.parametrize(
    ("extra", "cost"),
    [
        ({}, 1),
        ({"top_n": 5000}, 11),
        ({"top_n": 10**9}, 2001),  # of a million items all
        ({"items": ["i"] * 10_000}, 21),
        ({"exploration_weight": 1.0}, 62),
        ({"query": Query([], 1.0, filter=ItemFilter(where={"a": frozenset("b")}))}, 8),
        ({"query": Query([Event("i", 1.0)] * 1000, 1.0)}, 6),
    ],
)
def test_what_a_question_costs_is_what_it_makes_the_model_do(extra, cost):
    asked = wire.Asked(**({"task": "score", "query": Query([], 1.0)} | extra))
    assert _cost_of(asked, 10**6) == cost


def test_the_predictors_public_form_bounds_its_answers(service):
    predictor = service.predictors.predictor
    many = {"timestamp": 5, "top_n": SETTINGS.max_num_results}
    for instances in ([many | {"top_n": 10**9}], [many] * 5):
        response = service.post(*instances, model=predictor)
        assert response.status_code == 400
        assert "top_n" in response.text


def test_the_models_thread_uses_the_threads_it_was_given():
    """OpenMP's number is each thread's own; those not told use every core."""
    import threadpoolctl

    predictor = Predictor(SETTINGS.model_copy(update={"model_threads": 1}), FakeScorer())
    for executor in (predictor._executor, predictor._loader):
        pools = executor.submit(threadpoolctl.threadpool_info).result()
        assert pools and {pool["num_threads"] for pool in pools} == {1}


def test_what_is_there_at_start_is_left_to_no_garbage_collection():
    try:
        freeze_garbage_collection()
        assert gc.get_freeze_count() > 10_000
        started = [[] for _ in range(100)]
        assert len(gc.get_objects()) < 10_000, "only what came since is looked through"
        assert started
    finally:
        gc.unfreeze()
    # Not counted anew by a scrape, which would take tens of milliseconds: now there are none.
    assert REGISTRY.get_sample_value("hrnn_gc_frozen_objects") > 10_000


def test_lines_wait_for_a_slow_reader_in_a_thread_of_their_own_and_not_without_end(monkeypatch):
    """The other end of the pipe is not read until all has been logged."""
    monkeypatch.setattr("serving.process.LINES_WAITING", 3)
    dropped, lines, text = [], 50, "x" * 65_536  # as much as a pipe holds
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as reader, os.fdopen(write_end, "w") as writer:
        handler = BackgroundHandler([logging.StreamHandler(writer)], lambda: dropped.append(1))
        for k in range(lines):
            handler.handle(logging.makeLogRecord({"msg": f"{k} {text}"}))
        assert lines - 5 <= len(dropped) < lines
        written = [reader.readline() for _ in range(lines - len(dropped))]
        handler.close()
    assert all(line.endswith(text + "\n") for line in written)
    numbers = [int(line.split()[0]) for line in written]
    assert numbers == sorted(set(numbers))


def test_what_is_logged_before_the_end_is_written():
    written = io.StringIO()
    handler = BackgroundHandler([logging.StreamHandler(written)], lambda: None)
    for k in range(100):
        handler.handle(logging.makeLogRecord({"msg": str(k)}))
    handler.close()
    assert written.getvalue().split() == [str(k) for k in range(100)]


def test_a_model_is_warm_for_few_results_and_for_many(monkeypatch):
    asked = []
    scorer = FakeScorer()
    search = scorer.asks
    monkeypatch.setattr(
        scorer, "asks", lambda q, r, n, e: asked.append((len(q), n[0])) or search(q, r, n, e)
    )
    LoadedModel(scorer)
    for queries in (1, 8):
        assert any(b >= queries and n <= approximate.MEASURED_TOP for b, n in asked)
    assert any(n > approximate.MEASURED_TOP for _, n in asked)
