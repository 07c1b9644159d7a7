"""How much log q(t) and a new item count where the catalogue grew since training (§3.2, eq. 5).

What is learned of an item holds, with hindsight, some of its popularity, so in a fast catalogue
(news) the learned β is small. Of items that come after training nothing of the kind is known: how
popular they are only the trend says. So, when training has ended, half of its items are made as new
as those that `model.extension` adds, then the other half, and the validation events say which
weight of the trend and which bias of new items are right in both:

    p(a | h, t) ∝ exp(φ̃_a + β_s·log q_a(t) + δ·[a is new]),    s = Σ_{new a} q_a(t).

β_s goes from the learned β at s = 0 in a straight line to what was fitted at the share of the fit,
and stays there. It is one number for all items, so that affinity and trend can be added elsewhere.

Shapes: N events, M items, J items made new, F features (log q, is new).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.extension import as_new
from model.hrnn import TrainedHRNN
from model.splits import Cases

MAX_EVENTS = 2000
MAX_CELLS = 2**26  # scores of both halves that are kept, and as many log q: 512 MB
BLOCK = 256
# Of the prior of β and δ: a change of 1 has to win half as many nats of validation, as what a few
# events say is noise.
PRECISION = 10.0
STEPS = 30  # Newton's, at most
LARGEST_BIAS = 10.0


def fit_new_items(
    model: TrainedHRNN, valid: Cases, known_J: NDArray[np.int64], seed: int = 0
) -> None:
    """Set the network's β of new items and their bias.

    Args:
        model: trained, with `trend_log`; without a trend the bias alone is set.
        valid: events that training did not descend on.
        known_J: int64, positions of the items that training met, two or more.
    """
    count = min(len(valid), MAX_EVENTS, max(1, MAX_CELLS // 2 // model.network.num_items))
    some = Cases(valid.histories, valid.event_N[np.linspace(0, len(valid) - 1, count).astype(int)])
    table = model.trend_table(some.histories)
    if len(known_J) < 2 or not count:
        return
    shuffled_J = np.random.default_rng(seed).permutation(known_J)
    if table is not None:
        row_E = torch.from_numpy(table.row_of(some.histories.timestamp_E))
    item_E = torch.from_numpy(some.histories.item_E)
    blocks = []
    for new_J in np.array_split(shuffled_J, 2):
        grown = as_new(model, new_J)
        new_M = grown.network.items.new_M.cpu()
        grown.network.items.new_bias.zero_()
        grown.trend_log = None  # affinities alone
        for event_N, score_NM in grown.iter_scores_at(some.histories, BLOCK, some.event_N):
            if table is None:  # β has no slope, and stays 0
                log_q_NM = torch.zeros(1, 1).expand_as(score_NM)
            else:
                log_q_NM = table.every_item(row_E[event_N])
            blocks.append(_Block(score_NM, log_q_NM, item_E[event_N], new_M))
        del grown  # before the next one is made
    beta = float(model.network.beta.detach())
    fitted_beta, bias = _fitted(blocks, beta)
    network = model.network
    if table is not None:
        network.new_beta.fill_(fitted_beta - beta)
        network.new_share.copy_(torch.cat([block.new_share_N for block in blocks]).mean())
    network.items.new_bias.fill_(bias)


@dataclass(frozen=True)
class _Block:
    """Some events under one choice of new items."""

    score_NM: Tensor  # affinities
    log_q_NM: Tensor
    item_N: Tensor  # chosen
    new_M: Tensor  # bool

    @property
    def new_share_N(self) -> Tensor:
        """Of q(t), what new items have."""
        return self.log_q_NM[:, self.new_M].exp().sum(dim=1)


def _fitted(blocks: Sequence[_Block], beta: float) -> tuple[float, float]:
    """β ≥ 0 and δ of the largest likelihood, held to (β learned, 0) by `PRECISION`.

    The loss is convex in both; Newton's steps are halved until it falls.
    """
    prior_F = torch.tensor([beta, 0.0], dtype=torch.float64)
    at_F = prior_F.clone()
    loss, slope_F, curve_FF = _loss(blocks, at_F, prior_F)
    least_F = torch.tensor([0.0, -LARGEST_BIAS], dtype=torch.float64)
    most_F = torch.tensor([torch.inf, LARGEST_BIAS], dtype=torch.float64)
    for _ in range(STEPS):
        # What is at its bound, and would go beyond, stays there; the other is solved for alone.
        held_F = ((at_F <= least_F) & (slope_F > 0)) | ((at_F >= most_F) & (slope_F < 0))
        free_F = (~held_F).nonzero()[:, 0]
        step_F = torch.zeros_like(at_F)
        step_F[free_F] = torch.linalg.solve(curve_FF[free_F][:, free_F], slope_F[free_F])
        size = 1.0
        while True:
            next_F = torch.clamp(at_F - size * step_F, least_F, most_F)
            found = _loss(blocks, next_F, prior_F)
            if found[0] <= loss or size < 1e-3:
                break
            size /= 2
        if found[0] >= loss - 1e-6:
            break
        at_F, (loss, slope_F, curve_FF) = next_F, found
    return float(at_F[0]), float(at_F[1])


def _loss(blocks: Sequence[_Block], at_F: Tensor, prior_F: Tensor) -> tuple[float, Tensor, Tensor]:
    """−log likelihood − log prior in nats, its gradient `[F]` and Hessian `[F, F]`."""
    away_F = at_F - prior_F
    loss = 0.5 * PRECISION * float(away_F @ away_F)
    slope_F, curve_FF = PRECISION * away_F, PRECISION * torch.eye(2, dtype=torch.float64)
    beta, bias = at_F.tolist()
    for block in blocks:
        score_NM, log_q_NM, item_N = block.score_NM, block.log_q_NM, block.item_N
        new_M, new_1M = block.new_M, block.new_M.float()[None]
        log_p_NM = torch.log_softmax(score_NM + beta * log_q_NM + bias * new_1M, dim=1)
        row_N = torch.arange(len(item_N))
        loss -= float(log_p_NM[row_N, item_N].double().sum())
        p_NM = log_p_NM.exp_()
        mean_NF = torch.stack([(p_NM * log_q_NM).sum(1), p_NM[:, new_M].sum(1)], 1).double()
        qq_N = (p_NM * log_q_NM.square()).sum(1).double()
        qn_N = (p_NM[:, new_M] * log_q_NM[:, new_M]).sum(1).double()
        second_FF = torch.stack([qq_N, qn_N, qn_N, mean_NF[:, 1]], 1).sum(0).view(2, 2)
        chosen_NF = torch.stack([log_q_NM[row_N, item_N], new_M[item_N].float()], 1).double()
        slope_F = slope_F + (mean_NF - chosen_NF).sum(0)
        curve_FF = curve_FF + second_FF - mean_NF.T @ mean_NF
    return loss, slope_F, curve_FF
