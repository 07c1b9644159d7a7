"""Where the priors begin: as likely as popularity, counts and repeats can be without the network.

What transition counts weigh beside popularity (κ) and how much sooner or later an item comes again
(ρ) differs between logs by factors of thousands. Steps of the learning rate's size would take
thousands to get there, and a sparse log has no thousands. With γ = 1 the likelihood of both is
known in closed form, since all the sums over items are:

    p(a) = (p_a + κ·f_a)·exp(ρ_b(a)) / Z
    Z = 1 + κ·Σ_j f_j + Σ_{j seen} (exp(ρ_b(j)) − 1)·(p_j + κ·f_j)

with popularity p, followers f_j = Σ_r α_r·P(j | recent_r) counted from other users, and b(j) the
distance of an item seen before.

Shapes: N positions, R recent items, B lag buckets, Z pairs of a position and an item seen before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.lifts import Lifts
from model.repeats import BUCKETS, RepeatPrior, SeenItems, next_same
from model.sequences import Histories
from model.transitions import TransitionPrior, Transitions
from model.trend_table import TrendTable

ROWS = 512  # positions whose pairs are looked up at once
STEPS = 200  # of L-BFGS, at most
POPULARITY_CELLS = 2**24  # log q that are held while popularity and trend are weighed: 64 MB
POPULARITY_EVENTS = 2000  # at most, for that
# Of the prior of both exponents: a change of 1 has to win half as many nats.
PRECISION = 10.0
LEAST_BETA = 0.02  # the slope of β = exp(log_beta) is β: from 0 it would never move


@dataclass(frozen=True)
class Facts:
    """What the likelihood needs to know of some positions, float64."""

    p_N: Tensor  # popularity of the item chosen
    followed_N: Tensor  # f of the item chosen
    mass_N: Tensor  # Σ_j f_j
    again_NB: Tensor  # 1 where the item chosen was seen at this distance
    seen_p_NB: Tensor  # Σ p_j of the items seen at this distance
    seen_followed_NB: Tensor  # Σ f_j of the same

    @classmethod
    def of(
        cls,
        histories: Histories,
        event_N: NDArray[np.int64],
        p_M: Tensor,
        prior: TransitionPrior | None,
        transitions: Transitions | None,
        fold_U: NDArray[np.int64],
    ) -> Self:
        """Read some events of a log.

        Args:
            transitions: cross-fitted, rows f·M … (f + 1)·M − 1 for the users of fold f.
        """
        first_E = np.repeat(histories.offset_U1[:-1], np.diff(histories.offset_U1))
        item_E = torch.from_numpy(histories.item_E)
        first_event_E = torch.from_numpy(first_E)
        next_same_E = torch.from_numpy(next_same(histories))
        columns = []
        for start in range(0, len(event_N), ROWS):
            part_N = event_N[start : start + ROWS]
            target_N = item_E[part_N]
            seen = SeenItems.of(torch.from_numpy(part_N), first_event_E, next_same_E, item_E)
            owner_Z = torch.repeat_interleave(seen.offset_N1.diff())
            p_Z = p_M[seen.item_Z].double()
            followed_N, mass_N = torch.zeros(2, len(part_N), dtype=torch.float64)
            followed_Z = torch.zeros_like(p_Z)
            if prior is not None and transitions is not None:
                at_NR = part_N[:, None] - np.arange(1, prior.recent + 1)
                base_N1 = fold_U[histories.user_of(part_N)][:, None] * len(p_M)
                row_NR = torch.from_numpy(
                    np.where(
                        at_NR >= first_E[part_N][:, None],
                        base_N1 + histories.item_E[np.maximum(at_NR, 0)],
                        -1,
                    )
                )
                followed_N = transitions.at(row_NR, prior.alpha_R, target_N).double()
                mass_N = transitions.mass(row_NR, prior.alpha_R).double()
                followed_Z = Lifts.pairs(
                    transitions,
                    row_NR,
                    prior.alpha_R,
                    torch.ones_like(p_M),
                    owner_Z,
                    seen.item_Z,
                ).double()
            cell_Z = owner_Z * BUCKETS + seen.bucket_Z
            chosen_Z = (target_N[owner_Z] == seen.item_Z).double()
            by_bucket = (
                torch.zeros(len(part_N) * BUCKETS, dtype=torch.float64)
                .index_add_(0, cell_Z, value_Z)
                .view(-1, BUCKETS)
                for value_Z in (chosen_Z, p_Z, followed_Z)
            )
            columns.append((p_M[target_N].double(), followed_N, mass_N, *by_bucket))
        return cls(*map(torch.cat, zip(*columns, strict=True)))

    def loss(self, kappa: Tensor, rho_B: Tensor) -> Tensor:
        """−log likelihood in nats."""
        grown_NB = self.seen_p_NB + kappa * self.seen_followed_NB
        z_N = 1.0 + kappa * self.mass_N + grown_NB @ torch.expm1(rho_B)
        log_z_N = z_N.clamp(min=torch.finfo(z_N.dtype).tiny).log()
        chosen_N = (self.p_N + kappa * self.followed_N).log() + self.again_NB @ rho_B
        return (log_z_N - chosen_N).sum()


def start_priors(
    facts: Facts,
    prior: TransitionPrior | None,
    repeats: RepeatPrior | None,
    without_counts: float = 0.0,
) -> None:
    """Set γ = 1, and κ and ρ to what is most likely; what the network lacks stays 0.

    Both are held by one observation for and one against, so that neither leaves for infinity.

    Args:
        without_counts: share of the steps that will not read the counts. An item that follows
            itself is a repeat: of known items the counts would say all of it, of new ones ρ alone.
    """
    log_kappa = torch.zeros((), dtype=torch.float64, requires_grad=prior is not None)
    rho_B = torch.zeros(BUCKETS, dtype=torch.float64, requires_grad=repeats is not None)

    def loss() -> Tensor:
        kappa = log_kappa.exp() * (prior is not None)
        held = (rho_B.exp() - rho_B).sum()
        if prior is not None:
            held = held + 2.0 * torch.log1p(kappa) - log_kappa
        alone = without_counts * facts.loss(torch.zeros_like(kappa), rho_B)
        return (1.0 - without_counts) * facts.loss(kappa, rho_B) + alone + held

    _minimise(loss, [t for t in (log_kappa, rho_B) if t.requires_grad])
    with torch.no_grad():
        if prior is not None:
            prior.log_gamma.zero_()
            prior.log_kappa.copy_(log_kappa)
        if repeats is not None:
            repeats.rho.copy_(rho_B)


def _minimise(loss: Callable[[], Tensor], free: Sequence[Tensor]) -> None:
    """Descend a smooth loss of a few numbers to its minimum."""
    optimiser = torch.optim.LBFGS(
        free, max_iter=STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


@dataclass(frozen=True)
class Popularities:
    """An item's share of the whole log, and its share of a while before each of some events.

    The event itself is in neither: q counts what came before, and of p it is taken off again.
    """

    item_N: Tensor  # int64, chosen
    log_q_NM: Tensor
    log_p_M: Tensor
    own_log_p_N: Tensor  # of the item chosen, without this choice

    @classmethod
    def of(
        cls,
        table: TrendTable,
        histories: Histories,
        event_N: NDArray[np.int64],
        count_M: NDArray[np.int64],
    ) -> Self:
        """Read some events of a log whose items were chosen `count_M` times."""
        item_N = histories.item_E[event_N]
        total = count_M.sum() + len(count_M)
        row_U, place_N = torch.from_numpy(table.row_of(histories.timestamp_E[event_N])).unique(
            return_inverse=True
        )
        return cls(
            torch.from_numpy(item_N),
            table.rows(row_U).index_select(0, place_N),  # `every_item` may keep the whole table
            torch.from_numpy(np.log((count_M + 1.0) / total)).float(),
            torch.from_numpy(np.log(np.maximum(count_M[item_N], 1) / total)).float(),
        )

    def loss(self, share: Tensor, beta: Tensor) -> Tensor:
        """−log likelihood of p_a^share · q_a(t)^β, in nats."""
        score_NM = share * self.log_p_M + beta * self.log_q_NM
        chosen_N1 = self.item_N[:, None]
        was_N1 = score_NM.gather(1, chosen_N1)
        own_N1 = was_N1 + (share * (self.own_log_p_N - self.log_p_M[self.item_N]))[:, None]
        score_NM = score_NM.scatter(1, chosen_N1, own_N1)
        return (score_NM.logsumexp(dim=1) - own_N1[:, 0]).sum()


def popularity_start(facts: Popularities) -> tuple[float, float]:
    """The most likely exponents of p and q, both above 0: what biases and β begin at.

    They are held to (0, 1), the trend alone, by `PRECISION`.
    """
    log_share, log_beta = (torch.tensor(v, requires_grad=True) for v in (-2.0, 0.0))

    def loss() -> Tensor:
        share, beta = log_share.exp(), log_beta.exp()
        return facts.loss(share, beta) + 0.5 * PRECISION * (share**2 + (beta - 1.0) ** 2)

    _minimise(loss, [log_share, log_beta])
    return float(log_share.detach().exp()), max(LEAST_BETA, float(log_beta.detach().exp()))
