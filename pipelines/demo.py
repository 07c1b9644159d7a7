"""The demo: train on MovieLens-100K, serve, ask as several people at several times."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.catalogue import Catalogue
from model.query import Event
from pipelines import local_runner
from pipelines.serving import champion_catalogue, local_serving
from pipelines.settings import load
from pipelines.sources import Source
from pipelines.tables import console, evaluation_table, paths_table, side_by_side
from serving.client import Client, Prediction
from serving.event_client import EventClient, Sent

DATASET, USER, SHOWN = "movielens-100k", "196", 8
DAY = 86_400
VISIBLE_SECONDS = 60
NEW_ITEM, SEQUEL = "demo-new", "The sequel of {}"


def main(workspace: Path, say: Callable[[str], None]) -> None:
    """Run the whole thing and print what a person wants to see. Leaves no process behind."""
    started = time.monotonic()
    result = local_runner.run(Source(dataset=DATASET), workspace, load(), say=say)
    evaluation_table(result, sys.stdout)
    if result["verdict"] == "refused":
        for reason in result["reasons"]:
            say(f"refused: {reason}")
    history = _history(Path(result["clean"]) / "interactions.parquet", USER)
    catalogue = champion_catalogue(workspace)
    say("starting the servers")
    with (
        local_serving(workspace) as serving,
        Client(serving.url) as client,
        EventClient(serving.settings.collector_url) as events,
    ):
        _ask(client, events, catalogue, history)
        example = serving.predict_url.replace(serving.url, "http://127.0.0.1:8080")
    out = console(sys.stdout)
    paths_table(result, sys.stdout)
    out.print(
        f"\nFinished in {time.monotonic() - started:.0f} s. To go on:\n"
        "  make serve                    keep the servers up, metrics on /metrics\n"
        f"  .venv/bin/hrnn recommend --user {USER}\n"
        "  .venv/bin/hrnn run --interactions YOUR.csv\n"
        f"  curl -s {example} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"instances": [{{"user_id": "{USER}", "num_results": 5}}]}}\'',
        soft_wrap=True,
        markup=False,
    )
    print(f"\nThe evaluation report, for a browser: {result['report']}")


def _ask(client: Client, events: EventClient, catalogue: Catalogue, history: list[Event]) -> None:
    """Known user, the same a day later, the same after one more film, a new user."""
    titles = catalogue.titles

    def shown(prediction: Prediction) -> list[str]:
        return [titles.get(item.item_id, item.item_id) for item in prediction.items]

    # The log is from 1998: its last moment is this user's "now".
    now = history[-1].timestamp + 60
    known = client.recommend(USER, num_results=SHOWN, timestamp=now, exclude_seen=True)
    later = client.recommend(
        # As if nothing had happened since: the event log may hold the events of earlier demos.
        USER,
        history=history,
        timestamp=now + DAY,
        num_results=SHOWN,
        exclude_seen=True,
    )
    watched = known.items[0].item_id
    event = {
        "event_id": f"demo-{USER}-{watched}",
        "user_id": USER,
        "item_id": watched,
        "timestamp": now + 1,
        "event_type": history[-1].event_type,
        "event_value": history[-1].value and 5.0,
    }
    # The same question before and after the event: nothing else differs.
    asked: dict[str, Any] = {"timestamp": now + 60, "num_results": SHOWN, "exclude_seen": True}
    before = client.recommend(USER, **asked)
    sending = time.monotonic()
    sent = _until_visible(events, {k: v for k, v in event.items() if v is not None})
    seconds = time.monotonic() - sending
    more = client.recommend(USER, **asked)
    new = client.recommend("nobody-yet", num_results=SHOWN, timestamp=now)
    sequel: dict[str, Any] = {n: v[catalogue.index[watched]] for n, v in catalogue.fields.items()}
    if catalogue.title_field is not None:
        sequel[catalogue.title_field] = SEQUEL.format(titles.get(watched, watched))
    putting = time.monotonic()
    events.put_item(NEW_ITEM, {name: value for name, value in sequel.items() if value is not None})
    rank = _rank_of_new_item(client, now + 60, len(catalogue) + 1)
    placing = time.monotonic() - putting
    out = console(sys.stdout)
    out.print(f"\nUser {USER} watched last:", markup=False)
    for seen in history[-3:]:
        out.print(f"  {titles.get(seen.item_id, seen.item_id)}", markup=False)
    out.print(
        f"\nPOST /events: user {USER} watches {titles.get(watched, watched)}"
        f" ({'stored' if sent.stored else 'known from an earlier demo'} and visible after"
        f" {1000 * seconds:.0f} ms); {effect(before, more, watched)}",
        markup=False,
    )
    came = "not recommended in time"
    if rank:
        came = (
            f"recommended after {1000 * placing:.0f} ms, number {rank} of {len(catalogue) + 1} by"
            f" affinity to user {USER}"
        )
    out.print(
        f"PUT /items: {SEQUEL.format(titles.get(watched, watched))}, a film that no model was"
        f" trained on: {came}",
        markup=False,
    )
    side_by_side(
        {
            f"user {USER}": shown(known),
            "a day later": shown(later),
            f"after {titles.get(watched, watched)}": shown(more),
            "a new user": shown(new),
        },
        "Recommendations over HTTP",
        sys.stdout,
    )


def effect(before: Prediction, after: Prediction, item_id: str) -> str:
    """What the event with an item has changed in the answer to the same question."""
    affinity = {item.item_id: item.affinity for item in before.items}
    common = [item for item in after.items if item.item_id in affinity]
    moved = sum(abs(item.affinity - affinity[item.item_id]) > 1e-5 for item in common)
    new = len(after.items) - len(common)
    if not moved + new or item_id in {item.item_id for item in after.items}:
        return "the next answer does not show it"
    return (
        f"the next answer leaves it out: {new} of {len(after.items)} are others,"
        f" {moved} have another affinity"
    )


def _until_visible(events: EventClient, event: dict[str, Any]) -> Sent:
    """Store an event and wait until the online features have it: the first one may find the
    collector still connecting to the feature store."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    first = sent = events.send([event])
    while not sent.visible and time.monotonic() < deadline:
        sent = events.send([event])  # a duplicate, stored once
    return replace(first, visible=sent.visible)


def _rank_of_new_item(client: Client, now: float, items: int) -> int | None:
    """Its place by affinity, once it is recommended; None: it was not in time."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        # What nobody chose yet is no trend: with it, it stands behind all that is popular.
        answer = client.recommend(USER, timestamp=now, num_results=items, trend_weight=0.0)
        for rank, item in enumerate(answer.items, start=1):
            if item.item_id == NEW_ITEM:
                return rank
    return None


def _history(interactions: Path, user: str) -> list[Event]:
    table = pq.read_table(interactions, filters=pc.field("user_id") == user)
    return [
        Event(row["item_id"], row["timestamp"], row.get("event_type"), row.get("event_value"))
        for row in table.to_pylist()
    ]
