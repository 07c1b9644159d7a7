"""The loss of a batch: every position has a λ of its own, as `Items.outputs` mixes by it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.hrnn import encode_batch
from model.network import NetworkSettings
from model.objective import FOLLOWERS_UNTIL, Shares, without_followers
from model.schema import Schema
from model.sequences import bptt_batches
from model.trainer import Trainer
from model.training import TrainSettings
from model.trends import ResolvedTrend
from tests import synthetic

M = 30
SCHEMA = Schema.parse({"items": {"genre": "categorical"}})


def _trainer(fields=True, **settings):
    log, catalogue = synthetic.successor(25, 12, M, seed=0, p=0.5), synthetic.catalogue(M)
    if fields:
        catalogue.fields["genre"] = [f"g{j % 4}" for j in range(M)]
    network = NetworkSettings(
        embedding=8, hidden=8, control=4, dropout=0.0, fields_dropout=0.0, user_dropout=0.0
    )
    settings = TrainSettings(network=network, batch_events=40, bptt=6, **settings)
    trend = ResolvedTrend(3600, 0, 1.0)
    trainer = Trainer(log, catalogue, settings, trend, SCHEMA if fields else Schema())
    for parameter in trainer.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trainer, log


@pytest.mark.parametrize("fields", [True, False])
@pytest.mark.parametrize("softmax", ["dense", "sampled"])
def test_every_position_is_scored_under_its_own_lambda(softmax, fields):
    trainer, log = _trainer(fields, softmax=softmax, negatives=5)
    network, objective = trainer.network, trainer.objective
    positions, targets = trainer._read(log, np.arange(len(log)))
    state_SK, followed, alone = None, 0, 0
    for batch in bptt_batches(log, bptt=6, batch_events=40, rng=np.random.default_rng(1)):
        event_N = torch.from_numpy(batch.event_N)
        if trainer.tables:
            trainer.rows.open(trainer.tables, [torch.arange(M + 1)])
        encoded = encode_batch(network, positions, batch, state_SK)
        state_SK = encoded.state_SK
        draws = objective.draw()
        lambda_N = objective.lambdas(draws, len(event_N))
        target_N = positions.target[event_N]
        rows_NR = objective._transition_rows(positions, targets, event_N)
        log_q_NM = trainer.trend_table.every_item(positions.trend_row[event_N])
        nll = []
        for n, (mix, target) in enumerate(zip(lambda_N, target_N, strict=True)):
            w_MD, b_M = network.items.outputs(float(mix))
            score_M = w_MD @ encoded.query_ND[n] + b_M + network.beta * log_q_NM[n]
            if not fields or mix < FOLLOWERS_UNTIL:
                followed += 1
                score_M = score_M + network.prior(objective.transitions, rows_NR[n : n + 1])[0]
            else:
                alone += 1
            score_M = score_M + network.repeats(encoded.seen.rows(n, n + 1), M)[0]
            if softmax == "sampled":
                item_S = draws.negative_S[draws.negative_S != target]
                score_M = score_M - objective.log_count_M
                score_M = score_M[torch.cat([target[None], item_S])]
                target = torch.tensor(0)
            nll.append(F.cross_entropy(score_M[None], target[None]))
        _, ranking = objective.loss(positions, targets, event_N, target_N, encoded, draws, Shares())
        torch.testing.assert_close(ranking, torch.stack(nll).mean(), rtol=1e-4, atol=1e-5)
        trainer.rows.close()
    assert followed > 50
    assert (alone > 10) == fields


@pytest.mark.parametrize("fields_alone", [0.0, 0.3])
def test_every_step_has_all_lambdas_and_half_of_it_that_of_known_items(fields_alone):
    trainer, _ = _trainer(fields_alone=fields_alone)
    starts = set()
    for _ in range(5):
        draws = trainer.objective.draw()
        starts.add(float(draws.lambda_start))
        lambda_N = trainer.objective.lambdas(draws, 1000)
        alone_N, known_N = lambda_N == 1.0, lambda_N == 0.5
        assert float(alone_N.float().mean()) == pytest.approx(fields_alone, abs=0.01)
        assert float(known_N.float().mean()) == pytest.approx((1 - fields_alone) / 2, abs=0.01)
        mixed = lambda_N[~alone_N & ~known_N].sort().values
        even = (torch.arange(len(mixed)) + 0.5) / len(mixed)
        torch.testing.assert_close(mixed, even, rtol=0.0, atol=0.01)
        unread = float((lambda_N >= FOLLOWERS_UNTIL).float().mean())
        assert unread == pytest.approx(without_followers(fields_alone), abs=0.01)
        # Nor do neighbours go together: of any twenty in a row, some are low and some are high.
        ends = lambda_N.unfold(0, 20, 1).sort(dim=1).values[:, [0, -1]]
        assert float(ends[:, 0].max()) < 0.3
        assert float(ends[:, 1].min()) > 0.7
    assert len(starts) == 5
