"""A trained HRNN-meta: the network with what it needs to read histories.

Shapes: E events, N packed positions, S segments, M items.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.device import move, precision, send
from model.inputs import InputEncodings, Positions
from model.network import Encoded, HRNNMeta
from model.sequences import Batch, Histories, bptt_batches
from model.transitions import Transitions
from model.trend_table import TrendTable
from model.trends import ResolvedTrend
from model.values import PARTS


@dataclass
class TrainedHRNN:
    """Implements `NextItemModel` and `ValueModel`."""

    network: HRNNMeta
    encodings: InputEncodings
    trend: ResolvedTrend | None
    transitions: Transitions | None = None
    curve: list[dict[str, float]] = field(default_factory=list)  # an entry per epoch; 0: before it
    trend_log: Histories | None = None  # what log q(t) is counted from, for evaluation

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Scores φ̃ + β·log q(t) of every event given the ones before it.

        q(t) is counted from the events of `trend_log` before each event's period.
        """
        return self.iter_scores_at(histories, block, np.arange(histories.num_events))

    def iter_scores_at(
        self, histories: Histories, block: int, event_N: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """The same for some events only: all are encoded, these are scored."""
        asked_E = np.zeros(histories.num_events, dtype=bool)
        asked_E[event_N] = True
        device = self.network.device
        model = replace(self, transitions=move(self.transitions, device))
        table = self.trend_table(histories)
        positions = move(self.network.positions(histories, table), device)
        table = move(table, device)
        self.network.eval()
        with torch.inference_mode():
            items = self.network.items.outputs()
            for batch, encoded in encode_batches(self.network, positions, histories):
                row_N = np.flatnonzero(asked_E[batch.event_N])
                for start in range(0, len(row_N), block):
                    row_B = row_N[start : start + block]
                    event_B = batch.event_N[row_B]
                    query_BD = encoded.query_ND[send(row_B, device)]
                    score_BM = model._scores(
                        query_BD, *items, positions, send(event_B, device), table
                    )
                    yield event_B, score_BM.cpu()

    def _scores(
        self,
        query_BD: Tensor,
        w_MD: Tensor,
        b_M: Tensor,
        positions: Positions,
        event_B: Tensor,
        table: TrendTable | None,
    ) -> Tensor:
        # The context is left before anything is yielded: it is the whole thread's.
        with precision(event_B.device, torch.float32):
            prior_BM = self.prior(positions, event_B)
            score_BM = self.network.affinities(query_BD, w_MD, b_M, prior_BM)
            if table is not None and positions.trend_row is not None:
                trend_BM = table.every_item(positions.trend_row[event_B])
                score_BM += self.trend_weight(trend_BM)[:, None] * trend_BM
        return score_BM

    def trend_weight(self, log_q_NM: Tensor) -> Tensor:
        """β under each of these trends: `[N]`."""
        new_M = self.network.items.new_M
        return self.network.beta_at(log_q_NM[:, new_M].exp().sum(dim=1))

    def trend_table(self, histories: Histories) -> TrendTable | None:
        """log q(t) at the events of some histories; None: this model has no trend."""
        if self.trend is None or self.trend_log is None:
            return None
        return TrendTable.build(
            self.trend_log.item_E,
            self.trend_log.timestamp_E,
            self.network.num_items,
            self.trend,
            np.unique(histories.timestamp_E // self.trend.period_seconds),
            own_periods=False,
        )

    def prior(self, positions: Positions, event_N: Tensor) -> Tensor | None:
        """What transition counts and repeats add to the affinities of these positions: `[N, M]`."""
        network, bonus_NM = self.network, None
        if network.prior is not None and self.transitions is not None:
            recent_NR = positions.recent_items(event_N, network.prior.recent)
            bonus_NM = network.prior(self.transitions, recent_NR)
        if network.repeats is not None:
            repeat_NM = network.repeats(positions.seen_items(event_N), network.num_items)
            bonus_NM = repeat_NM if bonus_NM is None else bonus_NM + repeat_NM
        return bonus_NM

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        """Predicted value of every event's item, from the events before it: float64 `[E]`.

        Raises:
            ValueError: the training log had no differing values.
        """
        return self.encodings.unstandardise(self.value_parts(histories).sum(axis=1))

    def value_parts(self, histories: Histories) -> NDArray[np.float64]:
        """The same standardised and by what says it, `[E, 1 + P]`; see `model.values`.

        Raises:
            ValueError: the training log had no differing values.
        """
        device = self.network.device
        positions = move(self.network.positions(histories, None), device)
        part_EP1 = np.empty((histories.num_events, 1 + PARTS))
        self.network.eval()
        with torch.inference_mode():
            for batch, encoded in encode_batches(self.network, positions, histories):
                event_N = send(batch.event_N, device)
                item_N = positions.target[event_N]
                with precision(device, torch.float32):
                    part_NP1 = self.network.value_parts(positions, event_N, encoded, item_N)
                part_EP1[batch.event_N] = part_NP1.double().cpu().numpy()
        return part_EP1


def encode_batches(
    network: HRNNMeta,
    positions: Positions,
    histories: Histories,
    *,
    bptt: int = 128,
    batch_events: int = 4096,
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batch after batch, carrying each user's state across segments (detached)."""
    state_SK: Tensor | None = None
    for batch in bptt_batches(histories, bptt=bptt, batch_events=batch_events, rng=None):
        encoded = encode_batch(network, positions, batch, state_SK)
        yield batch, encoded
        state_SK = encoded.state_SK.detach()


def encode_batch(
    network: HRNNMeta,
    positions: Positions,
    batch: Batch,
    state_SK: Tensor | None,
    previous_N: Tensor | None = None,
) -> Encoded:
    """Encode one batch from the states that the batch before left (None: there was none).

    Args:
        previous_N: the positions' previous items, where they have been read.
    """
    device = network.device
    previous_S = send(batch.previous_S, device)
    with precision(device, torch.float32):  # in training: whatever it is within
        start_SK = network.initial_state(len(previous_S))
        if state_SK is not None and len(state_SK):
            carried_S1 = (previous_S >= 0)[:, None]
            start_SK = torch.where(carried_S1, state_SK[previous_S.clamp(min=0)], start_SK)
        return network.encode(
            positions,
            send(batch.event_N, device),
            torch.from_numpy(batch.batch_size_T),
            start_SK,
            previous_N,
        )
