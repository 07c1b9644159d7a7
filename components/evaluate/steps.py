"""Evaluate: candidate and baselines on the same held-out users → metrics and a report."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from components.evaluate.measure import Measured, measure
from components.evaluate.report import render
from model import bundle as bundles
from model.baselines.popularity import Popularity
from model.baselines.transition_counts import TransitionCounts
from model.bootstrap import UserSums, intervals
from model.evaluation import (
    NextItemModel,
    Outcomes,
    ValueModel,
    last_events,
    later_events,
    outcomes,
    split_users,
    squared_errors,
    summarise,
)
from model.metrics import popularity_percentile
from model.sequences import Histories
from model.settings import SettingsBase
from model.slices import slices
from model.tables import Log
from model.trends import ResolvedTrend

REFERENCE = "popularity"
CutOff = Annotated[int, Field(ge=1)]


class EvaluateSettings(SettingsBase):
    """What is measured."""

    k: CutOff = 10  # cut-off of the ranking metrics
    more_k: tuple[CutOff, ...] = (1, 5, 20, 50)  # further cut-offs, in the JSON only
    level: float = Field(0.95, gt=0.0, lt=1.0)  # of the intervals
    samples: int = Field(1000, ge=1)  # resamplings of the test users
    seed: int = Field(0, ge=0)  # of the resamplings


def run(
    clean: Path, bundle: Path, evaluation: Path, report: Path, *, settings: dict[str, Any]
) -> dict[str, Any]:
    """Measure the bundle and the popularity baseline on the bundle's test users.

    Writes the metrics as JSON to `evaluation` and a self-contained HTML page to `report`.

    Raises:
        BundleError: the bundle cannot be loaded.
    """
    chosen = EvaluateSettings.parse(settings, "evaluate")
    loaded = bundles.load(bundle)
    catalogue, split_settings = loaded.catalogue, loaded.settings.split
    histories = Log.read(clean, loaded.schema, catalogue).histories
    split = split_users(histories, split_settings)
    train, test = split.train, split.test
    hrnn = loaded.model
    # The trend in force at a test event is counted from training users before its period.
    hrnn.trend_log = train
    models: dict[str, NextItemModel] = {
        "hrnn": hrnn,
        REFERENCE: Popularity(len(catalogue)).fit(train),
        TransitionCounts.name: TransitionCounts(len(catalogue)).fit(train),
    }
    train_count_M = np.bincount(train.item_E, minlength=len(catalogue))
    percentile_M = popularity_percentile(train_count_M)
    read_outs = {"last": last_events(test), "every": later_events(test)}
    kinds = {
        name: np.flatnonzero(mask_E)
        for name, mask_E in slices(test, train_count_M, hrnn.encodings.session_gap).items()
    }

    ks = (chosen.k, *(k for k in chosen.more_k if k != chosen.k))
    results = {
        removed: {
            name: outcomes(model, test, len(catalogue), ks, removed, percentile_M)
            for name, model in models.items()
        }
        for removed in (False, True)
    }

    def measured(removed: bool, groups: dict[str, NDArray[np.int64]]) -> Measured:
        return measure(
            results[removed],
            groups,
            test,
            reference=REFERENCE,
            level=chosen.level,
            samples=chosen.samples,
            seed=chosen.seed,
        )

    kept, removed = measured(False, read_outs | kinds), measured(True, read_outs)
    metrics: dict[str, Any] = {}
    for name in models:
        metrics[name] = {
            **_read_outs(results[False][name], read_outs, chosen.k),
            "more_k": _read_outs(results[False][name], read_outs, *ks[1:]),
            "intervals": {r: kept.intervals[name][r] for r in read_outs},
            "slices": {kind: kept.intervals[name][kind] for kind in kinds},
            "seen_removed": {
                **_read_outs(results[True][name], read_outs, chosen.k),
                "intervals": removed.intervals[name],
            },
        }
        if name != REFERENCE:
            metrics[name][f"against_{REFERENCE}"] = {
                **{r: kept.against[name][r] for r in read_outs},
                "slices": {kind: kept.against[name][kind] for kind in kinds},
                "seen_removed": removed.against[name],
            }
        every, ndcg = metrics[name]["every"], f"ndcg@{chosen.k}"
        print(f"{name:12s} PPL {every['ppl']:8.1f}  {ndcg} {every[ndcg]:.4f}", flush=True)
    document = {
        "protocol": {
            "split": "user",
            **split_settings.model_dump(),
            "ranking": "full catalogue, nothing removed, expected rank on ties",
            "seen_removed": "the same without the items of the user's earlier events (the chosen "
            "item always stays)",
            "read_outs": {
                "last": "the last event of every test user",
                "every": "every event of every test user but the first",
            },
            "intervals": f"{100 * chosen.level:g}%, bootstrap over test users, "
            f"{chosen.samples:,} resamplings",
            "session_gap_seconds": hrnn.encodings.session_gap,
            "k": chosen.k,
            "items": len(catalogue),
            "train_users": len(train),
            "test_users": len(test),
        },
        "model_version": loaded.manifest.model_version,
        "models": metrics,
        "values": _values(hrnn, train, test, chosen),
    }
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write_text(json.dumps(document, indent=1) + "\n")
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(
        render(
            document=document,
            results=results[False],
            test=test,
            train_item_counts=train_count_M,
            curve=loaded.metrics["curve"],
            model_facts={
                "Model version": loaded.manifest.model_version,
                "Trend": "none" if hrnn.trend is None else _describe(hrnn.trend),
                "Trend weight β": f"{float(hrnn.network.beta.detach()):.3f}",
                "Session gap": f"{hrnn.encodings.session_gap:,} s",
            },
        )
    )
    return document


def _describe(trend: ResolvedTrend) -> str:
    window = f"the last {trend.window_seconds:,} s" if trend.window_seconds else "everything before"
    return f"counted anew every {trend.period_seconds:,} s, from {window}"


def _read_outs(
    result: Outcomes, read_outs: dict[str, NDArray[np.int64]], *ks: int
) -> dict[str, dict[str, Any]]:
    return {name: summarise(result, event_N, ks) for name, event_N in read_outs.items()}


class _MeanValue:
    """Predicts the mean value of the training events."""

    def __init__(self, train: Histories) -> None:
        self.mean = float(np.nanmean(train.value_E)) if train.value_E is not None else float("nan")

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        return np.full(histories.num_events, self.mean)


def _values(
    model: NextItemModel, train: Histories, test: Histories, settings: EvaluateSettings
) -> dict[str, Any] | None:
    """RMSE of predicted values next to the training mean's; None where none are predicted."""
    if not isinstance(model, ValueModel):
        return None
    try:
        errors = [squared_errors(m, test) for m in (model, _MeanValue(train))]
    except ValueError:
        return None
    error_2N = [error_E[later_events(test)] for error_E in errors]
    sums = UserSums.of(error_2N, test.user_E[later_events(test)], len(test))
    if not sums.count_UX.any():
        return None
    hrnn, mean = intervals(
        sums, np.sqrt, level=settings.level, samples=settings.samples, seed=settings.seed
    )
    return {
        "cases": int(sums.count_UX[:, 0].sum()),
        "rmse": {"hrnn": hrnn.to_json(), "mean": mean.to_json()},
    }
