"""Exploration: a random bonus for items of which little is known, so that more becomes known.

An item with n counted interactions (plus the pseudo-count s) gets
    bonus = weight · σ · U,    σ = √(s / (n + s)),    U ~ uniform [0, 1).
σ is 1 for an item nobody has touched and falls like 1/√n. U depends on the seed and the item alone:
whoever knows the seed can draw the same bonuses again.

What is learned from the answers has to be weighted, as items come the more often the better they
score. An item comes if its score beats τ, the best score that did not: with the others' bonuses as
they were drawn, its propensity is P(score without bonus + weight · σ · U > τ). This is threshold
sampling (Duffield, Lund, Thorup 2007): the mean of reward / propensity over all answers, 0 where an
item did not come, is the item's mean reward, without bias, over the requests where the others left
it any room.

Shapes: M items, catalogue order.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.trends import TrendSnapshot

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uncertainty(trend: TrendSnapshot, item_ids: Sequence[str]) -> NDArray[np.float64]:
    """σ `[M]` in (0, 1], from the counts behind a trend snapshot: q ∝ n + s, its floor ∝ s."""
    sigma_M: NDArray[np.float64] = np.exp((trend.floor - trend.dense(item_ids)) / 2)
    return np.minimum(sigma_M, 1.0)


def propensity(base: float, limit: float, threshold: float) -> float:
    """P(base + limit · U > threshold): of an item that came, so it is above 0."""
    room = threshold - base
    return 1.0 if room <= 0 or limit <= 0 else max(1.0 - room / limit, 2.0**-53)


def uniform(seed: str, num_items: int) -> NDArray[np.float64]:
    """U `[M]` in [0, 1): SplitMix64 (Steele et al. 2014) at M places of the seed's stream."""
    start = np.uint64(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest()))
    with np.errstate(over="ignore"):
        z_M = start + np.arange(1, num_items + 1, dtype=np.uint64) * _STEP
        z_M = (z_M ^ (z_M >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_M = (z_M ^ (z_M >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z_M ^= z_M >> np.uint64(31)
    # The upper 53 bits are a float64's exact integers.
    return (z_M >> np.uint64(11)).astype(np.float64) * 2.0**-53
