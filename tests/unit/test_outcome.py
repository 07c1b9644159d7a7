"""The exit handler says how a run ended, to a web hook too; tokens in its address stay unsaid."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from components.outcome import steps
from model.errors import InputError, UnavailableError

RUN = {"pipeline": "train-and-deploy", "run_id": "r1", "step": "train", "error": "no disk"}


@pytest.fixture
def hook():
    received = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(body))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("SUCCEEDED", "train-and-deploy r1: succeeded"),
        ("FAILED", "train-and-deploy r1: failed at train: no disk"),
        ("CANCELLED", "train-and-deploy r1: cancelled at train: no disk"),
    ],
)
def test_the_outcome_is_written_and_told(tmp_path, hook, state, text):
    address, received = hook
    record = steps.run(tmp_path / "o" / "outcome", **RUN, state=state, notify=f"{address}/x")
    assert record["text"] == text
    assert json.loads((tmp_path / "o" / "outcome").read_text()) == record
    assert received == [record]


def test_without_an_address_nobody_is_told(tmp_path, hook):
    steps.run(tmp_path / "outcome", **RUN, state="FAILED", notify="")
    assert hook[1] == []


def test_an_outcome_that_could_not_be_told_is_an_error_without_the_token(tmp_path, hook):
    address, _ = hook
    for url, reason in ((f"{address}/broken/TOKEN", "HTTP 500"), ("http://127.0.0.1:9/TOKEN", "")):
        with pytest.raises(UnavailableError, match=f"could be told.*{reason}") as raised:
            steps.run(tmp_path / "outcome", **RUN, state="FAILED", notify=url)
        assert "TOKEN" not in str(raised.value)
    with pytest.raises(InputError, match="HRNN_NOTIFY_URL"):
        steps.run(tmp_path / "outcome", **RUN, state="FAILED", notify="file:///etc/passwd")
    assert json.loads((tmp_path / "outcome").read_text())["state"] == "FAILED"
