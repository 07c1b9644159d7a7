"""Training throughput against the machine's own matrix-multiplication limit, by catalogue size.

    python -m benchmarks.train_throughput --items 1000 10000

The limit is what the arithmetic of one event would allow at the GEMM speed measured in the same
run: 6 FLOPs per weight that an event passes through (2 forward, 4 backward).
"""

import argparse
import json
import sys
import time

import numpy as np
import torch

from model.catalogue import Catalogue
from model.network import NetworkSettings
from model.sequences import Histories
from model.training import TrainSettings, fit


def gemm_flops(size: int = 1536, seconds: float = 1.0) -> float:
    """Measured float32 FLOP/s of a square matrix product."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    a @ b
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - started)


def random_log(num_users: int, length: int, num_items: int, seed: int) -> Histories:
    """Zipf-popular items, exponential gaps."""
    rng = np.random.default_rng(seed)
    item_E = np.minimum(rng.zipf(1.3, num_users * length) - 1, num_items - 1)
    gap_UL = rng.exponential(3600, (num_users, length))
    return Histories(
        user_ids=tuple(map(str, range(num_users))),
        item_E=item_E.astype(np.int64),
        timestamp_E=(1e9 + np.cumsum(gap_UL, axis=1)).astype(np.int64).ravel(),
        offset_U1=np.arange(num_users + 1, dtype=np.int64) * length,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--events", type=int, default=50_000)
    options = parser.parse_args(arguments)
    network = NetworkSettings(hidden=options.hidden)
    settings = TrainSettings(network=network, max_epochs=2)
    valid = random_log(2, 5, min(options.items), seed=1)
    limit = gemm_flops()
    print(f"GEMM limit {limit / 1e9:.0f} GFLOP/s")
    print("| items | events/s | share of the GEMM limit |\n|---|---|---|")
    rows = []
    for num_items in options.items:
        log = random_log(options.events // 100, 100, num_items, seed=0)
        model = fit(log, valid, Catalogue(tuple(map(str, range(num_items)))), settings, None)
        # The first epoch warms caches and allocators up.
        speed = log.num_events / (model.curve[-1]["seconds"])
        inputs = network.embedding + network.control + 1
        weights = 3 * network.hidden * (inputs + network.hidden)
        weights += network.hidden * network.embedding + network.embedding * num_items
        share = 6 * weights * speed / limit
        rows.append({"items": num_items, "events_per_second": speed, "gemm_share": share})
        print(f"| {num_items:,} | {speed:,.0f} | {share:.0%} |", flush=True)
    print(json.dumps({"gemm_flops": limit, "hidden": options.hidden, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
