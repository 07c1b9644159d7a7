"""The command line: bad input is one clear sentence, an exit code, and never a traceback."""

import contextlib
import io
import json
import subprocess
import sys
import time
from unittest import mock

import pytest
import yaml
from typer.testing import CliRunner

from model.errors import InputError, UnavailableError
from pipelines import cli
from pipelines.cli import app, parse_time
from pipelines.local_checks import check_training
from pipelines.settings import BATCH, REFRESH, SECTIONS, TRAINING, load
from tests.http_server import Handler, HttpServer
from tests.unit.test_store import make_bundle


def hrnn(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
    )


def refused(*arguments, code=2):
    """What the entry point says; in this process, as imports take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hrnn", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert ended.value.code == code, err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert out.getvalue() == ""
    return err.getvalue()


def test_help_names_every_command_and_loads_nothing_heavy():
    done = hrnn("--help")
    assert done.returncode == 0
    for command in ("run", "refresh-trends", "compile", "serve", "recommend", "settings", "demo"):
        assert command in done.stdout
    loaded = subprocess.run(
        [sys.executable, "-c", "import pipelines.cli, sys; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"torch", "kfp", "feast", "kserve", "pandas", "ibis"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interactions", "none.csv"], "--interactions none.csv: no such file"),
        (["--dataset", "movielens-9"], "movielens-100k"),
        (["--dataset", "movielens-100k", "--interactions", "x"], "not both"),
        (["--users", "u.csv"], "--users and --items go with --interactions"),
        (["--set", "train.epochs=3"], "train.epochs: no such setting"),
        (["--set", "trian.seed=3"], "did you mean train?"),
        (["--set", "train.seed"], "expected SECTION.KEY=VALUE"),
        (["--set", "train.seed=many"], "train.seed"),
        (["--set", "train.network.hidden=[1"], "is not a value"),
        (["--settings", "none.yaml"], "--settings none.yaml: No such file"),
        (["--set", "train.warm_start=20200101T000000Z-0"], "no version '20200101T000000Z-0'"),
        (["--set", "train.warm_start=some/bundle"], "train.warm_start: 'some/bundle' is not"),
        (["--set", "deploy.service=Hrnn_Meta"], "must be a name in Kubernetes"),
        (["--set", "deploy.service=hrnn-meta"], "give --model-store an address"),
        (
            ["--set", "deploy.service=hrnn-meta", "--model-store", "memory://m"],
            "cannot read memory",
        ),
        (["--set", "deploy.service=hrnn-meta", "--model-store", "file:///m"], "cannot read file:"),
        (["--set", "deploy.service_url=here:8080"], "must be http://HOST"),
        (["--set", "deploy.service_url=htp://u:PW@h"], "must be http://HOST"),
        (["--set", "deploy.release.prometheus=u:PW@h//x"], "must be http://HOST"),
        (["--set", "deploy.release.prometheus=htp://h?token=PW"], "must be http://HOST"),
        (["--set", "deploy.service_url=http://u:PW@h"], "deploy.service_url: an address with a"),
        (["--model-store", "nonsense://x"], "nonsense://x"),
        (["--model-store", "s3://key:PW@bucket/x"], "--model-store: an address with a password"),
        (["--interactions", "https://u:PW@host/log.csv"], "--interactions: an address with a"),
        (["--interactions", "s3://b/l", "--items", "https://h/i?sig=PW"], "--items: an address"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments, message, tmp_path):
    stderr = refused("run", "--workspace", tmp_path / "ws", *arguments)
    assert message in stderr
    assert "PW" not in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no champion: deploy a model first"),
        (["--version", "v9"], "no version 'v9'"),
        (["--version", "../x"], "'../x' is not the name of a version"),
        (["--output", "https://h/o?X-Amz-Signature=PW"], "--output: an address with a password"),
        (["--user-list", "https://u:PW@h/list"], "--user-list: an address with a password"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused_before_anything_starts(
    arguments, message, tmp_path
):
    stderr = refused(
        "batch-recommend", "--output", tmp_path / "o", "--workspace", tmp_path / "ws", *arguments
    )
    assert message in stderr
    assert "PW" not in stderr
    assert not (tmp_path / "ws").exists()


def test_servers_that_a_release_needs_are_asked_before_anything_starts(tmp_path):
    nobody = "http://127.0.0.1:9"
    with pytest.raises(UnavailableError, match=r"deploy\.service_url=.*nobody answers there"):
        check_training(load(None, [f"deploy.service_url={nobody}"]), str(tmp_path / "models"))
    with HttpServer(Handler) as server:  # whatever it answers
        asked = [f"deploy.service_url={server.address}"]
        check_training(load(None, asked), str(tmp_path / "models"))
        with pytest.raises(UnavailableError, match=r"deploy\.release\.prometheus=.*nobody"):
            asked.append(f"deploy.release.prometheus={nobody}")
            check_training(load(None, asked), str(tmp_path / "models"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="Not a directory"):
        check_training(load(), str(tmp_path / "file"))


def test_a_bundles_folder_to_start_from_is_found_by_steps_that_run_elsewhere(tmp_path, monkeypatch):
    make_bundle(tmp_path / "older", "v1")
    monkeypatch.chdir(tmp_path)
    checked = check_training(load(None, ["train.warm_start=older"]), str(tmp_path / "models"))
    assert checked.to_json()["train"]["warm_start"] == str(tmp_path / "older")


GOOD_ROWS = "user_id,item_id,timestamp\n" + "\n".join(
    f"u{u},i{(u + n) % 7},{1_000_000_000 + 60 * n}" for u in range(20) for n in range(6)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("user_id,item_id,timestamp\n", "no rows"),
        ("user_id,what,timestamp\nu,i,1\n", "item_id"),
        (GOOD_ROWS.replace("10000", "soon"), "bad_timestamp"),
        (GOOD_ROWS.replace("u1,", ",").replace("u2,", ","), "null_user"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(content, message, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(content)
    stderr = refused("run", "--workspace", tmp_path / "ws", "--interactions", path)
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last.replace("has no row", "no rows"), stderr
    assert "full log" in last


def test_serve_without_a_model_says_what_to_do(tmp_path):
    assert "start with `hrnn run`" in refused("serve", "--workspace", tmp_path)


def test_recommend_without_a_service_says_what_to_do():
    stderr = refused("recommend", "--user", "1", "--url", "http://127.0.0.1:9", code=1)
    assert "start one with `hrnn serve`" in stderr


def test_settings_are_printed_with_overrides_in_force(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("train: {seed: 4, max_epochs: 9}\n")
    done = hrnn(
        "settings", "--settings", file, "--set", "train.seed=5", "--set", "train.learning_rate=1e-2"
    )
    settings = yaml.safe_load(done.stdout)
    assert settings["train"]["seed"] == 5
    assert settings["train"]["max_epochs"] == 9
    assert settings["train"]["learning_rate"] == 0.01


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        (["run"], TRAINING),
        (["refresh-trends"], REFRESH),
        (["batch-recommend"], BATCH),
        (["submit"], SECTIONS),
        (["schedule", "create"], SECTIONS),
    ],
)
def test_help_leads_to_the_settings(command, sections):
    shown = CliRunner().invoke(app, [*command, "--help"]).stdout
    settings = shown.partition("`hrnn settings SECTION` tells its keys")[2]
    for name in SECTIONS:
        assert (f"\n  {name} " in settings) is (name in sections), name


def test_sections_of_settings_are_shown_alone():
    shown = CliRunner().invoke(app, ["settings", "gate", "evaluate"])
    assert list(yaml.safe_load(shown.stdout)) == ["gate", "evaluate"]
    assert list(json.loads(CliRunner().invoke(app, ["settings", "gate", "--json"]).stdout)) == [
        "gate"
    ]
    with pytest.raises(InputError, match="did you mean train"):
        CliRunner().invoke(app, ["settings", "trian"], catch_exceptions=False)


def test_times():
    now = time.time()
    assert parse_time("893286638", now) == 893286638
    assert parse_time("+1d", now) == now + 86_400
    assert parse_time("1998-04-22T23:10:38Z", now) == 893286638
    assert parse_time("1998-04-22T23:10:38", now) == 893286638
    with pytest.raises(InputError, match="ISO 8601"):
        parse_time("tomorrow", now)


def test_a_refresh_without_a_source_looks_for_the_workspaces_log(tmp_path, monkeypatch):
    monkeypatch.delenv("HRNN_EVENT_LOG", raising=False)
    message = refused("refresh-trends", "--workspace", tmp_path, code=1)
    assert f"no feature store in {tmp_path}/features; run the pipeline" in message
