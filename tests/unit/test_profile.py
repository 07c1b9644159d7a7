"""The average of the fields so far: against a walk through each history, and what it is for."""

import numpy as np
import pytest
import torch

from model.catalogue import Catalogue
from model.evaluation import evaluate
from model.fields import FieldBags, fit_encoding
from model.inputs import InputEncodings, Positions
from model.network import NetworkSettings
from model.profile import DAMPING, FieldProfile, FoldedProfile
from model.schema import FieldKind, Schema
from model.splits import SplitSettings, split_users
from model.training import TrainSettings, fit
from tests import synthetic

GENRES = ["a", "b", None, "a", "c", "b"]
TAGS = [["x", "y"], ["y"], ["z"], None, ["x"], ["z", "x"]]


def _profile(num_items):
    columns = {
        "genre": [GENRES[j % 6] for j in range(num_items)],
        "tags": [TAGS[j % 6] for j in range(num_items)],
    }
    encodings = (
        fit_encoding("genre", FieldKind.CATEGORICAL, columns["genre"]),
        fit_encoding("tags", FieldKind.MULTI_CATEGORICAL, columns["tags"]),
    )
    profile = FieldProfile(encodings, size=5, dropout=0.0)
    torch.nn.init.normal_(profile.query.weight)
    return profile, FieldBags.encode(encodings, columns, num_items)


@pytest.mark.parametrize("num_items", [6, 5000])  # all rows, and those that are read
def test_the_average_of_every_position(num_items):
    rng = np.random.default_rng(0)
    item_lists = [rng.integers(num_items, size=n).tolist() for n in (1, 9, 30, 2)]
    log = synthetic.histories(item_lists, [list(range(len(i))) for i in item_lists])
    positions = Positions.of(log, InputEncodings(num_items=num_items, session_gap=60), None)
    profile, bags = _profile(num_items)
    z_MZ = profile.embedding(bags).detach().numpy()
    wanted = []
    for items in item_lists:
        for k in range(len(items)):
            seen = sorted(set(items[:k]))
            wanted.append(z_MZ[seen].sum(axis=0) / (len(seen) + DAMPING))
    wanted = np.array(wanted) @ profile.query.weight.detach().numpy().T
    event_N = torch.from_numpy(rng.permutation(len(wanted)))
    got = profile(bags, positions.seen_items(event_N)).detach().numpy()
    np.testing.assert_allclose(got, wanted[event_N], atol=1e-5)

    folded = FoldedProfile(profile, bags)
    past = [np.array(items[:k], dtype=np.int64) for items in item_lists for k in range(len(items))]
    np.testing.assert_allclose(folded(past), wanted, atol=1e-5)


@pytest.mark.parametrize("num_items", [1, 6])
def test_nothing_is_known_at_the_start(num_items):
    log = synthetic.histories([[0], [0]], [[0], [0]])
    positions = Positions.of(log, InputEncodings(num_items=num_items, session_gap=60), None)
    profile, bags = _profile(num_items)
    seen = positions.seen_items(torch.tensor([0, 1]))
    assert profile(bags, seen).tolist() == [[0.0] * 5] * 2
    assert FoldedProfile(profile, bags)([np.empty(0, dtype=np.int64)]).tolist() == [[0.0] * 5]


def _taste_log(num_users, length, seed):
    """Users like one of four genres from their first event on, with 40 items each; items are not
    the same in the halves of the users, so ids say nothing of the other half's."""
    rng = np.random.default_rng(seed)
    genre_U = rng.integers(4, size=num_users)
    liked = rng.random((num_users, length)) < 0.5
    genre_UL = np.where(liked, genre_U[:, None], rng.integers(4, size=(num_users, length)))
    item_UL = genre_UL * 40 + rng.integers(40, size=(num_users, length))
    return synthetic.histories(item_UL.tolist(), [list(range(length))] * num_users)


def test_a_taste_is_read_from_a_long_history():
    log = _taste_log(100, 40, seed=0)
    ids = tuple(f"i{j}" for j in range(160))
    catalogue = Catalogue(ids, fields={"genre": [str(j // 40) for j in range(160)]})
    schema = Schema.parse({"items": {"genre": "categorical"}})
    split = split_users(log, SplitSettings())
    ppl = {}
    for switch in (True, False):
        # What is read by every network: the last item's fields. What only one has: the average.
        network = NetworkSettings(
            embedding=16,
            hidden=4,
            control=4,
            transitions=False,
            repeats=False,
            profile=switch,
            dropout=0.0,
        )
        settings = TrainSettings(
            network=network, max_epochs=8, learning_rate=0.01, batch_events=256
        )
        model = fit(split.train, split.valid, catalogue, settings, None, schema)
        ppl[switch] = evaluate(model, split.test, len(catalogue))["every"]["ppl"]
    assert ppl[True] < 0.97 * ppl[False]
