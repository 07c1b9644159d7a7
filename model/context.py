"""Contextual inputs (§2.2): control (time delta, session start), feedback, request context.

The time delta is that of the *request*: at position k it is t_{k+1} − t_k, known when the
recommendation is asked for, so one history gives other answers at other times (Table 2).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.fields import FieldBags, FieldEmbedding, FieldEncoding

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
        self.output_size = size + 1

    def forward(self, bucket_N: Tensor, session_start_N: Tensor) -> Tensor:
        return torch.cat(
            [self.delta_embedding(bucket_N), session_start_N.to(torch.float32)[:, None]], dim=1
        )


class FeedbackInput(nn.Module):
    """What the user made of the previous item: its event type, its value, whether it has one."""

    TYPE_SIZE = 4

    def __init__(self, num_types: int, with_value: bool) -> None:
        super().__init__()
        self.type_embedding = nn.Embedding(num_types, self.TYPE_SIZE) if num_types else None
        self.with_value = with_value
        self.output_size = self.TYPE_SIZE * (num_types > 0) + 2 * with_value

    def forward(self, type_N: Tensor, value_N: Tensor) -> Tensor:
        """Type tokens and standardised values (NaN: none) → `[N, output_size]`."""
        parts = [] if self.type_embedding is None else [self.type_embedding(type_N)]
        if self.with_value:
            known_N = ~value_N.isnan()
            parts.append(torch.stack([value_N.nan_to_num(), known_N.to(value_N.dtype)], dim=1))
        return torch.cat(parts, dim=1)


class ContextGate(nn.Module):
    """Request context (device, language, …): h ⊙ (1 + scale(c)) + shift(c).

    It is read where the recommendation is asked for and not fed to the encoder, so the state a
    user leaves behind does not depend on the devices of requests gone by: histories need not
    store them, and training and serving read the same thing.
    """

    def __init__(self, encodings: Sequence[FieldEncoding], size: int, hidden: int) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(encodings, size)
        self.modulation = nn.Linear(self.embedding.output_size, 2 * hidden)

    def forward(self, h_NH: Tensor, bags: FieldBags) -> Tensor:
        scale_NH, shift_NH = self.modulation(self.embedding(bags)).chunk(2, dim=1)
        return h_NH * (1.0 + scale_NH) + shift_NH
