"""What the tests of the real serving processes share: a random bundle, a store, the launcher."""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from model import bundle
from model.catalogue import Catalogue
from model.fields import FieldBags, FieldEncoding
from model.inputs import InputEncodings
from model.network import HRNNMeta
from model.recommender import Recommender
from model.schema import FieldKind, Schema
from model.training import TrainedHRNN, TrainSettings
from model.transitions import Transitions
from model.trends import ResolvedTrend, snapshot_from_counts
from serving.launcher import LocalServing
from serving.settings import ServeSettings
from tests import synthetic

ITEMS = tuple(f"i{j:03}" for j in range(500))
NOW = 1_000_000
HISTORY = [(f"i{7 * k % 500:03}", 900_000 + 3000 * k) for k in range(20)]
RATED = [  # the same with what the user made of it
    (item, timestamp, ("play", "skip", None)[k % 3], (5.0, None, 1.5, 4.0)[k % 4])
    for k, (item, timestamp) in enumerate(HISTORY)
]


def random_bundle(path, seed=0, fields=None, kinds=None):
    """A bundle with random weights: serving is about passing things on, not about accuracy.

    `fields`: of the items, by name, beside `parity`; `kinds`: theirs.
    """
    torch.manual_seed(seed)
    settings = TrainSettings()
    categorical, numeric = FieldKind.CATEGORICAL, FieldKind.NUMERIC
    encodings = InputEncodings(
        num_items=len(ITEMS),
        session_gap=3600,
        context_fields=(
            FieldEncoding(name="device", kind=categorical, vocabulary=("tv", "phone", "7")),
            FieldEncoding(name="volume", kind=numeric, knots=(0.0, 5.0, 10.0)),
        ),
        event_type=FieldEncoding(name="event_type", kind=categorical, vocabulary=("play", "skip")),
        value_mean=3.0,
        value_std=1.2,
    )
    no_fields = FieldBags.encode((), {}, len(ITEMS))
    network = HRNNMeta(settings.network, encodings, no_fields, with_trend=True)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
        network.values.user.weight.normal_(std=0.1)
        network.values.mean_M.normal_(std=0.3)
        network.values.taste_MY.normal_(std=0.3)
    past = synthetic.successor(100, 20, len(ITEMS), seed=0)
    counts = [(j * 37) % 101 for j in range(400)]
    trend = snapshot_from_counts(
        ITEMS[:400], counts, num_items=500, smoothing=1.0, as_of=NOW, window_seconds=0
    )
    bundle.save(
        path,
        model=TrainedHRNN(
            network,
            encodings,
            ResolvedTrend(86_400, 0, 1.0),
            Transitions.count(past, len(ITEMS)),
        ),
        catalogue=Catalogue(
            ITEMS, {"parity": [["even", "odd"][j % 2] for j in range(500)], **(fields or {})}
        ),
        schema=Schema(
            items={"parity": categorical, **(kinds or {})},
            context={"device": categorical, "volume": numeric},
        ),
        settings=settings,
        trend=trend,
        metrics={},
    )
    return path


USERS = {"u1": {"history": HISTORY}, "rater": {"history": RATED}}


class Store:
    """The file behind fake_store_transformer.py."""

    def __init__(self, path, trend):
        self.path = path
        self.values = {"users": USERS, "trend": trend.to_json()}
        self.write()

    def write(self, **changes):
        self.values |= changes
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values))
        temporary.replace(self.path)


class Serving(LocalServing):
    """Both processes, the transformer on the file store."""

    def command(self, role):
        if role == "predictor":
            return super().command(role)
        return [sys.executable, str(Path(__file__).with_name("fake_store_transformer.py"))]


@contextmanager
def started(model_dir, bundle_dir, folder, **settings):
    """Both processes, ready; `serving.store` is the transformer's store."""
    store = Store(folder / "store.json", Recommender.load(bundle_dir).trend)
    values = {"trend_refresh_seconds": 0.2, "grace_seconds": 3} | settings
    features = SimpleNamespace(root=str(folder), online="sqlite", redis_url=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_STORE", str(store.path))
        with Serving(
            model_dir, features, ServeSettings(**values).with_free_ports(), folder / "logs"
        ) as serving:
            serving.store = store
            yield serving


def metric(serving, role, name, **labels):
    """A sample's value; 0 while it is not there."""
    text = httpx.get(serving.metrics_urls[role], trust_env=False).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


def is_ready(url):
    try:
        return httpx.get(f"{url}/v2/health/ready", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)
