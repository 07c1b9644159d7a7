"""The examples of docs/serving.md, sent to the real processes: what they show comes back."""

import json
import re
from pathlib import Path

import httpx
import pytest

from model.schema import FieldKind
from tests.e2e.processes import ITEMS, random_bundle, started

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
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


def known(text):
    """The example with items that the model here has in the place of MovieLens'."""
    return re.sub(
        r'"(744|50|242|302)\b', lambda m: f'"i{int(m[1]) % len(ITEMS):03}', json.dumps(text)
    )


def test_there_are_examples_of_every_kind():
    kinds = [(kind, answer is not None) for kind, _, answer in examples()]
    assert kinds.count(("", True)) >= 3 and (" infer", True) in kinds


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_documented_answer_comes_back(serving, number):
    kind, request, expected = examples()[number]
    response = httpx.post(
        serving.url + PATHS[kind],
        content=known(request),
        headers={"Content-Type": "application/json"},
        trust_env=False,
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    if kind == "":
        for prediction in answer["predictions"]:
            assert prediction["degraded"] == [] and prediction["items"]
    if expected is not None:
        assert shape(answer) == shape(expected)
