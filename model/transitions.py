"""Item-to-item transition counts: the short path from recent items to the next one.

A count of what follows what needs no gradient step to know a rare pair, and on sparse logs it
ranks better than a recurrent state. T_ij counts how often j came within WINDOW events after i,
nearer ones counting more; a recent item i then says P(j | i) = T_ij / (1 + Σ_j T_ij).

What is bought again or visited again is mostly the user's own, like a home that nobody else ever
visits: of such an item the others' counts know nothing. So of the pseudo-count of 1 an item itself
gets the share `again`, which is how much of what follows any item is the same item once more.

Shapes: M items, Z stored entries, N positions, R recent items, F folds of the users.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.columns import GrowingColumn
from model.item_ranges import item_ranges
from model.sequences import Histories

WINDOW = 10  # events after an item that count as following it
FOLLOWERS = 50  # kept per item
RANGE_EVENTS = 2**19  # whose pairs are counted at once: some 500 MB while that lasts
DAMPING = 1.0  # pseudo-count per item: a rarely seen one says less
AGAIN_EVENTS = 2**22  # looked at together for how often items come again


@dataclass(frozen=True)
class _Pairs:
    """How often item j followed item i, for some i: in units of 1 / `per_event`, hence exact.

    `key_Z` is i·M + j, ascending; `units_ZF` counts the users of each fold. Of every item the pair
    with itself is there, be it with 0 units.
    """

    key_Z: NDArray[np.int64]
    units_ZF: NDArray[np.int64]
    per_event: int  # units of a pair one event apart


def _pairs_by_item(
    histories: Histories,
    num_items: int,
    fold_U: NDArray[np.int64] | None,
    folds: int,
    window: int = WINDOW,
) -> Iterator[_Pairs]:
    """The pairs of all items, some items after others: a pair at lag k counts 1 / k."""
    per_event = math.lcm(*range(1, window + 1))
    unit_L = per_event // np.arange(1, window + 1)
    item_E, end_U = histories.item_E, histories.offset_U1[1:]
    for first, end, pieces in item_ranges(item_E, num_items, RANGE_EVENTS):
        known_P, units_P = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for event_K in pieces:
            user_K = histories.user_of(event_K)
            end_K = end_U[user_K]
            # One number says it all, and is sorted without its weight: (i, j, fold, lag).
            prefix_K = np.asarray(item_E[event_K]) * num_items
            codes = []
            for lag in range(1, window + 1):
                has_K = event_K + lag < end_K
                code = prefix_K[has_K] + item_E[event_K[has_K] + lag]
                code *= folds
                if fold_U is not None:
                    code += fold_U[user_K[has_K]]
                code *= window
                code += lag - 1
                codes.append(code)
            code_P = np.concatenate(codes)
            code_P.sort()
            pair_P, lag_P = np.divmod(code_P, window)
            new_P, new_units_P = _sum_sorted(pair_P, unit_L[lag_P])
            if len(known_P):  # of a single item, whose events are many
                new_P, units_P = np.concatenate([known_P, new_P]), np.r_[units_P, new_units_P]
                order_P = np.argsort(new_P, kind="stable")
                known_P, units_P = _sum_sorted(new_P[order_P], units_P[order_P])
            else:
                known_P, units_P = new_P, new_units_P
        key_P, fold_P = np.divmod(known_P, folds)
        key_Z = np.union1d(key_P, np.arange(first, end, dtype=np.int64) * (num_items + 1))
        units_ZF = np.zeros((len(key_Z), folds), dtype=np.int64)
        units_ZF[np.searchsorted(key_Z, key_P), fold_P] = units_P
        yield _Pairs(key_Z, units_ZF, per_event)


def again_share(histories: Histories, window: int = WINDOW) -> float:
    """How much of what follows an item, weighted as in the counts, is that item: 0 … 1."""
    item_E, end_U = histories.item_E, histories.offset_U1[1:]
    same = every = 0.0
    for start in range(0, histories.num_events, AGAIN_EVENTS):
        event_K = np.arange(start, min(start + AGAIN_EVENTS, histories.num_events))
        end_K = end_U[histories.user_of(event_K)]
        for lag in range(1, window + 1):
            from_K = event_K[event_K + lag < end_K]
            every += len(from_K) / lag
            same += float((item_E[from_K] == item_E[from_K + lag]).sum()) / lag
    return same / every if every else 0.0


def _sum_sorted(
    key: NDArray[np.int64], value: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct keys of an ascending list, and the sum of the values of each."""
    if not len(key):
        return key, value
    first = np.flatnonzero(np.diff(key, prepend=key[0] - 1))
    return key[first], np.add.reduceat(value, first)


ROWS_AT_ONCE = 65_536  # of the counts, where all of them are gone through


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
        return cls.fitted(histories, num_items, None, 1, followers)[0]

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
        return cls.fitted(histories, num_items, fold_U, folds, followers)[1]

    @classmethod
    def fitted(
        cls,
        histories: Histories,
        num_items: int,
        fold_U: NDArray[np.int64] | None,
        folds: int,
        followers: int = FOLLOWERS,
        again: float = 0.0,
    ) -> tuple[Self, Self]:
        """What `count` and `cross_fitted` give, in one pass.

        Memory is bounded by what is kept; that is in files where it is long (`model.columns`).

        Args:
            again: of an item's pseudo-count, what counts as the item itself.
        """
        whole = _Followers(num_items, followers, again)
        cross = [
            _Followers(num_items, followers, again)
            for _ in range(folds if fold_U is not None else 0)
        ]
        for pairs in _pairs_by_item(histories, num_items, fold_U, folds):
            total_Z = pairs.units_ZF.sum(axis=1)
            whole.add(pairs.key_Z, total_Z, pairs.per_event)
            for fold, kept in enumerate(cross):
                kept.add(pairs.key_Z, total_Z - pairs.units_ZF[:, fold], pairs.per_event)
        return cls._stack(num_items, [whole]), cls._stack(num_items, cross)

    @classmethod
    def _stack(cls, num_items: int, folds: Sequence["_Followers"]) -> Self:
        size_R = np.concatenate([np.empty(0, dtype=np.int64), *(fold.size_M for fold in folds)])
        columns = GrowingColumn(np.int64), GrowingColumn(np.float32)
        for fold in folds:
            for column, piece in zip(columns, (fold.item, fold.probability), strict=True):
                column.extend(piece.finish())
        return cls(
            num_items,
            torch.from_numpy(np.r_[0, np.cumsum(size_R)].astype(np.int64)),
            *(torch.from_numpy(column.finish()) for column in columns),
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

    def without(self, item_J: Tensor) -> "Transitions":
        """The same counts, but for those of some items: nothing follows them, nor do they."""
        gone_M = torch.zeros(self.num_items, dtype=torch.bool)
        gone_M[item_J] = True
        probability_Z = self.probability_Z.clone()
        for start in range(0, self.num_items, ROWS_AT_ONCE):
            row_R1 = self.offset_R1[start : start + ROWS_AT_ONCE + 1]
            part = slice(int(row_R1[0]), int(row_R1[-1]))
            from_Z = torch.repeat_interleave(gone_M[start : start + ROWS_AT_ONCE], row_R1.diff())
            probability_Z[part][from_Z | gone_M[self.item_Z[part]]] = 0.0
        return replace(self, probability_Z=probability_Z)

    def followers(
        self, row_BR: NDArray[np.int64], weight_R: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Every item j that follows one of the rows of b, and Σ_r weight_r · P(j | row_br).

        Args:
            row_BR: rows of the counts; −1 where there is no item.

        Returns:
            Keys b·M + j, ascending, and the sums.
        """
        offset_R1, queries = self.offset_R1.numpy(), len(row_BR)
        row_F = row_BR.ravel()
        start_F = offset_R1[row_F]
        length_F = np.where(row_F < 0, 0, offset_R1[row_F + 1] - start_F)
        entry_Z = np.repeat(start_F - np.cumsum(length_F) + length_F, length_F)
        entry_Z += np.arange(len(entry_Z))
        base_F = np.repeat(np.arange(queries) * self.num_items, row_BR.shape[1])
        key_Z = np.repeat(base_F, length_F) + self.item_Z.numpy()[entry_Z]
        weight_Z = np.repeat(np.tile(weight_R, queries), length_F)
        return summed(key_Z, weight_Z * self.probability_Z.numpy()[entry_Z])

    def at(self, row_NR: Tensor, weight_R: Tensor, item_N: Tensor) -> Tensor:
        """Σ_r weight_r · P(item_n | row_r): `[N]`, one item per position."""
        n_Z, item_Z, value_Z = self._entries(row_NR, weight_R)
        found_Z = item_N[n_Z] == item_Z
        return value_Z.new_zeros(len(row_NR)).index_add_(0, n_Z[found_Z], value_Z[found_Z])

    def mass(self, row_NR: Tensor, weight_R: Tensor) -> Tensor:
        """Σ_j Σ_r weight_r · P(j | row_r), of all stored followers together: `[N]`."""
        n_Z, _, value_Z = self._entries(row_NR, weight_R)
        return value_Z.new_zeros(len(row_NR)).index_add_(0, n_Z, value_Z)

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


def summed(
    key_Z: NDArray[np.int64], value_Z: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The distinct keys, ascending, and the sum of each one's values."""
    if not len(key_Z):
        return key_Z, np.empty(0)
    order = np.argsort(key_Z, kind="stable")
    key_Z = key_Z[order]
    first_S = np.flatnonzero(np.concatenate([[True], key_Z[1:] != key_Z[:-1]]))
    return key_Z[first_S], np.add.reduceat(value_Z[order], first_S, dtype=np.float64)


class _Followers:
    """The most frequent followers of every item, items coming in ascending order."""

    def __init__(self, num_items: int, followers: int, again: float) -> None:
        self._num_items, self._most, self._again = num_items, followers, again
        self.size_M = np.zeros(num_items, dtype=np.int64)
        self.item, self.probability = GrowingColumn(np.int32), GrowingColumn(np.float32)

    def add(self, key_Z: NDArray[np.int64], units_Z: NDArray[np.int64], per_event: int) -> None:
        """Some items' pairs: keys i·M + j ascending, and counts in units of 1 / `per_event`."""
        pseudo = DAMPING * per_event
        weight_Z = units_Z + self._again * pseudo * (key_Z % (self._num_items + 1) == 0)
        key_Z, units_Z, weight_Z = (a[weight_Z > 0] for a in (key_Z, units_Z, weight_Z))
        if not len(key_Z):
            return
        row_Z, item_Z = np.divmod(key_Z, self._num_items)
        first_Y = np.flatnonzero(np.diff(row_Z, prepend=-1))
        length_Y = np.diff(first_Y, append=len(row_Z))
        # By row; within one the most frequent first, equal ones by item.
        order_Z = np.lexsort((-weight_Z, row_Z))
        place_Z = np.arange(len(row_Z)) - np.repeat(first_Y, length_Y)
        kept_K = np.sort(order_Z[place_Z < self._most])
        total_Z = np.repeat(np.add.reduceat(units_Z, first_Y), length_Y)
        probability_K = weight_Z[kept_K] / (total_Z[kept_K] + pseudo)
        self.size_M[row_Z[first_Y]] = np.minimum(length_Y, self._most)
        self.item.extend(item_Z[kept_K])
        self.probability.extend(probability_K)


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
        self, transitions: Transitions, row_BR: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The items whose bonus is not 0 after B queries' recent items.

        Args:
            row_BR: newest first; −1 where there is no item.

        Returns:
            Keys b·M + item, ascending, and the bonus of each.
        """
        key_S, total_S = transitions.followers(row_BR, self.alpha_R.numpy()[: row_BR.shape[1]])
        lift_S = total_S * self.inverse_p_M.numpy()[key_S % transitions.num_items]
        gamma, kappa = self.gamma.item(), self.kappa.item()
        return key_S, gamma * np.log1p(kappa * lift_S)

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
