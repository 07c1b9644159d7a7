"""What cannot be reached is asked again; what is wrong is refused at once."""

import socket

import pytest

from components.ingest import steps
from components.retries import patiently
from model.errors import InputError, UnavailableError
from tests.http_server import Handler, HttpServer

ROWS = "user_id,item_id,timestamp\n" + "".join(f"u{n},i{n},{n + 10}\n" for n in range(5))
SOON = {"retries": 3, "retry_seconds": 0.01}


@pytest.fixture
def files():
    """An HTTP server of one file; it answers with the statuses of `script` first."""
    script, asked = [], []

    class Files(Handler):
        def _answer(self):
            asked.append(self.command)
            status = script.pop(0) if script else 200
            content = ROWS.encode() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = _answer

    with HttpServer(Files) as server:
        yield f"{server.address}/log.csv", script, asked


def test_a_source_that_comes_back_is_read(files, tmp_path, capsys):
    url, script, _ = files
    script += [503] * 2
    source = steps.run(tmp_path / "tables", interactions=url, settings=SOON)
    assert source["rows"] == {"interactions": 5}
    said = capsys.readouterr().out
    assert f"{url} cannot be fetched: 503" in said
    assert "again in 0 s" in said


def test_a_source_that_stays_away_is_said_after_the_last_try(files, tmp_path, capsys):
    url, script, _ = files
    script += [503] * 100
    with pytest.raises(UnavailableError, match="cannot be fetched: 503"):
        steps.run(tmp_path / "tables", interactions=url, settings=SOON)
    assert capsys.readouterr().out.count("again in") == 3


def test_an_event_log_that_is_down_is_asked_again(tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://u:secret@127.0.0.1:{unused.getsockname()[1]}/db"
        with pytest.raises(UnavailableError) as raised:
            steps.run(tmp_path / "tables", interactions=url, settings=SOON | {"retries": 1})
    said = capsys.readouterr().out
    assert said.count("again in") == 1
    assert "secret" not in said + str(raised.value)


@pytest.mark.parametrize(
    ("status", "message"), [(404, "no such file"), (403, "may not be read with these credentials")]
)
def test_the_users_errors_are_not_tried_again(files, tmp_path, capsys, status, message):
    url, script, asked = files
    script += [status] * 100
    with pytest.raises(InputError, match=message):
        steps.run(tmp_path / "tables", interactions=url, settings=SOON)
    assert len(asked) <= 2
    assert "again in" not in capsys.readouterr().out


def test_wrong_content_is_not_read_twice(files, tmp_path, capsys):
    url, _, asked = files
    with pytest.raises(InputError, match="has no column 'product'"):
        steps.run(
            tmp_path / "tables",
            interactions=url,
            settings=SOON | {"columns": {"item_id": "product"}},
        )
    assert asked.count("GET") <= 2
    assert "again in" not in capsys.readouterr().out


def test_waits_grow(capsys):
    with pytest.raises(UnavailableError):
        patiently(_down, retries=3, wait_seconds=0.001)
    assert capsys.readouterr().out.count("down; again in") == 3
    with pytest.raises(UnavailableError):
        patiently(_down, retries=0, wait_seconds=60.0)


def _down():
    raise UnavailableError("down")
