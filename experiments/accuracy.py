"""Accuracy of HRNN-meta, its ablations and its baselines: one protocol, several seeds, intervals.

    python -m experiments.accuracy --clean DIR --protocol user --models hrnn no-time popularity

DIR holds clean tables (`hrnn run` leaves them in its workspace). Protocols: `user` (whole users
held out, every event read out), `loo` (leave-one-out), `cold` (half of the items held out),
`values` (ratings of held-out users), `trend` (the last 30% of the log, current against frozen
popularity). Every result is appended to `--results` as one JSON line; `experiments.tables` makes
the tables of docs/results.md from there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from model.baselines.popularity import Popularity
from model.bootstrap import UserSums, intervals, paired_ratio
from model.evaluation import NextItemModel, cold_item_metrics, outcomes, squared_errors
from model.hrnn import TrainedHRNN
from model.sequences import Histories
from model.splits import (
    Cases,
    SplitSettings,
    later_events,
    leave_one_out,
    split_cold_items,
    split_time,
    split_users,
)
from model.tables import Log
from model.training import TrainSettings, fit
from model.trends import TrendSettings, choose_trend

# What each ablation changes in the training settings.
VARIANTS: dict[str, dict[str, Any]] = {
    "hrnn": {},
    "no-time": {"network": {"time_input": False}},
    "no-item-fields": {"network": {"item_fields": False}},
    "no-user-fields": {"network": {"user_fields": False}},
    "no-feedback": {"network": {"feedback": False}},
    "no-transitions": {"network": {"transitions": False}},
    "no-trend": {"trend_decomposition": False},
    "no-context": {
        "network": {
            "time_input": False,
            "user_fields": False,
            "item_fields": False,
            "feedback": False,
        },
        "trend_decomposition": False,
    },
    "no-averaging": {"averaging_epochs": 0.0},
    "no-tie-shuffling": {"shuffle_ties": False},
    "no-values": {"network": {"ratings": False}},
    "untied": {"network": {"tied": False}},
    "sampled-512": {"softmax": "sampled", "negatives": 512},
    "lstm": {"network": {"encoder": "lstm"}},
    "transformer": {"network": {"encoder": "transformer"}},
    "hgru": {"network": {"encoder": "hgru"}},
    "multi-hot": {"network": {"encoder": "multi_hot"}},
}


@dataclass
class Task:
    """One protocol on one log: what to fit on, and what to read out."""

    log: Log
    train: Histories
    valid: Histories | Cases
    test: Cases


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` on top, section by section."""
    result = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def fit_variant(task: Task, name: str, overrides: dict[str, Any], seed: int) -> TrainedHRNN:
    """Train HRNN-meta with one ablation."""
    settings = TrainSettings.parse(merged(merged(overrides, VARIANTS[name]), {"seed": seed}))
    trend = None
    if settings.trend_decomposition:
        items, times = task.train.item_E, task.train.timestamp_E
        trend = choose_trend(items, times, len(task.log.catalogue), TrendSettings())
    return fit(
        task.train,
        task.valid,
        task.log.catalogue,
        settings,
        trend,
        task.log.schema,
        progress=lambda line: print(f"  {name} seed {seed} {line}", file=sys.stderr, flush=True),
    )


def build(task: Task, name: str, overrides: dict[str, Any], seed: int) -> NextItemModel:
    """A fitted model by name: a variant of HRNN-meta or a baseline."""
    if name in VARIANTS:
        return fit_variant(task, name, overrides, seed)
    return BASELINES[name](task)


def _popularity(task: Task) -> NextItemModel:
    return Popularity(len(task.log.catalogue)).fit(task.train)


BASELINES: dict[str, Callable[[Task], NextItemModel]] = {"popularity": _popularity}
