"""Fields of items and users: encoding, and that the model uses them for what they are worth."""

import dataclasses

import numpy as np
import pytest
import torch

from model.catalogue import Catalogue
from model.evaluation import SplitSettings, evaluate, split_users
from model.fields import MISSING, FieldBags, fit_encoding
from model.items import Items
from model.network import NetworkSettings
from model.schema import FieldKind, Schema
from model.training import TrainSettings, fit
from tests import synthetic

SMALL = NetworkSettings(embedding=16, hidden=32, control=8, dropout=0.0, user_dropout=0.0)
TRAIN = TrainSettings(network=SMALL, batch_events=256, learning_rate=0.01, max_epochs=20)


def _bag(encoding, value):
    bags = FieldBags.encode([encoding], {encoding.name: [value]}, 1)
    pairs = zip(bags.token[0].tolist(), bags.weight[0].tolist(), strict=True)
    return {token: weight for token, weight in pairs if weight > 0}


def test_categorical():
    encoding = fit_encoding("f", FieldKind.CATEGORICAL, ["b", "a", "b", None])
    assert encoding.vocabulary == ("b", "a")  # most frequent first
    assert _bag(encoding, "a") == {2: 1.0}
    assert _bag(encoding, "new") == _bag(encoding, None) == {MISSING: 1.0}


def test_multi_categorical_has_unit_length():
    encoding = fit_encoding("f", FieldKind.MULTI_CATEGORICAL, [["x", "y"], ["x"], []])
    assert _bag(encoding, ["x", "y"]) == pytest.approx({1: 2**-0.5, 2: 2**-0.5})
    assert _bag(encoding, []) == {MISSING: 1.0}


def test_numeric_is_interpolated_between_knots():
    encoding = fit_encoding("f", FieldKind.NUMERIC, [0.0, 10.0, None, float("nan")])
    assert encoding.knots[0] == 0
    assert encoding.knots[-1] == 10
    knots = np.array([0.0, *encoding.knots])  # token 0 is MISSING
    for value in (0.0, 3.7, 10.0):
        assert sum(knots[t] * w for t, w in _bag(encoding, value).items()) == pytest.approx(
            value, rel=1e-6, abs=1e-6
        )
    assert _bag(encoding, -5.0) == _bag(encoding, 0.0)
    assert _bag(encoding, 99.0) == _bag(encoding, 10.0)
    assert _bag(encoding, float("nan")) == {MISSING: 1.0}


def test_text_is_square_root_counts():
    encoding = fit_encoding("f", FieldKind.TEXT, ["Star Wars", "Star Trek"])
    star, wars = encoding.vocabulary.index("star") + 1, encoding.vocabulary.index("wars") + 1
    bag = _bag(encoding, "star STAR star star wars")
    assert bag[star] / bag[wars] == pytest.approx(2.0)


def test_rows_equal_encoding_those_rows():
    encoding = fit_encoding("f", FieldKind.MULTI_CATEGORICAL, [["a", "b"], ["c"]])
    column = [["a"], ["b", "c"], None, ["a", "b", "c"]]
    bags = FieldBags.encode([encoding], {"f": column}, 4)
    chosen = [3, 0, 3, 2]
    again = FieldBags.encode([encoding], {"f": [column[r] for r in chosen]}, 4)
    rows = bags.rows(torch.tensor(chosen))
    for name in ("token", "weight", "offset"):
        assert torch.equal(getattr(rows, name)[0], getattr(again, name)[0])


def _two_fields():
    encoding = fit_encoding("f", FieldKind.CATEGORICAL, ["a", "b"])
    column = ["a", "b", "a", "b"]
    return encoding, FieldBags.encode([encoding], {"f": column}, 4)


def test_lambda_one_ignores_ids_and_lambda_zero_ignores_fields():
    encoding, bags = _two_fields()
    items = Items(4, 8, [encoding], bags, dropout=0.0).eval()
    with torch.no_grad():
        w_MD, b_M = items.outputs(1.0)
        assert torch.equal(w_MD[0], w_MD[2])
        assert torch.equal(b_M[1], b_M[3])
        before = items.outputs(0.0)
        items.bags = FieldBags.encode([encoding], {"f": ["b", "b", "b", "b"]}, 4)
        for a, b in zip(before, items.outputs(0.0), strict=True):
            assert torch.equal(a, b)


def test_folded_inputs_equal_computed_ones():
    encoding, bags = _two_fields()
    items = Items(4, 8, [encoding], bags, dropout=0.5).eval()
    item_N = torch.tensor([4, 0, 3, 3])
    with torch.no_grad():
        computed = items.inputs(item_N)
        items.fold()
        torch.testing.assert_close(items.inputs(item_N), computed)
    items.train()
    assert items.inputs(item_N).requires_grad


def test_user_fields_are_learned_to_their_floor():
    """The user's group decides which half of the items they take: floor PPL = M / 2."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, 200)
    items = [(10 * g + rng.integers(0, 10, 4)).tolist() for g in group]
    log = synthetic.histories(items, [list(range(0, 400, 100))] * 200)
    log = dataclasses.replace(log, user_fields={"group": [str(g) for g in group]})
    split = split_users(log, SplitSettings(min_events=1))
    schema = Schema.parse({"users": {"group": "categorical"}})
    first = {}
    for name, kinds in (("with", schema), ("without", None)):
        model = fit(split.train, split.valid, synthetic.catalogue(20), TRAIN, None, kinds)
        nll = []
        for event_N, score_NM in model.iter_scores(split.test, 64):
            is_first = np.isin(event_N, split.test.offset_U1[:-1])
            target = torch.from_numpy(split.test.item_E[event_N])
            log_p = torch.log_softmax(score_NM, dim=1).gather(1, target[:, None])[:, 0]
            nll += (-log_p[torch.from_numpy(is_first)]).tolist()
        first[name] = np.exp(np.mean(nll))
    # Before a user's first event only the field can tell.
    assert first["with"] < 12.5
    assert first["without"] > 16


def test_cold_items_rank_by_their_fields():
    """Users stay with one genre; items never trained on must rank by genre, above chance."""
    rng = np.random.default_rng(0)
    genre = np.arange(40) % 4
    warm = np.arange(40) < 32
    items = [rng.choice(np.flatnonzero((genre == g) & warm), 8).tolist() for g in range(4)] * 60
    log = synthetic.histories(items, [list(range(0, 800, 100))] * len(items))
    catalogue = Catalogue(tuple(f"i{j:03d}" for j in range(40)), {"genre": [str(g) for g in genre]})
    schema = Schema.parse({"items": {"genre": "categorical"}})
    split = split_users(log, SplitSettings())
    model = fit(split.train, split.valid, catalogue, TRAIN, None, schema)
    assert model.network.items.lambda_M[~torch.from_numpy(warm)].tolist() == [1.0] * 8
    right = []
    cold = np.flatnonzero(~warm)
    for event_N, score_NM in model.iter_scores(split.test, 64):
        for event, score_M in zip(event_N, score_NM, strict=True):
            if event not in split.test.offset_U1:
                best = cold[int(score_M[cold].argmax())]
                right.append(genre[best] == genre[split.test.item_E[event]])
    assert np.mean(right) > 0.9  # chance: 0.25


def test_item_fields_help_when_ids_are_rare():
    rng = np.random.default_rng(1)
    genre = np.arange(400) % 4
    items = [rng.choice(np.flatnonzero(genre == g), 6).tolist() for g in rng.integers(0, 4, 300)]
    log = synthetic.histories(items, [list(range(0, 600, 100))] * 300)
    catalogue = Catalogue(
        tuple(f"i{j:03d}" for j in range(400)), {"genre": [str(g) for g in genre]}
    )
    split = split_users(log, SplitSettings())
    network = SMALL.model_copy(update={"dropout": 0.3})
    settings = TRAIN.model_copy(update={"network": network, "max_epochs": 100})
    ppl = {}
    for name, schema in (
        ("with", Schema.parse({"items": {"genre": "categorical"}})),
        ("without", None),
    ):
        model = fit(split.train, split.valid, catalogue, settings, None, schema)
        ppl[name] = evaluate(model, split.test, 400)["every"]["ppl"]
    assert ppl["with"] < 150, ppl  # floor 100: one genre of four
    assert ppl["without"] > 1.5 * ppl["with"], ppl
