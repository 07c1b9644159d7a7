"""Canaries against a stand-in of the Kubernetes API with KServe's behaviour, and what they decide.

The stand-in merges patches, counts generations, lags behind with its status, and holds every
InferenceService that is written to the SDK's schema of KServe 0.21.
"""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes import client

from components.deploy.kserve import InferenceServices, canary_of
from components.deploy.release import ReleaseSettings, RolledBackError, release
from k8s.validate import problems
from model.errors import InputError, UnavailableError
from model.store import Lineage, ModelStore
from tests.unit.test_store import make_bundle

ROOT = Path(__file__).parents[2]
STABLE = yaml.safe_load((ROOT / "k8s/base/inferenceservice.yaml").read_text())
SETTINGS = {"ready_seconds": 5, "watch_seconds": 0, "poll_seconds": 0.01}
PATH = "/apis/serving.kserve.io/v1beta1/namespaces/hrnn/inferenceservices"


def merge(value, change):
    """RFC 7396."""
    if not isinstance(change, dict):
        return change
    value = dict(value) if isinstance(value, dict) else {}
    for key, part in change.items():
        if part is None:
            value.pop(key, None)
        else:
            value[key] = merge(value.get(key), part)
    return value


class Cluster:
    """The API server, KServe's controller, the served model and Prometheus on one address."""

    def __init__(self, store, mode):
        self.store, self.mode = store, mode
        self.objects, self.looks, self.calls, self.requests = {}, {}, [], 0
        self.broken = set()  # what does not work
        self.prometheus = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                kind = self.headers.get("Content-Type", "")
                if self.command == "PATCH" and kind != "application/merge-patch+json":
                    status, answer = 415, {"message": f"no patch of type {kind}"}
                else:
                    status, answer = outer.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        stable = copy.deepcopy(STABLE)
        stable["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] = mode
        self._write("hrnn-meta", stable)

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def api(self):
        configuration = client.Configuration(host=self.address)
        return client.CustomObjectsApi(client.ApiClient(configuration))

    def answer(self, method, path, body):
        path = urlsplit(path).path
        if path == "/api/v1/query":
            return 200, self._metrics()
        if path.endswith(":predict"):
            return self._predict(path.split("/")[1])
        self.calls.append(method)
        if "api" in self.broken:
            return 500, {"message": "etcd is gone"}
        name = path.removeprefix(PATH).strip("/") or body["metadata"]["name"]
        if method == "POST":
            return self._write(name, body)
        if name not in self.objects:
            return 404, {"message": "not found"}
        if method == "GET":
            return 200, self._seen(name)
        if method == "DELETE":
            del self.objects[name]
            return 200, {"status": "Success"}
        now = self.objects[name]
        return self._write(name, merge(now, body) if method == "PATCH" else body)

    def _write(self, name, body):
        told = {k: v for k, v in body.items() if k != "status"}
        if wrong := problems([told]):
            return 422, {"message": wrong[0]}
        generation = self.objects.get(name, {}).get("metadata", {}).get("generation", 0) + 1
        told["metadata"] = told["metadata"] | {"generation": generation, "namespace": "hrnn"}
        # What was seen of an object before the controller looks at it anew.
        told["status"] = self.objects.get(name, {}).get("status", {})
        self.objects[name] = told
        self.looks[name] = 0
        return 200, told

    def _seen(self, name):
        """The controller has caught up at the second look after a change."""
        thing = self.objects[name]
        self.looks[name] += 1
        if self.looks[name] >= 2:
            generation = thing["metadata"]["generation"]
            percent = thing["spec"]["predictor"].get("canaryTrafficPercent")
            revision = f"{name}-predictor-{generation:05d}"
            bad = "pods" in self.broken and self._pinned(name)
            traffic = [{"revisionName": revision, "percent": percent or 100}]
            condition = {"type": "Ready", "status": "False" if bad else "True"}
            predictor = {"type": "PredictorReady", "status": condition["status"]}
            if bad:
                predictor["message"] = "CrashLoopBackOff"
            thing["status"] = {
                "observedGeneration": generation,
                "url": f"{self.address}/{name}",
                "deploymentMode": self.mode,
                "conditions": [condition, predictor],
                "components": {
                    "predictor": {
                        "latestCreatedRevision": revision,
                        "latestReadyRevision": "an older one" if bad else revision,
                        "traffic": traffic,
                    }
                },
            }
        return thing

    def _pinned(self, name):
        env = self.objects[name]["spec"]["predictor"]["containers"][0]["env"]
        return next((e["value"] for e in env if e["name"] == "HRNN_MODEL_DIR"), None)

    def _predict(self, name):
        self.requests += 1
        champion = self.store.champion().version if self.store.champion() else None
        pinned = self._pinned(name)
        share = self.objects[name]["spec"]["predictor"].get("canaryTrafficPercent", 100)
        version = champion
        if pinned and self.requests % 10 < share / 10:
            version = pinned.rpartition("/")[2]
            if "canary" in self.broken:
                return 500, {"error": "boom"}
            if "nan" in self.broken:
                return 200, self._prediction(version, float("nan"))
        if "service" in self.broken and version == "v2":
            return 503, {"error": "boom"}
        if "stuck" in self.broken and not pinned:
            version = "v1"
        return 200, self._prediction(version, -1.0)

    @staticmethod
    def _prediction(version, score):
        items = [{"item_id": "i", "score": score}]
        return {"predictions": [{"model_version": version, "degraded": [], "items": items}]}

    def _metrics(self):
        if "prometheus" in self.broken:
            return {"status": "error", "error": "no"}
        value = self.prometheus.get("value")
        result = [] if value is None else [{"metric": {}, "value": [0, str(value)]}]
        return {"status": "success", "data": {"resultType": "vector", "result": result}}


@pytest.fixture
def store(tmp_path):
    store = ModelStore(str(tmp_path / "models"))
    for version in ("v1", "v2"):
        store.publish(make_bundle(tmp_path / version, version), Lineage())
    store.promote("v1")
    return store


@pytest.fixture(params=["Knative", "Standard"])
def cluster(request, store):
    cluster = Cluster(store, request.param)
    yield cluster
    cluster.close()


def _release(cluster, store, **settings):
    services = InferenceServices("hrnn", cluster.api())
    return release(
        store,
        "v2",
        replaces="v1",
        canary=canary_of(services, "hrnn-meta", 20),
        service=lambda: f"{cluster.address}/hrnn-meta",
        model_dir=f"{store.uri}/versions/v2",
        settings=ReleaseSettings.parse(SETTINGS | {"traffic_percent": 20} | settings),
    )


def _spec(cluster):
    return cluster.objects["hrnn-meta"]["spec"]


def test_a_good_candidate_is_tried_promoted_and_the_canary_is_gone(cluster, store):
    before = copy.deepcopy(_spec(cluster))
    champion = _release(cluster, store)
    assert (champion.version, champion.previous, champion.reason) == ("v2", "v1", "deploy")
    assert list(cluster.objects) == ["hrnn-meta"]
    assert _spec(cluster) == before
    assert cluster.requests >= 2
    assert ("PATCH" in cluster.calls) is (cluster.mode == "Knative")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("pods", "did not become ready within 1 s .*CrashLoopBackOff|did not become ready"),
        ("canary", "test requests failed, the last with: HTTP 500"),
        ("nan", "scores that are not finite|ValueError"),
    ],
)
def test_a_bad_candidate_is_rolled_back_and_the_champion_serves_on(cluster, store, broken, reason):
    before = copy.deepcopy(_spec(cluster))
    pointer = store.champion()
    cluster.broken = {broken}
    with pytest.raises(RolledBackError, match=reason):
        _release(cluster, store, ready_seconds=1, watch_seconds=1)
    assert store.champion() == pointer
    assert list(cluster.objects) == ["hrnn-meta"]
    assert _spec(cluster) == before


def test_prometheus_decides_too(cluster, store):
    cluster.prometheus["value"] = 0.5
    with pytest.raises(RolledBackError, match=r"error rate is 0\.5, above 0\.01"):
        _release(cluster, store, prometheus=cluster.address)
    assert store.champion().version == "v1"
    cluster.broken = {"prometheus"}
    with pytest.raises(InputError, match="Prometheus refused"):
        _release(cluster, store, prometheus=cluster.address)
    cluster.broken, cluster.prometheus = set(), {}
    assert _release(cluster, store, prometheus=cluster.address).version == "v2"


@pytest.mark.parametrize(
    ("broken", "reason"), [("stuck", "did not take the new champion.*v1"), ("service", "HTTP 503")]
)
def test_a_service_that_does_not_follow_gets_its_champion_back(cluster, store, broken, reason):
    cluster.broken = {broken}
    # The canary's own answers are fine: only the stable service is at fault.
    if broken == "service":
        with pytest.raises(RolledBackError):
            _release(cluster, store, ready_seconds=1)
    else:
        with pytest.raises(RolledBackError, match=reason):
            _release(cluster, store, ready_seconds=1)
    assert store.champion().version == "v1"
    assert list(cluster.objects) == ["hrnn-meta"]


def test_what_a_killed_run_left_is_put_right_by_the_next(cluster, store):
    before = copy.deepcopy(_spec(cluster))
    services = InferenceServices("hrnn", cluster.api())
    canary_of(services, "hrnn-meta", 20).begin("/stores/models/versions/v0")
    canary_of(services, "hrnn-meta", 20).end()
    canary_of(services, "hrnn-meta", 20).end()
    assert _spec(cluster) == before
    canary_of(services, "hrnn-meta", 20).begin("/stores/models/versions/v0")
    assert _release(cluster, store).version == "v2"
    assert _spec(cluster) == before


def test_a_standard_canary_has_a_transformer_of_its_own(store):
    cluster = Cluster(store, "Standard")
    try:
        services = InferenceServices("hrnn", cluster.api())
        canary_of(services, "hrnn-meta", 20).begin("/b")
        spec = cluster.objects["hrnn-meta-canary"]["spec"]
        env = {e["name"]: e["value"] for e in spec["transformer"]["containers"][0]["env"]}
        assert env["HRNN_PREDICTOR_HOST"] == "hrnn-meta-canary-predictor:8091"
        assert (spec["predictor"]["minReplicas"], spec["predictor"]["maxReplicas"]) == (1, 1)
    finally:
        cluster.close()


def test_a_cluster_that_does_not_answer_is_said(cluster, store):
    cluster.broken = {"api"}
    with pytest.raises(UnavailableError, match="500 about InferenceService hrnn/hrnn-meta"):
        _release(cluster, store)
    cluster.broken = set()
    with pytest.raises(InputError, match="no InferenceService hrnn/other"):
        canary_of(InferenceServices("hrnn", cluster.api()), "other", 10)
    api = client.CustomObjectsApi(client.ApiClient(client.Configuration(host="http://127.0.0.1:9")))
    with pytest.raises(UnavailableError, match="cannot be reached"):
        InferenceServices("hrnn", api).get("hrnn-meta")
    assert store.champion().version == "v1"


def test_on_a_laptop_the_service_is_watched_after_the_promotion(store):
    cluster = Cluster(store, "Standard")
    settings = ReleaseSettings.parse(SETTINGS | {"ready_seconds": 1})
    how = {"replaces": "v1", "canary": None, "model_dir": "", "settings": settings}
    try:
        cluster.broken = {"service"}
        with pytest.raises(RolledBackError):
            release(store, "v2", service=lambda: f"{cluster.address}/hrnn-meta", **how)
        assert (store.champion().version, store.champion().reason) == ("v1", "rollback")
        cluster.broken = set()
        champion = release(store, "v2", service=lambda: f"{cluster.address}/hrnn-meta", **how)
        assert champion.version == "v2"
    finally:
        cluster.close()
