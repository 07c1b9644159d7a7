"""The training loss of one batch: dense or sampled softmax, rewards, trend, values (§3).

Shapes: N packed positions, M items, S sampled negatives, P trend periods, U users.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.dense_loss import DenseTargets, dense_loss
from model.feedback import FeedbackSettings, event_rewards, event_weights
from model.inputs import Positions
from model.losses import (
    one_against_all,
    rating_regression,
    sampled_one_against_all,
    sampled_softmax,
    softmax_cross_entropy,
)
from model.network import Encoded, HRNNMeta
from model.sampling import AliasSampler
from model.sequences import Histories
from model.transitions import Transitions
from model.trends import TrendTable


@dataclass(frozen=True)
class EventTargets:
    """What every event of the training log is worth: `[E]` float32."""

    weight: Tensor
    reward: Tensor | None  # None: every event has reward 1

    @classmethod
    def of(cls, log: Histories, feedback: FeedbackSettings) -> "EventTargets":
        """Raises InputError when a setting needs a column that the log does not have."""
        reward = None
        if feedback.has_rewards:
            reward = torch.from_numpy(
                event_rewards(feedback, log.num_events, log.event_type_E, log.value_E)
            )
        weight_E = event_weights(feedback, log.num_events, log.event_type_E, log.value_E)
        return cls(torch.from_numpy(weight_E), reward)


@dataclass
class Objective:
    """−log p(a | h, t), p ∝ exp(φ̃ + β·log q(t)) (eq. 2, 3, 5), and the values' error (Table 4)."""

    network: HRNNMeta
    value_weight: float
    sampler: AliasSampler | None  # None: dense softmax
    negatives: int
    trend_table: TrendTable | None
    transitions: Transitions | None  # cross-fitted: F·M rows
    fold_U: NDArray[np.int64]  # the fold of each training user
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.fold = torch.from_numpy(self.fold_U)
        self.log_q_PM: Tensor | None = None
        if self.trend_table is not None:
            self.log_q_PM = torch.from_numpy(self.trend_table.log_q_PM)

    def loss(
        self, positions: Positions, targets: EventTargets, event_N: Tensor, encoded: Encoded
    ) -> tuple[Tensor, Tensor]:
        """The loss to descend, and its softmax part alone (the log of the training PPL)."""
        target_N, weight_N = positions.target[event_N], targets.weight[event_N]
        reward_N = None if targets.reward is None else targets.reward[event_N]
        # λ ~ U[0, 1] keeps ids and fields able to stand alone (§2.3).
        lambda_mix = torch.rand((), generator=self.generator)
        rows_NR = self._transition_rows(positions, event_N)
        period_N = None if positions.trend_row is None else positions.trend_row[event_N]
        if self.sampler is None:
            ranking = self._dense(
                encoded, lambda_mix, target_N, rows_NR, period_N, reward_N, weight_N
            )
        else:
            ranking = self._sampled(
                encoded, lambda_mix, target_N, rows_NR, period_N, reward_N, weight_N
            )
        if self.network.values is None or not self.value_weight:
            return ranking, ranking.detach()
        predicted_N = self.network.predict_values(positions, event_N, encoded, target_N)
        error = rating_regression(positions.value[event_N], predicted_N, weight_N)
        return ranking + self.value_weight * error, ranking.detach()

    def _transition_rows(self, positions: Positions, event_N: Tensor) -> Tensor | None:
        """Rows of the cross-fitted counts for each position's recent items `[N, R]`."""
        if self.network.prior is None or self.transitions is None:
            return None
        item_NR = positions.recent_items(event_N, self.network.prior.recent)
        fold_N1 = self.fold[positions.user[event_N]][:, None]
        return torch.where(item_NR >= 0, fold_N1 * self.network.num_items + item_NR, -1)

    def _dense(
        self,
        encoded: Encoded,
        lambda_mix: Tensor,
        target_N: Tensor,
        rows_NR: Tensor | None,
        period_N: Tensor | None,
        reward_N: Tensor | None,
        weight_N: Tensor,
    ) -> Tensor:
        w_MD, b_M = self.network.items.outputs(lambda_mix)
        prior = self.network.prior
        if rows_NR is None or self.transitions is None:
            prior = None
        if not encoded.query_ND.is_cuda:
            given = DenseTargets(target_N, weight_N, reward_N)
            coefficients = {}
            if prior is not None:
                given = replace(
                    given,
                    transitions=self.transitions,
                    row_NR=rows_NR,
                    alpha_R=prior.alpha_R,
                    inverse_p_M=prior.inverse_p_M,
                )
                coefficients = {"gamma": prior.gamma, "kappa": prior.kappa}
            if period_N is not None and self.log_q_PM is not None:
                given = replace(given, log_q_PM=self.log_q_PM, period_N=period_N)
                coefficients["beta"] = self.network.beta
            return dense_loss(encoded.query_ND, w_MD, b_M, given, **coefficients)
        # A GPU has the memory and the kernels for the scores as a whole.
        phi_NM = torch.addmm(b_M, encoded.query_ND, w_MD.T)
        if prior is not None and self.transitions is not None and rows_NR is not None:
            phi_NM = phi_NM + prior(self.transitions, rows_NR)
        trend_NM = None
        if period_N is not None and self.log_q_PM is not None:
            trend_NM = self.network.beta * self.log_q_PM[period_N]
        if reward_N is None:
            return softmax_cross_entropy(phi_NM, target_N, trend_NM, weight_N)
        return one_against_all(phi_NM, target_N, reward_N, trend_NM, weight_N)

    def _sampled(
        self,
        encoded: Encoded,
        lambda_mix: Tensor,
        target_N: Tensor,
        rows_NR: Tensor | None,
        period_N: Tensor | None,
        reward_N: Tensor | None,
        weight_N: Tensor,
    ) -> Tensor:
        assert self.sampler is not None  # noqa: S101 - the caller's branch
        negative_S = self.sampler.negatives(self.negatives, self.generator)
        item_R, place_N = target_N.unique(return_inverse=True)
        w_RD, b_R = self.network.items.outputs(lambda_mix, item_R)
        w_SD, b_S = self.network.items.outputs(lambda_mix, negative_S)
        phi_N = (encoded.query_ND * w_RD[place_N]).sum(dim=1) + b_R[place_N]
        phi_NS = torch.addmm(b_S, encoded.query_ND, w_SD.T)
        prior = self.network.prior
        if rows_NR is not None and prior is not None and self.transitions is not None:
            phi_N = phi_N + prior.at(self.transitions, rows_NR, target_N)
            phi_NS = phi_NS + prior(self.transitions, rows_NR, negative_S)
        trend_N = trend_NS = None
        if period_N is not None and self.log_q_PM is not None:
            trend_N = self.network.beta * self.log_q_PM[period_N, target_N]
            trend_NS = self.network.beta * self.log_q_PM[period_N[:, None], negative_S]
        correction_N = self.sampler.log_expected_count(target_N, self.negatives)
        correction_S = self.sampler.log_expected_count(negative_S, self.negatives)
        sampled = (phi_N, phi_NS, correction_N, correction_S, target_N, negative_S)
        if reward_N is None:
            return sampled_softmax(*sampled, trend_N, trend_NS, weight_N)
        return sampled_one_against_all(
            *sampled, reward_N, self.network.num_items, trend_N, trend_NS, weight_N
        )
