"""The linear bias of item fields against the ridge regression solved as one."""

import numpy as np
import pytest
import torch

from model.field_bias import RIDGE, FieldBias
from model.fields import FieldBags, fit_encoding
from model.network import NetworkSettings
from model.schema import FieldKind, Schema
from model.trainer import Trainer
from model.training import TrainSettings
from model.trends import ResolvedTrend
from tests import synthetic

M = 80


def _fields():
    rng = np.random.default_rng(0)
    columns = {
        "genre": [None if g == 0 else f"g{g}" for g in rng.integers(5, size=M)],
        "tags": [
            [f"t{t}" for t in rng.permutation(9)[: rng.integers(4)]] or None for _ in range(M)
        ],
        "year": rng.integers(1950, 2000, size=M).astype(float).tolist(),
        "title": [" ".join(f"w{w}" for w in rng.integers(30, size=4)) for _ in range(M)],
    }
    kinds = [
        FieldKind.CATEGORICAL,
        FieldKind.MULTI_CATEGORICAL,
        FieldKind.NUMERIC,
        FieldKind.TEXT,
    ]
    encodings = [
        fit_encoding(name, kind, columns[name]) for name, kind in zip(columns, kinds, strict=True)
    ]
    return encodings, FieldBags.encode(encodings, columns, M)


def test_it_starts_at_the_ridge_regression():
    encodings, bags = _fields()
    generator = torch.Generator().manual_seed(0)
    b_M = torch.randn(M, generator=generator) * 2 - 7
    known_M = torch.rand(M, generator=generator) < 0.6
    bias = FieldBias(encodings)
    bias.start_at(bags, b_M, known_M)

    columns = []
    for f, encoding in enumerate(encodings):
        x = torch.zeros(M, encoding.num_tokens, dtype=torch.float64)
        for m in range(M):
            for k in range(int(bags.offset[f][m]), int(bags.offset[f][m + 1])):
                x[m, bags.token[f][k]] += float(bags.weight[f][k])
        x[:, 0] = 0.0  # missing
        columns.append(x)
    x = torch.cat([*columns, torch.ones(M, 1, dtype=torch.float64)], dim=1)
    mean = b_M[known_M].double().mean()
    gram = x[known_M].T @ x[known_M] + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    beta = torch.linalg.solve(gram, x[known_M].T @ (b_M[known_M].double() - mean))
    with torch.no_grad():
        torch.testing.assert_close(bias(bags).double(), x @ beta + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [0, 1])
def test_of_hardly_any_item_nothing_is_learned(known):
    encodings, bags = _fields()
    bias = FieldBias(encodings)
    known_M = torch.arange(M) < known
    bias.start_at(bags, torch.full((M,), -3.0), known_M)
    with torch.no_grad():
        torch.testing.assert_close(bias(bags), torch.full((M,), -3.0 * known))


def test_training_begins_there_by_as_much_as_the_trend_does_not_say():
    log = synthetic.successor(40, 12, 10, seed=0)
    catalogue = synthetic.catalogue(10)
    catalogue.fields["genre"] = ["a"] * 5 + ["b"] * 5
    log = synthetic.replace(log, item_E=np.where(log.item_E < 5, log.item_E // 2, log.item_E))
    settings = TrainSettings(network=NetworkSettings(embedding=8, hidden=8, control=4))
    schema = Schema.parse({"items": {"genre": "categorical"}})
    ahead = {}
    for trend in (None, ResolvedTrend(3600, 0, 1.0)):
        trainer = Trainer(log, catalogue, settings, trend, schema)
        with torch.no_grad():
            _, b_M = trainer.network.items.outputs(1.0)
        # Items 3 and 4 are new; each a is chosen more than each b.
        assert b_M[:5].unique().numel() == 1 == b_M[5:].unique().numel()
        ahead[trend is not None] = float(b_M[3] - b_M[7])
    assert ahead[False] > 0.2
    assert 0.0 < ahead[True] < ahead[False]
