"""A real Prometheus scrapes the live servers; every panel and alert query runs against it."""

import json
import shutil
import socket
import subprocess
import time
from string import Template

import httpx
import pytest
import yaml

from components.deploy.watch import ReleaseSettings, _prometheus, http_client
from k8s.monitoring import dashboards
from model.query import Event

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus")

# Panels of faults stay empty while nothing is wrong.
QUIET = {
    "Feature reads that fail",
    "Predictor calls that fail",
    "Degraded answers",
    "Failing share",
    "Model changes",
    "Refused and cut off",
    "New items that cannot be served",
    "Collector failures",
}


@pytest.fixture(scope="module")
def prometheus(service, tmp_path_factory):
    serving, client = service
    folder = tmp_path_factory.mktemp("prometheus")
    targets = [
        {
            "targets": [url.removeprefix("http://").removesuffix("/metrics")],
            "labels": {"role": role},
        }
        for role, url in serving.metrics_urls.items()
    ]
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "hrnn", "static_configs": targets}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not _ready(address):
            assert time.monotonic() < deadline, "Prometheus did not start"
            time.sleep(0.2)
        while len(_query(address, "up == 1")) < len(targets) or len(targets) < 3:
            assert time.monotonic() < deadline, "Prometheus did not scrape all three servers"
            time.sleep(0.2)
        end = time.monotonic() + 6
        while time.monotonic() < end:
            events = [{"user_id": "u", "item_id": "i"}, {"user_id": "u", "colour": "red"}]
            httpx.post(f"{serving.settings.collector_url}/events", json={"events": events})
            client.recommend(history=[Event("item 1", 1_000_000_000.0), Event("gone", 1e9 + 1)])
            client.recommend("nobody")
            time.sleep(0.1)
        time.sleep(1.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def _ready(address):
    """It listens before it answers queries: 503 until then."""
    try:
        return httpx.get(f"http://{address}/-/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def _query(address, expression):
    answer = httpx.get(f"http://{address}/api/v1/query", params={"query": expression}, timeout=10)
    body = answer.json()
    assert body["status"] == "success", f"{expression}: {body}"
    return body["data"]["result"]


def test_every_panel_shows_data_of_a_live_run(prometheus):
    board = json.loads(dashboards.OUTPUT.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "5s")
            result = _query(prometheus, expression)
            assert result or panel["title"] in QUIET, f"{panel['title']}: {expression}"
            values = [float(series["value"][1]) for series in result]
            if panel["title"] in ("Requests", "Time to answer"):
                assert max(values) > 0, panel["title"]


@pytest.mark.parametrize("role", ["transformer", "predictor"])  # Standard mode, Knative mode
def test_the_queries_that_watch_a_release_find_its_pods_and_no_others(prometheus, role):
    """Without one failed request the error rate is 0, not unknown."""
    settings = ReleaseSettings()
    with http_client() as client:
        for query in (settings.error_query, settings.p99_query):
            found, missed = (
                _prometheus(
                    client,
                    f"http://{prometheus}",
                    Template(query).substitute(labels=labels, window="60000ms"),
                )
                for labels in (f'role="{role}"', f'role="{role}", inferenceservice="other"')
            )
            assert found is not None
            assert found == 0 if query == settings.error_query else found > 0
            assert missed is None
