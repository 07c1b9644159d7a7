"""The exit handler says how a run ended; a web hook that fails is a warning and hides nothing."""

import json
import threading

import pytest

from components.outcome import steps
from tests.http_server import Handler, HttpServer

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
