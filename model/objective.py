"""The training loss of one batch: dense or sampled softmax, rewards, trend, values (§3).

Shapes: N packed positions, M items, S sampled negatives, P trend periods, U users.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.device import send
from model.distributed import Processes
from model.feedback import FeedbackSettings, event_rewards, event_weights
from model.fused_loss import Targets, fused_loss
from model.inputs import Positions
from model.items import mixed_queries
from model.lifts import Lifts
from model.losses import (
    one_against_all,
    rating_regression,
    shown_softmax,
    softmax_cross_entropy,
)
from model.network import Encoded, HRNNMeta
from model.repeats import SeenItems
from model.sampling import AliasSampler
from model.sequences import Histories
from model.shown import Shown
from model.transitions import Transitions
from model.trend_table import TrendTable

# λ from which on a position is without transition counts: what is scored mostly by its fields is to
# be learned without knowing what followed what, as nothing ever followed on a new item. That is a
# fifth of the positions; with a tenth of them, from 0.8 on, new items stood too high among others.
FOLLOWERS_UNTIL = 0.6
# λ of known items until validation chooses another, and share of the positions trained under it. Of
# λ ~ U[0, 1] alone, the network makes a compromise that fits no λ well (docs/results.md).
KNOWN_LAMBDA, KNOWN_SHARE = 0.5, 0.5
# Steps of this length around the circle never crowd: the λ of any stretch of positions are spread
# over [0, 1) almost evenly.
GOLDEN_RATIO = (5.0**0.5 - 1.0) / 2.0


def without_followers(fields_alone: float) -> float:
    """Share of the positions that do not read the transition counts, where items have fields."""
    mixed = (1.0 - fields_alone) * (1.0 - KNOWN_SHARE)
    return fields_alone + mixed * (1.0 - FOLLOWERS_UNTIL)


@dataclass(frozen=True)
class EventTargets:
    """What training knows of events beside the inputs: their worth, `[E]` float32, and folds."""

    weight: Tensor
    reward: Tensor | None  # None: every event has reward 1
    fold_U: Tensor  # int64, of each user: whose transition counts leave it out
    shown: Shown | None  # what was on the lists beside the events' items, where that has weight

    @classmethod
    def of(cls, log: Histories, feedback: FeedbackSettings, fold_U: Tensor) -> "EventTargets":
        """Raises InputError when a setting needs a column that the log does not have."""
        reward = None
        if feedback.has_rewards:
            reward = torch.from_numpy(
                event_rewards(feedback, log.num_events, log.event_type_E, log.value_E)
            )
        weight_E = event_weights(feedback, log.num_events, log.event_type_E, log.value_E)
        shown = log.shown if feedback.shown_weight else None
        return cls(torch.from_numpy(weight_E), reward, fold_U, shown)

    def passed_over(self, event_N: NDArray[np.int64], device: torch.device) -> "PassedOver | None":
        """What was shown beside these events' items; None where nothing was."""
        if self.shown is None:
            return None
        item_R, place_R = self.shown.of(event_N)
        if not len(item_R):
            return None
        return PassedOver(send(item_R, device), send(place_R, device))


@dataclass(frozen=True)
class PassedOver:
    """Items that were shown and not chosen at the positions of a batch: int64 `[R]` both."""

    item_R: Tensor
    place_R: Tensor  # of which of the N positions


@dataclass(frozen=True)
class Shares:
    """What one process's means count in the means over a batch of several processes."""

    ranking: Tensor | float = 1.0
    values: Tensor | float = 1.0
    lists: Tensor | float = 1.0


@dataclass(frozen=True)
class Draws:
    """What chance decides in a step."""

    lambda_start: Tensor  # uniform on [0, 1): where the λ of the step's positions begin
    negative_S: Tensor | None  # distinct items, ascending; None: dense softmax


@dataclass
class Objective:
    """−log p(a | h, t), p ∝ exp(φ̃ + β·log q(t)) (eq. 2, 3, 5), and the values' error (Table 4)."""

    network: HRNNMeta
    value_weight: float
    sampler: AliasSampler | None  # None: dense softmax
    negatives: int
    trend_table: TrendTable | None
    transitions: Transitions | None  # cross-fitted: F·M rows
    generator: torch.Generator
    shown_weight: float = 0.0  # of the softmax over what was shown, beside the one over all items
    fields_alone: float = 0.0  # share of the positions with λ = 1
    dtype: torch.dtype = torch.float32  # of the products and the softmax over scores

    def shares(
        self, positions: Positions, targets: EventTargets, event_N: Tensor, processes: Processes
    ) -> Shares:
        """This process's share of the batch; of one process alone, all of it."""
        if processes.size == 1:
            return Shares()
        weight_N = targets.weight[event_N]
        known_N = ~positions.value[event_N].isnan()
        chosen = (weight_N if targets.reward is None else weight_N * targets.reward[event_N]).sum()
        own = torch.stack([weight_N.sum(), (weight_N * known_N).sum(), chosen])
        share = own / processes.sum(own).clamp(min=torch.finfo(own.dtype).tiny)
        return Shares(share[0], share[1], share[2])

    @cached_property
    def log_count_M(self) -> Tensor:
        """log of how often each item is expected among the negatives of a step (`sampling`)."""
        assert self.sampler is not None  # noqa: S101 - the caller's branch
        every_item_M = torch.arange(self.network.num_items, device=self.generator.device)
        return self.sampler.log_expected_count(every_item_M, self.negatives)

    def draw(self) -> Draws:
        """The random numbers of the next step, the same in every process."""
        start = torch.rand((), generator=self.generator, device=self.generator.device)
        negative_S = None
        if self.sampler is not None:
            negative_S = self.sampler.negatives(self.negatives, self.generator)
        return Draws(start, negative_S)

    def lambdas(self, draws: Draws, positions: int) -> Tensor:
        """λ of each position of a step: `[N]`.

        `fields_alone` of them see the fields alone (λ = 1), as new items do. Of the others half
        have λ = ½, as known items do at inference, and half λ ~ U[0, 1], which keeps ids and
        fields able to stand alone (§2.3).
        """
        n_N = torch.arange(positions, dtype=torch.float64, device=draws.lambda_start.device)
        place_N = (draws.lambda_start + GOLDEN_RATIO * n_N) % 1.0 / (1.0 - self.fields_alone)
        uniform_N = ((place_N - KNOWN_SHARE) / (1.0 - KNOWN_SHARE)).clamp(max=1.0)
        return torch.where(place_N < KNOWN_SHARE, KNOWN_LAMBDA, uniform_N).float()

    def loss(
        self,
        positions: Positions,
        targets: EventTargets,
        event_N: Tensor,
        target_N: Tensor,
        encoded: Encoded,
        draws: Draws,
        share: Shares,
        passed_over: PassedOver | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss to descend, and its softmax part alone (the log of the training PPL).

        Args:
            target_N: the events' items.
            draws: of `draw`; the rows of the negatives and the targets are open.
            passed_over: of the events' targets.
            share: what this process's part counts in the batch; the second value is the mean over
                its own positions.
        """
        weight_N = targets.weight[event_N]
        reward_N = None if targets.reward is None else targets.reward[event_N]
        rows_NR = self._transition_rows(positions, targets, event_N)
        if self.network.items.output_tower is not None:
            lambda_N = self.lambdas(draws, len(event_N))
            encoded = replace(encoded, query_ND=mixed_queries(encoded.query_ND, lambda_N))
            if rows_NR is not None:
                rows_NR = torch.where(lambda_N[:, None] < FOLLOWERS_UNTIL, rows_NR, -1)
        period_N = None if positions.trend_row is None else positions.trend_row[event_N]
        seen = None if self.network.repeats is None else encoded.seen
        given = (target_N, rows_NR, seen, period_N, reward_N, weight_N)
        if draws.negative_S is None:
            ranking = self._dense(encoded, *given)
        else:
            ranking = self._sampled(encoded, draws.negative_S, *given)
        loss = ranking * share.ranking
        if passed_over is not None:
            worth_N = weight_N if reward_N is None else weight_N * reward_N
            shown = self._shown(encoded, target_N, rows_NR, seen, passed_over, worth_N)
            loss = loss + self.shown_weight * shown * share.lists
        if self.network.values is not None and self.value_weight:
            predicted_N = self.network.predict_values(positions, event_N, encoded, target_N)
            error = rating_regression(positions.value[event_N], predicted_N, weight_N)
            loss = loss + self.value_weight * error * share.values
        return loss, ranking.detach()

    def _shown(
        self,
        encoded: Encoded,
        target_N: Tensor,
        rows_NR: Tensor | None,
        seen: SeenItems | None,
        passed_over: PassedOver,
        weight_N: Tensor,
    ) -> Tensor:
        """The softmax over lists. The trend stays out: it is how often an item is shown (§3.2), and
        on a list all were."""
        network = self.network
        every_N = torch.arange(len(target_N), device=target_N.device)
        place_P = torch.cat([every_N, passed_over.place_R])  # the targets, then the others
        item_P = torch.cat([target_N, passed_over.item_R])
        item_U, at_P = item_P.unique(return_inverse=True)
        w_UD, b_U = network.items.sides(item_U)
        query_PD = encoded.query_ND.index_select(0, place_P)
        phi_P = torch.linalg.vecdot(query_PD, w_UD.index_select(0, at_P)) + b_U[at_P]
        if rows_NR is not None and network.prior is not None and self.transitions is not None:
            prior = network.prior
            lift_P = Lifts.pairs(
                self.transitions, rows_NR, prior.alpha_R, prior.inverse_p_M, place_P, item_P
            )
            phi_P = phi_P + prior.gamma * torch.log1p(prior.kappa * lift_P)
        if seen is not None and network.repeats is not None:
            phi_P = phi_P + network.repeats.pairs(seen, place_P, item_P, network.num_items)
        phi_N, phi_R = phi_P.split([len(target_N), len(passed_over.item_R)])
        return shown_softmax(phi_N, phi_R, passed_over.place_R, weight_N)

    def _transition_rows(
        self, positions: Positions, targets: EventTargets, event_N: Tensor
    ) -> Tensor | None:
        """Rows of the cross-fitted counts for each position's recent items `[N, R]`."""
        if self.network.prior is None or self.transitions is None:
            return None
        item_NR = positions.recent_items(event_N, self.network.prior.recent)
        fold_N1 = targets.fold_U[positions.user[event_N]][:, None]
        return torch.where(item_NR >= 0, fold_N1 * self.network.num_items + item_NR, -1)

    def _dense(
        self,
        encoded: Encoded,
        target_N: Tensor,
        rows_NR: Tensor | None,
        seen: SeenItems | None,
        period_N: Tensor | None,
        reward_N: Tensor | None,
        weight_N: Tensor,
    ) -> Tensor:
        w_MD, b_M = self.network.items.sides()
        prior = self.network.prior
        log_q = None if period_N is None else self._log_q(period_N)
        if not encoded.query_ND.is_cuda:
            lifts = None
            if prior is not None and self.transitions is not None and rows_NR is not None:
                lifts = Lifts.dense(self.transitions, rows_NR, prior.alpha_R, prior.inverse_p_M)
            given = Targets(
                target_N,
                weight_N,
                reward_N=reward_N,
                log_q=log_q,
                lifts=lifts,
                seen=seen,
                dtype=self.dtype,
            )
            return fused_loss(encoded.query_ND, w_MD, b_M, given, **self._coefficients())
        # A GPU has the memory and the kernels for the scores as a whole.
        phi_NM = torch.addmm(b_M, encoded.query_ND, w_MD.T)
        if prior is not None and self.transitions is not None and rows_NR is not None:
            phi_NM = phi_NM + prior(self.transitions, rows_NR)
        if seen is not None and self.network.repeats is not None:
            phi_NM = phi_NM + self.network.repeats(seen, self.network.num_items)
        trend_NM = None
        if log_q is not None:
            trend_NM = self.network.beta * log_q(slice(None))
        if reward_N is None:
            return softmax_cross_entropy(phi_NM, target_N, trend_NM, weight_N)
        return one_against_all(phi_NM, target_N, reward_N, trend_NM, weight_N)

    def _sampled(
        self,
        encoded: Encoded,
        negative_S: Tensor,
        target_N: Tensor,
        rows_NR: Tensor | None,
        seen: SeenItems | None,
        period_N: Tensor | None,
        reward_N: Tensor | None,
        weight_N: Tensor,
    ) -> Tensor:
        """What `model.losses` defines as sampled losses, on shared negatives."""
        network, query_ND, rows = self.network, encoded.query_ND, self.network.items.rows
        assert rows is not None  # noqa: S101 - caller's branch
        place_N, place_S = rows.place(target_N), rows.place(negative_S)
        w_RD, b_R = network.items.sides(rows.common_R)
        hit_N = b_R.index_select(0, place_N)  # and the product of query and vector
        lifts = log_q = None
        if rows_NR is not None and network.prior is not None and self.transitions is not None:
            prior = network.prior
            lifts, lift_N = Lifts.sampled(
                self.transitions, rows_NR, prior.alpha_R, prior.inverse_p_M, negative_S, target_N
            )
            hit_N = hit_N + prior.gamma * torch.log1p(prior.kappa * lift_N)
        if seen is not None and network.repeats is not None:
            hit_N = hit_N + network.repeats.at(seen, target_N)
            seen = seen.among(negative_S)
        if period_N is not None and self.trend_table is not None:
            hit_N = hit_N + network.beta * self.trend_table.at(period_N, target_N)
            log_q = self._log_q(period_N, negative_S)
        hit_N = hit_N - self.log_count_M.index_select(0, target_N)
        log_count_S = self.log_count_M.index_select(0, negative_S)
        column_R = torch.full_like(rows.common_R, -1)
        column_R.index_copy_(0, place_S, torch.arange(len(place_S), device=place_S.device))
        any_item_S = None
        if reward_N is not None:
            any_item_S = torch.exp(-log_count_S) / network.num_items
        given = Targets(
            column_R.index_select(0, place_N),
            weight_N,
            place_N,
            place_S,
            reward_N,
            any_item_S,
            log_q,
            lifts,
            seen,
            self.dtype,
        )
        b_S = b_R.index_select(0, place_S) - log_count_S
        return fused_loss(query_ND, w_RD, b_S, given, hit_N=hit_N, **self._coefficients())

    def _coefficients(self) -> dict[str, Tensor]:
        """β, γ, κ and ρ, as far as the network has them."""
        found = {}
        if self.trend_table is not None:
            found["beta"] = self.network.beta
        if self.network.prior is not None:
            found |= {"gamma": self.network.prior.gamma, "kappa": self.network.prior.kappa}
        if self.network.repeats is not None:
            found["rho"] = self.network.repeats.rho
        return found

    def _log_q(
        self, period_N: Tensor, item_S: Tensor | None = None
    ) -> Callable[[slice], Tensor] | None:
        """log q(t) of parts of the positions, for all items or some; None without a trend."""
        table = self.trend_table
        if table is None:
            return None
        if item_S is not None:
            row_U, place_N = period_N.unique(return_inverse=True)
            log_q_US = table.columns(row_U, item_S)
            return lambda part: log_q_US.index_select(0, place_N[part])
        return lambda part: table.every_item(period_N[part])
