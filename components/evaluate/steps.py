"""Evaluate: candidate and baselines on the same held-out users → metrics and a report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluate.report import render
from model import bundle as bundles
from model.baselines.popularity import Popularity
from model.evaluation import (
    NextItemModel,
    Outcomes,
    last_events,
    later_events,
    outcomes,
    split_users,
    summarise,
)
from model.inputs import UserFields
from model.sequences import Histories
from model.settings import SettingsBase
from model.trends import TrendTable


class EvaluateSettings(SettingsBase):
    """What is measured."""

    k: int = 10  # cut-off of the ranking metrics


def run(
    clean: Path, bundle: Path, evaluation: Path, report: Path, *, settings: dict[str, Any]
) -> dict[str, Any]:
    """Measure the bundle and the popularity baseline on the bundle's test users.

    Writes the metrics as JSON to `evaluation` and a self-contained HTML page to `report`.

    Raises:
        BundleError: the bundle cannot be loaded.
    """
    evaluate_settings = EvaluateSettings.parse(settings, "evaluate")
    loaded = bundles.load(bundle)
    catalogue, split_settings = loaded.catalogue, loaded.settings.split
    histories = UserFields.read(clean, loaded.schema).attach(
        Histories.from_table(clean / "interactions.parquet", catalogue)
    )
    split = split_users(histories, split_settings)
    hrnn = loaded.model
    if hrnn.trend is not None:
        # The trend in force at a test event is counted from training users before its period.
        hrnn.trend_table = TrendTable.build(
            split.train.item_E,
            split.train.timestamp_E,
            len(catalogue),
            hrnn.trend,
            np.unique(split.test.timestamp_E // hrnn.trend.period_seconds),
        )
    models: dict[str, NextItemModel] = {
        "hrnn": hrnn,
        "popularity": Popularity(len(catalogue)).fit(split.train),
    }
    results: dict[str, Outcomes] = {}
    metrics: dict[str, Any] = {}
    for name, model in models.items():
        results[name] = outcomes(model, split.test, len(catalogue), evaluate_settings.k)
        metrics[name] = {
            "last": summarise(results[name], last_events(split.test)),
            "every": summarise(results[name], later_events(split.test)),
        }
        every = metrics[name]["every"]
        ndcg = f"ndcg@{evaluate_settings.k}"
        print(f"{name:12s} PPL {every['ppl']:8.1f}  {ndcg} {every[ndcg]:.4f}", flush=True)
    document = {
        "protocol": {
            "split": "user",
            **split_settings.model_dump(),
            "ranking": "full catalogue, nothing removed, expected rank on ties",
            "read_outs": {
                "last": "the last event of every test user",
                "every": "every event of every test user but the first",
            },
            "k": evaluate_settings.k,
            "items": len(catalogue),
            "train_users": len(split.train),
            "test_users": len(split.test),
        },
        "model_version": loaded.manifest.model_version,
        "models": metrics,
    }
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write_text(json.dumps(document, indent=1) + "\n")
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(
        render(
            document=document,
            results=results,
            test=split.test,
            train_item_counts=np.bincount(split.train.item_E, minlength=len(catalogue)),
            curve=loaded.metrics["curve"],
            model_facts={
                "Model version": loaded.manifest.model_version,
                "Trend": "none" if hrnn.trend is None else str(asdict(hrnn.trend)),
                "Trend weight β": f"{float(hrnn.network.beta.detach()):.3f}",
                "Session gap": f"{hrnn.encodings.session_gap:,} s",
            },
        )
    )
    return document
