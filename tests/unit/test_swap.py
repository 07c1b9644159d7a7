"""What a new model does before its first answer, so that its first users do not wait for it."""

import asyncio
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from model.query import History, Query
from model.recommender import Recommender
from serving import predictor as serving
from serving import wire
from serving.predictor import LoadedModel, Predictor
from serving.settings import ServeSettings
from tests.e2e.processes import random_bundle


@pytest.fixture(scope="module")
def recommenders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    paths = [random_bundle(folder / str(seed), seed) for seed in range(2)]
    return [partial(Recommender.load, path) for path in paths]


def asked(recommender, user, items):
    ids = recommender.item_ids
    history = History([ids[(user + k) % len(ids)] for k in range(40)], 1e9 + 60.0 * np.arange(40))
    return wire.Asked("score", Query(history, 2e9), 5, part=wire.Part(items, 0, 3))


def test_a_new_model_has_read_what_the_old_one_read_and_knows_its_lists(recommenders, monkeypatch):
    old, new, fresh = recommenders[0](), recommenders[1](), recommenders[1]()
    predictor = Predictor(ServeSettings(), old)
    items = wire.ItemList(old.item_ids[:7], np.full(7, -2.0), -9.0)
    predictor._lists[items.name] = items
    questions = [asked(old, user, items) for user in range(3 * serving.READ_TOGETHER)]
    asyncio.run(predictor._in_parts(questions))
    pauses = []
    monkeypatch.setattr(serving.time, "sleep", pauses.append)
    model = predictor._made_ready(LoadedModel(new), predictor._models[0], [items])
    assert len(pauses) >= 3 and min(pauses) > 0, "answers go on meanwhile"
    for question in questions:
        assert new._lean.read(question.query, question.query.history).steps == 1
    assert "listed" in vars(model._lists[items.name])
    expected = LoadedModel(fresh).score(questions)
    for found, one in zip(model.score(questions), expected, strict=True):
        assert found.item_ids == one.item_ids
        np.testing.assert_allclose(found.affinity_T, one.affinity_T, atol=1e-5)


def test_reading_ahead_ends_in_time(recommenders, monkeypatch, caplog):
    caplog.set_level("INFO")
    old, new = recommenders[0](), recommenders[1]()
    monkeypatch.setattr(serving, "TAKE_OVER_SECONDS", 0.0)
    before = LoadedModel(old)
    items = wire.ItemList(old.item_ids[:7], np.full(7, -2.0), -9.0)
    before.score([asked(old, user, items) for user in range(100)])
    LoadedModel(new).read_as(before)
    assert f"{serving.READ_TOGETHER} of 10" in caplog.text  # those of the warm-up besides
    assert len(new.recent()) < 100


def failing(model, users):
    """A model that cannot read some histories."""
    read_all = model._lean.read_all

    def read(queries, known, asked_at=None):
        if any(query.history[0].item_id in users for query in queries):
            raise RuntimeError("secret")
        return read_all(queries, known, asked_at)

    model._lean.read_all = read


def test_one_history_that_cannot_be_read_does_not_keep_a_model_from_its_use(
    recommenders, monkeypatch, caplog
):
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: None)
    old, new = recommenders[0](), recommenders[1]()
    before, after = LoadedModel(old), LoadedModel(new)
    items = wire.ItemList(old.item_ids[:7], np.full(7, -2.0), -9.0)
    questions = [asked(old, user, items) for user in range(30)]
    before.score(questions)
    failing(new, {old.item_ids[5], old.item_ids[20]})
    after.read_as(before)
    assert "2 of 3" in caplog.text and "secret" not in caplog.text
    assert caplog.text.count("RuntimeError") == 1
    assert len(new.recent()) == len(old.recent()) - 2


def test_a_model_that_can_read_nothing_is_refused_and_the_items_are_those_of_the_old_one(
    recommenders, monkeypatch
):
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: None)
    old, new = recommenders[0](), recommenders[1]()
    predictor = Predictor(ServeSettings(), old)
    items = wire.ItemList(old.item_ids[:7], np.full(7, -2.0), -9.0)
    predictor._models[0].score([asked(old, user, items) for user in range(30)])
    after = LoadedModel(new)
    failing(new, set(old.item_ids))
    rebased = []
    known = {"item": {"title": "New"}}

    def rebase(select):
        rebased.append(select.__self__)
        if select.__self__ is new:
            predictor._feed.items = {}  # it was trained on them

    predictor._feed = SimpleNamespace(
        items=known, changed=False, rebase=rebase, poll=lambda select: None
    )
    with pytest.raises(RuntimeError):
        predictor._made_ready(after, predictor._models[0], [])
    assert rebased == [new, old]
    assert predictor._feed.items == known
