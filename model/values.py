"""Predicting the value (rating) an item would get: the head of Table 4.

v̂_j = m_j + c_j + z_j·U·x + u·x in standardised units, with x = h ⊕ (user's mean residual so far,
its weight). m_j is item j's damped mean in training; how far a user's values lie from those means
is the feedback that prediction needs most, and an average over a history is the one thing a
gated state computes badly, so it is given.

Shapes: E events, N positions, M items, H hidden, V latent.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LATENT = 16
DAMPING = 5.0  # pseudo-events with the overall mean, per item and per user


def item_means(
    item_E: NDArray[np.int64], value_E: NDArray[np.float32], num_items: int
) -> NDArray[np.float32]:
    """Damped mean of the standardised values of each item `[M]`; NaN values do not count."""
    known_E = ~np.isnan(value_E)
    sum_M = np.bincount(item_E[known_E], value_E[known_E], minlength=num_items)
    count_M = np.bincount(item_E[known_E], minlength=num_items)
    return (sum_M / (count_M + DAMPING)).astype(np.float32)


def running_residuals(
    item_E: Tensor, value_E: Tensor, first_event_E: Tensor, mean_M: Tensor
) -> Tensor:
    """Before each event: the user's damped mean residual, and how many values it rests on.

    Args:
        value_E: standardised, NaN where missing.
        first_event_E: where the event's history begins.

    Returns:
        float32 `[E, 2]`: Σ (v − m) / (n + damping), n / (n + damping).
    """
    known_E = ~value_E.isnan()
    residual_E = torch.where(known_E, value_E - mean_M[item_E], 0.0).double()
    both_E2 = torch.stack([residual_E, known_E.double()], dim=1)
    before_E2 = both_E2.cumsum(0) - both_E2
    sum_E, count_E = (before_E2 - before_E2[first_event_E]).unbind(1)
    damped_E2 = torch.stack([sum_E, count_E], dim=1) / (count_E + DAMPING)[:, None]
    return damped_E2.float()


class ValueHead(nn.Module):
    """Predicted value of given items in given states."""

    def __init__(self, num_items: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mean_M: Tensor
        self.register_buffer("mean_M", torch.zeros(num_items))
        self.item = nn.Embedding(num_items, LATENT)
        self.bias = nn.Embedding(num_items, 1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)
        self.dropout = nn.Dropout(dropout)
        self.user = nn.Linear(hidden + 2, LATENT + 1)
        with torch.no_grad():  # to begin with, what the averages alone say
            self.user.weight[LATENT].zero_()
            self.user.weight[LATENT, hidden] = 1.0
            self.user.bias[LATENT] = 0.0

    def forward(self, h_NH: Tensor, residual_N2: Tensor, item_N: Tensor) -> Tensor:
        """Predicted standardised value of item_n in state h_n: `[N]`."""
        x_NX = torch.cat([self.dropout(h_NH), residual_N2], dim=1)
        u_NV, u_N = self.user(x_NX).tensor_split([LATENT], dim=1)
        latent_N = (u_NV * self.item(item_N)).sum(dim=1)
        return self.mean_M[item_N] + self.bias(item_N)[:, 0] + latent_N + u_N[:, 0]
