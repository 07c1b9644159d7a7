"""Trend snapshots as rows of the feature store."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from feature_repo.names import CATALOGUE_ID, JOIN_KEY
from model.trends import TrendSnapshot


def truncate(snapshot: TrendSnapshot, top_items: int) -> TrendSnapshot:
    """Keep the `top_items` most popular items; all others share one floor.

    The floor becomes the mean mass of the items no longer listed, so the distribution still sums
    to one: log((Σ_dropped q + (M − T)·exp(floor)) / (M − T')). A snapshot that is short enough
    comes back unchanged.
    """
    if len(snapshot.item_ids) <= top_items:
        return snapshot
    uncounted = snapshot.num_items - len(snapshot.item_ids)
    # Summed directly: 1 − Σ_kept would cancel when nearly all mass is kept.
    mass = math.fsum(np.exp(snapshot.log_q[top_items:])) + uncounted * math.exp(snapshot.floor)
    return replace(
        snapshot,
        item_ids=snapshot.item_ids[:top_items],
        log_q=snapshot.log_q[:top_items],
        floor=math.log(mass / (snapshot.num_items - top_items)),
    )


def to_row(snapshot: TrendSnapshot) -> dict[str, Any]:
    """Feature values by name, with the catalogue's key."""
    return {JOIN_KEY["catalogue"]: CATALOGUE_ID, **snapshot.to_json()}


def from_row(row: Mapping[str, Any]) -> TrendSnapshot | None:
    """Inverse of `to_row`; None when the row was never written."""
    return None if row["as_of"] is None else TrendSnapshot.from_json(row)
