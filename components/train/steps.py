"""Train: clean tables → model bundle."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from components.warm_start.steps import resolve, told
from model import bundle as bundles
from model.checkpoint import digest_of
from model.distributed import Processes
from model.errors import InputError
from model.manifest import MANIFEST, Manifest
from model.splits import split_users
from model.store import ModelStore
from model.tables import Log
from model.training import TrainSettings, fit
from model.trends import TrendSettings, choose_trend, items_for_choice, snapshot_from_counts
from model.warm_start import Start

__all__ = ["TrainSettings", "run"]


def run(
    clean: Path,
    bundle: Path,
    *,
    trend: dict[str, Any],
    settings: dict[str, Any],
    checkpoints: Path | None = None,
    model_store: str = "",
    start: str | None = None,
) -> Manifest:
    """Train on the training users of `clean` and write a bundle.

    In a process group (`components.train.job`) all train together; rank 0 prints and writes.

    Args:
        checkpoints: a folder that outlives this process; every training run has a folder of its
            own in it, named by its settings and data, and a run that was interrupted goes on there.
        model_store: folder or address of the store that `train.warm_start` refers to.
        start: version that `train.warm_start` was found to mean ("": a start at random); None: it
            is looked up now.

    Raises:
        InputError: wrong settings, too little data, or no such version to start from.
        UnavailableError: a checkpoint cannot be written, or the model store cannot be read.
    """
    train_settings = TrainSettings.parse(settings, "train")
    trend_settings = TrendSettings.parse(trend, "trend")
    log = Log.read(clean, shown=train_settings.feedback.lists)
    schema, catalogue, histories = log.schema, log.catalogue, log.histories
    split = split_users(histories, train_settings.split)
    processes = Processes.current()

    def say(line: str) -> None:
        if processes.rank == 0:
            print(line, flush=True)

    say(
        f"{len(split.train):,} training, {len(split.valid):,} validation, {len(split.test):,} test"
        f" users; {split.train.num_events:,} training events; {len(catalogue):,} items"
        + f"; {processes.size} processes"
        * (processes.size > 1)
    )
    if left_out := len(histories) - sum(map(len, (split.train, split.valid, split.test))):
        say(f"{left_out:,} users left out: they have too few events to learn or to test by")
    # On the whole log, like the features step: the trend that is served must be the one
    # trained with.
    chosen_M = items_for_choice(catalogue.item_ids, histories.num_events)
    chosen_E = chosen_M[histories.item_E]
    resolved = choose_trend(
        (np.cumsum(chosen_M) - 1)[histories.item_E[chosen_E]],
        histories.timestamp_E[chosen_E],
        int(chosen_M.sum()),
        trend_settings,
        table_items=len(catalogue),
    )
    if start is None:  # the same for all processes, whatever is promoted meanwhile
        start = processes.once(lambda: resolve(train_settings.warm_start, model_store))
        say(told(train_settings.warm_start, start))
    if checkpoints is not None:
        data = histories.item_E, histories.timestamp_E, list(catalogue.item_ids)
        checkpoints = checkpoints / digest_of(settings, trend, start, *data)[:16]
    with _older(train_settings.warm_start, start, model_store) as older:
        model = fit(
            split.train,
            split.valid,
            catalogue,
            train_settings,
            resolved if train_settings.trend_decomposition else None,
            schema,
            progress=say,
            checkpoints=checkpoints,
            start=None if older is None else Start(older.model.network, older.catalogue),
        )
    # "Now" is the log's own end: everything that happened up to it counts.
    as_of = int(histories.timestamp_E.max()) + 1
    oldest = as_of - resolved.window_seconds if resolved.window_seconds else 0
    count_M = histories.item_counts(len(catalogue), since=oldest)
    counted = np.flatnonzero(count_M)
    snapshot = snapshot_from_counts(
        [catalogue.item_ids[j] for j in counted],
        count_M[counted],
        num_items=len(catalogue),
        smoothing=resolved.smoothing,
        as_of=as_of,
        window_seconds=resolved.window_seconds,
    )
    best = min(model.curve, key=lambda entry: entry["valid_loss"])
    metrics = {
        "training": {
            "best_epoch": best["epoch"],
            "valid_ppl": best["valid_ppl"],
            "seconds": sum(entry["seconds"] for entry in model.curve),
            "users": len(split.train),
            "events": split.train.num_events,
            "warm_start": None if older is None else older.manifest.model_version,
        },
        "curve": model.curve,
    }

    def save() -> Manifest:
        return bundles.save(
            bundle,
            model=model,
            catalogue=catalogue,
            schema=schema,
            settings=train_settings,
            trend=snapshot,
            metrics=metrics,
        )

    return processes.once(save)


@contextmanager
def _older(wanted: str, start: str, model_store: str) -> Iterator[bundles.Bundle | None]:
    """The bundle that training starts from; None: at random.

    Raises:
        InputError: the folder `wanted` holds another version by now, or the store lacks it.
    """
    if not start:
        yield None
        return
    folder = Path(wanted)
    if not (folder / MANIFEST).exists():
        with tempfile.TemporaryDirectory() as work:
            yield bundles.load(ModelStore(model_store).fetch(start, Path(work)))
        return
    older = bundles.load(folder)
    if (found := older.manifest.model_version) != start:
        raise InputError(
            f"train.warm_start: {wanted} holds version {found} by now, not {start} as when this "
            "run began: run it again"
        )
    yield older
