"""The softmax over lists: the scores it takes are those of the softmax over all items."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.hrnn import encode_batch
from model.items import mixed_queries
from model.network import NetworkSettings
from model.objective import FOLLOWERS_UNTIL, Shares
from model.schema import Schema
from model.sequences import bptt_batches
from model.shown import Shown
from model.trainer import Trainer
from model.training import TrainSettings
from model.trends import ResolvedTrend
from tests import synthetic

M = 30
SCHEMA = Schema.parse({"items": {"genre": "categorical"}})


def log_with_lists():
    rng = np.random.default_rng(0)
    log = synthetic.successor(25, 12, M, seed=0, p=0.5)
    lists = []
    for item in log.item_E:
        offered = rng.permutation(M)[: rng.integers(6)]
        lists.append(offered[offered != item])
    offset_E1 = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    return synthetic.replace(log, shown=Shown(np.concatenate(lists).astype(np.int32), offset_E1))


@pytest.mark.parametrize("softmax", ["dense", "sampled"])
@pytest.mark.parametrize("with_trend", [True, False])
def test_scores_on_lists_are_those_of_the_whole_catalogue(softmax, with_trend):
    log = log_with_lists()
    catalogue = synthetic.catalogue(M)
    catalogue.fields["genre"] = [f"g{j % 4}" for j in range(M)]
    settings = TrainSettings(
        network=NetworkSettings(
            embedding=8, hidden=8, control=4, dropout=0.0, fields_dropout=0.0, user_dropout=0.0
        ),
        softmax=softmax,
        negatives=5,
        batch_events=40,
        bptt=6,
    )
    trend = ResolvedTrend(3600, 0, 1.0) if with_trend else None
    trainer = Trainer(log, catalogue, settings, trend, SCHEMA)
    network, objective = trainer.network, trainer.objective
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    positions, targets = trainer._read(log, np.arange(len(log)))
    draws = objective.draw()
    batches = bptt_batches(log, bptt=6, batch_events=40, rng=np.random.default_rng(1))
    state_SK, compared = None, 0
    for batch in batches:
        event_N = torch.from_numpy(batch.event_N)
        if trainer.tables:
            trainer.rows.open(trainer.tables, [torch.arange(M + 1)])
        encoded = encode_batch(network, positions, batch, state_SK)
        state_SK = encoded.state_SK
        lambda_N = objective.lambdas(draws, len(event_N))
        phi_NM = torch.stack(
            [
                network.affinities(query_D[None], *network.items.outputs(float(mix)), None)[0]
                for query_D, mix in zip(encoded.query_ND, lambda_N, strict=True)
            ]
        )
        rows_NR = objective._transition_rows(positions, targets, event_N)
        rows_NR[lambda_N >= FOLLOWERS_UNTIL] = -1
        phi_NM = phi_NM + network.prior(objective.transitions, rows_NR)
        phi_NM = phi_NM + network.repeats(encoded.seen, M)
        nll = []
        for n, event in enumerate(batch.event_N):
            others = log.shown.of(np.array([event]))[0]
            compared += len(others)
            columns = [log.item_E[event], *others]
            nll.append(-phi_NM[n, columns].log_softmax(0)[0])
        passed_over = targets.passed_over(batch.event_N, torch.device("cpu"))
        weight_N = targets.weight[event_N]
        mixed = replace(encoded, query_ND=mixed_queries(encoded.query_ND, lambda_N))
        got = objective._shown(
            mixed,
            positions.target[event_N],
            rows_NR,
            encoded.seen,
            passed_over,
            weight_N,
        )
        torch.testing.assert_close(got, torch.stack(nll).mean(), rtol=1e-4, atol=1e-5)
        given = positions, targets, event_N, positions.target[event_N], encoded, draws, Shares()
        alone, both = objective.loss(*given)[0], objective.loss(*given, passed_over)[0]
        torch.testing.assert_close(both - alone, objective.shown_weight * got)
        trainer.rows.close()
    assert compared > 200
