"""Item-to-item transition counts: the short path from recent items to the next one.

A count of what follows what needs no gradient step to know a rare pair, and on sparse logs it
ranks better than a recurrent state. T_ij counts how often j came within WINDOW events after i,
nearer ones counting more; a recent item i then says P(j | i) = T_ij / Σ_j T_ij.

Shapes: M items, Z stored entries, N positions, R recent items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.sequences import Histories

WINDOW = 10  # events after an item that count as following it
FOLLOWERS = 50  # kept per item
DAMPING = 1.0  # pseudo-count per item: a rarely seen one says less


def pair_counts(
    histories: Histories, num_items: int, window: int = WINDOW
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keys i·M + j `[Z]` ascending, and their weighted counts: 1 / lag for lag 1 … window."""
    user_E = histories.user_E
    key = np.empty(0, dtype=np.int64)
    weight = np.empty(0)
    for lag in range(1, window + 1):
        same = user_E[lag:] == user_E[:-lag]
        new = histories.item_E[:-lag][same] * num_items + histories.item_E[lag:][same]
        key, weight = _sum_by_key(
            np.concatenate([key, new]), np.concatenate([weight, np.full(len(new), 1.0 / lag)])
        )
    return key, weight


def _sum_by_key(
    key: NDArray[np.int64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    unique, inverse = np.unique(key, return_inverse=True)
    return unique, np.bincount(inverse, weight, minlength=len(unique)).astype(np.float64)


@dataclass(frozen=True)
class Transitions:
    """P(j | i) for the most frequent followers j of every item i, in CSR form.

    `offset_R1` int64 `[R + 1]`, `item_Z` int64, `probability_Z` float32. R = M rows, or F·M of
    them where each of F folds of the users has counts of its own.
    """

    num_items: int
    offset_R1: Tensor
    item_Z: Tensor
    probability_Z: Tensor

    @classmethod
    def count(cls, histories: Histories, num_items: int, followers: int = FOLLOWERS) -> Self:
        """Count every pair of every user; the `followers` most frequent of each item are kept."""
        return cls._stack([pair_counts(histories, num_items)], num_items, followers)

    @classmethod
    def cross_fitted(
        cls,
        histories: Histories,
        num_items: int,
        fold_U: NDArray[np.int64],
        folds: int,
        followers: int = FOLLOWERS,
    ) -> Self:
        """Counts for training: rows f·M … (f + 1)·M − 1 count all users but those of fold f.

        A network that saw a user's own pairs counted in would learn to trust them, and find at
        serving time that they are gone.
        """
        parts = [
            pair_counts(histories.subset(np.flatnonzero(fold_U == f)), num_items)
            for f in range(folds)
        ]
        others = [
            _sum_by_key(*map(np.concatenate, zip(*(p for p in parts if p is not own), strict=True)))
            for own in parts
        ]
        return cls._stack(others, num_items, followers)

    @classmethod
    def _stack(
        cls,
        counts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]],
        num_items: int,
        followers: int,
    ) -> Self:
        kept = (_most_frequent(key, count, num_items, followers) for key, count in counts)
        row, item, probability = zip(*kept, strict=True)
        row_Z = np.concatenate([r + f * num_items for f, r in enumerate(row)])
        offset_R1 = np.searchsorted(row_Z, np.arange(len(counts) * num_items + 1))
        return cls(
            num_items,
            torch.from_numpy(offset_R1.astype(np.int64)),
            torch.from_numpy(np.concatenate(item)),
            torch.from_numpy(np.concatenate(probability)),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name, for a bundle."""
        return {
            "offset": self.offset_R1,
            "item": self.item_Z,
            "probability": self.probability_Z,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], num_items: int) -> Self:
        """Inverse of `tensors`.

        Raises:
            ValueError: the arrays do not describe counts of `num_items` items.
        """
        offset_R1, item_Z = tensors["offset"], tensors["item"]
        probability_Z = tensors["probability"]
        sizes = offset_R1.diff()
        if (
            len(offset_R1) != num_items + 1
            or int(offset_R1[0]) != 0
            or bool((sizes < 0).any())
            or int(offset_R1[-1]) != len(item_Z)
            or len(item_Z) != len(probability_Z)
            or bool(((item_Z < 0) | (item_Z >= num_items)).any())
            or not bool(torch.isfinite(probability_Z).all())
        ):
            raise ValueError("transition counts do not fit the catalogue")
        return cls(num_items, offset_R1, item_Z, probability_Z)

    def scatter(self, row_NR: Tensor, weight_R: Tensor, column_S: Tensor | None = None) -> Tensor:
        """Σ_r weight_r · P(j | row_r) for every item j: `[N, M]`.

        Args:
            row_NR: rows of the counts; −1 where there is no item.
            column_S: distinct items, ascending; only these are looked up: `[N, S]`.
        """
        n_Z, item_Z, value_Z = self._entries(row_NR, weight_R)
        columns = self.num_items
        if column_S is not None:
            columns = len(column_S)
            place_Z = torch.searchsorted(column_S, item_Z).clamp(max=columns - 1)
            found_Z = column_S[place_Z] == item_Z
            n_Z, item_Z, value_Z = n_Z[found_Z], place_Z[found_Z], value_Z[found_Z]
        out = value_Z.new_zeros(len(row_NR) * columns)
        return out.index_add_(0, n_Z * columns + item_Z, value_Z).view(len(row_NR), columns)

    def followers(
        self, row_R: NDArray[np.int64], weight_R: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Every item j that follows one of some rows, ascending, and Σ_r weight_r · P(j | row_r).

        Args:
            row_R: rows of the counts; −1 where there is no item.
        """
        offset_R1, item_Z = self.offset_R1.numpy(), self.item_Z.numpy()
        probability_Z = self.probability_Z.numpy()
        spans = [
            (slice(offset_R1[r], offset_R1[r + 1]), w)
            for r, w in zip(row_R, weight_R, strict=True)
            if r >= 0
        ]
        if not spans:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        item_S, place_Z = np.unique(
            np.concatenate([item_Z[span] for span, _ in spans]), return_inverse=True
        )
        value_Z = np.concatenate([weight * probability_Z[span] for span, weight in spans])
        total_S = np.bincount(place_Z, value_Z, minlength=len(item_S))
        return item_S, total_S.astype(np.float32)

    def at(self, row_NR: Tensor, weight_R: Tensor, item_N: Tensor) -> Tensor:
        """Σ_r weight_r · P(item_n | row_r): `[N]`, one item per position."""
        n_Z, item_Z, value_Z = self._entries(row_NR, weight_R)
        found_Z = item_N[n_Z] == item_Z
        return value_Z.new_zeros(len(row_NR)).index_add_(0, n_Z[found_Z], value_Z[found_Z])

    def _entries(self, row_NR: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every stored follower of every row asked for: (n, item, weighted probability)."""
        n_F, r_F = (row_NR >= 0).nonzero(as_tuple=True)
        row_F = row_NR[n_F, r_F]
        start_F = self.offset_R1[row_F]
        length_F = self.offset_R1[row_F + 1] - start_F
        owner_Z = torch.repeat_interleave(length_F)
        entry_Z = torch.arange(len(owner_Z)).add_(
            (start_F - length_F.cumsum(0) + length_F)[owner_Z]
        )
        value_Z = self.probability_Z[entry_Z].mul_(weight_R[r_F][owner_Z])
        return n_F[owner_Z], self.item_Z[entry_Z], value_Z


def _most_frequent(
    key_Z: NDArray[np.int64], count_Z: NDArray[np.float64], num_items: int, followers: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(row, item, probability) of each item's most frequent followers, by row."""
    row_Z = key_Z // num_items
    total_M = np.bincount(row_Z, count_Z, minlength=num_items)
    order = np.lexsort((-count_Z, row_Z))
    start_M = np.searchsorted(row_Z[order], np.arange(num_items))
    place_Z = np.arange(len(order)) - start_M[row_Z[order]]
    kept = np.sort(order[place_Z < followers])
    row_Z = row_Z[kept]
    probability_Z = count_Z[kept] / (total_M[row_Z] + DAMPING)
    return row_Z, key_Z[kept] % num_items, probability_Z.astype(np.float32)


class TransitionPrior(nn.Module):
    """Adds γ·log(1 + κ·Σ_r α_r·P(j | recent_r) / p_j) to the affinity of every item j.

    With γ = 1 and κ = (1 − ε) / ε this turns a popularity p into the mixture
    ε·p + (1 − ε)·Σ_r α_r·P(· | recent_r), the counts' own prediction; γ and κ are learned beside
    the network, α_r ∝ 1 / r over the R most recent items, as in the counts. Items that never
    followed get 0.
    """

    def __init__(self, num_items: int, recent: int = WINDOW) -> None:
        super().__init__()
        self.recent = recent
        self.log_kappa = nn.Parameter(torch.zeros(()))
        self.log_gamma = nn.Parameter(torch.tensor(-1.0))
        alpha_R = 1.0 / torch.arange(1.0, recent + 1)
        self.alpha_R: Tensor
        self.register_buffer("alpha_R", alpha_R / alpha_R.sum(), persistent=False)
        self.inverse_p_M: Tensor
        self.register_buffer("inverse_p_M", torch.ones(num_items))

    def forward(
        self, transitions: Transitions, row_NR: Tensor, column_S: Tensor | None = None
    ) -> Tensor:
        """The bonus of every item `[N, M]`, or of some: `[N, S]`."""
        inverse_p = self.inverse_p_M if column_S is None else self.inverse_p_M[column_S]
        return self._bonus(transitions.scatter(row_NR, self.alpha_R, column_S).mul_(inverse_p))

    def sparse(
        self, transitions: Transitions, row_R: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The items whose bonus is not 0 after these recent items, ascending, and the bonus."""
        item_S, total_S = transitions.followers(row_R, self.alpha_R.numpy()[: len(row_R)])
        lift_S = torch.from_numpy(total_S) * self.inverse_p_M[torch.from_numpy(item_S)]
        return item_S, self._bonus(lift_S).numpy()

    def at(self, transitions: Transitions, row_NR: Tensor, item_N: Tensor) -> Tensor:
        """The bonus of one item per position: `[N]`."""
        followed_N = transitions.at(row_NR, self.alpha_R, item_N)
        return self._bonus(followed_N * self.inverse_p_M[item_N])

    @property
    def gamma(self) -> Tensor:
        """γ > 0."""
        return self.log_gamma.exp()

    @property
    def kappa(self) -> Tensor:
        """κ > 0."""
        return self.log_kappa.exp()

    def _bonus(self, lift: Tensor) -> Tensor:
        return self.gamma * torch.log1p(self.kappa * lift)
