"""A new item is put to the collector and recommended from its metadata: real processes."""

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from feature_repo.settings import FeatureStoreSettings
from model.query import ItemFilter, Query
from model.recommender import Recommender
from serving.client import Client
from serving.event_client import EventClient
from serving.launcher import LocalServing
from serving.settings import COLLECTOR, PREDICTOR, TRANSFORMER, ServeSettings
from tests.e2e.processes import NOW, metric, random_bundle, until
from tests.feature_store import fill

REPLICA = ServeSettings().with_free_ports()  # a second predictor's ports
ODD = {"parity": frozenset({"odd"})}


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def serving(bundle_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    features = FeatureStoreSettings(root=str(folder / "features"))
    fill(features, {}, Recommender.load(bundle_dir).trend)
    settings = ServeSettings(event_log=f"sqlite:///{folder}/events.db").with_free_ports()
    # Both replicas of the last test; calls go in turn to those that are up.
    ports = settings.predictor_grpc_port, REPLICA.predictor_grpc_port
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    settings = settings.model_copy(update={"predictor_host": f"ipv4:{addresses}"})
    with LocalServing(bundle_dir, features, settings, folder / "logs") as serving:
        yield serving


@pytest.fixture(scope="module")
def client(serving):
    with Client(serving.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def collector(serving):
    with closing(EventClient(serving.settings.collector_url, timeout=30)) as events:
        yield events


def found(client, item, where=ODD):
    """The item's row in an answer that it alone may be in; None: it is not."""
    item_filter = ItemFilter(include=frozenset({item}), where=where)
    answer = client.recommend(timestamp=NOW, num_results=5, item_filter=item_filter)
    assert answer.degraded == ()
    return answer.items[0] if answer.items else None


def test_an_item_put_is_recommended_and_nothing_fails_meanwhile(
    client, collector, serving, bundle_dir
):
    recommender = Recommender.load(bundle_dir)
    assert found(client, "brand new") is None
    stop, versions, failures = threading.Event(), set(), []

    def ask():
        with Client(serving.url, timeout=30) as own:
            while not stop.is_set():
                try:
                    answer = own.recommend("u1", timestamp=NOW, num_results=400)
                except Exception as error:
                    failures.append(error)
                    return
                versions.add((answer.model_version, answer.degraded, len(answer.items)))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        collector.put_item("brand new", {"parity": "odd"})
        until(lambda: found(client, "brand new"))
        for n in range(3):
            collector.put_item(f"more {n}", {"parity": "even"})
        until(lambda: found(client, "more 2", where={}))
    finally:
        stop.set()
        asking.join()
    assert not failures
    assert versions == {(recommender.version, (), 400)}
    row = found(client, "brand new")
    grown = recommender.with_items(
        {name: {} for name in ("brand new", "more 0", "more 1", "more 2")}
    )
    now = recommender.trend
    beta = grown.beta_under(now.item_ids, now.log_q, now.floor)
    assert row.trend == pytest.approx(beta * now.floor)  # the snapshot does not list it
    # The rest of the catalogue is as it was, with the new item among it where it belongs.
    answer = client.recommend(timestamp=NOW, num_results=600)
    assert [i.item_id for i in answer.items] == [
        i.item_id for i in sorted(answer.items, key=lambda i: (-i.score, i.item_id))
    ]
    assert {"brand new", "more 0", "i001"} <= {i.item_id for i in answer.items}
    before = {i.item_id: i.affinity for i in recommender.recommend([Query([], NOW)], 600)[0]}
    for item in answer.items:
        if item.item_id in before:
            assert item.affinity == pytest.approx(before[item.item_id], abs=1e-4)


def test_changed_fields_count_and_unfit_ones_are_left_out(client, collector, serving):
    assert found(client, "i002") is None
    collector.put_item("i002", {"parity": "odd", "unheard of": 5})
    until(lambda: found(client, "i002"))
    collector.put_item("strange", {"parity": ["no", "text"]})
    until(lambda: found(client, "strange", where={}))
    assert found(client, "strange") is None
    collector.put_item("i002", {"parity": "even"})  # as it was
    until(lambda: found(client, "i002") is None)


def test_it_stays_when_the_collector_is_away_and_comes_back_with_the_predictor(
    client, collector, serving
):
    collector.put_item("stays", {"parity": "odd"})
    until(lambda: found(client, "stays"))
    serving.processes[PREDICTOR].kill()
    serving.processes[PREDICTOR].wait()
    serving.start_one(PREDICTOR)
    serving.wait_ready(PREDICTOR, 120)
    until(lambda: client.recommend(timestamp=NOW).degraded == ())  # connected again
    until(lambda: found(client, "stays"))
    serving.processes[COLLECTOR].kill()
    serving.processes[COLLECTOR].wait()
    assert found(client, "stays") is not None
    serving.start_one(COLLECTOR)
    serving.wait_ready(COLLECTOR, 120)
    collector.put_item("after that", {"parity": "odd"})
    until(lambda: found(client, "after that"))


class Second(LocalServing):
    """Another predictor of the same model, which knows of no new items."""

    roles = (PREDICTOR,)


def test_replicas_with_other_items_end_a_search_of_several_rounds(
    client, collector, serving, bundle_dir, tmp_path
):
    recommender = Recommender.load(bundle_dir)
    collector.put_item("of one replica alone", {"parity": "odd"})
    until(lambda: found(client, "of one replica alone"))
    # So many items that the model lacks trend most that the first round's list is a small part.
    base = recommender.trend
    strangers = tuple(f"stranger {n}" for n in range(20_000))
    log_q = np.concatenate([np.full(len(strangers), base.log_q[0] + 500.0), base.log_q])
    trend = replace(base, item_ids=strangers + base.item_ids, log_q=log_q)
    features = FeatureStoreSettings(root=serving.settings.feature_root)
    expected = [
        item.item_id for item in recommender.recommend([Query([], NOW)], 12, trend=trend)[0]
    ]
    with Second(bundle_dir, features, REPLICA, tmp_path):
        fill(features, {}, trend)
        until(lambda: client.recommend(timestamp=NOW, num_results=5).trend_version == trend.version)

        def restarted():
            """Searches that took more rounds than one replica alone needs."""
            answer = client.recommend(timestamp=NOW, num_results=12)
            assert answer.degraded == ()
            trained = [i.item_id for i in answer.items if i.item_id in recommender.item_ids]
            assert trained == expected[: len(trained)] and len(trained) >= 5
            count, least = (
                metric(serving, TRANSFORMER, f"hrnn_threshold_rounds_{name}", **labels)
                for name, labels in (("count", {}), ("bucket", {"le": "2.0"}))
            )
            return count - least

        until(lambda: restarted() >= 3)
