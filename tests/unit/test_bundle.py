"""Bundles: what was saved comes back; what was tampered with does not."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from components.train import steps
from model import bundle as bundles
from model.errors import BundleError, InputError
from model.manifest import digest_of_file
from model.query import Event, ItemFilter, Query
from model.recommender import Recommender
from model.store import ModelStore
from pipelines.cli import app
from serving.predictor import LoadedModel
from tests import synthetic
from tests.e2e.processes import random_bundle
from tests.http_server import Handler, HttpServer
from tests.unit.test_store import deploy

TRAIN = {
    "max_epochs": 2,
    "network": {"embedding": 8, "hidden": 16, "control": 4},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    clean = synthetic.clean_tables(folder / "clean", synthetic.successor(60, 10, 20, seed=0))
    synthetic.add_users(clean)
    steps.run(clean, folder / "bundle", trend={}, settings=TRAIN)
    return folder / "bundle"


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "bundle")


@pytest.fixture(scope="module")
def recommender(trained):
    return Recommender.load(trained)


def _query(*items, at=2_000_000_000.0, **more):
    events = [Event(i, 1_000_000_000.0 + 60 * n) for n, i in enumerate(items)]
    return Query(history=events, timestamp=at, **more)


def test_load_gives_back_the_same_scores(trained, recommender):
    again = Recommender.load(trained)
    queries = [_query("i001", "i004"), _query()]
    np.testing.assert_array_equal(again.affinities(queries), recommender.affinities(queries))
    assert again.version == recommender.version
    assert again.item_titles["i003"] == "Item 3"


def test_the_model_card_says_what_the_model_is(trained, recommender):
    card = (trained / "MODEL_CARD.md").read_text()
    model = bundles.load(trained).model
    parameters = sum(p.numel() for p in model.network.parameters())
    metrics = json.loads((trained / "metrics.json").read_text())["training"]
    lines = [line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| ")]
    rows = dict(line for line in lines if len(line) == 2)
    assert rows["Version"] == recommender.version
    assert rows["Items"] == "20"
    assert rows["Parameters"] == f"{parameters:,}"
    assert rows["User fields"] == ", ".join(f.name for f in model.encodings.user_fields)
    assert rows["Training events"] == str(metrics["events"])
    assert rows["Training valid_ppl"] == str(metrics["valid_ppl"])


def test_batch_equals_single(recommender):
    queries = [_query(), _query("i001"), _query("i003", "i007", "i001"), _query("i002", "i009")]
    single = np.concatenate([recommender.affinities([q]) for q in queries])
    np.testing.assert_allclose(recommender.affinities(queries), single, atol=1e-5)
    assert recommender.affinities([]).shape == (0, 20)


def test_scores_are_affinity_plus_trend_and_normalise(recommender):
    [items] = recommender.recommend([_query("i001")], k=1000)
    assert len(items) == 20  # k beyond the catalogue gives the catalogue
    assert [i.score for i in items] == sorted((i.score for i in items), reverse=True)
    for item in items:
        assert item.score == pytest.approx(item.affinity + item.trend)
    [plain] = recommender.recommend([_query("i001")], k=1000, trend_weight=0.0)
    assert all(item.trend == 0 for item in plain)


def test_request_time_and_events_change_the_answer(recommender):
    soon, later = _query("i001", at=1_000_000_060.0), _query("i001", at=1_000_864_000.0)
    more = _query("i001", "i008", at=1_000_000_120.0)
    scores = recommender.affinities([soon, later, more])
    assert np.abs(scores[0] - scores[1]).max() > 1e-4
    assert np.abs(scores[0] - scores[2]).max() > 1e-4


def test_unknown_items_in_a_history_are_skipped(recommender):
    np.testing.assert_allclose(
        recommender.affinities([_query("nope", "i002")]),
        recommender.affinities(
            [Query([Event("i002", 1_000_000_060.0)], timestamp=2_000_000_000.0)]
        ),
        atol=1e-5,
    )


def test_filters(recommender):
    where = ItemFilter(where={"genres": frozenset(["even"])}, exclude=frozenset(["i000"]))
    [items] = recommender.recommend([_query("i002", filter=where, exclude_seen=True)], k=50)
    assert {i.item_id for i in items} == {f"i{j:03d}" for j in range(4, 20, 2)}
    include = ItemFilter(include=frozenset(["i001", "i002", "unknown"]))
    [items] = recommender.recommend([_query(filter=include)], k=50)
    assert {i.item_id for i in items} == {"i001", "i002"}
    year = ItemFilter(where={"year": frozenset(["1992"])})
    [items] = recommender.recommend([_query(filter=year)], k=50)
    assert {i.item_id for i in items} == {"i002", "i007", "i012", "i017"}
    with pytest.raises(InputError, match=r"no field 'colour' \(fields: .*genres"):
        recommender.recommend([_query(filter=ItemFilter(where={"colour": frozenset("r")}))], 1)
    with pytest.raises(InputError, match="not a number"):
        recommender.allowed(_query(filter=ItemFilter(where={"year": frozenset(["x"])})))


def test_rank_orders_the_given_items_only(recommender):
    [ranked] = recommender.rank([_query("i001")], [["i005", "i003", "unknown", "i005"]])
    assert {i.item_id for i in ranked} == {"i005", "i003"}
    [full] = recommender.recommend([_query("i001")], k=20)
    order = [i.item_id for i in full if i.item_id in {"i005", "i003"}]
    assert [i.item_id for i in ranked] == order


def test_a_bundle_is_never_written_over(trained):
    loaded = bundles.load(trained)
    with pytest.raises(BundleError, match="not empty"):
        bundles.save(
            trained,
            model=loaded.model,
            catalogue=loaded.catalogue,
            schema=loaded.schema,
            settings=loaded.settings,
            trend=loaded.trend,
            metrics={},
        )


def _edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def _resign(path):
    files = {f.name: digest_of_file(f) for f in path.iterdir() if f.name != "manifest.json"}
    _edit_manifest(path, files=files)


def _flip_a_byte(path):
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)


def _truncate(path):
    os.truncate(path / "weights.safetensors", 100)


def _pickle_as_weights(path):
    (path / "weights.safetensors").write_bytes(pickle.dumps({"a": 1}))
    _resign(path)


def _huge_header(path):
    (path / "weights.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    _resign(path)


def _other_shape(path):
    settings = json.loads((path / "settings.json").read_text())
    settings["train"]["network"]["hidden"] = 17
    (path / "settings.json").write_text(json.dumps(settings))
    _resign(path)


def _trend(**changes):
    def damage(path):
        values = json.loads((path / "trend.json").read_text())
        values |= {name: change(values[name]) for name, change in changes.items()}
        (path / "trend.json").write_text(json.dumps(values))
        _resign(path)

    return damage


DAMAGE = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    "garbage manifest": (lambda p: (p / "manifest.json").write_text("{"), "not a bundle manifest"),
    "foreign": (lambda p: _edit_manifest(p, format="other"), "not a hrnn-meta-bundle"),
    "future": (lambda p: _edit_manifest(p, format_version=99), "bundle format 99"),
    "missing file": (lambda p: (p / "items.parquet").unlink(), "items.parquet is missing"),
    "extra file": (lambda p: (p / "x.pkl").write_bytes(b""), "does not list"),
    "outside": (
        lambda p: _edit_manifest(p, files={"../../etc/passwd": "0"}),
        "outside the bundle",
    ),
    "changed": (_flip_a_byte, "does not match its digest"),
    "truncated": (_truncate, "does not match its digest"),
    "pickle": (_pickle_as_weights, "cannot be loaded"),
    "huge header": (_huge_header, "cannot be loaded"),
    "other shape": (_other_shape, "cannot be loaded"),
    "trend NaN": (_trend(log_q=lambda q: [*q[:-1], float("nan")]), "trend.*log_q.*finite"),
    "trend none": (_trend(log_q=lambda q: [float("-inf"), *q[1:]]), "trend.*log_q.*finite"),
    "trend floor": (_trend(floor=lambda _: float("-inf")), "trend.*floor.*finite"),
    "trend short": (_trend(log_q=lambda q: q[1:]), "trend.*log_q"),
    "trend never": (_trend(as_of=lambda _: float("inf")), "cannot be loaded"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bundles_are_refused(case, copy):
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(BundleError, match=message):
        bundles.load(copy)


@pytest.mark.parametrize("part", ["", "values."])
def test_a_model_whose_answers_are_not_finite_is_not_served(part, tmp_path):
    """Finite weights under valid digests, too large to calculate with."""
    copy = random_bundle(tmp_path / "bundle")
    LoadedModel(Recommender.load(copy))
    weights = load_file(copy / "weights.safetensors")
    assert any(name.startswith("values.") for name in weights)
    for name, tensor in weights.items():
        if name.startswith(part) and tensor.is_floating_point():
            weights[name] = tensor * 1e25
    save_file(weights, copy / "weights.safetensors")
    _resign(copy)
    with pytest.raises(BundleError, match="not finite although its weights are"):
        LoadedModel(Recommender.load(copy))


def test_a_bundle_of_the_format_before_is_read_as_it_was_meant(copy):
    """Format 5 knew nothing of new items: β is the learned one, whatever is new."""
    weights = load_file(copy / "weights.safetensors")
    for name in ("new_beta", "new_share", "items.new_bias"):
        del weights[name]
    save_file(weights, copy / "weights.safetensors")
    _edit_manifest(copy, format_version=5)
    _resign(copy)
    network = bundles.load(copy).model.network
    with torch.no_grad():
        assert float(network.beta_at(torch.tensor(1.0))) == float(network.beta)
    assert float(network.items.new_bias) == 0.0
    _edit_manifest(copy, format_version=6)
    with pytest.raises(BundleError, match="new_beta"):
        bundles.load(copy)


def test_serving_scores_equal_training_scores(trained, recommender):
    """One history read by the evaluation and by the recommender gives the same affinities."""
    loaded = bundles.load(trained)
    items, times = [1, 8, 17, 0], [1_000_000_000, 1_000_000_600, 1_000_000_660, 1_000_100_000]
    log = synthetic.histories([items], [times])
    evaluated = {
        int(event): score_M
        for event_N, score_NM in loaded.model.iter_scores(log, 64)
        for event, score_M in zip(event_N, score_NM, strict=True)
    }
    for k in range(len(items)):
        history = [Event(f"i{items[n]:03d}", float(times[n])) for n in range(k)]
        served = recommender.affinities([Query(history, float(times[k]))])[0]
        np.testing.assert_allclose(served, evaluated[k].numpy(), atol=1e-5)


def test_user_fields_are_read_and_wrong_ones_named(recommender):
    young, old = _query("i001", user={"age": 20.0}), _query("i001", user={"age": 60.0})
    scores = recommender.affinities([young, old])
    assert np.abs(scores[0] - scores[1]).max() > 0
    recommender.check(_query(user={"age": "33", "group": "new", "unheard of": "x"}))
    # It begins with the field: the transformer tells by it whose value it was.
    with pytest.raises(InputError, match=r"^user\.age: expected numeric, got str"):
        recommender.check(_query(user={"age": "old"}))
    with pytest.raises(InputError, match=r"user\.age: expected numeric, got tuple"):
        recommender.check(_query(user={"age": ("a", "b")}))


def test_a_model_without_its_transition_counts_is_not_saved(trained, tmp_path):
    loaded = bundles.load(trained)
    loaded.model.transitions = None
    with pytest.raises(BundleError, match="belong together"):
        bundles.save(
            tmp_path / "bundle",
            model=loaded.model,
            catalogue=loaded.catalogue,
            schema=loaded.schema,
            settings=loaded.settings,
            trend=loaded.trend,
            metrics={},
        )
    assert not (tmp_path / "bundle").exists()


class _Answers(Handler):
    """A service's answer, whatever is asked."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        item = {"item_id": "i003", "score": 1.0, "affinity": 1.0, "trend": 0.0, "exploration": 0.0}
        names = {"recommendation_id": "r", "model_version": "v", "trend_version": None}
        body = json.dumps({"predictions": [{**names, "degraded": [], "items": [item]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_titles_are_those_of_the_model_store_that_is_named(trained, tmp_path):
    deploy(ModelStore(str(tmp_path / "models")), trained)
    with HttpServer(_Answers) as server:
        asked = ["recommend", "--url", server.address, "--workspace", str(tmp_path / "none")]
        without = CliRunner().invoke(app, asked)
        named = CliRunner().invoke(app, [*asked, "--model-store", str(tmp_path / "models")])
    assert (without.exit_code, named.exit_code) == (0, 0), named.output
    assert "i003" in without.output and "Item 3" not in without.output
    assert "Item 3" in named.output
