"""The repeat prior against a walk through each history, and what it learns."""

import numpy as np
import torch

from model.evaluation import perplexity
from model.inputs import InputEncodings, Positions
from model.repeats import RepeatPrior, SeenItems
from model.training import TrainSettings, fit
from tests import synthetic
from tests.synthetic import catalogue

M = 6


def _positions(item_lists):
    log = synthetic.histories(item_lists, [list(range(len(i))) for i in item_lists])
    return Positions.of(log, InputEncodings(num_items=M, session_gap=60), None)


def _brute_force(items, k, rho):
    """ρ of the lag at which each item was last chosen before position k."""
    bonus = np.zeros(M, dtype=np.float32)
    for j in set(items[:k]):
        lag = k - max(i for i in range(k) if items[i] == j)
        bonus[j] = rho[int(np.log2(lag))]
    return bonus


def test_bonus_of_every_position():
    rng = np.random.default_rng(0)
    item_lists = [rng.integers(M, size=n).tolist() for n in (1, 9, 30, 2)]
    positions = _positions(item_lists)
    prior = RepeatPrior()
    torch.nn.init.normal_(prior.rho)
    wanted = np.array(
        [
            _brute_force(items, k, prior.rho.detach().numpy())
            for items in item_lists
            for k in range(len(items))
        ]
    )
    event_N = torch.from_numpy(rng.permutation(len(wanted)))
    seen = positions.seen_items(event_N)
    got = prior(seen, M).detach().numpy()
    np.testing.assert_allclose(got, wanted[event_N], rtol=1e-6)
    columns = torch.tensor([0, 3, 5])
    among = prior(seen.among(columns), len(columns)).detach()
    np.testing.assert_array_equal(among, got[:, columns])
    assert not prior(seen.among(columns[:0]), 1).any()
    place_R = torch.from_numpy(rng.integers(len(event_N), size=200))
    item_R = torch.from_numpy(rng.integers(M, size=200))
    np.testing.assert_array_equal(
        prior.pairs(seen, place_R, item_R, M).detach(), got[place_R, item_R]
    )
    first = positions.seen_items(torch.tensor([0]))
    assert prior.pairs(first, place_R[:0], item_R[:0], M).tolist() == []
    assert prior.pairs(first, torch.zeros(2, dtype=torch.int64), item_R[:2], M).tolist() == [0, 0]
    item_N = torch.from_numpy(rng.integers(M, size=len(wanted)))
    np.testing.assert_array_equal(prior.at(seen, item_N).detach(), got[np.arange(len(got)), item_N])
    part = prior(seen.rows(3, 11), M).detach()
    np.testing.assert_array_equal(part, got[3:11])


def test_nothing_is_seen_at_the_start():
    seen = _positions([[0], [1]]).seen_items(torch.tensor([0, 1]))
    assert isinstance(seen, SeenItems) and not len(seen.item_Z)
    assert not RepeatPrior()(seen, M).any()


def _without_repeats(users, num_items, seed):
    rng = np.random.default_rng(seed)
    lists = [rng.permutation(num_items)[: num_items // 2].tolist() for _ in range(users)]
    return synthetic.histories(lists, [list(range(0, 60 * len(i), 60)) for i in lists])


def test_where_nothing_repeats_the_choice_is_among_the_rest():
    """Uniform over the items not yet seen: PPL is exp(mean log(M − k)), which no state can keep."""
    num_items = 40
    train, test = _without_repeats(150, num_items, 0), _without_repeats(40, num_items, 1)
    position = np.arange(1, num_items // 2)
    floor = float(np.exp(np.log(num_items - position).mean()))
    settings = {
        "max_epochs": 12,
        "learning_rate": 0.01,
        "trend_decomposition": False,
        "network": {"embedding": 8, "hidden": 8, "transitions": False, "dropout": 0.0},
    }
    ppl = {}
    for repeats in (True, False):
        own = settings | {"network": settings["network"] | {"repeats": repeats}}
        model = fit(train, test, catalogue(num_items), TrainSettings.parse(own), None)
        ppl[repeats] = perplexity(model, test, num_items)
    assert ppl[True] < floor * 1.05
    assert ppl[False] > floor * 1.2
