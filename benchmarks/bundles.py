"""Bundles of any catalogue size through the real writer: random weights, nothing trained."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.train_throughput import random_log
from model import bundle
from model.catalogue import Catalogue
from model.fields import FieldBags
from model.inputs import InputEncodings
from model.network import HRNNMeta
from model.schema import Schema
from model.training import TrainedHRNN, TrainSettings
from model.transitions import Transitions
from model.trends import ResolvedTrend, snapshot_from_counts

NOW = 1_700_000_000
TRENDING = 5000  # items in the snapshot, as the feature store keeps at most by default


def random_bundle(path: Path, num_items: int, seed: int = 0) -> Path:
    """A bundle that is served as a trained one is."""
    torch.manual_seed(seed)
    settings = TrainSettings()
    ids = tuple(f"i{j:07}" for j in range(num_items))
    encodings = InputEncodings(num_items=num_items, session_gap=3600)
    no_fields = FieldBags.encode((), {}, num_items)
    network = HRNNMeta(settings.network, encodings, no_fields, with_trend=True)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # scores spread as those of a trained network do
    listed = min(num_items, TRENDING)
    counts = np.random.default_rng(seed).zipf(1.3, listed).clip(max=10**6)
    trend = snapshot_from_counts(
        ids[:listed], counts, num_items=num_items, smoothing=1.0, as_of=NOW, window_seconds=0
    )
    past = random_log(100_000, num_items, seed)
    bundle.save(
        path,
        model=TrainedHRNN(
            network,
            encodings,
            ResolvedTrend(86_400, 0, 1.0),
            Transitions.count(past, num_items),
        ),
        catalogue=Catalogue(ids, {}),
        schema=Schema(),
        settings=settings,
        trend=trend,
        metrics={},
    )
    return path
