"""Everything that has to keep the contract. Append an `Entry`, and the whole suite runs on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.baselines.base import Baseline
from model.baselines.factors import BayesianPersonalisedRanking
from model.baselines.item_knn import ItemKNN
from model.baselines.next_item_fm import NextItemFactorizationMachine
from model.baselines.popularity import Popularity, RecentPopularity
from model.baselines.ratings import (
    DampedBias,
    FactorizationMachine,
    ItemAutoRec,
    RollingAverage,
)
from model.baselines.transition_counts import TransitionCounts
from model.catalogue import Catalogue
from model.network import NetworkSettings
from model.schema import FieldKind, Schema
from model.sequences import Histories
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend

USER_FIELDS = {"group": FieldKind.CATEGORICAL}  # of the generated users
Make = Callable[[Histories, Histories, Catalogue], Any]


@dataclass(frozen=True)
class Entry:
    """A name, and how to fit the model: `make(train, valid, catalogue)`.

    `next_item`, `values`: which of the two contracts it keeps. `reads_past`: whether its scores
    depend on the user's own events. `baseline`: the class, where it saves and loads by itself;
    `settings`: of HRNN, which is saved as a bundle.
    """

    name: str
    make: Make
    next_item: bool = True
    values: bool = False
    reads_past: bool = True
    baseline: type[Baseline] | None = None
    settings: TrainSettings | None = None


def _baseline(kind: type[Baseline], **facts: bool) -> Entry:
    return Entry(
        kind.name,
        lambda train, valid, catalogue: kind(len(catalogue)).fit(train),
        baseline=kind,
        **facts,
    )


def _fm_with_fields(train: Histories, valid: Histories, catalogue: Catalogue) -> Any:
    return NextItemFactorizationMachine(len(catalogue), USER_FIELDS).fit(train)


def hrnn_settings(network: dict[str, Any]) -> TrainSettings:
    """Small and quick."""
    sizes = {"embedding": 16, "hidden": 16, "control": 4}
    return TrainSettings(
        network=NetworkSettings(**sizes, **network), max_epochs=2, batch_events=128, seed=0
    )


def hrnn_schema() -> Schema:
    return Schema(users=USER_FIELDS)


def _hrnn(name: str, **network: Any) -> Entry:
    settings = hrnn_settings(network)

    def make(train: Histories, valid: Histories, catalogue: Catalogue) -> Any:
        trend = ResolvedTrend(86_400, 0, 1.0)
        return fit(train, valid, catalogue, settings, trend, hrnn_schema())

    return Entry(name, make, values=True, settings=settings)


REGISTRY: list[Entry] = [
    _baseline(Popularity, reads_past=False),
    _baseline(RecentPopularity, reads_past=False),
    _baseline(TransitionCounts),
    _baseline(ItemKNN),
    _baseline(BayesianPersonalisedRanking),
    _baseline(NextItemFactorizationMachine),
    Entry("next-item-fm-fields", _fm_with_fields, baseline=NextItemFactorizationMachine),
    _baseline(RollingAverage, next_item=False, values=True),
    _baseline(DampedBias, next_item=False, values=True),
    _baseline(FactorizationMachine, next_item=False, values=True),
    _baseline(ItemAutoRec, next_item=False, values=True),
    _hrnn("gru"),
    _hrnn("lstm", encoder="lstm"),
    _hrnn("transformer", encoder="transformer"),
    _hrnn("hgru", encoder="hgru"),
    _hrnn("multi_hot", encoder="multi_hot"),
    _hrnn("untied", tied=False, transitions=False),
]
