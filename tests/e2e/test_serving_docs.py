"""The examples of docs/serving.md, sent to the real processes: what they show comes back."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import apply
from model.schema import FieldKind
from tests.e2e.collectors import CollectorProcess
from tests.e2e.processes import ITEMS, random_bundle, started
from tests.feature_sources import SCHEMA

REPO = Path(__file__).parents[2]
DOCS = REPO / "docs" / "serving.md"
SERVICE, COLLECTOR = "http://127.0.0.1:8080", "http://127.0.0.1:8100"
PATHS = {"": "/v1/models/hrnn-meta:predict", " infer": "/v2/models/hrnn-meta/infer"}


def examples():
    """(kind of request, request, answer or None), in the order of the page."""
    found = re.findall(r"```json( answer| infer|)\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    blocks = [(kind, json.loads(text)) for kind, text in found]
    pairs = []
    for kind, block in blocks:
        if kind == " answer":
            pairs[-1][2] = block
        else:
            pairs.append([kind, block, None])
    return pairs


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    fields = {"genres": [["Comedy"] if j % 2 else ["Drama", "Crime"] for j in range(len(ITEMS))]}
    bundle = random_bundle(folder / "bundle", 0, fields, {"genres": FieldKind.MULTI_CATEGORICAL})
    with started(bundle, bundle, folder) as serving:
        yield serving


def shape(value):
    """Names and types; of a list its first entry, as examples are shorter than answers."""
    if isinstance(value, dict):
        return {name: shape(v) for name, v in value.items()}
    if isinstance(value, list):
        return [shape(v) for v in value[:1]]
    return type(value).__name__


def here(item):
    """An item that the model here has, in the place of one of MovieLens'."""
    return f"i{int(item) % len(ITEMS):03}"


def known(text):
    """The example with items that the model here has."""
    return re.sub(r'"(744|50|242|302)\b', lambda m: f'"{here(m[1])}', text)


def block(start):
    """The one block of code that begins so, after its fence."""
    (found,) = re.findall(rf"```{start}.*?```", DOCS.read_text(), flags=re.DOTALL)
    return found.partition("\n")[2].removesuffix("```")


def commands(start):
    """Commands in the text that begin so."""
    return [" ".join(c.split()) for c in re.findall(rf"`({start} [^`]*)`", DOCS.read_text())]


def run(command, folder, **options):
    """A command's output; no setting of the machine's has a part in it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HRNN_")}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(REPO), "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hrnn(command, folder):
    program, *arguments = shlex.split(command)
    assert program == "hrnn"
    return run([sys.executable, "-m", "pipelines.cli", *arguments], folder)


def test_there_are_examples_of_every_kind():
    kinds = [(kind, answer is not None) for kind, _, answer in examples()]
    assert kinds.count(("", True)) >= 3 and (" infer", True) in kinds


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_documented_answer_comes_back(serving, number):
    kind, request, expected = examples()[number]
    response = httpx.post(
        serving.url + PATHS[kind],
        content=known(json.dumps(request)),
        headers={"Content-Type": "application/json"},
        trust_env=False,
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    if kind == "":
        for prediction in answer["predictions"]:
            assert prediction["degraded"] == [] and prediction["items"]
    else:
        assert answer["id"] == request["id"] == expected["id"]
        (output,) = answer["outputs"]
        (prediction,) = map(json.loads, output["data"])
        (instance,) = map(json.loads, request["inputs"][0]["data"])
        assert len(prediction["items"]) == instance["num_results"]
        assert answer["model_version"] == prediction["model_version"]
    if expected is not None:
        assert shape(answer) == shape(expected)


def test_the_python_example_prints_what_its_requests_ask_for(serving, tmp_path):
    code = known(block("python"))
    assert code.count(SERVICE) == 1
    printed = run([sys.executable, "-c", code.replace(SERVICE, serving.url)], tmp_path)
    lines = [line.split() for line in printed.splitlines()]
    ranked, rated = lines[:10], lines[10:]
    for item, score, affinity, trend in ranked:
        assert item in ITEMS
        assert float(score) == pytest.approx(float(affinity) + float(trend))
    assert [item for item, _ in rated] == [here(744), here(50)]


def test_the_commands_ask_the_service(serving, tmp_path):
    explored, rated = (
        json.loads(hrnn(f"{command} --url {serving.url} --json", tmp_path))
        for command in map(_with_known_items, commands("hrnn recommend"))
    )
    assert len(explored["items"]) == 10 and any(i["exploration"] > 0 for i in explored["items"])
    assert [r["item_id"] for r in rated["ratings"]] == [here(744), here(50)]
    assert rated.get("unknown_items", 0) == 0  # the one of the history is known, too
    assert explored["degraded"] == rated["degraded"] == []


def _with_known_items(command):
    return re.sub(r"\b(744|50|242)(?=[,@ ])", lambda m: here(m[1]), command)


def test_the_collector_stores_the_documented_events(tmp_path):
    features = FeatureStoreSettings(root=str(tmp_path / "features"))
    apply(features, SCHEMA)
    (command,) = commands("hrnn events send")
    curl = block("\ncurl")
    assert curl.count(COLLECTOR) == 1
    with CollectorProcess(f"sqlite:///{tmp_path}/events.db", features, tmp_path) as collector:
        curl = curl.replace(COLLECTOR, collector.url)
        _, _, url, _, header, _, body = shlex.split(curl)

        def post():
            headers = dict([header.split(": ")])
            return httpx.post(url, content=body, headers=headers, trust_env=False).text

        shell = shutil.which("curl") is not None
        first = json.loads(run(["sh", "-c", curl], tmp_path) if shell else post())
        second = json.loads(post())
        assert [e["status"] for e in first["events"]] == ["stored", "stored"]
        assert first["events"][0]["event_id"] == "o-1"
        # The other one has no id of its own, so that it is another event each time.
        assert [e["status"] for e in second["events"]] == ["duplicate", "stored"]
        hrnn(f"{command} --url {collector.url}", tmp_path)
        assert collector.metric('hrnn_collector_events_total{outcome="stored"}') == 4
