"""The exit handler says how a run ended; a web hook that fails is a warning and hides nothing."""

import json
import threading

import pytest

from components.deploy import settle as settling
from components.deploy.settle import Settled
from components.outcome import steps
from model.errors import UnavailableError
from model.store import Lineage, ModelStore
from tests.http_server import Handler, HttpServer
from tests.unit.test_store import make_bundle

RUN = {"pipeline": "train-and-deploy", "run_id": "r1", "step": "train", "error": "no disk"}


@pytest.fixture
def hook():
    """A web hook; the path says how it behaves."""
    received, over = [], threading.Event()

    class Hook(Handler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(body))
            if "silent" in self.path:
                over.wait()  # takes the request and never answers
                return
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()
            if "endless" in self.path:
                over.wait()  # answers, but its body never ends

    with HttpServer(Hook) as server:
        yield server.address, received
        over.set()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("SUCCEEDED", "train-and-deploy r1: succeeded"),
        ("FAILED", "train-and-deploy r1: failed at train: no disk"),
        ("CANCELLED", "train-and-deploy r1: cancelled at train: no disk"),
    ],
)
@pytest.mark.parametrize("path", ["x", "endless"])
def test_the_outcome_is_written_and_told(tmp_path, hook, state, text, path):
    address, received = hook
    record = steps.run(tmp_path / "o" / "outcome", **RUN, state=state, notify=f"{address}/{path}")
    assert record["text"] == text
    assert json.loads((tmp_path / "o" / "outcome").read_text()) == record
    assert received == [record]
    assert "warning" not in record


def test_without_an_address_nobody_is_told(tmp_path, hook):
    steps.run(tmp_path / "outcome", **RUN, state="FAILED", notify="")
    assert hook[1] == []


@pytest.mark.parametrize(
    ("notify", "reason"),
    [
        ("{hook}/broken/TOKEN", "HTTP 500"),
        ("{hook}/silent/TOKEN", "no answer within 0.5 s"),
        ("http://127.0.0.1:9/TOKEN", "no connection"),
        ("file:///etc/TOKEN", "it is no http(s) address"),
        ("http://TOKEN\u0000/", "InvalidURL"),
    ],
)
def test_a_web_hook_that_fails_is_a_warning_after_the_outcome(
    tmp_path, hook, capsys, monkeypatch, notify, reason
):
    monkeypatch.setattr(steps, "SECONDS", 0.5)
    record = steps.run(
        tmp_path / "outcome", **RUN, state="FAILED", notify=notify.replace("{hook}", hook[0])
    )
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "train-and-deploy r1: failed at train: no disk",
        f"warning: HRNN_NOTIFY_URL was not told of this outcome: {reason}",
    ]
    assert record["warning"] in said[1]
    assert json.loads((tmp_path / "outcome").read_text()) == record
    assert "TOKEN" not in "".join(said)


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELLED"])
def test_what_a_run_left_half_done_is_settled_and_told_with_its_outcome(tmp_path, hook, state):
    def settle():
        return Settled(["v2 was rolled back"], ["Kubernetes cannot be reached"])

    address, received = hook
    record = steps.run(tmp_path / "outcome", **RUN, state=state, notify=address, settle=settle)
    assert json.loads((tmp_path / "outcome").read_text()) == record
    assert received[0]["text"] == record["text"]
    if state == "SUCCEEDED":
        assert "settled" not in record and "warning" not in record
        return
    assert record["settled"] == ["v2 was rolled back"]
    assert record["warning"] == "not settled: Kubernetes cannot be reached"
    assert record["text"].endswith(
        "at train: no disk; v2 was rolled back; not settled: Kubernetes cannot be reached"
    )


@pytest.mark.parametrize("error", [UnavailableError("no store"), RuntimeError("no store")])
def test_a_run_that_cannot_be_settled_is_told_all_the_same(tmp_path, hook, capsys, error):
    def settle():
        raise error

    record = steps.run(tmp_path / "o", **RUN, state="FAILED", notify=hook[0], settle=settle)
    assert hook[1][0]["state"] == "FAILED"
    assert "could not be settled" in record["warning"] and "no store" in record["warning"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "train-and-deploy r1: failed at train: no disk"
    assert said[1] == f"warning: {record['warning']}"


@pytest.mark.parametrize("service", ["", "hrnn-meta"])
def test_the_settings_of_the_run_say_what_is_to_be_settled(tmp_path, monkeypatch, service):
    store = ModelStore(str(tmp_path / "models"))
    for version in ("v1", "v2"):
        store.publish(make_bundle(tmp_path / version, version), Lineage())
    store.promote("v1")
    store.promote("v2", checking="r1")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none")
    )
    settled = settling.run(store.uri, {"service": service}, "r1", seconds=1)
    assert store.champion().version == "v1"
    assert ["no cluster to deploy to" in p for p in settled.problems] == [True] * bool(service)
