"""The two real processes with a real bundle: the contract over HTTP and gRPC, and real faults."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from model.errors import InputError, UnavailableError
from model.query import Event, ItemFilter, Query
from model.recommender import Recommender
from model.trends import snapshot_from_counts
from serving.client import Client
from serving.settings import ServeSettings
from tests import fuzzing
from tests.e2e.processes import (
    HISTORY,
    ITEMS,
    NOW,
    RATED,
    USERS,
    Serving,
    is_ready,
    random_bundle,
    started,
    until,
)
from tests.planted import interruptible


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def serving(bundle_dir, tmp_path_factory):
    with started(bundle_dir, bundle_dir, tmp_path_factory.mktemp("serving")) as serving:
        yield serving


@pytest.fixture(scope="module")
def recommender(bundle_dir):
    return Recommender.load(bundle_dir)


@pytest.fixture
def client(serving):
    with Client(serving.url) as client:
        yield client


def events(rows):
    return [Event(item, float(timestamp), *feedback) for item, timestamp, *feedback in rows]


def approx(items):
    """Batches of other sizes round differently in the last bits."""
    return [
        (i.item_id, pytest.approx(i.score, abs=1e-4), pytest.approx(i.trend, abs=1e-9))
        for i in items
    ]


def plain(items):
    return [(i.item_id, i.score, i.trend) for i in items]


def test_answers_equal_brute_force_over_the_bundle(client, recommender):
    queries = [
        ({"user_id": "u1"}, Query(events(HISTORY), NOW)),
        ({"user_id": "new"}, Query([], NOW)),
        ({"history": events(HISTORY[:3])}, Query(events(HISTORY[:3]), NOW)),
        (
            {
                "user_id": "u1",
                "exclude_seen": True,
                "item_filter": ItemFilter(where={"parity": frozenset({"odd"})}),
            },
            Query(
                events(HISTORY),
                NOW,
                filter=ItemFilter(where={"parity": frozenset({"odd"})}),
                exclude_seen=True,
            ),
        ),
    ]
    for arguments, query in queries:
        answer = client.recommend(**arguments, timestamp=NOW, num_results=20)
        (expected,) = recommender.recommend([query], 20)
        assert plain(answer.items) == approx(expected)
        assert answer.degraded == ()
        assert answer.model_version == recommender.version
        assert answer.trend_version == recommender.trend.version
    items = ["i400", "i001", "nope", "i020"]
    answer = client.rank(items, "u1", timestamp=NOW)
    (expected,) = recommender.rank([Query(events(HISTORY), NOW)], [items])
    assert plain(answer.items) == approx(expected)
    assert answer.unknown_items == 1


def test_request_time_and_added_events_change_the_answer(serving, client):
    def scores(answer):
        return {i.item_id: i.score for i in answer.items}

    today = client.recommend("u1", timestamp=NOW, num_results=500)
    tomorrow = client.recommend("u1", timestamp=NOW + 86_400, num_results=500)
    assert scores(today) != scores(tomorrow)
    serving.store.write(users=USERS | {"u1": {"history": [*HISTORY, ("i250", NOW - 5)]}})
    try:
        after = client.recommend("u1", timestamp=NOW, num_results=500)
    finally:
        serving.store.write(users=USERS)
    assert scores(after) != scores(today)
    again = client.recommend("u1", timestamp=NOW, num_results=500)
    # Read from a kept state or anew: equal but for rounding.
    assert scores(again) == pytest.approx(scores(today), abs=1e-4)


def test_feedback_reaches_the_model_from_the_store_and_from_the_request(client, recommender):
    (expected,) = recommender.recommend([Query(events(RATED), NOW)], 20)
    (without,) = recommender.recommend([Query(events(HISTORY), NOW)], 20)
    stored = client.recommend("rater", timestamp=NOW, num_results=20)
    own = client.recommend(history=events(RATED), timestamp=NOW, num_results=20)
    assert plain(stored.items) == approx(expected)
    assert plain(own.items) == approx(expected)
    assert plain(own.items) != approx(without)


def test_the_context_of_the_request_reaches_the_model(client, recommender):
    answers = []
    for context in ({}, {"device": "tv"}, {"device": "phone", "volume": 2.5, "moon": "full"}):
        (expected,) = recommender.recommend([Query(events(RATED), NOW, context=context)], 20)
        answer = client.recommend("rater", timestamp=NOW, num_results=20, context=context)
        assert plain(answer.items) == approx(expected)
        answers.append(plain(answer.items))
    assert answers[0] != answers[1] != answers[2]
    # A whole number stays one on its way: the third device is called "7".
    number, text = (
        client.recommend("u1", timestamp=NOW, context={"device": device}) for device in (7, "7")
    )
    assert plain(number.items) == plain(text.items)
    for context, reason in [
        ({"volume": "loud"}, r"instances\[0\]\.context\.volume: expected numeric, got str"),
        ({"device": ["tv"]}, r"instances\[0\]\.context\.device: expected categorical, got list"),
        ({"device": {"a": "b"}}, r"instances\[0\]\.context\.device: must be text"),
    ]:
        with pytest.raises(InputError, match=reason):
            client.recommend("u1", context=context)


def test_items_are_rated_as_by_the_model(client, recommender):
    items = ["i400", "i001", "nope", "i020", "i001"]
    for arguments, history in (
        ({"user_id": "rater"}, RATED),
        ({"user_id": "rater", "context": {"device": "tv"}}, RATED),
        ({"history": events(RATED[:4])}, RATED[:4]),
        ({"user_id": "nobody"}, []),
    ):
        answer = client.rate(items, **arguments, timestamp=NOW)
        query = Query(events(history), NOW, context=arguments.get("context", {}))
        (expected,) = recommender.rate([query], [["i400", "i001", "i020"]])
        assert [r.item_id for r in answer.ratings] == [item for item, _ in expected]
        values = [value for _, value in expected]
        assert [r.value for r in answer.ratings] == pytest.approx(values, abs=1e-4)
        assert np.ptp(values) > 0.01
        assert (answer.items, answer.unknown_items, answer.degraded) == ((), 1, ())
        assert (answer.model_version, answer.trend_version) == (recommender.version, None)
    single = [client.rate([item], "rater", timestamp=NOW).ratings[0].value for item in ITEMS[:5]]
    whole = [r.value for r in client.rate(ITEMS, "rater", timestamp=NOW).ratings]
    assert whole[:5] == pytest.approx(single, abs=1e-4)
    assert len(whole) == len(ITEMS)


def test_tasks_can_be_mixed_in_one_request(client):
    alone = [
        client.recommend("rater", timestamp=NOW, num_results=4),
        client.rate(["i007", "i003"], "rater", timestamp=NOW),
        client.rank(["i007", "i003"], "rater", timestamp=NOW),
    ]
    who = {"user_id": "rater", "timestamp": NOW}
    together = client.predict(
        [
            who | {"num_results": 4},
            who | {"task": "rate", "items": ["i007", "i003"]},
            who | {"task": "rank", "items": ["i007", "i003"]},
        ]
    )
    for one, other in zip(alone, together, strict=True):
        assert plain(one.items) == approx(other.items)
        assert [r.item_id for r in one.ratings] == [r.item_id for r in other.ratings]
        values = [r.value for r in other.ratings]
        assert [r.value for r in one.ratings] == pytest.approx(values, abs=1e-4)


def test_unknown_users_and_items_have_a_documented_answer(client):
    new = client.recommend("nobody", timestamp=NOW)
    assert new.degraded == () and len(new.items) == 25
    odd = client.recommend(history=[Event("gone", 5.0)], timestamp=NOW)
    assert odd.unknown_items == 1
    assert [i.item_id for i in odd.items] == [i.item_id for i in new.items]


def test_bad_input_is_4xx_over_http(serving, client):
    json_type = {"content-type": "application/json"}
    with httpx.Client(base_url=serving.url, trust_env=False) as http:
        path = "/v1/models/hrnn-meta:predict"
        for content, headers, status in [
            (b'{"instances": [', json_type, 400),
            (b"{}", json_type, 400),
            (b'{"instances": [{"num_results": -3}]}', json_type, 400),
            (b'{"instances": [{"num_results": 0}]}', json_type, 400),
            (b'{"instances": [{"task": "rate"}]}', json_type, 400),
            (b'{"instances": [{"task": "guess"}]}', json_type, 400),
            (b'{"instances": [{"context": {"volume": "loud"}}]}', json_type, 400),
            (b'{"instances": [{"context": {"device": ["tv", "phone"]}}]}', json_type, 400),
            (b'{"instances": [{"filter": {"where": {"colour": ["red"]}}}]}', json_type, 400),
            (b'{"instances": [{}]}', {"content-type": "text/csv"}, 415),
            (b" " * (5 * 2**20), json_type, 413),
            (b'{"instances":' + b"[" * 10**5, json_type, 400),
        ]:
            response = http.post(path, content=content, headers=headers)
            assert response.status_code == status, response.text
            assert response.json()["error"]
    with pytest.raises(InputError, match=r"instances\[0\]\.num_results"):
        client.recommend("u1", num_results=-1)
    with pytest.raises(InputError, match="cannot be sent"):
        client.recommend("u1", timestamp=float("nan"))


def test_both_protocols_over_grpc_and_rest_agree(serving, client):
    from serving.kserve_api import pb, pb_grpc

    expected = client.recommend("u1", timestamp=NOW, num_results=3)
    address = f"{serving.settings.host}:{serving.settings.transformer_grpc_port}"

    def request(*texts, **tensor):
        contents = pb.InferTensorContents(bytes_contents=[t.encode() for t in texts])
        values = {"name": "instances", "datatype": "BYTES", "shape": [len(texts)]} | tensor
        return pb.ModelInferRequest(
            model_name="hrnn-meta",
            inputs=[pb.ModelInferRequest.InferInputTensor(contents=contents, **values)],
        )

    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=5).ready
        text = json.dumps({"user_id": "u1", "timestamp": NOW, "num_results": 3})
        response = stub.ModelInfer(request(text), timeout=5)
        answer = json.loads(response.outputs[0].contents.bytes_contents[0])
        assert [i["item_id"] for i in answer["items"]] == [i.item_id for i in expected.items]
        rate = {"user_id": "rater", "timestamp": NOW, "task": "rate", "items": ["i003", "no"]}
        response = stub.ModelInfer(request(json.dumps(rate)), timeout=5)
        answer = json.loads(response.outputs[0].contents.bytes_contents[0])
        rated = client.rate(["i003"], "rater", timestamp=NOW).ratings
        assert answer["items"] == [{"item_id": "i003", "value": pytest.approx(rated[0].value)}]
        assert answer["unknown_items"] == 1
        tensor = {"name": "instances", "datatype": "BYTES", "shape": [1]}
        response = httpx.post(
            f"{serving.url}/v2/models/hrnn-meta/infer",
            json={"inputs": [tensor | {"data": [json.dumps(rate)]}]},
            trust_env=False,
        )
        answer = json.loads(response.json()["outputs"][0]["data"][0])
        assert answer["items"] == [{"item_id": "i003", "value": pytest.approx(rated[0].value)}]
        raw = len(text).to_bytes(4, "little") + text.encode()
        tensor = pb.ModelInferRequest.InferInputTensor(
            name="instances", datatype="BYTES", shape=[1]
        )
        response = stub.ModelInfer(
            pb.ModelInferRequest(model_name="hrnn-meta", inputs=[tensor], raw_input_contents=[raw]),
            timeout=5,
        )
        assert response.outputs[0].name == "predictions"
        wrong = [
            (request('{"num_results": -1}'), "num_results"),
            (request("{"), "JSON"),
            (request(json.dumps({"user_id": fuzzing.nested(6, 4, "x" * 30)})), "user_id"),
            (request(json.dumps({"context": fuzzing.nested(9, 3, "🎬" * 30)})), "context.k0"),
            (request("{}", name="🎬" * 10**5), "instances"),
            (request("{}", shape=[2]), "shape"),
            (request("{}", shape=[-1]), "shape"),
            (request("{}", datatype="INT64"), "BYTES"),
            (request("{}", name="x"), "instances"),
            (pb.ModelInferRequest(model_name="hrnn-meta"), "instances"),
            (
                pb.ModelInferRequest(
                    model_name="hrnn-meta", inputs=[tensor], raw_input_contents=[b"\xff" * 3]
                ),
                "contents",
            ),
        ]
        for bad, reason in wrong:
            with pytest.raises(grpc.RpcError) as error:
                stub.ModelInfer(bad, timeout=5)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert reason in error.value.details()
        other = pb.ModelInferRequest(model_name="x" * 10**5)
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(other, timeout=5)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as error:
            stub.RepositoryModelUnload(
                pb.RepositoryModelUnloadRequest(model_name="hrnn-meta"), timeout=5
            )
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("role", ["transformer", "predictor"])
def test_fuzzed_requests_are_answered_or_refused(serving, role):
    """V1, V2 and gRPC, whole and torn; benchmarks.fuzz_serving sends more."""
    s = serving.settings
    base, port = {
        "transformer": (s.transformer_url, s.transformer_grpc_port),
        "predictor": (s.predictor_url, s.predictor_grpc_port),
    }[role]
    few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    with (
        httpx.Client(base_url=base, timeout=30, trust_env=False) as http,
        grpc.insecure_channel(f"{s.host}:{port}") as channel,
    ):

        @few
        @given(fuzzing.v1_bodies(ITEMS), fuzzing.v2_bodies(ITEMS))
        def over_http(v1, v2):
            headers = {"content-type": "application/json"}
            for path, body in (
                ("/v1/models/hrnn-meta:predict", v1),
                ("/v2/models/hrnn-meta/infer", v2),
            ):
                fuzzing.refused_or_answered(http.post(path, content=body, headers=headers))

        @few
        @given(fuzzing.grpc_messages(ITEMS, s.model_name))
        def over_grpc(message):
            fuzzing.ask_grpc(channel, message)

        over_http()
        over_grpc()
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff", timeout=30)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    serving.check()


def test_clients_that_never_send_their_bodies_keep_nobody_out(serving, client):
    s = serving.settings
    for port in (s.transformer_http_port, s.predictor_http_port):
        with contextlib.ExitStack() as stack:
            for _ in range(10 * s.max_in_flight):
                sock = stack.enter_context(socket.create_connection((s.host, port)))
                sock.sendall(
                    b"POST /v1/models/hrnn-meta:predict HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Length: 1000\r\n\r\n{"
                )
            time.sleep(0.2)
            assert len(client.recommend("u1").items) == 25


def test_concurrent_requests_get_their_own_answers(serving):
    def ask(k):
        with Client(serving.url) as client:
            return [len(client.recommend("u1", num_results=n).items) for n in range(k, k + 10)]

    with ThreadPoolExecutor(4) as pool:
        for k, sizes in zip(range(1, 9), pool.map(ask, range(1, 9)), strict=True):
            assert sizes == list(range(k, k + 10))


def test_metrics_of_both_processes(serving, client):
    client.recommend("u1")
    for role, names in {
        "transformer": [
            'hrnn_requests_total{outcome="ok",task="recommend"}',
            'hrnn_request_duration_seconds_bucket{le="0.0015",task="recommend"}',
            'hrnn_stage_duration_seconds_count{stage="features"}',
            "hrnn_threshold_rounds_count",
            "hrnn_trend_age_seconds",
            "hrnn_model_info{version=",
        ],
        "predictor": [
            'hrnn_requests_total{outcome="ok",task="score"}',
            'hrnn_stage_duration_seconds_count{stage="model"}',
            "hrnn_bundle_load_seconds",
            "hrnn_model_info{version=",
        ],
    }.items():
        text = httpx.get(serving.metrics_urls[role], trust_env=False).text
        for name in names:
            assert name in text, (role, name)
        assert "u1" not in text


def test_only_loopback_is_bound(serving):
    settings = serving.settings
    ports = {
        getattr(settings, f"{role}_{kind}_port")
        for role in ("transformer", "predictor")
        for kind in ("http", "grpc")
    }
    bound = {}
    for process in serving.processes.values():
        for connection in psutil.Process(process.pid).connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                bound[connection.laddr.port] = connection.laddr.ip
    assert bound.keys() == ports
    assert all(ip in ("127.0.0.1", "::ffff:127.0.0.1") for ip in bound.values())


def test_a_slow_feature_store_is_cut_off_and_labelled(serving, client):
    serving.store.write(delay=2.0)
    try:
        start = time.monotonic()
        answer = client.recommend("u1", timestamp=NOW, history=events(HISTORY))
        assert time.monotonic() - start < 1.5
    finally:
        serving.store.write(delay=0)
    assert answer.degraded == ("features_unavailable",)
    assert len(answer.items) == 25
    until(lambda: client.recommend("u1").degraded == ())


def test_a_new_trend_snapshot_is_picked_up_without_a_restart(serving, client, recommender):
    boosted = snapshot_from_counts(
        ["i499"], [10**9], num_items=500, smoothing=1e-3, as_of=NOW + 60, window_seconds=0
    )
    serving.store.write(trend=boosted.to_json())
    try:
        until(lambda: client.recommend("u1").trend_version == boosted.version)
        answer = client.recommend("u1", timestamp=NOW, num_results=20)
        (expected,) = recommender.recommend([Query(events(HISTORY), NOW)], 20, trend=boosted)
        assert plain(answer.items) == approx(expected)
        strong = client.recommend("u1", timestamp=NOW, trend_weight=10.0)
        assert strong.items[0].item_id == "i499"
    finally:
        serving.store.write(trend=recommender.trend.to_json())
    until(lambda: client.recommend("u1").trend_version == recommender.trend.version)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_predictor_killed_or_paused_then_back(serving, client, recommender, fault):
    process = serving.processes["predictor"]
    process.send_signal(fault)
    if fault == signal.SIGKILL:
        process.wait()
    try:
        start = time.monotonic()
        answer = client.recommend("u1", timestamp=NOW, num_results=5)
        assert time.monotonic() - start < 2.5
        assert answer.degraded == ("predictor_unavailable",)
        assert answer.model_version is None
        assert [i.item_id for i in answer.items] == list(recommender.trend.item_ids[:5])
        rated = client.rate(["i001"], "u1", timestamp=NOW)
        assert (rated.ratings, rated.degraded) == ((), ("predictor_unavailable",))
        with Client(serving.url) as other:
            assert other.ready()
    finally:
        if fault == signal.SIGKILL:
            process.stdin.close()
            serving.start_one("predictor")
            serving.wait_ready("predictor", 60)
        else:
            process.send_signal(signal.SIGCONT)
    until(lambda: client.recommend("u1", timestamp=NOW).degraded == ())


def test_logs_are_structured_and_hold_no_ids(serving, client):
    client.recommend("a-secret-user", history=[Event("a-secret-item", 5.0)])
    with pytest.raises(InputError):
        client.recommend("a-secret-user", num_results=-1)
    for role in ("transformer", "predictor"):
        text = serving.log_file(role).read_text()
        assert "secret" not in text
        for line in text.splitlines():
            assert {"time", "level", "role", "message"} <= json.loads(line).keys()


# Start and stop; each test starts processes of its own.


def run_role(role, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"serving.{role}", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_port_in_use(bundle_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("--http-port", "--grpc-port"):
            result = run_role("predictor", "--model-dir", str(bundle_dir), flag, str(port))
            assert result.returncode == 2
            assert result.stderr.startswith(f"error: port {port} on 127.0.0.1 is in use")
            assert "Traceback" not in result.stderr


def test_a_corrupt_bundle_is_refused_with_a_reason(bundle_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bundle_dir, broken)
    with (broken / "weights.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x55")
    settings = ServeSettings().with_free_ports()
    result = run_role("predictor", "--model-dir", str(broken), **settings.to_env() | {
        "HRNN_MODEL_DIR": ""})  # fmt: skip
    assert result.returncode == 2
    assert "weights.safetensors does not match its digest" in result.stderr
    assert "Traceback" not in result.stderr


def test_metrics_stay_in_one_process_though_feast_was_imported(bundle_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "multiprocess"))
    features = SimpleNamespace(root=str(tmp_path), online="sqlite", redis_url=None)
    serving = Serving(bundle_dir, features, ServeSettings().with_free_ports(), tmp_path)
    try:
        serving.start_one("predictor")
        serving.wait_ready("predictor", 60)
        assert "process_resident_memory_bytes" in (
            httpx.get(serving.metrics_urls["predictor"], trust_env=False).text
        ), "not there in the mode of several processes"
    finally:
        serving.stop()
    assert not (tmp_path / "multiprocess").exists()


def test_the_launcher_tells_why_a_process_did_not_start(tmp_path, monkeypatch):
    features = SimpleNamespace(root=str(tmp_path), online="sqlite", redis_url=None)
    serving = Serving(tmp_path / "nothing", features, ServeSettings().with_free_ports())
    monkeypatch.setenv("FAKE_STORE", str(tmp_path / "none.json"))
    with pytest.raises(UnavailableError, match=r"the predictor stopped .*holds no model"):
        serving.start()
    assert not serving.processes


@contextlib.contextmanager
def lone_predictor(bundle_dir, **values):
    """The process and its settings, ready; killed if it is still there at the end."""
    settings = ServeSettings(**values).with_free_ports()
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.predictor", "--model-dir", str(bundle_dir)],
        env={**os.environ, **settings.to_env(), "HRNN_MODEL_DIR": ""},
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            until(lambda: is_ready(settings.predictor_url), 60)
            yield process, settings
        finally:
            process.kill()


def test_sigterm_finishes_and_leaves_nothing(bundle_dir):
    with lone_predictor(bundle_dir) as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(15) == 0
        assert b"draining" not in process.stderr.read()
        assert not [child for child in children if child.is_running()]


def test_after_sigterm_new_connections_are_answered_until_it_is_drained(bundle_dir):
    from serving.kserve_api import pb, pb_grpc

    body = {"instances": [{"timestamp": NOW, "top_n": 1}]}
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="instances",
        datatype="BYTES",
        shape=[1],
        contents=pb.InferTensorContents(bytes_contents=[json.dumps(body["instances"][0]).encode()]),
    )
    with lone_predictor(bundle_dir, drain_seconds=1.5) as (process, settings):
        request = pb.ModelInferRequest(model_name=settings.model_name, inputs=[tensor])
        predict = f"{settings.predictor_url}/v1/models/{settings.model_name}:predict"
        address = f"{settings.host}:{settings.predictor_grpc_port}"
        process.terminate()
        told, answered = time.monotonic(), 0
        while time.monotonic() < told + 1.0:  # each over a connection of its own
            assert httpx.post(predict, json=body, trust_env=False).status_code == 200
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(address, options) as channel:
                assert pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=10)
            answered += 1
            time.sleep(0.1)
        assert answered
        assert process.wait(15) == 0
        assert time.monotonic() - told >= 1.5
        with pytest.raises(httpx.ConnectError):
            httpx.post(predict, json=body, trust_env=False)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)])
def test_a_second_sigterm_or_ctrl_c_ends_without_draining(bundle_dir, numbers):
    with lone_predictor(bundle_dir, drain_seconds=600) as (process, settings):
        for number in numbers:
            assert is_ready(settings.predictor_url)
            process.send_signal(number)
            time.sleep(0.5)  # two that come together are one to the kernel
        assert process.wait(15) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(bundle_dir, tmp_path, number):
    """Also when it is killed and cannot stop them; on Ctrl-C it stops them in order."""
    script = textwrap.dedent("""
        import os, sys
        from types import SimpleNamespace
        from serving.launcher import LocalServing
        from serving.settings import ServeSettings
        class One(LocalServing):
            def command(self, role):
                return super().command("predictor")
            def start(self):
                self.log_dir.mkdir(parents=True, exist_ok=True)
                self.start_one("predictor")
                self.wait_ready("predictor", 60)
                return self
        features = SimpleNamespace(root=".", online="sqlite", redis_url=None)
        settings = ServeSettings(grace_seconds=1).with_free_ports()
        with One(sys.argv[1], features, settings, sys.argv[2]) as serving:
            print(serving.processes["predictor"].pid, flush=True)
            serving.wait()
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(bundle_dir), str(tmp_path / "logs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=interruptible,
    )
    try:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.send_signal(number)
        parent.wait(15)
    finally:
        parent.kill()
        parent.stdout.close()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 15)
