"""Figures of several models on the same cases, with intervals and paired comparisons.

Shapes: E events, N cases of all groups, G groups of cases, X columns (group, model, metric),
R resamplings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.evaluate.document import CONFIDENCES
from model.bootstrap import UserSums, comparisons_of, identity, intervals_of
from model.evaluation import Outcomes
from model.metrics import case_metrics
from model.sequences import Histories


@dataclass(frozen=True)
class Measured:
    """Plain JSON values by model, group and metric.

    `intervals`: {"value", "low", "high"}. `against`: by reference, of every other model, the
    comparison with it, {"value", "low", "high", "excludes_zero", "quantiles"}: of `ppl` the ratio,
    of the other metrics the difference; `quantiles` of its resamplings by probability, for those
    who want another confidence. Groups without cases have no metrics.
    """

    intervals: dict[str, dict[str, dict[str, Any]]]
    against: dict[str, dict[str, dict[str, dict[str, Any]]]]


QUANTILES = tuple(sorted({*CONFIDENCES, *(round(1 - c, 3) for c in CONFIDENCES)}))


def measure(
    results: Mapping[str, Outcomes],
    groups: Mapping[str, NDArray[np.int64]],
    histories: Histories,
    *,
    references: Sequence[str],
    level: float,
    samples: int,
    seed: int,
) -> Measured:
    """Intervals of every model's metrics in every group of cases; all share their draws.

    Args:
        groups: events by name of the group.
        references: the models that all others are compared with.
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
    intervals: dict[str, dict[str, Any]] = {name: {} for name in names}
    against: dict[str, dict[str, dict[str, Any]]] = {
        reference: {name: {} for name in names if name != reference} for reference in references
    }
    for g, (group, group_N) in enumerate(groups.items()):
        for a, name in enumerate(names):
            intervals[name][group] = {"cases": len(group_N)}
            others = [r for r in references if r != name]
            for reference in others:
                against[reference][name][group] = {"cases": len(group_N)}
            if not len(group_N):
                continue
            for m, metric in enumerate(metrics):
                transform = np.exp if metric == "ppl" else identity
                value, value_R = mean_GAM[g, a, m], mean_RGAM[:, g, a, m]
                [interval] = intervals_of(value[None], value_R[:, None], transform, level)
                intervals[name][group][metric] = interval.to_json()
                for reference in others:
                    r = names.index(reference)
                    change, change_R = value - mean_GAM[g, r, m], value_R - mean_RGAM[:, g, r, m]
                    [comparison] = comparisons_of(change[None], change_R[:, None], transform, level)
                    against[reference][name][group][metric] = {
                        **comparison.to_json(),
                        "quantiles": _quantiles(transform(change_R)),
                    }
    return Measured(intervals, against)


def _quantiles(figure_R: NDArray[np.float64]) -> dict[str, float]:
    if np.isnan(figure_R).all():
        return {}
    values = np.nanquantile(figure_R, QUANTILES)
    return {f"{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}
