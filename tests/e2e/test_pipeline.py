"""The main job, whole: a log with a planted pattern in, the pattern back over HTTP."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from model.errors import InputError
from model.query import Event, Recommendation
from model.store import ModelStore
from pipelines import demo
from serving.client import Prediction
from serving.event_client import EventClient
from tests import synthetic
from tests.planted import FAST, HRNN_RUN, ITEMS, hrnn_run, interruptible, write_log


def test_the_result_is_one_json_object_that_names_real_files(deployed):
    _, result, done, _ = deployed
    assert done.stdout.count("\n") == 1
    assert result["verdict"] == "deployed"
    for name in ("bundle", "report", "data_report", "log"):
        assert Path(result[name]).exists(), name
    for page in map(Path, (result["report"], result["data_report"])):
        # A browser follows a link and shows a page without a suffix as text.
        assert page.suffix == ".html" and not page.is_symlink()
    hrnn, popularity = result["metrics"]["hrnn"], result["metrics"]["popularity"]
    assert hrnn["every"]["ppl"] < 0.5 * popularity["every"]["ppl"]
    assert "[5/8 train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_bad_row_is_in_quarantine_and_nothing_else_is(deployed):
    _, result, _, _ = deployed
    report = json.loads((Path(result["clean"]) / "report.json").read_text())
    assert report["rows"]["interactions"]["reasons"] == {"bad_timestamp": 1}


def test_the_planted_pattern_comes_back_over_http(service):
    _, client = service
    right = 0
    for a in range(ITEMS):
        history = [Event(f"item {a}", 1_000_000_000.0)]
        prediction = client.recommend(history=history, timestamp=1_000_000_600, num_results=1)
        assert prediction.degraded == ()
        right += prediction.items[0].item_id == f"item {(7 * a + 1) % ITEMS}"
    assert right >= ITEMS - 1


def test_the_stored_history_is_used_and_an_added_event_changes_the_answer(deployed, service):
    _, client = service
    log = synthetic.successor(300, 12, ITEMS, seed=0)
    user = 7
    last = int(log.item_E[log.offset_U1[user + 1] - 1])
    now = int(log.timestamp_E[log.offset_U1[user + 1] - 1]) + 600
    stored = client.recommend(log.user_ids[user], timestamp=now, num_results=3)
    assert stored.items[0].item_id == f"item {(7 * last + 1) % ITEMS}"
    events = [
        Event(f"item {log.item_E[e]}", float(log.timestamp_E[e]), "view")
        for e in range(log.offset_U1[user], log.offset_U1[user + 1])
    ]
    explicit = client.recommend(history=events, timestamp=now, num_results=3)
    assert [i.item_id for i in explicit.items] == [i.item_id for i in stored.items]
    assert explicit.items[0].score == pytest.approx(stored.items[0].score)
    added = [*events, Event("item 3", float(now), "view")]
    changed = client.recommend(history=added, timestamp=now + 600, num_results=3)
    assert changed.items[0].item_id == f"item {22 % ITEMS}"


def test_request_time_matters_and_new_users_are_served(service):
    _, client = service
    history = [Event("item 2", 1_000_000_000.0)]
    soon = client.recommend(history=history, timestamp=1_000_000_600)
    later = client.recommend(history=history, timestamp=1_000_000_600 + 86_400)
    assert [i.score for i in soon.items] != [i.score for i in later.items]
    new = client.recommend("never seen", num_results=ITEMS * 2)
    assert len(new.items) == ITEMS
    assert new.degraded == ()


def test_served_scores_equal_the_model_in_process(deployed, service):
    from model.query import Query
    from model.recommender import Recommender

    _workspace, result, _, _ = deployed
    _, client = service
    recommender = Recommender.load(result["bundle"])
    history = [Event("item 2", 1_000_000_000.0), Event("item 15", 1_000_000_600.0)]
    served = client.recommend(history=history, timestamp=1_000_001_200, num_results=ITEMS)
    [own] = recommender.recommend([Query(history, 1_000_001_200.0)], ITEMS)
    assert [i.item_id for i in served.items] == [i.item_id for i in own]
    for a, b in zip(served.items, own, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
        assert a.trend == pytest.approx(b.trend, abs=1e-9)


def test_a_model_of_a_log_without_values_refuses_to_rate(service):
    _, client = service
    with pytest.raises(InputError, match=r"instances\[0\]\.task: this model cannot rate"):
        client.rate(["item 1"])
    assert client.rank(["item 1"]).items  # everything else goes on


def test_metrics_are_exported_by_both_processes(service):
    serving, client = service
    client.recommend("somebody")
    for role, url in serving.metrics_urls.items():
        text = httpx.get(url, timeout=5).text
        assert "hrnn_requests_total" in text
        (frozen,) = re.findall(r"^hrnn_gc_frozen_objects (\S+)$", text, re.MULTILINE)
        assert float(frozen) > 100_000, f"{role}: imports are looked through again and again"


def test_an_answer_that_explored_has_a_line_in_the_log(service):
    serving, client = service
    answer = client.recommend("somebody", num_results=5, exploration_weight=2.0)
    deadline = time.monotonic() + 60
    while True:  # another thread writes it
        lines = serving.log_file("transformer").read_text().splitlines()
        found = [json.loads(line) for line in lines if answer.recommendation_id in line]
        if found:
            break
        assert time.monotonic() < deadline, "no line of this answer"
        time.sleep(0.05)
    (line,) = found
    assert line["logger"] == "hrnn.exploration"
    assert [item for item, _, _ in line["items"]] == [i.item_id for i in answer.items]


COLUMNS = {"ingest.columns": "{user_id: customer, item_id: product_id, timestamp: when}"}
WORSE = {
    "train.max_epochs": 1,
    "train.learning_rate": 1e-9,
    "train.network": "{embedding: 16, hidden: 32, transitions: false}",  # counts need no epoch
}


def test_a_worse_model_is_refused_and_the_first_keeps_serving(deployed, service):
    workspace, result, _, path = deployed
    _, client = service
    store = ModelStore(str(workspace / "models"))
    before = store.champion()
    done = hrnn_run(workspace, "--interactions", path, settings=FAST | WORSE | COLUMNS)
    assert done.returncode == 3, done.stderr
    refused = json.loads(done.stdout)
    assert refused["verdict"] == "refused"
    assert refused["champion"] == before.version == result["model_version"]
    assert any("worse than the champion's" in reason for reason in refused["reasons"])
    assert refused["metrics"]["champion"]["comparable"]["cases"] > 0
    assert "[1/8 ingest]\n  done before, not again" in done.stderr
    assert Path(refused["report"]).exists()
    assert store.champion() == before
    answer = client.recommend("u7", num_results=3)
    assert answer.model_version == before.version


def test_a_refused_model_is_deployed_only_with_a_reason_that_is_recorded(deployed, tmp_path):
    workspace, _, _, path = deployed
    copy = tmp_path / "workspace"
    for part in ("models", "runs/.cache"):
        shutil.copytree(workspace / part, copy / part)
    store = ModelStore(str(copy / "models"))
    before = store.champion()
    done = hrnn_run(
        copy, "--interactions", path, "--override", "a test", settings=FAST | WORSE | COLUMNS
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["verdict"], result["override"]) == ("deployed", "a test")
    champion = store.champion()
    assert (champion.version, champion.previous) == (result["model_version"], before.version)
    lineage = store.version(champion.version).lineage
    assert lineage.override == "a test"
    assert lineage.verdict["passed"] is False
    assert (lineage.run_id, lineage.parent) == (result["run_id"], before.version)
    assert store.rollback().version == before.version


def test_everybody_gets_a_list(deployed, tmp_path):
    workspace, result, _, path = deployed
    output = tmp_path / "lists"
    done = subprocess.run(
        [
            *(*HRNN_RUN[:-1], "batch-recommend", "--json", "--output", output),
            *("--interactions", path, "--workspace", workspace),
            *("--set", f"ingest.columns={COLUMNS['ingest.columns']}"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["model_version"] == result["model_version"]
    assert json.loads((output / "latest.json").read_text())["batch"] == said["batch"]
    assert "[3/3 batch-recommend]" in done.stderr
    rows = pq.read_table(said["output"]).to_pylist()
    assert len({row["user_id"] for row in rows}) == said["num_users"] == 300


def test_the_demo_ends_with_the_reports_path(deployed, tmp_path, monkeypatch, capsys):
    """The demo of a finished run: its servers, its questions, what it prints last."""
    workspace, result, _, _ = deployed
    for part in ("models", "features"):
        shutil.copytree(workspace / part, tmp_path / part)
    monkeypatch.setattr(demo.local_runner, "run", lambda *_, **__: result)
    monkeypatch.setattr(demo, "USER", "u7")
    demo.main(tmp_path, lambda _: None)
    out = capsys.readouterr().out
    assert "User u7 watched last:" in out
    # What the event has done, told from two answers to the same question.
    told = " ".join(out.split())
    changed = re.findall(r"the next answer leaves it out: \d+ of 8 are others, (\d+) have", told)
    assert changed, out
    assert int(changed[0]) > 0
    assert "PUT /items" in out and "not recommended in time" not in out
    assert "Recommendations over HTTP" in out
    assert out.rstrip("\n").splitlines()[-1].endswith(f": {result['report']}")
    assert Path(result["report"]).is_file()


def test_the_demo_says_so_when_an_event_changes_nothing():
    def answer(*affinities):
        items = [Recommendation(f"i{n}", -float(n), a, 0.0) for n, a in affinities]
        return Prediction("r", "v", None, (), tuple(items))

    before = answer((1, 0.5), (2, 0.4))
    for after in (before, answer((2, 0.4)), answer((1, 0.6), (2, 0.5))):
        assert demo.effect(before, after, "i1") == "the next answer does not show it"
    told = demo.effect(before, answer((2, 0.3), (3, 0.2)), "i1")
    assert told == "the next answer leaves it out: 1 of 2 are others, 1 have another affinity"


def test_ctrl_c_stops_everything(tmp_path):
    log = synthetic.successor(300, 12, ITEMS, seed=0)
    path = write_log(tmp_path / "log.csv", log)
    process = subprocess.Popen(
        [
            *HRNN_RUN,
            "--workspace",
            tmp_path / "ws",
            "--interactions",
            path,
            "--set",
            "train.max_epochs=10000",
            "--set",
            "train.patience=10000",
            "--set",
            "ingest.columns={user_id: customer, timestamp: when}",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HRNN_TEST_MARK": str(tmp_path)},
        preexec_fn=interruptible,
    )
    try:
        for line in process.stderr:
            if "epoch " in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        stderr = process.stderr.read()
        assert stderr.strip().splitlines()[-1] == "stopped"
        assert _marked(str(tmp_path)) == []
    finally:
        for pid in _marked(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Processes that inherited our mark."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HRNN_TEST_MARK={mark}".encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


def test_an_event_changes_the_next_answer(service):
    """Posted to the collector, in the history of the very next request; a new user becomes one."""
    serving, client = service
    with EventClient(serving.settings.collector_url) as events:
        asked = {"timestamp": 2_000_000_000 - 1, "exclude_seen": True}
        before = client.recommend("visitor", **asked)
        first = before.items[0].item_id
        event = {"user_id": "visitor", "item_id": first, "timestamp": 1_700_000_000}
        sent = events.send([event | {"event_id": "visit"}])
        deadline = time.monotonic() + 120
        while not sent.visible and time.monotonic() < deadline:  # while it connects to the store
            sent = events.send([event | {"event_id": "visit"}])
        assert sent.visible
        after = client.recommend("visitor", **asked)
        assert first not in {item.item_id for item in after.items}
        assert after.degraded == before.degraded
        assert events.delete_user("visitor") == 1
        again = client.recommend("visitor", **asked)
        assert [i.item_id for i in again.items] == [i.item_id for i in before.items]
