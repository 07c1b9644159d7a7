"""Negatives for large catalogues: items drawn from q by the alias method (§3.1).

Shapes: M items, n draws, S distinct sampled items, N anything.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


@dataclass(frozen=True)
class AliasSampler:
    """Draws items from a fixed distribution q, each in O(1) (Walker's alias method, [28] in §3.1).

    Slot j of M equally likely ones gives item j with probability `prob_M[j]`, item `alias_M[j]`
    otherwise. `log_q_M` is what the tables draw from; every item has q > 0.
    """

    prob_M: Tensor  # float64: float32 would blur the chances of rare items
    alias_M: Tensor  # int64
    log_q_M: Tensor  # float32

    @classmethod
    def build(cls, weight_M: ArrayLike) -> Self:
        """Tables for q ∝ `weight_M`, in a few passes over arrays.

        Raises:
            ValueError: no items, or a weight that is not positive and finite.
        """
        weight_M = np.asarray(weight_M, dtype=np.float64)
        if weight_M.ndim != 1 or not len(weight_M):
            raise ValueError("an alias sampler needs a list of at least one weight")
        if not (np.isfinite(weight_M).all() and (weight_M > 0).all()):
            # q = 0 cannot be corrected for: the item would never be seen as a negative.
            raise ValueError("the weights of an alias sampler must be positive and finite")
        relative_M = weight_M / weight_M.max()  # the sum of the weights may overflow
        total = relative_M.sum()
        prob_M, alias_M = _alias_tables(relative_M / total * len(weight_M))
        log_q_M = np.log(weight_M) - np.log(weight_M.max()) - np.log(total)
        return cls(
            torch.from_numpy(prob_M), torch.from_numpy(alias_M), torch.from_numpy(log_q_M).float()
        )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` independent items, int64 `[n]`, with replacement."""
        on: dict[str, Any] = {"generator": generator, "device": generator.device}
        slot_n = torch.randint(len(self.prob_M), (n,), **on)
        keep_n = torch.rand(n, dtype=torch.float64, **on) < self.prob_M[slot_n]
        return torch.where(keep_n, slot_n, self.alias_M[slot_n])

    def negatives(self, draws: int, generator: torch.Generator) -> Tensor:
        """The distinct items of about `draws` draws, int64 `[S]`, sorted.

        The number of draws is itself Poisson: each item is then in the set independently of all
        others, which makes `log_expected_count` and `model.losses.sampled_softmax` exact.
        """
        mean = torch.tensor(float(draws), device=generator.device)
        n = int(torch.poisson(mean, generator=generator))
        return self.draw(n, generator).unique()

    def log_expected_count(self, item_N: Tensor, draws: int) -> Tensor:
        """log of how often each item is expected in `negatives(draws)`, float32 `[N]`.

        An item is in the set at most once, so this is its chance 1 − exp(−draws·q) to be there:
        draws·q when that is small, 1 for every item when there are very many draws.
        """
        log_mean_N = self.log_q_M[item_N] + math.log(draws)
        # The chance equals draws·q to float32 well before exp(log_mean) underflows.
        log_chance_N = torch.log(-torch.expm1(-log_mean_N.clamp(min=-20.0).exp()))
        return torch.where(log_mean_N < -20.0, log_mean_N, log_chance_N)


def _alias_tables(load_M: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """`prob_M`, `alias_M` for loads M·q (mean 1).

    Vose's loop hands out what heavy items have too much of to light items' slots, one after the
    other; a heavy item left with less than a slot is topped up by the next heavy one. Whose turn it
    is depends only on running totals of what was missing and what was given, so the loop becomes
    two searches in cumulative sums.
    """
    heavy_M = load_M >= 1.0
    heavy_M[load_M.argmax()] = True  # rounding may leave every load just under 1
    light_L, heavy_H = np.flatnonzero(~heavy_M), np.flatnonzero(heavy_M)
    prob_M = np.ones(len(load_M))
    alias_M = np.arange(len(load_M))
    if not len(light_L):
        return prob_M, alias_M
    # What was missing before each light item's turn, and after the last; what can be given.
    missing_T = np.r_[0.0, np.cumsum(1.0 - load_M[light_L])]
    spare_H = np.cumsum(load_M[heavy_H] - 1.0)
    # A light slot is filled by the first heavy item that is not used up by then.
    giver_L = np.searchsorted(spare_H, missing_T[:-1], side="right").clip(max=len(heavy_H) - 1)
    prob_M[light_L] = load_M[light_L]
    alias_M[light_L] = heavy_H[giver_L]
    # A heavy item is used up by the turn that takes the total to its spare or past it; what it gave
    # too much, its own slot gets from the next heavy item. The last one ends even.
    turn_H = np.searchsorted(missing_T, spare_H[:-1], side="left").clip(max=len(light_L))
    prob_M[heavy_H[:-1]] = (1.0 + spare_H[:-1] - missing_T[turn_H]).clip(0.0, 1.0)
    alias_M[heavy_H[:-1]] = heavy_H[1:]
    return prob_M, alias_M


def frequency_sampler(count_M: ArrayLike, power: float = 0.75) -> AliasSampler:
    """q ∝ (count + 1)^power: near the items' own distribution, but flatter (§3.1, §4.6).

    Args:
        count_M: events per item in the training log.
        power: 1 samples by frequency, 0 uniformly.
    """
    # + 1, the trend's pseudo-count too: the correction by q needs q > 0 for whatever can be a
    # target (4), and an item without events has to be met as a negative now and then, or nothing
    # ever lowers the score that it starts with or gets from its fields.
    return AliasSampler.build((np.asarray(count_M, dtype=np.float64) + 1.0) ** power)
