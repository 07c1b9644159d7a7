"""Second-order factorization machine (Rendle 2010) that predicts the next item.

Its features are the candidate item, the bag of past items with exponentially decaying weights, and
the user's fields. Interactions among past items and fields are the same for every candidate and
cancel in the softmax; what is left is score_j = b_j + v_j·(Σ_r α_r·p_{recent_r} + Σ_f u_f), so
nothing of a user but fields and past items is fitted and users who are new are no exception.

Shapes: N positions, M items, R recent items, F factors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.baselines.base import NextItemBaseline, recent_items, smoothed_popularity
from model.fields import FieldBags, FieldEncoding, fit_encoding
from model.schema import FieldKind
from model.sequences import Histories

FIELDS = "fields.json"
RECENT = 50
HELD_OUT = 10  # every tenth training user decides when to stop
BATCH = 512
CELLS = 2**24  # scores of one batch at most
MAX_EPOCHS = 30
PATIENCE = 2
LEARNING_RATE = 0.005
WEIGHT_DECAY = 0.02
DROPOUT = 0.3


class NextItemFactorizationMachine(NextItemBaseline):
    """Trained with the full softmax; the decay of the past is learned with the rest."""

    name = "next-item-fm"

    def __init__(
        self,
        num_items: int,
        user_kinds: Mapping[str, FieldKind] | None = None,
        factors: int = 32,
        seed: int = 0,
    ) -> None:
        """Nothing is fitted yet.

        Args:
            user_kinds: the user fields to use, and what they are; None: none.
        """
        super().__init__(num_items)
        self.user_kinds, self.factors, self.seed = dict(user_kinds or {}), factors, seed
        self.encodings: list[FieldEncoding] = []

    def fit(self, train: Histories) -> Self:
        generator = torch.Generator().manual_seed(self.seed)
        self.encodings = [
            fit_encoding(name, kind, train.user_fields.get(name, ()))
            for name, kind in self.user_kinds.items()
        ]
        shapes = {"target": self.num_items, "past": self.num_items + 1}
        shapes |= {_table(e): e.num_tokens for e in self.encodings}
        parameters = {
            name: torch.randn(rows, self.factors, generator=generator) * 0.05
            for name, rows in shapes.items()
        }
        parameters["bias"] = smoothed_popularity(train, self.num_items).log()
        parameters["decay"] = torch.tensor(-2.0)  # a past item loses about an eighth per event
        self.state = {name: nn.Parameter(p) for name, p in parameters.items()}
        embeddings = [self.state[name] for name in shapes]
        optimiser = torch.optim.AdamW(
            [
                {"params": embeddings, "weight_decay": WEIGHT_DECAY},
                {"params": [self.state["bias"], self.state["decay"]], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
        )
        held_E = train.user_E % HELD_OUT == HELD_OUT - 1
        learned_E, held_E = np.flatnonzero(~held_E), np.flatnonzero(held_E)
        best, best_loss, worse = self._fitted(), float("inf"), 0
        for _ in range(MAX_EPOCHS):
            order = torch.randperm(len(learned_E), generator=generator).numpy()
            for event_N in self._batches(learned_E[order]):
                loss = self._loss(train, event_N, generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            loss_now = self._mean_loss(train, held_E if len(held_E) else learned_E)
            worse = worse + 1 if loss_now >= best_loss else 0
            if not worse:
                best, best_loss = self._fitted(), loss_now
            if worse == PATIENCE:
                break
        self.state = best
        return self

    def _fitted(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.state.items()}

    def _batches(self, event_E: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        rows = max(1, min(BATCH, CELLS // self.num_items))
        return [event_E[start : start + rows] for start in range(0, len(event_E), rows)]

    def _loss(
        self, train: Histories, event_N: NDArray[np.int64], generator: torch.Generator | None = None
    ) -> Tensor:
        score_NM = self._scores(train, event_N, generator)
        return F.cross_entropy(score_NM, torch.from_numpy(train.item_E[event_N]))

    def _mean_loss(self, train: Histories, event_E: NDArray[np.int64]) -> float:
        with torch.no_grad():
            total = sum(float(self._loss(train, n)) * len(n) for n in self._batches(event_E))
        return total / max(1, len(event_E))

    def _context(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        """What the candidate's factors meet `[N, F]`: past items and user fields."""
        item_NR = torch.from_numpy(recent_items(histories, event_N, RECENT))
        rate = F.softplus(self.state["decay"])
        weight_NR = (-rate * torch.arange(RECENT)).exp() * (item_NR >= 0)
        # A long past says more than a short one, but not n times more.
        weight_NR = weight_NR / weight_NR.sum(dim=1, keepdim=True).clamp(min=1e-6).sqrt()
        context_NF = F.embedding_bag(
            torch.where(item_NR >= 0, item_NR, self.num_items),
            self.state["past"],
            mode="sum",
            per_sample_weights=weight_NR,
        )
        if not self.encodings:
            return context_NF
        user_V, place_N = np.unique(histories.user_E[event_N], return_inverse=True)
        columns = {n: [c[u] for u in user_V] for n, c in histories.user_fields.items()}
        bags = FieldBags.encode(self.encodings, columns, len(user_V))
        for encoding, token, weight, offset in zip(
            self.encodings, bags.token, bags.weight, bags.offset, strict=True
        ):
            field_VF = F.embedding_bag(
                token,
                self.state[_table(encoding)],
                offset,
                mode="sum",
                per_sample_weights=weight,
                include_last_offset=True,
            )
            context_NF = context_NF + field_VF[torch.from_numpy(place_N)]
        return context_NF

    def _scores(
        self, histories: Histories, event_N: NDArray[np.int64], generator: torch.Generator | None
    ) -> Tensor:
        context_NF = self._context(histories, event_N)
        if generator is not None:  # F.dropout takes no generator, and the seed is ours alone
            kept_NF = torch.rand(context_NF.shape, generator=generator) >= DROPOUT
            context_NF = context_NF * kept_NF / (1.0 - DROPOUT)
        return torch.addmm(self.state["bias"], context_NF, self.state["target"].T)

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        with torch.no_grad():
            return self._scores(histories, event_N, None)

    def save(self, folder: Path) -> None:
        super().save(folder)
        encodings = [e.model_dump(mode="json") for e in self.encodings]
        (folder / FIELDS).write_text(json.dumps(encodings) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        model = super().load(folder)
        saved = json.loads((folder / FIELDS).read_text())
        model.encodings = [FieldEncoding.model_validate(e) for e in saved]
        model.user_kinds = {e.name: e.kind for e in model.encodings}
        model.factors = model.state["target"].shape[1]
        return model


def _table(encoding: FieldEncoding) -> str:
    return f"field.{encoding.name}"
