"""Figures of several models on the same cases, with intervals and paired comparisons.

Shapes: E events, N cases of all groups, G groups of cases, X columns (group, model, metric),
R resamplings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.bootstrap import UserSums, comparisons_of, identity, intervals_of
from model.evaluation import Outcomes
from model.metrics import case_metrics
from model.sequences import Histories


@dataclass(frozen=True)
class Measured:
    """Plain JSON values by model, group and metric.

    `intervals`: {"value", "low", "high"}. `against`: of every model but the reference, the
    comparison with it, {"value", "low", "high", "excludes_zero"}: of `ppl` the ratio, of the other
    metrics the difference. Groups without cases have no metrics.
    """

    intervals: dict[str, dict[str, dict[str, Any]]]
    against: dict[str, dict[str, dict[str, Any]]]


def measure(
    results: Mapping[str, Outcomes],
    groups: Mapping[str, NDArray[np.int64]],
    histories: Histories,
    *,
    reference: str,
    level: float,
    samples: int,
    seed: int,
) -> Measured:
    """Intervals of every model's metrics in every group of cases; all share their draws.

    Args:
        groups: events by name of the group.
        reference: the model that the others are compared with.
    """
    k = next(iter(results.values())).k
    # With one relevant item a case, recall is hit and precision is hit / k: they tell nothing more.
    metrics = ["ppl", f"mrr@{k}", f"hit@{k}", f"ndcg@{k}"]
    event_N = np.unique(np.concatenate(list(groups.values())))

    def columns() -> Iterator[NDArray[np.float64]]:
        for group in groups.values():
            outside_N = ~np.isin(event_N, group, assume_unique=True)
            for result in results.values():
                # PPL is the exponential of the mean of −log p.
                of_N = {"ppl": result.nll_E[event_N]}
                of_N |= case_metrics(result.rank_E[event_N], k)
                for metric in metrics:
                    yield np.where(outside_N, np.nan, of_N[metric])

    sums = UserSums.of(columns(), histories.user_E[event_N], len(histories))
    shape = (len(groups), len(results), len(metrics))
    mean_GAM = sums.mean_X.reshape(shape)
    mean_RGAM = sums.resampled(samples, seed).reshape(samples, *shape)
    names = list(results)
    of_reference = names.index(reference)
    intervals: dict[str, dict[str, Any]] = {name: {} for name in names}
    against: dict[str, dict[str, Any]] = {name: {} for name in names if name != reference}
    for g, (group, group_N) in enumerate(groups.items()):
        for a, name in enumerate(names):
            intervals[name][group] = {"cases": len(group_N)}
            if name != reference:
                against[name][group] = {"cases": len(group_N)}
            if not len(group_N):
                continue
            for m, metric in enumerate(metrics):
                transform = np.exp if metric == "ppl" else identity
                value, value_R = mean_GAM[g, a, m], mean_RGAM[:, g, a, m]
                [interval] = intervals_of(value[None], value_R[:, None], transform, level)
                intervals[name][group][metric] = interval.to_json()
                if name == reference:
                    continue
                other, other_R = mean_GAM[g, of_reference, m], mean_RGAM[:, g, of_reference, m]
                [comparison] = comparisons_of(
                    (value - other)[None], (value_R - other_R)[:, None], transform, level
                )
                against[name][group][metric] = comparison.to_json()
    return Measured(intervals, against)
