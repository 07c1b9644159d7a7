"""Items the user already had: films are hardly seen twice, groceries are bought again.

A gated state must learn item by item what one number says for all of them: that what was just
chosen comes back, or does not. So the affinity of every item in the user's history gets ρ_b, where
b says how long ago (in events) the item was last chosen. In a log without repeats ρ falls until
nothing is spent on items that cannot come, and the rest of the network learns to tell the others
apart.

Shapes: N positions, M items, Z pairs of a position and an item of its history, B lag buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.sequences import Histories

REACH = 1024  # events back
BUCKETS = REACH.bit_length()  # lag 1, 2–3, 4–7, …, 1024


@dataclass(frozen=True)
class SeenItems:
    """The distinct items of each position's history, and how far back each was last chosen.

    `offset_N1` int64 `[N + 1]`: position n has the pairs offset[n] … offset[n + 1] − 1 of `item_Z`
    (int64) and `bucket_Z` (int64, ⌊log2(lag)⌋).
    """

    offset_N1: Tensor
    item_Z: Tensor
    bucket_Z: Tensor

    @classmethod
    def of(
        cls, event_N: Tensor, first_event_E: Tensor, next_same_E: Tensor, item_E: Tensor
    ) -> Self:
        """Look back from the chosen positions.

        Args:
            first_event_E: where the position's history begins.
            next_same_E: the user's next event with the same item; E or more where there is none.
        """
        first_N = torch.maximum(first_event_E[event_N], event_N - REACH)
        length_N = event_N - first_N
        owner_P = torch.repeat_interleave(length_N)
        start_N = length_N.cumsum(0) - length_N
        at_P = torch.arange(len(owner_P), device=owner_P.device).add_((first_N - start_N)[owner_P])
        asked_P = event_N[owner_P]
        newest_P = next_same_E[at_P] >= asked_P  # an item counts once, where it was last chosen
        owner_Z, at_Z = owner_P[newest_P], at_P[newest_P]
        count_N = torch.bincount(owner_Z, minlength=len(event_N))
        lag_Z = asked_P[newest_P] - at_Z
        return cls(
            offset_N1=torch.cat([count_N.new_zeros(1), count_N.cumsum(0)]),
            item_Z=item_E[at_Z],
            bucket_Z=torch.log2(lag_Z.double()).long(),
        )

    def among(self, column_S: Tensor) -> "SeenItems":
        """Only some distinct items, ascending, and named by their places among these."""
        if not len(column_S):
            empty = self.item_Z[:0]
            return SeenItems(torch.zeros_like(self.offset_N1), empty, empty)
        place_Z = torch.searchsorted(column_S, self.item_Z).clamp_(max=len(column_S) - 1)
        found_Z = column_S[place_Z] == self.item_Z
        before_Z1 = torch.cat([found_Z.new_zeros(1, dtype=torch.int64), found_Z.cumsum(0)])
        return SeenItems(before_Z1[self.offset_N1], place_Z[found_Z], self.bucket_Z[found_Z])

    def rows(self, start: int, stop: int) -> "SeenItems":
        """Consecutive positions."""
        offset = self.offset_N1[start : stop + 1]
        part = slice(int(offset[0]), int(offset[-1]))
        return SeenItems(offset - offset[0], self.item_Z[part], self.bucket_Z[part])

    def cells(self, num_items: int) -> Tensor:
        """Place of each pair in a row-major `[N, M]` matrix: int64 `[Z]`."""
        return torch.repeat_interleave(self.offset_N1.diff()) * num_items + self.item_Z


def next_same(histories: Histories) -> NDArray[np.int64]:
    """Each event's next one of the same user and item, E where there is none: `[E]`."""
    user_E, item_E = histories.user_E, histories.item_E
    order = np.lexsort((item_E, user_E))  # stable: equal ones stay in time order
    same = (np.diff(item_E[order]) == 0) & (np.diff(user_E[order]) == 0)
    next_E = np.full(histories.num_events, histories.num_events, dtype=np.int64)
    next_E[order[:-1][same]] = order[1:][same]
    return next_E


class RepeatPrior(nn.Module):
    """Adds ρ_b to the affinity of every item of the user's history."""

    def __init__(self) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(BUCKETS))

    def forward(self, seen: SeenItems, num_items: int) -> Tensor:
        """The bonus of every item `[N, M]`."""
        num_rows, value_Z = len(seen.offset_N1) - 1, self.rho[seen.bucket_Z]
        out = value_Z.new_zeros(num_rows * num_items)
        return out.index_add(0, seen.cells(num_items), value_Z).view(num_rows, num_items)

    def sparse(
        self, histories: Sequence[NDArray[np.int64]], num_items: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The items of B histories (oldest first), and their bonus.

        Returns:
            Keys b·M + item, ascending, and the bonus of each.
        """
        recent = [item_L[-REACH:][::-1] for item_L in histories]
        length_B = np.array([len(item_L) for item_L in recent])
        base_B = np.arange(len(recent)) * num_items
        key_E = np.concatenate([*recent, np.empty(0, dtype=np.int64)]) + np.repeat(base_B, length_B)
        key_S, first_S = np.unique(key_E, return_index=True)
        back_E = np.arange(len(key_E)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
        bucket_S = np.log2(back_E[first_S] + 1.0).astype(np.int64)
        rho_S: NDArray[np.float32] = self.rho.detach().numpy()[bucket_S]
        return key_S, rho_S

    def pairs(self, seen: SeenItems, place_R: Tensor, item_R: Tensor, num_items: int) -> Tensor:
        """The bonus of some items, each at one of the positions: `[R]`."""
        cell_Z, order_Z = seen.cells(num_items).sort()
        if not len(cell_Z):
            return self.rho.new_zeros(len(item_R))
        cell_R = place_R * num_items + item_R
        at_R = torch.searchsorted(cell_Z, cell_R).clamp_(max=len(cell_Z) - 1)
        rho_R: Tensor = self.rho[seen.bucket_Z[order_Z[at_R]]]
        return rho_R * (cell_Z[at_R] == cell_R)

    def at(self, seen: SeenItems, item_N: Tensor) -> Tensor:
        """The bonus of one item per position: `[N]`."""
        owner_Z = torch.repeat_interleave(seen.offset_N1.diff())
        found_Z = item_N[owner_Z] == seen.item_Z
        value_Z = self.rho[seen.bucket_Z[found_Z]]
        return value_Z.new_zeros(len(item_N)).index_add(0, owner_Z[found_Z], value_Z)
