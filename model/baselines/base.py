"""The contract of the baselines: fit, score every event, recommend, save and load.

Shapes: E events, N positions, M items, K recommended items.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import BundleError
from model.sequences import Histories

STATE, FACTS = "baseline.safetensors", "baseline.json"


class Baseline(ABC):
    """A fitted baseline is a dictionary of tensors, so that it is saved without pickle."""

    name: ClassVar[str]

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def fit(self, train: Histories) -> Self:
        """Learn from training histories; fills `state`."""

    def save(self, folder: Path) -> None:
        """Write the fitted state into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.state.items()}, folder / STATE)
        facts = {"baseline": self.name, "num_items": self.num_items}
        (folder / FACTS).write_text(json.dumps(facts) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Inverse of `save`.

        Raises:
            BundleError: the folder holds another baseline.
        """
        facts = json.loads((folder / FACTS).read_text())
        if facts["baseline"] != cls.name:
            raise BundleError(f"{folder} holds a {facts['baseline']!r}, not a {cls.name}")
        model = cls(facts["num_items"])
        model.state = load_file(folder / STATE)
        return model


class NextItemBaseline(Baseline):
    """Scores every item at every event: implements `NextItemModel`."""

    @abstractmethod
    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        """Log-probabilities up to a constant per row `[N, M]`, from the events before each."""

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield (event_N, score_NM) for every event."""
        for start in range(0, histories.num_events, block):
            event_N = np.arange(start, min(start + block, histories.num_events))
            yield event_N, self.scores(histories, event_N)

    def recommend(
        self, histories: Histories, k: int, exclude_seen: bool = False
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The best k items (positions, scores) after each user's last event; fewer if M < k."""
        asked = with_request(histories)
        lists = []
        for user, end in enumerate(asked.offset_U1[1:]):
            score_M = self.scores(asked, np.array([end - 1]))[0].clone()
            if exclude_seen:
                first, last = histories.offset_U1[user], histories.offset_U1[user + 1]
                score_M[torch.from_numpy(histories.item_E[first:last])] = -torch.inf
            best = score_M.topk(min(k, self.num_items))
            kept = ~best.values.isinf()
            lists.append((best.indices[kept].numpy(), best.values[kept].numpy()))
        return lists


class ValueBaseline(Baseline):
    """Predicts the value (rating) of every event: implements `ValueModel`."""

    @abstractmethod
    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        """Value of event k from the events before it and its item: float64 `[E]`."""


def known_values(histories: Histories) -> NDArray[np.float64]:
    """The values of the events `[E]`, NaN where missing.

    Raises:
        ValueError: the log has none.
    """
    if histories.value_E is None:
        raise ValueError("these histories have no values")
    return histories.value_E


def with_request(histories: Histories) -> Histories:
    """One more position per user, a second after the last event; its item is not to be read."""
    length_U = np.diff(histories.offset_U1)
    offset_U1 = histories.offset_U1 + np.arange(len(histories) + 1)
    source = np.repeat(np.arange(len(histories)), length_U) + np.arange(histories.num_events)
    item_E = np.zeros(offset_U1[-1], dtype=np.int64)
    timestamp_E = np.zeros(offset_U1[-1], dtype=np.int64)
    item_E[source] = histories.item_E
    timestamp_E[source] = histories.timestamp_E
    request = offset_U1[1:] - 1
    follows = length_U > 0
    timestamp_E[request[follows]] = timestamp_E[request[follows] - 1] + 1
    if not follows.all() and histories.num_events:
        timestamp_E[request[~follows]] = int(histories.timestamp_E.max()) + 1
    return Histories(
        histories.user_ids, item_E, timestamp_E, offset_U1, user_fields=histories.user_fields
    )


def recent_items(histories: Histories, event_N: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """The `num` items before each event, newest first: `[N, num]`, −1 where there is none."""
    first_N = histories.offset_U1[histories.user_E[event_N]]
    at_NR = event_N[:, None] - np.arange(1, num + 1)
    item_NR = histories.item_E[np.maximum(at_NR, 0)]
    return np.where(at_NR >= first_N[:, None], item_NR, -1)


def smoothed_popularity(histories: Histories, num_items: int) -> Tensor:
    """(count + 1) / Σ (count + 1), float32 `[M]`."""
    count_M = np.bincount(histories.item_E, minlength=num_items) + 1.0
    return torch.from_numpy(count_M / count_M.sum()).float()
