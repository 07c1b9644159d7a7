"""Item-based nearest neighbours (Sarwar et al. 2001; Deshpande and Karypis 2004), by `implicit`.

Two items are as near as the cosine of the sets of users who chose them. A user is the last RECENT
items, newer ones weighing more, so users who were not in training need nothing fitted. Sums of
cosines are no probabilities: they are normalised and mixed with popularity, and how is chosen on
training users whose own choices are left out of the cosines.

Shapes: N positions, M items, K neighbours, R recent items, U users.
"""

import itertools
import warnings
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.baselines.base import NextItemBaseline, recent_items, smoothed_popularity
from model.sequences import Histories

RECENT = 20
NEIGHBOURS = 100
HELD_OUT = 10  # every tenth training user decides on the mix
CHOOSING_EVENTS = 2000
CHOOSING_CELLS = 2**23  # scores held at once while the mix is chosen
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)  # of popularity
OWN = (0.0, 1.0)  # an item's nearness to itself: whether items are chosen again


class ItemKNN(NextItemBaseline):
    """p_j = ε·p⁰_j + (1 − ε)·s_j / Σ s, with s_j = Σ_r cos(recent_r, j) / r.

    p⁰ is popularity; it stands alone where no recent item has a neighbour.
    """

    name = "item-knn"

    def fit(self, train: Histories) -> Self:
        held_U = np.arange(len(train)) % HELD_OUT == HELD_OUT - 1
        held = train.subset(np.flatnonzero(held_U))
        if held.num_events:
            self._count(train.subset(np.flatnonzero(~held_U)))
            mix = self._choose_mix(held)
        else:  # too few users to spare any
            mix = torch.tensor([0.5, 0.0])
        self._count(train)
        self.state["mix"] = mix
        return self

    def _count(self, train: Histories) -> None:
        neighbour_MK, cosine_MK = _nearest(train, self.num_items)
        self.state = {
            "neighbour": neighbour_MK,
            "cosine": cosine_MK,
            "p": smoothed_popularity(train, self.num_items),
        }

    def _choose_mix(self, held: Histories) -> Tensor:
        """(ε, nearness to itself) that predict the held-out users best `[2]`."""
        rng = np.random.default_rng(0)
        chosen_N = np.sort(rng.permutation(held.num_events)[:CHOOSING_EVENTS])
        rows = max(1, CHOOSING_CELLS // self.num_items)
        total = dict.fromkeys(itertools.product(SHARES, OWN), 0.0)
        for start in range(0, len(chosen_N), rows):
            event_N = chosen_N[start : start + rows]
            target_N = torch.from_numpy(held.item_E[event_N])
            p_N = self.state["p"][target_N].double()
            for own in OWN:
                share_NM = self._normalised(self._near(held, event_N, own))
                share_N = share_NM.gather(1, target_N[:, None])[:, 0].double()
                for epsilon in SHARES:
                    mixed_N = epsilon * p_N + (1.0 - epsilon) * share_N
                    total[epsilon, own] += float(mixed_N.log().sum())
        return torch.tensor(max(total, key=total.__getitem__))

    def _near(self, histories: Histories, event_N: NDArray[np.int64], own: float) -> Tensor:
        """s `[N, M]`: the recent items' cosines, each to `own` for the item itself."""
        item_NR = torch.from_numpy(recent_items(histories, event_N, RECENT))
        near_NM = torch.zeros(len(event_N), self.num_items)
        for r in range(RECENT):  # one recent item at a time: K numbers per row, not R·K
            here_P = (item_NR[:, r] >= 0).nonzero()[:, 0]
            item_P = item_NR[here_P, r]
            column_PK, value_PK = self.state["neighbour"][item_P], self.state["cosine"][item_P]
            row_PK = here_P[:, None].expand_as(column_PK)
            near_NM.index_put_((row_PK, column_PK), value_PK / (r + 1), accumulate=True)
            if own:
                weight_P = torch.full((len(here_P),), own / (r + 1))
                near_NM.index_put_((here_P, item_P), weight_P, accumulate=True)
        return near_NM

    def _normalised(self, near_NM: Tensor) -> Tensor:
        """s / Σ s `[N, M]`, in place; popularity in rows of zeros."""
        total_N1 = near_NM.sum(dim=1, keepdim=True)
        near_NM /= total_N1.clamp(min=torch.finfo(torch.float32).tiny)
        near_NM[total_N1[:, 0] == 0] = self.state["p"]
        return near_NM

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        epsilon, own = self.state["mix"].tolist()
        share_NM = self._normalised(self._near(histories, event_N, own))
        return share_NM.mul_(1.0 - epsilon).add_(self.state["p"], alpha=epsilon).log_()


def _nearest(train: Histories, num_items: int) -> tuple[Tensor, Tensor]:
    """The nearest other items of each, and their cosines `[M, K]`; 0 where there are fewer."""
    # Both come with the `dev` extra only: the product itself does not need them.
    from implicit.nearest_neighbours import CosineRecommender
    from scipy.sparse import csr_matrix

    matrix = csr_matrix(
        (np.ones(train.num_events), (train.user_E, train.item_E)),
        shape=(len(train), num_items),
    )
    matrix.data[:] = 1.0  # whether a user chose an item, not how often
    # One more than wanted: every item is its own nearest neighbour.
    library = CosineRecommender(K=min(NEIGHBOURS + 1, num_items), num_threads=1)
    with warnings.catch_warnings():  # the library warns of a conversion of its own making
        warnings.simplefilter("ignore")
        library.fit(matrix, show_progress=False)
    pairs = library.similarity.tocoo()
    other_Z = (pairs.row != pairs.col) & (pairs.data > 0)
    row_Z, column_Z, value_Z = pairs.row[other_Z], pairs.col[other_Z], pairs.data[other_Z]
    order = np.lexsort((column_Z, -value_Z, row_Z))
    row_Z, column_Z, value_Z = row_Z[order], column_Z[order], value_Z[order]
    place_Z = np.arange(len(row_Z)) - np.searchsorted(row_Z, row_Z)
    kept_Z = place_Z < NEIGHBOURS
    size = max(1, min(NEIGHBOURS, num_items - 1))
    neighbour_MK = np.zeros((num_items, size), dtype=np.int64)
    cosine_MK = np.zeros((num_items, size), dtype=np.float32)
    neighbour_MK[row_Z[kept_Z], place_Z[kept_Z]] = column_Z[kept_Z]
    cosine_MK[row_Z[kept_Z], place_Z[kept_Z]] = value_Z[kept_Z]
    return torch.from_numpy(neighbour_MK), torch.from_numpy(cosine_MK)
