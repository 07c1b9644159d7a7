"""Releases against the stand-in of a cluster: what a candidate gets, and what remains of it."""

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kubernetes import client

from components.deploy.kserve import (
    InferenceServices,
    Mark,
    NotOursError,
    RunningService,
    StableService,
    canary_of,
)
from components.deploy.release import Releaser
from components.deploy.settle import overdue, settle
from components.deploy.watch import ReleaseSettings
from components.outcome.steps import SETTLE_SECONDS, TOLD_SECONDS
from model.errors import ConflictError, InputError, RolledBackError, UnavailableError
from model.store import Lineage, ModelStore
from tests.kserve_cluster import Cluster
from tests.unit.test_store import make_bundle

SETTINGS = {"ready_seconds": 40, "watch_seconds": 0, "poll_seconds": 1, "traffic_percent": 20}
MODES = ("Knative", "Standard")
LATER = 2e9  # a mark whose run has time left


class Clock:
    """Time that only sleeping passes, so that no deadline depends on the machine."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        time.sleep(0.001)


def _store(folder):
    store = ModelStore(str(folder / "models"))
    for version in ("v0", "v1", "v2"):
        store.publish(make_bundle(folder / version, version), Lineage())
    for version in ("v0", "v1"):
        store.promote(version)
    return store


@pytest.fixture
def store(tmp_path):
    return _store(tmp_path)


@pytest.fixture(params=MODES)
def cluster(request, store):
    cluster = Cluster(store, request.param)
    yield cluster
    cluster.close()


@pytest.fixture
def knative(store):
    cluster = Cluster(store, "Knative")
    yield cluster
    cluster.close()


def _releaser(cluster, store, run_id="run-1", version="v2", **settings):
    services = InferenceServices("hrnn", cluster.api())
    stable = StableService(services, "hrnn-meta")
    chosen = ReleaseSettings.parse(SETTINGS | settings)
    canary = canary_of(services, stable, chosen.traffic_percent)
    return _timed(Releaser(store, version, run_id, stable, canary, chosen))


def _timed(releaser):
    clock = Clock()
    releaser.clock, releaser.sleep = clock, clock.sleep
    return releaser


def _release(cluster, store, run_id="run-1", replaces="v1", **settings):
    releaser = _releaser(cluster, store, run_id, **settings)
    releaser.release(f"{store.uri}/versions/v2", replaces=replaces)


def _spec(cluster):
    return copy.deepcopy(cluster.objects["hrnn-meta"]["spec"])


def _alone(cluster):
    """Only the stable service is left, and what it is made of is made once more if need be."""
    for _ in range(20):
        cluster.step()
    assert list(cluster.objects) == ["hrnn-meta"]
    if cluster.mode == "Knative":
        assert len(cluster.transformers) == 1  # its pods were never replaced
        (target,) = cluster.knative.traffic
        assert (target["percent"], target["latestRevision"]) == (100, True)
        assert cluster.knative.newest(ready=True) == cluster.knative.newest(ready=False)


def test_a_good_candidate_is_tried_promoted_and_the_canary_is_gone(cluster, store):
    before = _spec(cluster)
    _release(cluster, store)
    champion = store.champion()
    assert (champion.version, champion.previous, champion.reason) == ("v2", "v1", "deploy")
    assert champion.checking is None
    assert store.release("v2", "run-1").state == "released"
    assert _spec(cluster) == before
    assert cluster.requests >= 2
    assert cluster.exposed == (20 if cluster.mode == "Knative" else 0)
    _alone(cluster)


BAD = [
    ("pods", r"did not become ready as a canary within .*CrashLoopBackOff \(exit code 1\)"),
    ("canary", "of 3 test requests failed, the last with: HTTP 500"),
    ("nan", "scores that are not finite|ValueError"),
]


@pytest.mark.parametrize(("broken", "reason"), BAD)
def test_a_bad_candidate_never_has_more_than_its_share_and_the_champion_serves_on(
    cluster, store, broken, reason
):
    before, pointer = _spec(cluster), store.champion()
    cluster.broken = {broken}
    with pytest.raises(RolledBackError, match=reason) as told:
        _release(cluster, store, watch_seconds=60)
    assert str(told.value).startswith("v2 was rolled back: ")
    assert str(told.value).endswith("; the champion is still v1")
    assert "\n" not in str(told.value)
    assert store.champion() == pointer
    assert _spec(cluster) == before
    assert cluster.exposed <= 20
    _alone(cluster)


def test_what_was_rolled_back_is_told_again_and_not_tried_again(cluster, store):
    cluster.broken = {"canary"}
    with pytest.raises(RolledBackError):
        _release(cluster, store)
    cluster.broken = set()
    cluster.calls.clear()
    asked = cluster.requests
    with pytest.raises(RolledBackError, match=r"by this run at .*HTTP 500.*hrnn models promote v2"):
        _release(cluster, store)  # as the pipeline's retry of the step does
    assert cluster.requests == asked
    assert {verb for verb, *_ in cluster.calls} == {"get"}
    # Another run may try again, and so may a person.
    _release(cluster, store, run_id="run-2")
    assert store.champion().version == "v2"


def test_what_was_released_is_not_released_again(cluster, store):
    _release(cluster, store)
    store.rollback(replaces="v2")  # by hand
    _release(cluster, store)
    assert store.champion().version == "v1"


def test_failures_of_the_candidate_are_not_thinned_by_answers_of_the_champion(knative, store):
    """Every third of its answers fails: one in fifteen of all."""
    knative.broken = {"seldom"}
    with pytest.raises(RolledBackError, match="test requests failed"):
        _release(knative, store, traffic_percent=20, max_error_rate=0.1, watch_seconds=200)


def test_prometheus_is_asked_about_the_candidate_alone(cluster, store):
    seen = {"prometheus": cluster.address, "watch_seconds": 5}
    cluster.figures = {("canary", "errors"): 0.5}
    with pytest.raises(RolledBackError, match=r"error rate is 0\.5 by Prometheus, above 0\.01"):
        _release(cluster, store, run_id="a", **seen)
    cluster.figures = {("canary", "p99"): 0.7}
    with pytest.raises(RolledBackError, match=r"p99 latency is 0\.7 by Prometheus, above 0\.5"):
        _release(cluster, store, run_id="b", **seen)
    assert store.champion().version == "v1"
    # The champion's own troubles are not the candidate's.
    cluster.figures = {("all", "errors"): 0.5, ("all", "p99"): 9.0}
    _release(cluster, store, run_id="c", **seen)
    assert store.champion().version == "v2"
    windows = [int(w) for q in cluster.queries for w in re.findall(r"\[(\d+)ms\]", q)]
    assert max(windows) < 120_000


@pytest.mark.parametrize("value", [None, "NaN"])
def test_a_candidate_that_prometheus_does_not_know_is_not_released(cluster, store, value):
    cluster.figures = {("canary", "errors"): value}
    seen = {"prometheus": cluster.address, "watch_seconds": 5}
    with pytest.raises(UnavailableError, match=r"knows no error rate of the candidate after .*s"):
        _release(cluster, store, **seen)
    assert store.champion().version == "v1"
    assert store.release("v2", "run-1").state == "trying"  # nothing is said against it
    _alone(cluster)
    cluster.figures = {}
    _release(cluster, store, **seen)  # a retry may find it
    assert store.champion().version == "v2"


def test_a_prometheus_that_refuses_stops_the_release(cluster, store):
    cluster.broken = {"prometheus"}
    with pytest.raises(InputError, match="Prometheus refused"):
        _release(cluster, store, prometheus=cluster.address)
    assert store.champion().version == "v1"
    _alone(cluster)


def test_queries_about_all_pods_are_refused():
    with pytest.raises(InputError, match=r"error_query.*must select by \{\$labels\}"):
        ReleaseSettings.parse({"error_query": "sum(rate(errors[2m]))"})


def test_waits_that_the_pod_does_not_live_to_see_are_refused():
    with pytest.raises(InputError, match="the step is stopped after 7200 s"):
        ReleaseSettings.parse({"watch_seconds": 3600})


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("stuck", r"did not take it within .*v1"), ("service", "did not take it within .*HTTP 503")],
)
def test_a_service_that_does_not_follow_gets_its_champion_back(cluster, store, broken, reason):
    cluster.broken = {broken}
    with pytest.raises(RolledBackError, match=reason + ".*the champion is again v1"):
        _release(cluster, store)
    champion = store.champion()
    # Of before, with what was before it: a rollback by hand does not lead to v2.
    assert (champion.version, champion.previous, champion.checking) == ("v1", "v0", None)
    assert store.release("v2", "run-1").state == "rolled_back"
    _alone(cluster)


def test_a_first_version_is_released_to_a_service_that_waits_for_it(cluster, tmp_path):
    cluster.close()
    store = ModelStore(str(tmp_path / "new"))
    store.publish(make_bundle(tmp_path / "first", "v2"), Lineage())
    cluster = Cluster(store, cluster.mode)
    try:
        assert cluster.objects["hrnn-meta"]["status"].get("url") is None
        _release(cluster, store, replaces=None, prometheus=cluster.address, watch_seconds=5)
        champion = store.champion()
        assert (champion.version, champion.previous, champion.checking) == ("v2", None, None)
        assert {(verb, name) for verb, _, name in cluster.calls if verb != "get"} == set()
    finally:
        cluster.close()


def test_a_first_version_that_fails_leaves_no_champion_and_says_so(cluster, tmp_path):
    cluster.close()
    store = ModelStore(str(tmp_path / "new"))
    store.publish(make_bundle(tmp_path / "first", "v2"), Lineage())
    cluster = Cluster(store, cluster.mode)
    cluster.broken = {"service"}
    try:
        with pytest.raises(RolledBackError, match=r"HTTP 503.*there is no champion, as before it"):
            _release(cluster, store, replaces=None)
        assert store.champion() is None
        with pytest.raises(RolledBackError, match="there is no champion"):
            _release(cluster, store, replaces=None)
    finally:
        cluster.close()


def test_another_champion_meanwhile_is_left_alone(cluster, store):
    def somebody_else(verb, name):
        champion = store.champion()
        if champion.version == "v2" and verb == "get":
            cluster.watchers.clear()
            store.promote("v0")

    cluster.watchers.append(somebody_else)
    with pytest.raises(ConflictError, match="v0 was made the champion while v2 was being checked"):
        _release(cluster, store)
    assert store.champion().version == "v0"
    with pytest.raises(ConflictError, match="is v0, not v1"):
        _release(cluster, store, run_id="run-2")
    assert store.champion().version == "v0"
    _alone(cluster)


def _begun(cluster, run_id, until):
    """A canary as another process leaves it when it is killed."""
    releaser = _releaser(cluster, cluster.store)
    releaser.canary.begin("/stores/models/versions/v9", Mark(run_id, "v9", until))
    return releaser.canary


def test_a_canary_of_a_run_that_may_be_alive_is_left_alone(cluster, store):
    before = _spec(cluster)
    _begun(cluster, "another", LATER)
    with pytest.raises(
        NotOursError, match=r"run another is trying a canary of v9 .* by 2033-05-18T"
    ):
        _release(cluster, store)
    canary = _releaser(cluster, store).canary
    assert canary.mark().version == "v9"
    while canary.end("somebody", force=True):  # as `hrnn models canary --end` does
        pass
    assert canary.mark() is None
    assert _spec(cluster) == before
    assert cluster.exposed <= 20
    _release(cluster, store)
    _alone(cluster)


@pytest.mark.parametrize("whose", [("run-1", LATER), ("another", 1.0)], ids=["its own", "late"])
def test_a_canary_that_a_dead_run_left_is_ended_and_the_trial_begun_anew(cluster, store, whose):
    before = _spec(cluster)
    _begun(cluster, *whose)
    _release(cluster, store)
    assert store.champion().version == "v2"
    assert _spec(cluster) == before
    _alone(cluster)


def test_a_canary_that_is_taken_away_ends_the_trial_without_a_verdict(cluster, store):
    canary = _releaser(cluster, store).canary

    def take_away(seconds):
        canary.end("somebody", force=True)
        clock.sleep(seconds)

    releaser = _releaser(cluster, store, watch_seconds=60)
    clock, releaser.sleep = releaser.clock, take_away
    with pytest.raises(ConflictError, match="taken away by somebody else"):
        releaser.release(f"{store.uri}/versions/v2", replaces="v1")
    assert store.champion().version == "v1"
    assert store.release("v2", "run-1").state == "trying"
    _alone(cluster)


def test_a_variable_that_was_there_before_is_there_again(knative, store):
    """Whatever kind it is of."""
    services = InferenceServices("hrnn", knative.api())
    source = {"configMapKeyRef": {"name": "hrnn-config", "key": "HRNN_MODEL_DIR"}}
    named = {"name": "HRNN_MODEL_DIR", "valueFrom": source}

    def add(service):
        containers = service["spec"]["predictor"]["containers"]
        containers[0]["env"].insert(0, named)
        return {"spec": {"predictor": {"containers": containers}}}

    services.edit("hrnn-meta", add)
    for _ in range(20):
        knative.step()
    before = _spec(knative)
    _release(knative, store)
    assert _spec(knative) == before
    assert before["predictor"]["containers"][0]["env"][0] == named


def test_somebody_elses_share_of_the_traffic_is_not_touched(knative, store):
    services = InferenceServices("hrnn", knative.api())
    services.edit("hrnn-meta", lambda _: {"spec": {"predictor": {"canaryTrafficPercent": 30}}})
    before = _spec(knative)
    with pytest.raises(InputError, match="canaryTrafficPercent 30, which is not ours"):
        _release(knative, store)
    assert _spec(knative) == before


def test_a_revision_that_an_operator_pins_stays_pinned(knative, store):
    """`canaryTrafficPercent: 0` without a mark: a bad revision that is to get no traffic."""
    services = InferenceServices("hrnn", knative.api())

    def pin(service):
        containers = copy.deepcopy(service["spec"]["predictor"]["containers"])
        containers[0]["env"].append({"name": "HRNN_MODEL_DIR", "value": "/bad/versions/v7"})
        return {"spec": {"predictor": {"canaryTrafficPercent": 0, "containers": containers}}}

    services.edit("hrnn-meta", pin)
    for _ in range(20):
        knative.step()
    before = _spec(knative)
    store.record("v2", "run-1", "trying")
    settled = _settled(knative, store)
    assert (settled.done, settled.problems) == (["the release of v2 was given up"], [])
    assert _releaser(knative, store).canary.end("", force=True) == ""  # as `canary --end` does
    with pytest.raises(InputError, match="canaryTrafficPercent 0, which is not ours"):
        _release(knative, store)
    for _ in range(20):
        knative.step()
    assert _spec(knative) == before
    assert knative.exposed == 0


def test_a_share_that_an_operator_sets_while_a_canary_ends_stays(knative, store):
    before = _spec(knative)
    canary = _begun(knative, "run-1", LATER)
    while canary.end("run-1") != "the predictor's own revision is being made again":
        pass
    services = InferenceServices("hrnn", knative.api())
    services.edit("hrnn-meta", lambda _: {"spec": {"predictor": {"canaryTrafficPercent": 70}}})
    for _ in range(40):
        canary.end("run-1")
    assert canary.mark() is None
    assert _spec(knative).pop("predictor") == before["predictor"] | {"canaryTrafficPercent": 70}


def test_a_canary_that_is_changed_at_the_same_moment_is_looked_at_anew(knative, store):
    """The operator's own pin comes between the look and the change."""
    canary = _begun(knative, "run-1", LATER)
    theirs = {"spec": {"predictor": {"canaryTrafficPercent": 0, **_spec(knative)["predictor"]}}}
    theirs["spec"]["predictor"]["containers"][0]["env"] = []
    looks = []

    def pins(verb, name):
        looks.append(verb)
        if looks == ["get", "get"]:
            knative.watchers.clear()
            assert knative.merged("hrnn-meta", copy.deepcopy(theirs))[0] == 200

    knative.watchers.append(pins)
    with pytest.raises(UnavailableError, match="somebody else changed the canary"):
        canary.end("run-1")
    pinned = _spec(knative)
    assert canary.end("run-1") == ""
    assert _spec(knative) == pinned


def test_a_service_that_only_has_the_canarys_name_is_not_deleted(store):
    cluster = Cluster(store, "Standard")
    try:
        services = InferenceServices("hrnn", cluster.api())
        other = copy.deepcopy(services.existing("hrnn-meta"))
        other["metadata"] = {"name": "hrnn-meta-canary", "namespace": "hrnn"}
        services.create(other | {"status": {}})
        store.record("v2", "run-1", "trying")
        settled = _settled(cluster, store)
        assert (settled.done, settled.problems) == (["the release of v2 was given up"], [])
        assert _releaser(cluster, store).canary.end("", force=True) == ""
        with pytest.raises(InputError, match="hrnn-meta-canary that is not ours"):
            _release(cluster, store)
        assert "deletionTimestamp" not in cluster.objects["hrnn-meta-canary"]["metadata"]
    finally:
        cluster.close()


def test_a_standard_canary_has_a_transformer_of_its_own(store):
    cluster = Cluster(store, "Standard")
    try:
        _begun(cluster, "run-1", LATER)
        spec = cluster.objects["hrnn-meta-canary"]["spec"]
        env = {e["name"]: e["value"] for e in spec["transformer"]["containers"][0]["env"]}
        assert env["HRNN_PREDICTOR_HOST"] == "hrnn-meta-canary-predictor:8091"
        assert (spec["predictor"]["minReplicas"], spec["predictor"]["maxReplicas"]) == (1, 1)
    finally:
        cluster.close()


def test_a_cluster_that_does_not_answer_is_said(cluster, store):
    cluster.broken = {"api"}
    with pytest.raises(
        UnavailableError, match=r"500 to get inferenceservices\.serving.* hrnn/hrnn"
    ):
        _release(cluster, store)
    cluster.broken = set()
    services = InferenceServices("hrnn", cluster.api())
    with pytest.raises(UnavailableError, match=r"403 .*not permitted"):
        services.get("other")
    cluster.objects.clear()
    with pytest.raises(InputError, match="no InferenceService hrnn/hrnn-meta: apply k8s/ first"):
        _release(cluster, store)
    api = client.CustomObjectsApi(client.ApiClient(client.Configuration(host="http://127.0.0.1:9")))
    with pytest.raises(UnavailableError, match="cannot be reached"):
        InferenceServices("hrnn", api).get("hrnn-meta")
    assert store.champion().version == "v1"


def test_a_cluster_that_stops_answering_in_the_middle_is_said_and_put_right_later(cluster, store):
    before = _spec(cluster)

    def breaks(verb, name):
        if verb in ("create", "patch"):
            cluster.broken = {"api"}

    cluster.watchers.append(breaks)
    with pytest.raises(UnavailableError, match=r"cannot be taken away entirely|500 to "):
        _release(cluster, store)
    cluster.watchers.clear()
    cluster.broken = set()
    assert store.champion().version == "v1"
    _release(cluster, store)
    assert store.champion().version == "v2"
    assert _spec(cluster) == before
    _alone(cluster)


def test_on_a_laptop_the_service_is_watched_after_the_promotion(store):
    cluster = Cluster(store, "Standard")
    service = RunningService(f"{cluster.address}/hrnn-meta/")
    settings = ReleaseSettings.parse(SETTINGS)
    try:
        cluster.broken = {"service"}
        with pytest.raises(RolledBackError, match=r"HTTP 503.*the champion is again v1"):
            _timed(Releaser(store, "v2", "a", service, None, settings)).release("", replaces="v1")
        assert (store.champion().version, store.champion().previous) == ("v1", "v0")
        cluster.broken = set()
        _timed(Releaser(store, "v2", "b", service, None, settings)).release("", replaces="v1")
        assert store.champion().version == "v2"
    finally:
        cluster.close()


# Killed. The attempts run in processes of their own; the next one runs here.

ATTEMPTS = """
import json, os, signal, sys, traceback
from kubernetes import client
from components.deploy.kserve import InferenceServices, StableService, canary_of
from components.deploy.release import Releaser
from components.deploy.watch import ReleaseSettings
from model.errors import HrnnError
from model.store import ModelStore, _Folder
from tests.unit.test_release import Clock

def attempt(address, uri, settings, point):
    count = 0
    def dies(wrapped):
        def call(*arguments, **keywords):
            nonlocal count
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return wrapped(*arguments, **keywords)
        return call
    # Everything by which something in the store or on the cluster changes.
    _Folder.write = dies(_Folder.write)
    for change in ("create", "edit", "delete"):
        setattr(InferenceServices, change, dies(getattr(InferenceServices, change)))
    api = client.CustomObjectsApi(client.ApiClient(client.Configuration(host=address)))
    services = InferenceServices("hrnn", api)
    stable = StableService(services, "hrnn-meta")
    chosen = ReleaseSettings.parse(settings)
    store = ModelStore(uri)
    canary = canary_of(services, stable, chosen.traffic_percent)
    releaser = Releaser(store, "v2", "run-1", stable, canary, chosen)
    clock = Clock()
    releaser.clock, releaser.sleep = clock, clock.sleep
    try:
        releaser.release(f"{uri}/versions/v2", replaces="v1")
    except HrnnError as error:
        print(error, flush=True)
        return 1
    return 0

def forked(*arguments):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 3
    try:
        code = attempt(*arguments)
    except BaseException:
        traceback.print_exc()
    os._exit(code)

settings, worlds = json.loads(sys.argv[1]), sys.argv[2:]
if len(worlds) == 2:
    print("ready", flush=True)
    sys.exit(attempt(*worlds, settings, -1))
for point in range(len(worlds) // 2):
    code = forked(*worlds[2 * point : 2 * point + 2], settings, point)
    print("code", code, flush=True)
    if code != -signal.SIGKILL:
        break
"""


def _attempts(settings, worlds):
    places = [part for cluster, store in worlds for part in (cluster.address, store.uri)]
    return subprocess.Popen(
        [sys.executable, "-c", ATTEMPTS, json.dumps(SETTINGS | settings), *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    _store(folder)
    return folder / "models"


@pytest.fixture
def worlds(fresh, tmp_path):
    made = []

    def make(mode, count):
        for n in range(count):
            shutil.copytree(fresh, tmp_path / f"{mode}{n}")
            store = ModelStore(str(tmp_path / f"{mode}{n}"))
            made.append((Cluster(store, mode), store))
        return made

    yield make
    for cluster, _ in made:
        cluster.close()


@pytest.mark.parametrize(
    ("mode", "broken"),
    [(mode, broken) for mode in MODES for broken in (None, "service")] + [("Knative", "canary")],
)
def test_killed_before_any_change_the_next_attempt_ends_as_it_would_have(worlds, mode, broken):
    made = worlds(mode, 9)
    before = _spec(made[0][0])
    for cluster, _ in made:
        cluster.broken = {broken} - {None}
    done = _attempts({}, made)
    out, err = done.communicate(timeout=240)
    codes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("code ")]
    ended = 1 if broken else 0
    assert ended in codes, (out, err)
    killed = codes.index(ended)
    assert codes[:killed] == [-signal.SIGKILL] * killed, (out, err)
    assert killed >= 4
    for cluster, store in made[: killed + 1]:
        champion = store.champion()
        assert champion.version in ("v1", "v2")
        if broken:
            with pytest.raises(RolledBackError):
                _release(cluster, store)
            champion = store.champion()
            assert (champion.version, champion.previous) == ("v1", "v0")
            assert store.release("v2", "run-1").state == "rolled_back"
        else:
            _release(cluster, store)
            champion = store.champion()
            assert (champion.version, champion.previous) == ("v2", "v1")
            assert store.release("v2", "run-1").state == "released"
        assert champion.checking is None
        assert _spec(cluster) == before
        assert cluster.exposed <= 20
        _alone(cluster)


def _settled(cluster, store, run_id="run-1"):
    canary = _releaser(cluster, store).canary
    clock = Clock()
    return settle(store, run_id, lambda: canary, seconds=60, sleep=clock.sleep, clock=clock)


@pytest.mark.parametrize(("mode", "broken"), [("Knative", None), ("Standard", "service")])
def test_killed_before_any_change_the_runs_end_takes_it_back_and_promotes_nothing(
    worlds, mode, broken
):
    made = worlds(mode, 9)
    before = _spec(made[0][0])
    for cluster, _ in made:
        cluster.broken = {broken} - {None}
    out, err = _attempts({}, made).communicate(timeout=240)
    killed = out.splitlines().count(f"code {-signal.SIGKILL}")
    assert killed >= 4, (out, err)
    states = set()
    for cluster, store in made[:killed]:
        promoted = store.champion()
        checked = promoted.version == "v2" and promoted.checking is None
        settled = _settled(cluster, store)
        assert settled.problems == []
        champion, told = store.champion(), store.release("v2", "run-1")
        assert champion.version == ("v2" if checked else "v1")
        assert champion.checking is None
        states.add(told and told.state)
        assert _spec(cluster) == before
        assert cluster.exposed <= 20
        _alone(cluster)
        assert _settled(cluster, store).done == []  # nothing is left to be done
        cluster.broken = set()
        _release(cluster, store, run_id="run-2", replaces=champion.version)
        assert (store.champion().version, store.champion().previous) == ("v2", "v1")
    last = {"rolled_back"} if broken else {"released"}
    assert states == {None, "given_up"} | last


def test_a_run_that_was_given_up_may_go_on_all_the_same(knative, store):
    """As Kubeflow's `retry` of a whole run does, after its exit handler."""
    store.record("v2", "run-1", "trying")
    assert _settled(knative, store).done == ["the release of v2 was given up"]
    _begun(knative, "another", LATER)
    with pytest.raises(NotOursError):
        _release(knative, store)
    assert len(_settled(knative, store, "another").done) == 1
    _release(knative, store)
    assert store.release("v2", "run-1").state == "released"


def test_what_belongs_to_others_is_not_settled(cluster, store):
    store.promote("v2", checking="another")
    _begun(cluster, "another", LATER)
    settled = _settled(cluster, store)
    assert (settled.done, settled.problems) == ([], [])
    assert store.champion().checking == "another"
    canary = _releaser(cluster, store).canary
    assert canary.mark().run_id == "another"
    assert len(_settled(cluster, store, "another").done) == 2
    assert (store.champion().version, canary.mark()) == ("v1", None)


def test_a_cluster_that_does_not_answer_keeps_the_champion_of_before_from_nothing(cluster, store):
    store.record("v2", "run-1", "trying")
    _begun(cluster, "run-1", LATER)
    store.promote("v2", checking="run-1")
    canary = _releaser(cluster, store).canary
    cluster.broken = {"api"}
    clock = Clock()
    settled = settle(store, "run-1", lambda: canary, seconds=9, sleep=clock.sleep, clock=clock)
    assert store.champion().version == "v1"
    (problem,) = settled.problems
    assert "Kubernetes answered 500" in problem
    assert store.release("v2", "run-1").state == "trying"  # a later attempt has to see it
    cluster.broken = set()
    assert _settled(cluster, store).problems == []
    assert store.release("v2", "run-1").state == "given_up"
    _alone(cluster)


def test_a_rollback_that_fails_is_not_recorded_as_a_release(cluster, store):
    """The bundle of before is damaged: the version stays unchecked, and is told as that."""
    store.record("v2", "run-1", "trying")
    _begun(cluster, "run-1", LATER)
    store.promote("v2", checking="run-1")
    damaged = next(Path(store.uri, "versions", "v1").glob("*.npy"), None)
    damaged = damaged or next(
        f for f in Path(store.uri, "versions", "v1").iterdir() if f.name != "manifest.json"
    )
    content = damaged.read_bytes()
    damaged.write_bytes(b"garbage")
    settled = _settled(cluster, store)
    assert len(settled.problems) == 1
    assert settled.done == ["the canary of v9 was taken away"]
    assert store.champion().checking == "run-1"
    assert store.release("v2", "run-1").state == "trying"
    damaged.write_bytes(content)
    assert _settled(cluster, store).problems == []
    assert (store.champion().version, store.release("v2", "run-1").state) == ("v1", "given_up")


def test_a_check_that_a_dead_run_left_is_marked_with_the_run_that_takes_it_over(cluster, store):
    """The same version, of another run: the training was cached."""
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    before = ModelStore(store.uri, clock=lambda: long_ago).promote("v2", checking="dead")
    assert overdue(before, datetime.now(UTC))
    seen = []

    def look(verb, name):
        seen.append(store.champion())

    cluster.watchers.append(look)
    _release(cluster, store)
    cluster.watchers.clear()
    under = [c for c in seen if c.checking == "run-1"]
    assert under
    assert not overdue(under[0], datetime.now(UTC))
    champion = store.champion()
    assert (champion.version, champion.previous, champion.checking) == ("v2", "v1", None)


def test_a_check_is_taken_over_only_while_it_lasts(store):
    store.promote("v2", checking="a")
    assert store.promote("v2", checking="b").checking == "b"
    assert store.take_over("v2", "c").checking == "c"
    assert store.take_over("v2", "c") == store.champion()
    store.confirm("v2")
    assert store.take_over("v2", "d").checking is None
    assert store.promote("v2", checking="d").checking is None
    with pytest.raises(ConflictError, match="v2 became the champion"):
        store.take_over("v1", "d")


def test_what_another_run_checks_by_now_is_given_up_and_not_released(cluster, store):
    store.record("v2", "run-1", "trying")
    store.promote("v2", checking="run-2")
    assert _settled(cluster, store).done == ["the release of v2 was given up"]
    assert store.champion().checking == "run-2"


@pytest.mark.parametrize("hiccups", range(1, 5))
def test_store_and_cluster_that_answer_again_are_asked_again(cluster, store, hiccups):
    """Every call of either may fail for a while, also the first."""
    store.record("v2", "run-1", "trying")
    _begun(cluster, "run-1", LATER)
    store.promote("v2", checking="run-1")
    made = _releaser(cluster, store).canary
    clock, pointer = Clock(), Path(store.uri, "champion.json")
    content = pointer.read_bytes()

    def mended(seconds):
        clock.sleep(seconds)
        if clock.now >= hiccups:
            cluster.broken = set()
            if pointer.read_bytes() == b"{":
                pointer.write_bytes(content)

    def canary():
        if clock.now < hiccups / 2:
            raise UnavailableError("no answer")
        return made

    cluster.store = ModelStore(str(Path(store.uri).with_name("other")))  # the stand-in reads it too
    cluster.broken = {"api"}
    pointer.write_bytes(b"{")
    settled = settle(store, "run-1", canary, seconds=60, sleep=mended, clock=clock)
    cluster.store = store
    assert settled.problems == []
    assert len(settled.done) == 3
    assert (store.champion().version, store.release("v2", "run-1").state) == ("v1", "given_up")
    _alone(cluster)


def test_a_record_that_cannot_be_read_keeps_no_other_from_being_settled(cluster, store):
    for version in ("v0", "v1", "v2"):
        store.record(version, "run-1", "trying")
    store.promote("v2")
    Path(store.uri, "releases", "v1", "run-1.json").write_text("{")
    settled = _settled(cluster, store)
    assert len(settled.problems) == 1
    assert "v1/run-1.json is not a release record" in settled.problems[0]
    assert store.release("v0", "run-1").state == "given_up"
    assert store.release("v2", "run-1").state == "released"


def test_the_pod_that_settles_lives_long_enough():
    assert SETTLE_SECONDS + 300 <= TOLD_SECONDS


@pytest.mark.parametrize("healthy", [True, False])
def test_killed_between_the_promotion_and_its_check_the_check_goes_on(worlds, healthy):
    """The very moment: the pointer has moved, and the service is being looked at."""
    ((cluster, store),) = worlds("Standard", 1)
    process = _attempts({}, [(cluster, store)])
    killed = []

    def kill(verb, name):
        if store.champion().version == "v2" and not killed:
            process.kill()
            killed.append(process.wait())

    cluster.watchers.append(kill)
    process.communicate(timeout=120)
    assert killed == [-signal.SIGKILL]
    assert (store.champion().version, store.champion().checking) == ("v2", "run-1")
    assert store.release("v2", "run-1").state == "trying"
    cluster.broken = set() if healthy else {"service"}
    asked = cluster.requests
    if healthy:
        _release(cluster, store)
        assert cluster.requests > asked  # it was looked at, not taken as done
        assert (store.champion().version, store.champion().checking) == ("v2", None)
        assert store.champion().previous == "v1"
    else:
        with pytest.raises(RolledBackError, match=r"HTTP 503.*the champion is again v1"):
            _release(cluster, store)
        assert (store.champion().version, store.champion().previous) == ("v1", "v0")
    _alone(cluster)


@pytest.mark.parametrize("mode", MODES)
def test_sigterm_takes_the_canary_away_before_the_pod_is_killed(worlds, mode):
    ((cluster, store),) = worlds(mode, 1)
    before = _spec(cluster)
    process = _attempts({"watch_seconds": 6000}, [(cluster, store)])
    deadline = time.monotonic() + 120
    while cluster.requests < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1, (out, err)
    assert "stopped by SIGTERM" in out
    assert _spec(cluster) == before
    assert store.champion().version == "v1"
    assert cluster.exposed <= 20
    _alone(cluster)
    _release(cluster, store)
    assert store.champion().version == "v2"
