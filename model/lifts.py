"""What the transition counts say of a batch, as a list of cells: most followers are few.

Recent items repeat from position to position (a segment of L positions has L + R − 1 of them), so
the counts are read once per batch and item, into rows of equal width; a chunk of positions then
takes whole rows.

Shapes: N positions, C positions of a chunk, R recent items, U distinct rows of the counts read,
F their stored followers, W followers of the longest of them, S columns, Z = C·R·W cells.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.transitions import Transitions


@dataclass(frozen=True)
class Lifts:
    """Σ_r α_r·P(j | recent_r) / p_j of every position, in the columns where it is not 0."""

    place_NR: Tensor  # int64, row of the two below
    column_UW: Tensor  # int64; 0 where there is nothing
    value_UW: Tensor  # P(j | i) / p_j; 0 where there is nothing
    alpha_R: Tensor

    @classmethod
    def dense(
        cls, transitions: Transitions, row_NR: Tensor, alpha_R: Tensor, inverse_p_M: Tensor
    ) -> Self:
        """Columns are all items.

        Args:
            row_NR: rows of the counts, −1 where there is none.
        """
        place_NR, owner_F, item_F, value_F, rows = _read(transitions, row_NR)
        value_F = value_F * inverse_p_M.index_select(0, item_F)
        return cls(place_NR, *_widen(owner_F, item_F, value_F, rows), alpha_R)

    @classmethod
    def sampled(
        cls,
        transitions: Transitions,
        row_NR: Tensor,
        alpha_R: Tensor,
        inverse_p_M: Tensor,
        negative_S: Tensor,
        target_N: Tensor,
    ) -> tuple[Self, Tensor]:
        """Columns are the negatives (ascending); and the lift of each position's target `[N]`."""
        place_NR, owner_F, item_F, value_F, rows = _read(transitions, row_NR)
        key_F = owner_F * transitions.num_items + item_F
        wanted_NR = place_NR * transitions.num_items + target_N[:, None]
        lift_N = _found(key_F, value_F, wanted_NR) @ alpha_R * inverse_p_M[target_N]
        column_F = torch.searchsorted(negative_S, item_F).clamp_(max=max(len(negative_S) - 1, 0))
        kept_F = torch.zeros_like(item_F, dtype=torch.bool)
        if len(negative_S):
            kept_F = negative_S[column_F] == item_F
        value_F = value_F[kept_F] * inverse_p_M[item_F[kept_F]]
        wide = _widen(owner_F[kept_F], column_F[kept_F], value_F, rows)
        return cls(place_NR, *wide, alpha_R), lift_N

    @staticmethod
    def pairs(
        transitions: Transitions,
        row_NR: Tensor,
        alpha_R: Tensor,
        inverse_p_M: Tensor,
        place_P: Tensor,
        item_P: Tensor,
    ) -> Tensor:
        """The lifts of some items, each at one of the positions: `[P]`."""
        place_NR, owner_F, item_F, value_F, _ = _read(transitions, row_NR)
        key_F = owner_F * transitions.num_items + item_F
        wanted_PR = place_NR.index_select(0, place_P) * transitions.num_items + item_P[:, None]
        return _found(key_F, value_F, wanted_PR) @ alpha_R * inverse_p_M[item_P]

    def cells(self, part: slice, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the chunk's scores `[C, stride]` counted through, `[Z]`.

        Returns:
            cell: its number; one cell may be named by several recent items.
            lift: of the cell.
            part: of this entry in the lift; over a cell's entries they sum to 1, or are all 0.
        """
        place_CR = self.place_NR[part]
        rows, flat = len(place_CR), place_CR.reshape(-1)
        recent, width = place_CR.shape[1], self.column_UW.shape[1]
        cell = self.column_UW.index_select(0, flat).view(rows, recent * width)
        cell += torch.arange(0, rows * stride, stride, device=cell.device)[:, None]
        value = self.value_UW.index_select(0, flat).view(rows, recent, width)
        value *= self.alpha_R[:, None]
        cell_Z, value_Z = cell.view(-1), value.view(-1)
        lift = value_Z.new_zeros(rows * stride).index_add_(0, cell_Z, value_Z)
        lift_Z = lift.index_select(0, cell_Z)
        tiny = torch.finfo(lift_Z.dtype).tiny
        return cell_Z, lift_Z, value_Z.div_(lift_Z.clamp(min=tiny))


def _read(transitions: Transitions, row_NR: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The followers of the distinct rows: place `[N, R]` of each row, owner, item, value `[F]`."""
    row_U, place = row_NR.reshape(-1).unique(return_inverse=True)
    start_U = transitions.offset_R1[row_U.clamp(min=0)]
    length_U = (transitions.offset_R1[row_U.clamp(min=0) + 1] - start_U) * (row_U >= 0)
    owner_F = torch.repeat_interleave(length_U)
    shift_U = start_U - length_U.cumsum(0) + length_U
    entry_F = torch.arange(len(owner_F), device=owner_F.device) + shift_U.index_select(0, owner_F)
    item_F = transitions.item_Z.index_select(0, entry_F)
    value_F = transitions.probability_Z.index_select(0, entry_F)
    return place.view(row_NR.shape), owner_F, item_F, value_F, len(row_U)


def _found(key_F: Tensor, value_F: Tensor, wanted: Tensor) -> Tensor:
    """The values at some keys, 0 where there is none. Rows and the items in them ascend, so one
    search finds them."""
    if not len(key_F):
        return value_F.new_zeros(wanted.shape)
    at = torch.searchsorted(key_F, wanted).clamp_(max=len(key_F) - 1)
    return value_F[at] * (key_F[at] == wanted)


def _widen(owner_F: Tensor, column_F: Tensor, value_F: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`[F]` entries by row, ascending → columns and values `[U, W]`."""
    length_U = torch.bincount(owner_F, minlength=rows)
    width = max(1, int(length_U.max())) if rows else 1
    first_U = length_U.cumsum(0) - length_U
    place_F = torch.arange(len(owner_F), device=owner_F.device) - first_U.index_select(0, owner_F)
    cell_F = owner_F * width + place_F
    column_UW = column_F.new_zeros(rows * width).index_copy_(0, cell_F, column_F)
    value_UW = value_F.new_zeros(rows * width).index_copy_(0, cell_F, value_F)
    return column_UW.view(rows, width), value_UW.view(rows, width)
