"""submit, schedule and status: the KFP client's real calls to a server of the v2beta1 schema."""

import json
import socket

import kfp_server_api as api
import pytest
from typer.testing import CliRunner

from model.errors import InputError, UnavailableError
from pipelines.cli import app
from pipelines.endpoint import Endpoint, cron_expression, interval_seconds
from tests.kfp_server import KfpServer, checked, nodes


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # the client keeps its context there
    server = KfpServer()
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.address)
    yield server
    server.close()


def hrnn(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def _only(kept):
    (found,) = kept.values()
    return found


def test_a_run_is_submitted_with_its_settings(server):
    done = hrnn("submit", "--interactions", "s3://b/log.parquet", "--set", "train.seed=7", "--json")
    assert done.exit_code == 0, done.output
    run = _only(server.runs)
    assert json.loads(done.stdout) == {"run_id": run.run_id}
    parameters = run.runtime_config.parameters
    assert parameters["interactions"] == "s3://b/log.parquet"
    assert parameters["dataset"] == ""
    assert parameters["train_settings"]["seed"] == 7
    assert parameters["train_settings"]["split"]["assign"] == "hash"
    spec = run.pipeline_spec
    assert spec["pipeline_spec"]["pipelineInfo"]["name"] == "train-and-deploy"
    assert spec["platform_spec"]["platforms"]["kubernetes"]
    assert _only(server.experiments).display_name == "hrnn-meta"


def _finish(state, *steps, error=""):
    def act(run):
        run.state = state
        run.run_details = api.V2beta1RunDetails(task_details=nodes(*steps))
        run.error = api.GoogleRpcStatus(code=2, message=error) if error else None

    return act


RUNNING = _finish("RUNNING", ("ingest", "RUNNING"))
DONE = (("ingest", "SUCCEEDED"), ("gate", "SUCCEEDED"))


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (_finish("SUCCEEDED", *DONE, ("deploy", "SUCCEEDED")), 0, "deployed"),
        (_finish("SUCCEEDED", *DONE, ("deploy", "SKIPPED")), 3, "refused"),
        (_finish("SUCCEEDED", *DONE), 3, "refused"),
        (
            _finish("FAILED", ("ingest", "SUCCEEDED"), ("train", "FAILED")),
            1,
            "failed at train (full log: ",
        ),
        (_finish("FAILED", error="the workflow was lost"), 1, "failed: the workflow was lost"),
        (_finish("CANCELED"), 130, "cancelled"),
    ],
)
def test_the_exit_code_tells_the_outcome(server, end, code, words):
    server.script = [RUNNING, RUNNING, end]
    done = hrnn("submit", "--wait", "--poll", "0.1")
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert done.stderr.count("[ingest] running") == 1
    run_id = _only(server.runs).run_id
    shown = hrnn("status", run_id)
    assert shown.exit_code == code
    assert words in shown.stderr
    for noise in ("driver", "executor", "root", "x7k2f", "condition"):
        assert noise not in shown.stdout + shown.stderr + done.stderr


def test_a_failed_step_is_told_with_the_place_of_its_log(server):
    server.script = [_finish("FAILED", ("ingest", "SUCCEEDED"), ("train", "FAILED"))]
    done = hrnn("submit", "--wait", "--poll", "0.1", "--namespace", "team")
    run_id = _only(server.runs).run_id
    assert f"full log: {server.address}/#/runs/details/{run_id}, or `kubectl -n team" in done.stderr
    assert f"-l pipeline/runid={run_id},app.kubernetes.io/component=train" in done.stderr


def test_a_run_of_an_uploaded_pipeline_is_understood_too(server):
    """Its specification is elsewhere: steps are told by their names alone."""
    hrnn("submit")
    run = _only(server.runs)
    run.pipeline_spec = None
    run.pipeline_version_reference = api.V2beta1PipelineVersionReference(pipeline_id="p")
    _finish("SUCCEEDED", *DONE)(run)
    shown = hrnn("status", run.run_id, "--json")
    assert shown.exit_code == 3
    assert [s["name"] for s in json.loads(shown.stdout)["steps"]] == ["ingest", "gate"]


def test_the_stand_in_holds_both_sides_to_the_schema(server):
    with pytest.raises(ValueError, match="RUNNNING"):
        checked({"state": "RUNNNING"}, "V2beta1Run")
    with pytest.raises(ValueError, match="unknown field 'stat'"):
        checked({"run_details": {"task_details": [{"stat": "RUNNING"}]}}, "V2beta1Run")
    hrnn("submit")
    _only(server.runs).state = "DONE"
    hrnn("status")
    assert "'DONE' is none of" in server.wrong[0]
    server.wrong.clear()


def test_a_wait_survives_a_short_outage_and_ends_in_time(server):
    server.script = [RUNNING] * 100
    connected = Endpoint("")
    run_id = connected.submit("refresh_trends", {}, "r")
    with pytest.raises(UnavailableError, match="it goes on: `hrnn status"):
        connected.wait(run_id, print, seconds=0.3, every=0.1)
    server.script = [_finish("SUCCEEDED")]
    server.fail_next = [(503, {"message": "restarting"})] * 3
    assert connected.wait(run_id, print, seconds=60, every=0.01).outcome == "succeeded"
    server.script = [RUNNING] * 100
    server.fail_next = [(503, {"message": "restarting"})] * 30
    with pytest.raises(UnavailableError, match="503: restarting"):
        connected.wait(run_id, print, seconds=60, every=0.01)


def test_status_lists_runs_and_says_what_still_runs(server):
    for name in ("first", "second"):
        hrnn("submit", "--name", name)
    listed = hrnn("status")
    assert listed.exit_code == 0
    assert listed.stdout.index("second") < listed.stdout.index("first")
    assert hrnn("status", next(iter(server.runs))).exit_code == 4
    found = json.loads(hrnn("status", "--json").stdout)
    assert [run["name"] for run in found] == ["second", "first"]


def test_schedules_are_made_listed_replaced_and_deleted(server):
    made = hrnn("schedule", "create", "refresh_trends", "--every", "1h")
    assert made.exit_code == 0, made.output
    hrnn("schedule", "create", "train_and_deploy", "--cron", "0 3 * * *")
    by_name = {r.display_name: r for r in server.recurring.values()}
    refresh, train = by_name["refresh-trends"], by_name["train-and-deploy"]
    assert int(refresh.trigger.periodic_schedule.interval_second) == 3600
    assert train.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert (int(train.max_concurrency), train.no_catchup, train.mode) == (1, True, "ENABLE")
    listed = hrnn("schedule", "list").stdout
    assert "every 3,600 s" in listed
    assert "0 0 3 * * *" in listed
    with pytest.raises(InputError, match=r"a schedule refresh-trends \(every 3,600 s\) already"):
        hrnn("schedule", "create", "refresh_trends", "--every", "30m")
    replaced = hrnn("schedule", "create", "refresh_trends", "--every", "30m", "--replace")
    assert replaced.exit_code == 0, replaced.output
    assert refresh.recurring_run_id not in server.recurring
    assert len(server.recurring) == 2
    assert hrnn("schedule", "delete", "refresh-trends").exit_code == 0
    assert hrnn("schedule", "delete", train.recurring_run_id).exit_code == 0
    assert server.recurring == {}
    with pytest.raises(InputError, match="no schedule 'refresh-trends'"):
        hrnn("schedule", "delete", "refresh-trends")


def test_many_schedules_are_all_found(server):
    connected = Endpoint("")
    template = connected.schedule("refresh_trends", {}, "s", every_seconds=3600)
    for n in range(150):
        server.recurring[str(n)] = server.recurring[template]
    assert len(connected.schedules()) == 151


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "nothing"], "no pipeline 'nothing'"),
        (["submit", "--interactions", "log.csv"], "cannot read a file of this machine"),
        (["submit", "--items", "/home/me/items.csv"], "--items /home/me/items.csv: the pods"),
        (["submit", "--interactions", "postgresql://u:pw@h/db"], "put it into the Secret"),
        (["submit", "--dataset", "movielens-9"], "movielens-100k"),
        (["submit", "refresh_trends", "--items", "s3://b/i"], "--items goes with train_and_deploy"),
        (["submit", "--output", "s3://b/o"], "--output goes with batch_recommend, not train"),
        (["submit", "batch_recommend"], "give --output"),
        (["submit", "batch_recommend", "--override", "x"], "--override goes with train_and_deploy"),
        (["submit", "--set", "deploy.service_url=http://localhost:8080"], "the pod itself"),
        (["submit", "--set", "deploy.service_url=http://u:pw@h"], "an address with a password"),
        (["submit", "--set", "deploy.release.prometheus=http://h/?token=pw"], "with a password"),
        (["submit", "--set", "train.epochs=3"], "train.epochs: no such setting"),
        (["submit", "--set", "train.warm_start=my/bundle"], "cannot read a folder of this machine"),
        (["submit", "--set", "train.warm_start=v 1"], "'v 1' is not the name of a version"),
        (["submit", "--set", "deploy.service=Hrnn_Meta"], "must be a name in Kubernetes"),
        (["submit", "--set", "deploy.service_url=hrnn-meta"], "must be http://HOST"),
        (
            ["submit", "batch_recommend", "--output", "s3://b/o", "--version", "a b"],
            "--version: 'a",
        ),
        (["submit", "--set", "gate.rules_file=none.yaml"], "none.yaml"),
        (["schedule", "create", "refresh_trends"], "either --cron or --every"),
        (["schedule", "create", "refresh_trends", "--every", "soon"], "30m, 1h, 1d"),
        (["schedule", "create", "refresh_trends", "--cron", "at noon"], "five fields"),
        (["status", "no-such-run"], "404: runs no-such-run not found"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(server, arguments, message):
    with pytest.raises(InputError) as raised:
        hrnn(*arguments)
    assert message in str(raised.value)
    assert "pw" not in str(raised.value)
    assert server.runs == server.recurring == {}


OPTIONS = {
    "--interactions": "cannot read a file of this machine",
    "--users": "cannot read a file of this machine",
    "--items": "cannot read a file of this machine",
    "--user-list": "cannot read a file of this machine",
    "--model-store": "would be written inside a pod and be gone with it",
    "--output": "would be written inside a pod and be gone with it",
}
BATCH = ["batch_recommend", "--output", "s3://b/o", "--interactions", "s3://b/l"]


@pytest.mark.parametrize("command", [["submit"], ["schedule", "create", "--every", "1d"]])
@pytest.mark.parametrize(("option", "message"), OPTIONS.items())
def test_what_only_a_pod_or_this_machine_would_see_is_refused(server, command, option, message):
    local = ("out", "/data/x", "/stores/../data/x", "/stores", "file:///data/x", "memory://x")
    for address in (*local, "sqlite:///x.db"):
        with pytest.raises(InputError) as raised:
            hrnn(*command, *BATCH, option, address)
        assert f"{option} {address}: " in str(raised.value)
        assert message in str(raised.value)
        assert "a path below /stores (HRNN_VOLUMES" in str(raised.value)
    secret = ("s3://key:pw@b/x", "https://b/x?X-Amz-Signature=pw", "https://b/x?v=1&sig=pw")
    for address in ("http://127.0.0.1:9000/x", *secret, "postgresql://u@h/d?password=pw"):
        with pytest.raises(InputError, match=r"the pod itself|with a password") as raised:
            hrnn(*command, *BATCH, option, address)
        assert "pw" not in str(raised.value)
    if "written" in message:
        with pytest.raises(InputError, match="cannot be written to"):
            hrnn(*command, *BATCH, option, "https://bucket.example/x")
    assert server.runs == server.recurring == {}
    for address in ("s3://bucket/x", "/stores/x", "file:///stores/x"):
        done = hrnn("submit", *BATCH, option, address)
        assert done.exit_code == 0, done.output
        (run,) = list(server.runs.values())[-1:]
        assert run.runtime_config.parameters[option.strip("-").replace("-", "_")] == address


def test_volumes_are_declared_and_mounted(server, monkeypatch):
    monkeypatch.setenv("HRNN_VOLUMES", "data=/data")
    with pytest.raises(InputError, match="--model-store: /stores/models, the default, is not"):
        hrnn("submit")
    with pytest.raises(InputError, match="a path below /data"):
        hrnn("submit", "--model-store", "/stores/models")
    assert hrnn("submit", "--model-store", "/data/models").exit_code == 0
    run = _only(server.runs)
    assert run.runtime_config.parameters["checkpoints"] == ""
    monkeypatch.setenv("HRNN_VOLUMES", "data")
    with pytest.raises(InputError, match="HRNN_VOLUMES='data': expected CLAIM=/FOLDER"):
        hrnn("submit", "--model-store", "/data/models")


def test_an_endpoint_that_is_not_one_is_said(server, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"{address} cannot be reached"):
            Endpoint(address).runs()
    connected = Endpoint(server.address)
    server.fail_next = [(200, b"<html>a login page</html>")]
    with pytest.raises(UnavailableError, match="login page"):
        connected.runs()
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    with pytest.raises(InputError, match="--endpoint"):
        Endpoint("")


def test_times():
    assert interval_seconds("90m") == 5400
    assert cron_expression("*/5 * * * 1-5") == "0 */5 * * * 1-5"
    assert cron_expression("30 0 3 * * *") == "30 0 3 * * *"
    for wrong in ("", "* * *", "a;b * * * *", "1 2 3 4 5 6 7"):
        with pytest.raises(InputError):
            cron_expression(wrong)
    for wrong in ("", "1", "30s", "1y"):
        with pytest.raises(InputError):
            interval_seconds(wrong)
