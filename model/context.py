"""Control input: how long ago the last event was, and whether a new session starts (§2.2).

The time delta is that of the *request*: at position k it is t_{k+1} − t_k, known when the
recommendation is asked for, so one history gives other answers at other times (Table 2).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NUM_BUCKETS = 64
NO_PREVIOUS = 0  # bucket of a history's first position


def time_bucket(
    delta_N: NDArray[np.float64], has_previous_N: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Bucket ⌊2·log2(1 + Δt)⌋ + 1, Δt in seconds; 0 where there is no previous event.

    Half-octave buckets: seconds are told apart near zero, weeks from months far out.
    """
    bucket_N = np.floor(2.0 * np.log2(1.0 + np.maximum(delta_N, 0.0))).astype(np.int64) + 1
    return np.where(has_previous_N, np.minimum(bucket_N, NUM_BUCKETS - 1), NO_PREVIOUS)


def infer_session_gap(gap_N: NDArray[np.int64]) -> int:
    """Seconds of inactivity that end a session: Otsu's threshold on log gaps.

    Gaps inside a session and gaps between sessions form two modes; Otsu's method (1979) picks
    the cut that maximises the variance between them. Held within [1 minute, 1 week]; 30 minutes
    when there are no gaps to look at.
    """
    log_gap = np.log(gap_N[gap_N > 0].astype(np.float64))
    if len(log_gap) == 0:
        return 1800
    if np.ptp(log_gap) == 0.0:  # one mode only: no gap ends a session
        return int(np.exp(log_gap[0]).round())
    count_B, edge_B1 = np.histogram(log_gap, bins=256)
    centre_B = (edge_B1[1:] + edge_B1[:-1]) / 2
    below_B = np.cumsum(count_B)
    above_B = below_B[-1] - below_B
    sum_B = np.cumsum(count_B * centre_B)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_below_B = sum_B / below_B
        mean_above_B = (sum_B[-1] - sum_B) / above_B
        between_B = below_B * above_B * (mean_below_B - mean_above_B) ** 2
    cut = edge_B1[1 + int(np.nanargmax(between_B))]
    return int(np.clip(np.exp(cut), 60, 7 * 86_400))


class ControlInput(nn.Module):
    """Embedding of the time bucket ⊕ session-start bit → `[N, size + 1]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.delta_embedding = nn.Embedding(NUM_BUCKETS, size)

    def forward(self, bucket_N: Tensor, session_start_N: Tensor) -> Tensor:
        return torch.cat(
            [self.delta_embedding(bucket_N), session_start_N.to(torch.float32)[:, None]], dim=1
        )
