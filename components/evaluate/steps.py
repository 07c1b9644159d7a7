"""Evaluate: candidate and baselines on the same held-out users → metrics and a report."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from components.digests import code_digest, tables_digest
from components.evaluate.champion import load_champion
from components.evaluate.document import FORMAT, FORMAT_VERSION
from components.evaluate.measure import Measured, measure
from components.evaluate.report import render
from components.evaluate.request_time import request_time_effect
from model import bundle as bundles
from model.baselines.popularity import Popularity
from model.baselines.transition_counts import TransitionCounts
from model.bootstrap import UserSums, intervals
from model.calibration import calibration, confidence
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

REFERENCE, CANDIDATE, CHAMPION = "popularity", "hrnn", "champion"
COMPARABLE = "comparable"  # read-out: the cases of "every" that the champion was not trained on
CutOff = Annotated[int, Field(ge=1)]


class EvaluateSettings(SettingsBase):
    """What is measured."""

    k: CutOff = 10  # cut-off of the ranking metrics
    more_k: tuple[CutOff, ...] = (1, 5, 20, 50)  # further cut-offs, in the JSON only
    level: float = Field(0.95, gt=0.0, lt=1.0)  # of the intervals
    samples: int = Field(1000, ge=1)  # resamplings of the test users
    seed: int = Field(0, ge=0)  # of the resamplings
    frames: int = Field(6, ge=1, le=100)  # stretches of time, equally many test events in each


def run(
    clean: Path,
    bundle: Path,
    evaluation: Path,
    report: Path,
    *,
    settings: dict[str, Any],
    model_store: str = "",
    inputs: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure the bundle, the champion and the baselines on the bundle's test users.

    Writes the metrics as JSON to `evaluation` and a self-contained HTML page to `report`.

    Args:
        model_store: where the champion is; empty: there is none.
        inputs: addresses of the artifacts that were measured, for the record.

    Raises:
        BundleError: the bundle, or the champion's, cannot be loaded.
        InputError: the champion's bundle is gone.
        UnavailableError: the model store cannot be read.
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
    data_digest = tables_digest(clean)
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".champion-", dir=evaluation.parent) as work:
        champion = load_champion(model_store, clean, loaded, data_digest, Path(work))
    models: dict[str, NextItemModel] = {CANDIDATE: hrnn}
    asked = {}  # of models that read other fields of the same events
    if champion is not None and champion.model is not None and champion.test is not None:
        models[CHAMPION] = champion.model
        asked[CHAMPION] = champion.test
    models |= {
        REFERENCE: Popularity(len(catalogue)).fit(train),
        TransitionCounts.name: TransitionCounts(len(catalogue)).fit(train),
    }
    references = [name for name in (REFERENCE, CHAMPION) if name in models]
    train_count_M = np.bincount(train.item_E, minlength=len(catalogue))
    percentile_M = popularity_percentile(train_count_M)
    every_N = later_events(test)
    read_outs = {"last": last_events(test), "every": every_N}
    if champion is not None and champion.comparable_E is not None:
        read_outs[COMPARABLE] = every_N[champion.comparable_E[every_N]]
    kinds = {
        name: np.flatnonzero(mask_E)
        for name, mask_E in slices(test, train_count_M, hrnn.encodings.session_gap).items()
    }
    frames, frame_events = _frames(test, every_N, chosen.frames)

    ks = (chosen.k, *(k for k in chosen.more_k if k != chosen.k))
    results = {
        removed: {
            name: outcomes(model, asked.get(name, test), len(catalogue), ks, removed, percentile_M)
            for name, model in models.items()
        }
        for removed in (False, True)
    }

    def measured(removed: bool, groups: dict[str, NDArray[np.int64]]) -> Measured:
        return measure(
            results[removed],
            groups,
            test,
            references=references,
            level=chosen.level,
            samples=chosen.samples,
            seed=chosen.seed,
        )

    kept, removed = measured(False, read_outs | kinds | frame_events), measured(True, read_outs)
    metrics: dict[str, Any] = {}
    for name in models:
        metrics[name] = {
            **_read_outs(results[False][name], read_outs, chosen.k),
            "more_k": _read_outs(results[False][name], read_outs, *ks[1:]),
            "intervals": {r: kept.intervals[name][r] for r in read_outs},
            "slices": {kind: kept.intervals[name][kind] for kind in kinds},
            "frames": {frame: kept.intervals[name][frame] for frame in frame_events},
            "seen_removed": {
                **_read_outs(results[True][name], read_outs, chosen.k),
                "intervals": removed.intervals[name],
            },
        }
        for reference in references:
            if name == reference:
                continue
            against = kept.against[reference][name]
            metrics[name][f"against_{reference}"] = {
                **{r: against[r] for r in read_outs},
                "slices": {kind: against[kind] for kind in kinds},
                "seen_removed": removed.against[reference][name],
            }
        every, ndcg = metrics[name]["every"], f"ndcg@{chosen.k}"
        print(f"{name:18s} PPL {every['ppl']:8.1f}  {ndcg} {every[ndcg]:.4f}", flush=True)
    if champion is not None and champion.problem:
        print(f"the champion {champion.version} was not measured: {champion.problem}")
    entropy_E, first_E, right_E = confidence(hrnn, test, len(catalogue))
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "protocol": {
            "split": "user",
            **split_settings.model_dump(),
            "ranking": "full catalogue, nothing removed, expected rank on ties",
            "seen_removed": "the same without the items of the user's earlier events (the chosen "
            "item always stays)",
            "read_outs": {
                "last": "the last event of every test user",
                "every": "every event of every test user but the first",
                COMPARABLE: champion.basis if champion is not None else "",
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
        "champion": None
        if champion is None
        else {"version": champion.version, "problem": champion.problem},
        "data_digest": data_digest,
        "code_digest": code_digest(),
        "inputs": inputs or {},
        "models": metrics,
        "frames": frames,
        "values": _values(hrnn, train, test, chosen),
        "calibration": calibration(
            entropy_E[every_N],
            first_E[every_N],
            right_E[every_N],
            results[False][CANDIDATE].nll_E[every_N],
        ),
        "request_time": request_time_effect(loaded, test, chosen.k, chosen.seed),
    }
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
                "Trend weight β": hrnn.network.describe_beta(),
                "Session gap": f"{hrnn.encodings.session_gap:,} s",
                "Data (SHA-256)": data_digest,
                "Code": code_digest(),
            },
        )
    )
    return document


def _frames(
    test: Histories, event_N: NDArray[np.int64], frames: int
) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.int64]]]:
    """Stretches of time with equally many cases: their bounds, and the events of each."""
    ordered = event_N[np.argsort(test.timestamp_E[event_N], kind="stable")]
    parts = [part for part in np.array_split(ordered, frames) if len(part)]
    bounds = [
        {
            "name": f"frame/{f}",
            "start": int(test.timestamp_E[part[0]]),
            "end": int(test.timestamp_E[part[-1]]),
        }
        for f, part in enumerate(parts)
    ]
    return bounds, {f"frame/{f}": np.sort(part) for f, part in enumerate(parts)}


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
