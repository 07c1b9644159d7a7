"""Training from files: memory that data takes, and time spent waiting for it, at any log size.

    python -m benchmarks.train_data --events 100000000 --seconds 60

Generates a log of Zipf-popular items into columns in files (`model.columns.new_column`: they are
in TMPDIR and gone at the end, 16 bytes an event), makes ready for training as `hrnn run` does (the
trend's choice and table, transition counts with cross-fitting, repeats) and trains the default
network on it for some seconds of steps; `--plain` leaves it at ids and times. Parts are made
smaller than the default so that several pass in that time; `--part-events` says how large.

Resident memory is that of the process beyond what it had before the log was there, without the
items' tables: anonymous memory, which it needs (the most of it, watched ten times a second, also
while making ready), and apart from it pages of the files, which the kernel takes back when somebody
else needs the memory. Waiting is the time in which a step could
have run and had no batch.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.train_throughput import LENGTH
from model.catalogue import Catalogue
from model.columns import READ_EVENTS, new_column
from model.network import NetworkSettings
from model.schema import Schema
from model.sequences import Histories
from model.train_settings import Precision, Softmax, TrainSettings
from model.trainer import Trainer
from model.trends import ResolvedTrend, TrendSettings, choose_trend, items_for_choice


def log_in_files(num_events: int, num_items: int) -> Histories:
    """As `train_throughput.random_log`, made piece by piece."""
    rng = np.random.default_rng(0)
    num_users = max(2, num_events // LENGTH)
    item_E = new_column(num_users * LENGTH, np.int64)
    timestamp_E = new_column(num_users * LENGTH, np.int64)
    place_M = rng.permutation(num_items)
    step = READ_EVENTS // LENGTH
    for user in range(0, num_users, step):
        users = min(step, num_users - user)
        part = slice(user * LENGTH, (user + users) * LENGTH)
        item_E[part] = place_M[np.minimum(rng.zipf(1.1, users * LENGTH) - 1, num_items - 1)]
        gap_UL = rng.integers(1, 7200, (users, LENGTH))
        timestamp_E[part] = (10**9 + np.cumsum(gap_UL, axis=1)).ravel()
    return Histories(
        user_ids=tuple(map(str, range(num_users))),
        item_E=item_E,
        timestamp_E=timestamp_E,
        offset_U1=np.arange(num_users + 1, dtype=np.int64) * LENGTH,
    )


def resident() -> tuple[int, int]:
    """Bytes of anonymous memory and of file pages of this process now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = dict(line.split()[:2] for line in lines if line.startswith(("RssAnon", "RssFile")))
    return 1024 * int(kb["RssAnon:"]), 1024 * int(kb["RssFile:"])


class Peak:
    """The most resident memory from now on, looked at ten times a second."""

    def __init__(self) -> None:
        self.anonymous, self.file_pages = resident()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            anonymous, file_pages = resident()
            self.anonymous = max(self.anonymous, anonymous)
            self.file_pages = max(self.file_pages, file_pages)
            time.sleep(0.1)


def chosen_trend(log: Histories, catalogue: Catalogue) -> ResolvedTrend:
    """As the train step chooses it."""
    chosen_M = items_for_choice(catalogue.item_ids, log.num_events)
    chosen_E = chosen_M[log.item_E]
    place_E = (np.cumsum(chosen_M) - 1)[log.item_E[chosen_E]]
    return choose_trend(
        place_E,
        log.timestamp_E[chosen_E],
        int(chosen_M.sum()),
        TrendSettings(),
        table_items=len(catalogue),
    )


class _TimeIsUp(Exception):  # noqa: N818 - no error
    pass


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--part-events", type=int, default=500_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--plain", action="store_true", help="no transitions, repeats, trend")
    options = parser.parse_args(arguments)
    if shutil.disk_usage(tempfile.gettempdir()).free < 20 * options.events:
        parser.error(f"{tempfile.gettempdir()} has too little room: set TMPDIR")
    network = NetworkSettings(
        embedding=options.hidden,
        hidden=options.hidden,
        dropout=0.0,
        user_dropout=0.0,
        transitions=not options.plain,
        repeats=not options.plain,
        ratings=False,
    )
    settings = TrainSettings(
        network=network,
        softmax=Softmax.SAMPLED,
        negatives=1000,
        bptt=32,
        part_events=options.part_events,
        trend_decomposition=not options.plain,
        precision=Precision.AUTO,
    )
    before, _ = resident()
    most = Peak()
    started = time.perf_counter()
    log = log_in_files(options.events, options.items)
    made = time.perf_counter()
    print(f"{log.num_events:,} events of {len(log):,} users in {made - started:.0f} s", flush=True)
    catalogue = Catalogue(tuple(map(str, range(options.items))))
    trend = None if options.plain else chosen_trend(log, catalogue)
    trainer = Trainer(log, catalogue, settings, trend, Schema())
    ready = time.perf_counter()
    tables = sum(table.nbytes for table in trainer.tables)
    tables *= 2  # and their moving average
    made_ready = most.anonymous - before - tables
    print(f"trainer ready in {ready - made:.0f} s, {made_ready / 1e9:.2f} GB", flush=True)
    done, steps = trainer.start_epoch(), 0
    began = time.perf_counter()
    skipped = 0.0  # the first part's reading: nothing to do meanwhile, once an epoch

    def after_step() -> None:
        nonlocal steps, began, skipped
        if not steps:
            began, skipped = time.perf_counter(), trainer.waiting
        steps += 1
        if time.perf_counter() - began > options.seconds:
            raise _TimeIsUp

    with contextlib.suppress(_TimeIsUp):
        trainer.epoch(done, after_step)
    seconds = time.perf_counter() - began
    result = {
        "events": log.num_events,
        "steps": steps,
        "parts": done.part + 1,
        "events_per_second": (steps - 1) * settings.batch_events / seconds,
        "first_wait_seconds": skipped,
        "waiting_share": (trainer.waiting - skipped) / seconds,
        "making_ready_seconds": ready - made,
        "making_ready_bytes": made_ready,
        "data_bytes": most.anonymous - before - tables,
        "file_page_bytes": most.file_pages,
    }
    print(
        "| events | made ready in | parts passed | events/s | waiting | "
        "memory of data and training | file pages |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {log.num_events:,} | {result['making_ready_seconds']:.0f} s | {result['parts']} | "
        f"{result['events_per_second']:,.0f} | "
        f"{result['waiting_share']:.1%} | {result['data_bytes'] / 1e9:.2f} GB | "
        f"{result['file_page_bytes'] / 1e9:.2f} GB |"
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
