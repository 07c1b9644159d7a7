"""What the user's items so far are like: a long memory of their fields, read at the request.

A gated state forgets, and learns to count genres only from many users. The plain average of the
fields of everything in the user's history says at once who likes old comedies, also among items
that nobody chose yet (Table 7). It enters the query beside the state: w̃_j·(W·h + P·z̄), where
z̄ = Σ z(f_i) / (n + damping) over the n distinct items i of the history.

Shapes: N positions, M items, F fields, Z = F·size numbers of an item's fields, D embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.fields import FieldBags, FieldEmbedding, FieldEncoding
from model.repeats import REACH, SeenItems

SIZE = 16  # numbers per field
DAMPING = 2.0  # items about which nothing is known, beside those of the history


class FieldProfile(nn.Module):
    """P·z̄ of every position; 0 where a history is empty, and before training."""

    def __init__(self, encodings: Sequence[FieldEncoding], size: int, dropout: float) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(encodings, SIZE)
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(self.embedding.output_size, size, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, bags: FieldBags, seen: SeenItems) -> Tensor:
        """What the histories add to the query: `[N, D]`.

        Args:
            bags: fields of all items, M rows.
            seen: the items of each position's history.
        """
        if bags.num_rows <= len(seen.item_Z):
            place, z_RZ = seen.item_Z, self.embedding(bags)
        else:  # of a large catalogue, the rows that are read
            row_R, place = seen.item_Z.unique(return_inverse=True)
            if not len(row_R):  # nothing was seen anywhere
                return self.query.weight.new_zeros(len(seen.offset_N1) - 1, len(self.query.weight))
            z_RZ = self.embedding(bags.rows(row_R))
        sum_NZ = F.embedding_bag(place, z_RZ, seen.offset_N1, mode="sum", include_last_offset=True)
        count_N1 = seen.offset_N1.diff()[:, None]
        mean_NZ: Tensor = sum_NZ / (count_N1 + DAMPING)
        added_ND: Tensor = self.query(self.dropout(mean_NZ))
        return added_ND


class FoldedProfile:
    """The same for a few whole histories, with fixed weights."""

    def __init__(self, profile: FieldProfile, bags: FieldBags) -> None:
        with torch.no_grad():
            self._z_MZ: NDArray[np.float32] = profile.embedding(bags).numpy()
        self._query_ZD = profile.query.weight.detach().T.contiguous()

    def __call__(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """What B histories (items, oldest first) add to the queries: float32 `[B, D]`."""
        mean_BZ = np.empty((len(histories), len(self._query_ZD)), dtype=np.float32)
        for mean_Z, item_L in zip(mean_BZ, histories, strict=True):
            seen = np.unique(item_L[-REACH:])
            self._z_MZ.take(seen, axis=0).sum(axis=0, out=mean_Z)
            mean_Z /= len(seen) + DAMPING
        added_BD: NDArray[np.float32] = torch.mm(torch.from_numpy(mean_BZ), self._query_ZD).numpy()
        return added_BD
