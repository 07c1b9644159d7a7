"""What this machine can do at best, measured in the run that is compared with it."""

import statistics
import time
from collections.abc import Callable

import torch


def per_second(call: Callable[[], object], seconds: float = 0.7) -> float:
    """Calls per second, after a first one that warms up."""
    call()
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        call()
        rounds += 1
    return rounds / (time.perf_counter() - started)


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def gemm_flops(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of matrix products: the best of a square one and of the losses' own shapes."""
    best = 0.0
    for n, k, m in ((1536, 1536, 1536), (1024, 128, 1000), (1024, 1000, 128)):
        a, b = torch.rand(n, k).to(dtype), torch.rand(k, m).to(dtype)
        best = max(best, 2 * n * k * m * per_second(lambda a=a, b=b: a @ b))
    return best


def copy_bytes() -> float:
    """Bytes/s that a copy of 256 MiB reads and writes."""
    source = torch.rand(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes * per_second(lambda: target.copy_(source))
