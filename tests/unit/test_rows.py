"""Tables updated by rows: what dense arithmetic would give, and nothing else touched."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.averaging import WeightAverage
from model.network import NetworkSettings
from model.rows import RowwiseAdagrad, StepRows, clip_gradients, lookup
from model.schema import Schema
from model.shown import Shown
from model.train_settings import Softmax, TrainSettings
from model.trainer import Trainer
from model.training import fit
from model.trends import ResolvedTrend
from tests import synthetic

M, D = 7, 3
STEPS = st.lists(st.lists(st.integers(0, M - 1), min_size=1, max_size=5), min_size=1, max_size=8)


class _Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(M, D))
        self.vector = nn.Parameter(torch.randn(M))
        self.dense = nn.Parameter(torch.randn(D))

    def loss(self, row: torch.Tensor, read_rows=lookup) -> torch.Tensor:
        read = read_rows(self.matrix, row), read_rows(self.vector, row)
        again = read_rows(self.matrix, row.flip(0))  # a tied table is read twice
        return ((read[0] * again).sum(1) * self.dense.sum() + read[1] ** 2).sum()


def _dense_adagrad(table, grad, total, lr):
    """The rule over all rows; those without a gradient stay."""
    square = grad**2 if grad.dim() == 1 else (grad**2).mean(1)
    total += square
    scale = lr / (total.sqrt() + 1e-10)
    table -= grad * (scale if grad.dim() == 1 else scale[:, None])


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, clip=st.sampled_from([0.1, 100.0]))
def test_sparse_steps_equal_the_dense_rule_and_average(steps, clip):
    torch.manual_seed(0)
    by_rows, dense = _Tables(), _Tables()
    dense.load_state_dict(by_rows.state_dict())
    kept = copy.deepcopy(by_rows)
    tables = [by_rows.matrix, by_rows.vector]
    average = WeightAverage(by_rows, kept, 0.9, tables)
    wanted = AveragedModel(dense, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimiser = RowwiseAdagrad(tables, lr=0.1, after=average.take_rows)
    plain = [torch.optim.SGD([m.dense], lr=0.01) for m in (by_rows, dense)]
    totals = [torch.zeros(M), torch.zeros(M)]
    for rows in steps:
        row = torch.tensor(rows)
        by_rows.zero_grad()
        dense.zero_grad()
        dense.loss(row).backward()
        step_rows = StepRows()
        step_rows.open(tables, [row])
        by_rows.loss(row, step_rows.lookup).backward()
        step_rows.close()
        before = by_rows.matrix.detach().clone()
        clip_gradients(by_rows.parameters(), clip)
        nn.utils.clip_grad_norm_(dense.parameters(), clip)
        assert by_rows.matrix.grad.is_sparse and not dense.matrix.grad.is_sparse
        for o in (optimiser, *plain):
            o.step()
        with torch.no_grad():
            for table, total in zip((dense.matrix, dense.vector), totals, strict=True):
                _dense_adagrad(table, table.grad, total, 0.1)
        average.update()
        wanted.update_parameters(dense)
        untouched = np.setdiff1d(np.arange(M), rows)
        assert torch.equal(by_rows.matrix[untouched], before[untouched])
    average.finish()
    for got, want in ((by_rows, dense), (kept, wanted.module)):
        for name, value in got.state_dict().items():
            torch.testing.assert_close(value, want.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_rows_that_were_not_opened_cannot_be_read():
    tables, rows = _Tables(), StepRows()
    rows.open([tables.matrix], [torch.tensor([4, 1])])
    with pytest.raises(ValueError, match="not opened"):
        rows.lookup(tables.matrix, torch.tensor([4, 2]))


def test_rows_of_tables_of_different_lengths():
    """The last row of the longer one is not the shorter one's."""
    longer, shorter = nn.Parameter(torch.randn(M, D)), nn.Parameter(torch.randn(M - 1))
    rows = StepRows()
    met = torch.tensor([3, M - 1, 3]), torch.tensor([0])
    rows.open([longer, shorter], met)
    assert [rows.place(index).tolist() for index in met] == [[1, 2, 1], [0]]
    assert rows.common_R.tolist() == [0, 3]
    for table in (longer, shorter):
        assert torch.equal(rows.lookup(table, rows.common_R), table[[0, 3]])
    read = rows.lookup(longer, torch.tensor([M - 1, 0])), rows.lookup(shorter, torch.tensor([3]))
    assert torch.equal(read[0], longer[[M - 1, 0]]) and torch.equal(read[1], shorter[[3]])
    (read[0].sum() + read[1].sum()).backward()
    rows.close()
    assert longer.grad.indices().tolist() == [[0, 3, M - 1]]
    assert longer.grad.values()[:, 0].tolist() == [1.0, 0.0, 1.0]
    assert shorter.grad.to_dense().tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert torch.equal(rows.lookup(shorter, torch.tensor([5])), shorter[[5]])  # closed


@pytest.mark.parametrize(("tied", "listed"), [(True, False), (False, False), (True, True)])
def test_a_sampled_step_touches_only_the_rows_it_reads(tied, listed):
    """Of every table with a row per item: weights, state and average, bit for bit."""
    num_items = 400
    log = synthetic.successor(40, 12, 20, seed=0)  # items 20 … 399 never occur
    shown = np.empty(0, dtype=np.int64)
    if listed:  # but for 50 of them, which are on lists
        shown = np.arange(50, 50 + log.num_events) % 50 + 300
        log = synthetic.replace(
            log, shown=Shown(shown.astype(np.int32), np.arange(log.num_events + 1))
        )
    network = NetworkSettings(embedding=8, hidden=8, control=4, tied=tied)
    chosen = TrainSettings(
        network=network, softmax=Softmax.SAMPLED, negatives=5, batch_events=64, bptt=8
    )
    trainer = Trainer(
        log, synthetic.catalogue(num_items), chosen, ResolvedTrend(3600, 0, 1.0), Schema()
    )
    before = {n: p.detach().clone() for n, p in trainer.network.named_parameters()}
    kept_before = {n: p.detach().clone() for n, p in trainer.model.network.named_parameters()}
    drawn = []
    negatives = trainer.objective.sampler.negatives

    def spy(*arguments):
        drawn.append(negatives(*arguments))
        return drawn[-1]

    object.__setattr__(trainer.objective.sampler, "negatives", spy)
    trainer.epoch(trainer.start_epoch())
    met = [torch.from_numpy(log.item_E), torch.from_numpy(shown), torch.tensor([num_items])]
    read = torch.cat([*drawn, *met]).unique()
    tables = {
        id(t): n for n, p in trainer.network.named_parameters() for t in trainer.tables if t is p
    }
    assert len(tables) == (2 if tied else 3)
    untouched = torch.ones(num_items + 1, dtype=torch.bool)
    untouched[read] = False
    assert 0 < int(untouched.sum()) < num_items
    for table in trainer.tables:
        name, rows = tables[id(table)], untouched[: len(table)]
        assert torch.equal(table[rows], before[name][rows]), name
        assert not torch.equal(table, before[name])
        kept = dict(trainer.model.network.named_parameters())[name]
        assert torch.equal(kept[rows], kept_before[name][rows]), name
        state = trainer.optimisers[1].state[table]["sum"]
        assert not state[rows].any() and state.any()


def test_sampled_training_learns_what_dense_training_learns():
    log = synthetic.successor(300, 12, 20, seed=0)
    network = NetworkSettings(embedding=16, hidden=32, control=8, dropout=0.0)
    best = {}
    for softmax in Softmax.DENSE, Softmax.SAMPLED:
        chosen = TrainSettings(
            network=network,
            softmax=softmax,
            negatives=10,
            batch_events=256,
            learning_rate=0.01,
            max_epochs=12,
        )
        split = log.subset(np.arange(250)), log.subset(np.arange(250, 300))
        model = fit(*split, synthetic.catalogue(20), chosen, None)
        best[softmax] = min(entry["valid_ppl"] for entry in model.curve)
    assert best[Softmax.SAMPLED] < 1.1 * best[Softmax.DENSE]
