"""BPR matrix factorisation (Rendle et al. 2009), by the `implicit` library.

Test users are not among the factorised ones. A user is represented by the items so far: the mean
of the factors of the last RECENT items, newer ones weighing more. BPR's scores are no
log-probabilities, so a scale for them and a weight of popularity are chosen on training users.
"""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.baselines.base import NextItemBaseline, recent_items, smoothed_popularity
from model.sequences import Histories

RECENT = 20
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
POPULARITY_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


class BayesianPersonalisedRanking(NextItemBaseline):
    """score_j = scale·(mean factor of the past)·v_j + weight·log p_j."""

    name = "bpr"

    def __init__(self, num_items: int, factors: int = 64, seed: int = 0) -> None:
        super().__init__(num_items)
        self.factors, self.seed = factors, seed

    def fit(self, train: Histories) -> Self:
        # Both come with the `dev` extra only: the product itself does not need them.
        from implicit.bpr import BayesianPersonalizedRanking
        from scipy.sparse import csr_matrix

        matrix = csr_matrix(
            (np.ones(train.num_events, dtype=np.float32), (train.user_E, train.item_E)),
            shape=(len(train), self.num_items),
        )
        matrix.data[:] = 1.0
        library = BayesianPersonalizedRanking(
            factors=self.factors, random_state=self.seed, num_threads=1
        )
        library.fit(matrix, show_progress=False)
        self.state = {
            "item": torch.from_numpy(np.asarray(library.item_factors)[:, : self.factors].copy()),
            "log_p": smoothed_popularity(train, self.num_items).log(),
            "mix": torch.zeros(2),
        }
        rng = np.random.default_rng(self.seed)
        event_N = np.sort(rng.permutation(train.num_events)[:2000])
        target_N = torch.from_numpy(train.item_E[event_N])
        grid = [(s, w) for s in SCALES for w in POPULARITY_WEIGHTS]

        def likelihood(mix: tuple[float, float]) -> float:
            self.state["mix"] = torch.tensor(mix)
            log_p_NM = self.scores(train, event_N).log_softmax(dim=1)
            return float(log_p_NM.gather(1, target_N[:, None]).mean())

        self.state["mix"] = torch.tensor(max(grid, key=likelihood))
        return self

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        item_NR = torch.from_numpy(recent_items(histories, event_N, RECENT))
        weight_NR = (item_NR >= 0).float() / torch.arange(1.0, RECENT + 1)
        total_N1 = weight_NR.sum(dim=1, keepdim=True).clamp(min=1e-6)
        factor_NRF = self.state["item"][item_NR.clamp(min=0)]
        user_NF = (weight_NR[:, :, None] * factor_NRF).sum(dim=1) / total_N1
        scale, popularity = self.state["mix"]
        return scale * (user_NF @ self.state["item"].T) + popularity * self.state["log_p"]
