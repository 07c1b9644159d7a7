"""Predicting the value (rating) an item would get: the head of Table 4.

v̂_j = m_j + [y_j, 1]·w + c_j + z_j·U·x + u·x in standardised units, where m_j is item j's damped
mean in training and w what the user's values so far say: the ridge regression of the residuals
v − m on [y, 1]. The y_j are the leading singular vectors of the training residuals. An average
over a history is the one thing a gated state computes badly, so it is given; the network learns
what is left, from x = h ⊕ w ⊕ (how many values w rests on). What it learns of the training users is
partly theirs alone, so of each part as much is kept as the validation users bear out.

Shapes: E events, N positions, M items, H hidden, U users, Y tastes, X = Y + 1, V latent, P learned
parts (by item c, by user u·x, by both z·U·x).
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.rows import StepRows, lookup

LATENT = 16
TASTES = 8
PARTS = 3  # learned: by item, by user, by both
MEAN_DAMPING = 5.0  # pseudo-events with the overall mean, per item and per user
TASTE_DAMPING = 20.0  # pseudo-events without any taste, per item
RIDGE = 3.0
SHARE_DAMPING = 10.0  # squared deviations that validation has to win to change a share by 1
CHUNK = 2**15  # events whose normal equations are held at once


def item_means(
    item_E: NDArray[np.int64], value_E: NDArray[np.float32], num_items: int
) -> NDArray[np.float32]:
    """Damped mean of the standardised values of each item `[M]`; NaN values do not count."""
    known_E = ~np.isnan(value_E)
    sum_M = np.bincount(item_E[known_E], value_E[known_E], minlength=num_items)
    count_M = np.bincount(item_E[known_E], minlength=num_items)
    return (sum_M / (count_M + MEAN_DAMPING)).astype(np.float32)


def item_tastes(
    item_E: Tensor, user_E: Tensor, value_E: Tensor, mean_M: Tensor, num_users: int
) -> Tensor:
    """y `[M, Y]`: how an item's values vary with its users, beyond their own means.

    Leading left singular vectors of the M × U residuals, as an average per event of the item and
    scaled so that the users' coordinates have variance 1. Columns are 0 where there are fewer.
    """
    num_items, known_E = len(mean_M), ~value_E.isnan()
    item_F, user_F = item_E[known_E], user_E[known_E]
    residual_F = value_E[known_E] - mean_M[item_F]
    count_U = torch.bincount(user_F, minlength=num_users)
    mean_U = torch.zeros(num_users).index_add(0, user_F, residual_F) / (count_U + MEAN_DAMPING)
    residual_F = residual_F - mean_U[user_F]
    residual_MU = torch.sparse_coo_tensor(
        torch.stack([item_F, user_F]),
        residual_F,
        (num_items, num_users),
        check_invariants=True,
    ).coalesce()
    rank = min(TASTES, num_items, num_users)
    more = min(rank + 8, num_items, num_users)  # oversampling makes the leading ones exact
    left_MY, size_Y, _ = torch.svd_lowrank(residual_MU, q=more, niter=4)
    count_M = torch.bincount(item_F, minlength=num_items)
    y_MY = (left_MY * size_Y)[:, :rank] * num_users**0.5 / (count_M + TASTE_DAMPING)[:, None]
    return F.pad(y_MY, (0, TASTES - rank))


def running_tastes(
    item_E: Tensor,
    value_E: Tensor,
    offset_U1: NDArray[np.int64],
    mean_M: Tensor,
    taste_MY: Tensor,
) -> Tensor:
    """What the values before each event say about the user: float32 `[E, X + 1]`.

    w of the ridge regression of v − m on [y, 1], then n / (n + damping), with n values so far.

    Args:
        value_E: standardised, NaN where missing.
        offset_U1: where each user's events begin; a user sees nobody else's.
    """
    size = taste_MY.shape[1] + 1
    out_EW = torch.zeros(len(item_E), size + 1)
    if not len(item_E) or bool(value_E.isnan().all()):
        return out_EW
    damping_X = torch.full((size,), RIDGE, dtype=torch.float64)
    damping_X[-1] = MEAN_DAMPING
    first_user, num_users = 0, len(offset_U1) - 1
    while first_user < num_users:  # as many whole users as fit a chunk, one at least
        end_user = int(np.searchsorted(offset_U1, offset_U1[first_user] + CHUNK, side="right")) - 1
        end_user = min(max(end_user, first_user + 1), num_users)
        start, end = int(offset_U1[first_user]), int(offset_U1[end_user])
        length_U = torch.from_numpy(np.diff(offset_U1[first_user : end_user + 1]))
        begin_U = torch.from_numpy(offset_U1[first_user:end_user]) - start
        first_T = torch.repeat_interleave(begin_U, length_U)
        item_T, value_T = item_E[start:end], value_E[start:end]
        known_T = ~value_T.isnan()
        x_TX = F.pad(taste_MY[item_T], (0, 1), value=1.0).double() * known_T[:, None]
        residual_T = (value_T - mean_M[item_T]).nan_to_num().double()
        terms_TXX = torch.cat(
            [x_TX[:, :, None] * x_TX[:, None, :], (x_TX * residual_T[:, None])[:, :, None]], dim=2
        )
        total_TXX = terms_TXX.cumsum(0) - terms_TXX
        total_TXX = total_TXX - total_TXX[first_T]
        gram_TXX = total_TXX[:, :, :-1] + torch.diag(damping_X)
        w_TX = torch.linalg.solve(gram_TXX, total_TXX[:, :, -1])
        # The last column of x is 1 where there is a value: its Gram entry counts them.
        count_T = total_TXX[:, -1, -2]
        out_EW[start:end, :-1] = w_TX.float()
        out_EW[start:end, -1] = (count_T / (count_T + MEAN_DAMPING)).float()
        first_user = end_user
    return out_EW


class ValueHead(nn.Module):
    """Predicted value of given items in given states."""

    def __init__(self, num_items: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mean_M: Tensor
        self.taste_MY: Tensor
        self.register_buffer("mean_M", torch.zeros(num_items))
        self.register_buffer("taste_MY", torch.zeros(num_items, TASTES))
        self.rows: StepRows | None = None  # what a step on sampled items reads
        self.item = nn.Embedding(num_items, LATENT)
        self.bias = nn.Embedding(num_items, 1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)
        self.dropout = nn.Dropout(dropout)
        self.user = nn.Linear(hidden + TASTES + 2, LATENT + 1)
        nn.init.zeros_(self.user.weight)  # to begin with, what the averages alone say
        nn.init.zeros_(self.user.bias)

    def forward(self, h_NH: Tensor, taste_NW: Tensor, item_N: Tensor) -> Tensor:
        """Standardised value of item_n in state h_n, by what says it: `[N, 1 + P]`.

        First what the averages say, then the learned parts.

        Args:
            taste_NW: of `running_tastes`.
        """
        own_N = (taste_NW[:, :TASTES] * self.taste_MY[item_N]).sum(dim=1) + taste_NW[:, TASTES]
        x_NX = torch.cat([self.dropout(h_NH), taste_NW], dim=1)
        u_NV, u_N = self.user(x_NX).tensor_split([LATENT], dim=1)
        read = lookup if self.rows is None else self.rows.lookup
        latent_N = (u_NV * read(self.item.weight, item_N)).sum(dim=1)
        bias_N = read(self.bias.weight, item_N)[:, 0]
        return torch.stack([self.mean_M[item_N] + own_N, bias_N, u_N[:, 0], latent_N], dim=1)

    @torch.no_grad()
    def keep(self, share_P: NDArray[np.float64]) -> None:
        """Keep a share of each learned part."""
        by_item, by_user, by_both = share_P.tolist()
        self.bias.weight.mul_(by_item)
        scale_V1 = torch.full((LATENT + 1,), by_both)
        scale_V1[LATENT] = by_user
        scale_V1 = scale_V1.to(self.user.bias)
        self.user.weight.mul_(scale_V1[:, None])
        self.user.bias.mul_(scale_V1)


def shares_kept(value_N: NDArray[np.float64], part_NP1: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share in [0, 1] of each learned part that predicts values best: `[P]`.

    argmin_γ Σ_n (v_n − part_n0 − Σ_p γ_p·part_np)² + damping·|γ − 1|²: where little is known
    of it, all is kept.

    Args:
        value_N: standardised, of events that training did not descend on.
        part_NP1: of `ValueHead`, there.
    """
    learned_NP = part_NP1[:, 1:]
    num_parts = learned_NP.shape[1]
    gram_PP = learned_NP.T @ learned_NP + SHARE_DAMPING * np.eye(num_parts)
    right_P = learned_NP.T @ (value_N - part_NP1[:, 0]) + SHARE_DAMPING
    best, share_P = np.inf, np.ones(num_parts)
    # Convex, of few parts: each is at a bound or free.
    for held in itertools.product((0.0, 1.0, None), repeat=num_parts):
        free = [p for p, at in enumerate(held) if at is None]
        at_P = np.array([0.0 if at is None else at for at in held])
        at_P[free] = np.linalg.solve(gram_PP[np.ix_(free, free)], (right_P - gram_PP @ at_P)[free])
        loss = at_P @ gram_PP @ at_P / 2 - right_P @ at_P
        if loss < best and at_P.min() >= 0.0 and at_P.max() <= 1.0:
            best, share_P = loss, at_P
    return share_P
