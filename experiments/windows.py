"""What it costs not to read long histories from their oldest event (`model.states.beginning`).

    python -m experiments.windows --bundle BUNDLE --clean DIR --window 100

Both readings of the same windows, full ranking, no trend, every user of the log who has more events
than the window (most of them were trained on: only the difference says something).
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from model.metrics import case_metrics, negative_log_likelihood, ranks
from model.query import History, Query
from model.recommender import Recommender
from model.tables import Log

EVERY = 25  # events between two windows of a user


def questions(log: Log, window: int) -> list[tuple[Query, int]]:
    """Histories of `window` events, and the catalogue position of the item that came next."""
    histories, ids = log.histories, log.catalogue.item_ids
    found = []
    for u in range(len(histories)):
        begin, end = histories.offset_U1[u : u + 2]
        user = {name: values[u] for name, values in histories.user_fields.items()}
        for k in range(begin + window, end, EVERY):
            past = slice(k - window, k)
            types, value_E = histories.event_type_E, histories.value_E
            history = History(
                [ids[j] for j in histories.item_E[past]],
                histories.timestamp_E[past].astype(np.float64),
                None if types is None else list(types[past]),
                None if value_E is None else value_E[past],
            )
            query = Query(history, float(histories.timestamp_E[k]), user)
            found.append((query, int(histories.item_E[k])))
    return found


def measure(
    recommender: Recommender, asked: list[tuple[Query, int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log p and NDCG@10 of each next item."""
    log_p, rank = [], []
    for query, target in asked:
        phi_1M = torch.from_numpy(recommender.affinities([query]))
        target_1 = torch.tensor([target])
        log_p.append(-negative_log_likelihood(phi_1M, target_1))
        rank.append(ranks(phi_1M, target_1))
    return np.concatenate(log_p), case_metrics(np.concatenate(rank), 10)["ndcg@10"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--clean", type=Path, required=True, help="clean tables of a run")
    parser.add_argument("--window", type=int, default=100, help="events of a history")
    options = parser.parse_args(arguments)
    recommender = Recommender.load(options.bundle)
    asked = questions(Log.read(options.clean), options.window)
    cut_N, cut_ndcg_N = measure(recommender, asked)
    with patch("model.recommender.beginning", lambda time_L, key_L: 0):
        whole_N, whole_ndcg_N = measure(recommender, asked)
    difference_N = whole_N - cut_N
    print(f"{len(asked):,} windows of {options.window} events")
    for name, log_p_N, ndcg_N in (
        ("whole", whole_N, whole_ndcg_N),
        ("from within the first quarter", cut_N, cut_ndcg_N),
    ):
        print(f"{name}: PPL {np.exp(-log_p_N.mean()):.1f}, NDCG@10 {ndcg_N.mean():.4f}")
    error = difference_N.std() / np.sqrt(len(asked))
    print(f"nats lost: {difference_N.mean():.4f} ± {error:.4f} (standard error)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
