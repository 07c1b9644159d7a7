"""Rating baselines of Table 4: averages, factorization machine, I-AutoRec.

None of them sees the value of the event it predicts, and all are asked about users who were not
in training: what is known of such a user is the values of the events before.
"""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.baselines.base import ValueBaseline, known_values
from model.sequences import Histories
from model.values import MEAN_DAMPING, item_means, running_tastes


def _before(value_E: NDArray[np.float64], histories: Histories) -> NDArray[np.float64]:
    """Sum `[E]` of the values of the same user's events before each one."""
    total_E = np.cumsum(value_E) - value_E
    length_U = np.diff(histories.offset_U1)
    first_E = np.repeat(histories.offset_U1[:-1], length_U)
    return total_E - total_E[first_E] if len(total_E) else total_E


class RollingAverage(ValueBaseline):
    """(item's average + user's average so far) / 2 (§4.3); the overall mean where there is none."""

    name = "rolling-average"

    def fit(self, train: Histories) -> Self:
        value_E = known_values(train)
        known_E = ~np.isnan(value_E)
        mean = float(value_E[known_E].mean())
        item_E = train.item_E[known_E]
        sum_M = np.bincount(item_E, value_E[known_E], minlength=self.num_items)
        count_M = np.bincount(item_E, minlength=self.num_items)
        average_M = np.where(count_M > 0, sum_M / np.maximum(count_M, 1), mean)
        self.state = {
            "item": torch.from_numpy(average_M),
            "mean": torch.tensor(mean, dtype=torch.float64),
        }
        return self

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        value_E = known_values(histories)
        known_E = ~np.isnan(value_E)
        sum_E = _before(np.where(known_E, value_E, 0.0), histories)
        count_E = _before(known_E.astype(np.float64), histories)
        mean = float(self.state["mean"])
        user_E = np.where(count_E > 0, sum_E / np.maximum(count_E, 1.0), mean)
        item_E: NDArray[np.float64] = self.state["item"].numpy()[histories.item_E]
        return (item_E + user_E) / 2.0


class _Standardised(ValueBaseline):
    """Values with mean 0 and deviation 1; item means; the user's residuals so far."""

    def _fit_scale(self, train: Histories) -> Tensor:
        value_E = known_values(train)
        mean, std = float(np.nanmean(value_E)), float(np.nanstd(value_E)) or 1.0
        self.state = {"scale": torch.tensor([mean, std], dtype=torch.float64)}
        standard_E = self._standardise(train)
        means = item_means(train.item_E, standard_E.numpy(), self.num_items)
        self.state["item_mean"] = torch.from_numpy(means)
        return standard_E

    def _standardise(self, histories: Histories) -> Tensor:
        mean, std = self.state["scale"].tolist()
        return torch.from_numpy((known_values(histories) - mean) / std).float()

    def _unstandardise(self, value_E: Tensor) -> NDArray[np.float64]:
        mean, std = self.state["scale"].tolist()
        return mean + std * value_E.double().numpy()

    def _residuals(self, histories: Histories) -> Tensor:
        """The user's damped mean residual before each event `[E]`."""
        item_E, mean_M = torch.from_numpy(histories.item_E), self.state["item_mean"]
        no_tastes = torch.zeros(self.num_items, 0)
        value_E = self._standardise(histories)
        return running_tastes(item_E, value_E, histories.offset_U1, mean_M, no_tastes)[:, 0]


class DampedBias(_Standardised):
    """μ + damped item mean + damped mean residual of the user so far."""

    name = "damped-bias"

    def fit(self, train: Histories) -> Self:
        self._fit_scale(train)
        return self

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        item_E = self.state["item_mean"][torch.from_numpy(histories.item_E)]
        return self._unstandardise(item_E + self._residuals(histories))


class FactorizationMachine(_Standardised):
    """Second-order factorization machine (Rendle 2010) over item, past items and past residuals.

    Features of an event: its item; the last RECENT items, 1/√n each; the same items times their
    residual; the user's mean residual. Pairwise interactions are those with the event's item (the
    others do not depend on what is rated), linear terms for all.
    """

    name = "factorization-machine"
    RECENT = 50

    def __init__(self, num_items: int, factors: int = 16, seed: int = 0) -> None:
        super().__init__(num_items)
        self.factors, self.seed = factors, seed

    def fit(self, train: Histories) -> Self:
        value_E = self._fit_scale(train)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_items + 1, self.factors)
        parameters = {
            "target": torch.randn(shape, generator=generator) * 0.05,
            "past": torch.randn(shape, generator=generator) * 0.05,
            "rated": torch.randn(shape, generator=generator) * 0.05,
            "past_bias": torch.zeros(self.num_items + 1),
            "item_bias": torch.zeros(self.num_items),
            "user_weight": torch.ones(1),
        }
        self.state |= {n: nn.Parameter(p) for n, p in parameters.items()}
        optimiser = torch.optim.AdamW(
            [self.state[n] for n in parameters], lr=0.003, weight_decay=0.3
        )
        item_E = torch.from_numpy(train.item_E)
        residual_E = self._residuals(train)
        known_E = (~value_E.isnan()).nonzero()[:, 0]
        for _ in range(5):
            for event_N in known_E[torch.randperm(len(known_E), generator=generator)].split(1024):
                predicted_N = self._predict(train, item_E, value_E, residual_E, event_N)
                loss = F.mse_loss(predicted_N, value_E[event_N])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.state = {n: t.detach() for n, t in self.state.items()}
        return self

    def _predict(
        self,
        histories: Histories,
        item_E: Tensor,
        value_E: Tensor,
        residual_E: Tensor,
        event_N: Tensor,
    ) -> Tensor:
        first_N = torch.from_numpy(histories.offset_U1[histories.user_E[event_N.numpy()]])
        at_NR = event_N[:, None] - torch.arange(1, self.RECENT + 1)
        exists_NR = at_NR >= first_N[:, None]
        at_NR = at_NR.clamp(min=0)
        past_NR = torch.where(exists_NR, item_E[at_NR], self.num_items)
        residual_NR = (value_E[at_NR] - self.state["item_mean"][item_E[at_NR]]).nan_to_num()
        share_NR = exists_NR.float() / exists_NR.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
        context_NF = F.embedding_bag(
            past_NR, self.state["past"], mode="sum", per_sample_weights=share_NR
        ) + F.embedding_bag(
            past_NR, self.state["rated"], mode="sum", per_sample_weights=share_NR * residual_NR
        )
        target_N = item_E[event_N]
        linear_N = (share_NR * self.state["past_bias"][past_NR]).sum(dim=1)
        linear_N = linear_N + self.state["item_mean"][target_N] + self.state["item_bias"][target_N]
        linear_N = linear_N + self.state["user_weight"] * residual_E[event_N]
        return linear_N + (context_NF * self.state["target"][target_N]).sum(dim=1)

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        item_E = torch.from_numpy(histories.item_E)
        value_E, residual_E = self._standardise(histories), self._residuals(histories)
        parts = [
            self._predict(histories, item_E, value_E, residual_E, event_N)
            for event_N in torch.arange(histories.num_events).split(4096)
        ]
        return self._unstandardise(torch.cat(parts) if parts else torch.empty(0))


class ItemAutoRec(_Standardised):
    """I-AutoRec (Sedhain et al. 2015): an item's vector of ratings is encoded and decoded.

    z_j = g(V·r_j) is learned on the training users. A decoder has a row for every training user
    and none for a new one, so the new user's row is folded in before each event: ridge regression
    of the residuals so far on the z of the items they belong to.
    """

    name = "i-autorec"
    RIDGE = 30.0

    def __init__(self, num_items: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__(num_items)
        self.hidden, self.seed = hidden, seed

    def fit(self, train: Histories) -> Self:
        value_E = self._fit_scale(train)
        with torch.random.fork_rng():  # what is trained after this must not depend on it
            torch.manual_seed(self.seed)
            return self._fit(train, value_E)

    def _fit(self, train: Histories, value_E: Tensor) -> Self:
        item_E, user_E = torch.from_numpy(train.item_E), torch.from_numpy(train.user_E)
        known_E = ~value_E.isnan()
        residual_E = value_E - self.state["item_mean"][item_E]
        encoder = nn.Linear(len(train), self.hidden)
        decoder = nn.Linear(self.hidden, len(train))
        optimiser = torch.optim.AdamW(
            [*encoder.parameters(), *decoder.parameters()], lr=0.002, weight_decay=0.1
        )
        for _ in range(30):
            for item_B in torch.randperm(self.num_items).split(256):
                place_M = torch.full((self.num_items,), -1)
                place_M[item_B] = torch.arange(len(item_B))
                own_E = (known_E & (place_M[item_E] >= 0)).nonzero()[:, 0]
                at = (place_M[item_E[own_E]], user_E[own_E])
                rating_BU = torch.zeros(len(item_B), len(train))
                rating_BU[at] = residual_E[own_E]
                read_BU = F.dropout(rating_BU, 0.3)
                decoded_BU = decoder(torch.sigmoid(encoder(read_BU)))
                loss = (decoded_BU[at] - rating_BU[at]).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            rating_MU = torch.zeros(self.num_items, len(train))
            rating_MU[item_E[known_E], user_E[known_E]] = residual_E[known_E]
            z_MH = torch.sigmoid(encoder(rating_MU))
        self.state["z"] = z_MH - z_MH.mean(dim=0)
        return self

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        value_E = self._standardise(histories).double()
        item_E = torch.from_numpy(histories.item_E)
        item_mean_E = self.state["item_mean"][item_E].double()
        z_EH = self.state["z"][item_E].double()
        # One column more than z: the user's own mean, damped like everywhere else.
        x_EX = torch.cat([z_EH, torch.ones(len(z_EH), 1, dtype=torch.float64)], dim=1)
        ridge_X = torch.full((x_EX.shape[1],), self.RIDGE, dtype=torch.float64)
        ridge_X[-1] = MEAN_DAMPING
        predicted_E = item_mean_E.clone()
        for start, end in zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True):
            rows = slice(int(start), int(end))
            known_T1 = (~value_E[rows].isnan()).double()[:, None]
            x_TX = x_EX[rows]
            residual_T1 = (value_E[rows] - item_mean_E[rows]).nan_to_num()[:, None]
            seen_TX = x_TX * known_T1
            gram_TXX = (seen_TX[:, :, None] * seen_TX[:, None, :]).cumsum(0)
            moment_TX = (seen_TX * residual_T1).cumsum(0)
            gram_TXX = F.pad(gram_TXX, (0, 0, 0, 0, 1, 0))[:-1] + torch.diag(ridge_X)
            moment_TX = F.pad(moment_TX, (0, 0, 1, 0))[:-1]
            weight_TX = torch.linalg.solve(gram_TXX, moment_TX[:, :, None])[:, :, 0]
            predicted_E[rows] += (weight_TX * x_TX).sum(dim=1)
        return self._unstandardise(predicted_E)
