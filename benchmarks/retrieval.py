"""Exact top-N against the machine's memory speed, one query and a batch, per method.

    OMP_NUM_THREADS=2 python -m benchmarks.retrieval --items 1000000 --size 128

The limit for one query is reading the table that the method scans, once, at the speed measured in
the same run (the best of reading a float32 table through a sum and through a maximum). Every
answer is compared with scoring and sorting all items; `recall` is the share of items in common.

    python -m benchmarks.retrieval --clusters 1000 --approximate 0.95 0.99 --top 100

also measures the optional approximate index. Its speed depends on how much items resemble each
other: vectors without any order are its worst case, so here they lie around so many centres.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch

from benchmarks.machine import seconds
from model.retrieval import Allowed, Ask, Method, Retrieval, brute_force


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--top", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clusters", type=int, default=0, help="centres of items; 0: none")
    parser.add_argument("--approximate", type=float, nargs="*", default=[], help="recalls")
    parser.add_argument("--touched", type=int, default=400, help="items the priors change")
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(0)
    items = options.items
    w_MD = rng.standard_normal((items, options.size), dtype=np.float32)
    b_M = rng.standard_normal(items, dtype=np.float32)
    if options.clusters:
        centre_KD = rng.standard_normal((options.clusters, options.size), dtype=np.float32)
        w_MD *= 0.5
        w_MD += centre_KD[rng.integers(options.clusters, size=items)]
    table = torch.from_numpy(w_MD)
    read = min(seconds(table.sum, 5), seconds(table.view(-1).view(torch.int64).max, 5))
    print(f"{torch.get_num_threads()} threads; reading the float32 table: {read * 1e3:.1f} ms")
    half = table.bfloat16()
    x_BD = torch.from_numpy(rng.standard_normal((options.batch, options.size), dtype=np.float32))
    for name, rows in (("1", 1), (str(options.batch), options.batch)):
        x = x_BD[:rows].bfloat16().T.contiguous()
        out = torch.empty(items, rows, dtype=torch.bfloat16)
        took = seconds(lambda x=x, out=out, half=half: torch.mm(half, x, out=out), 3)
        print(f"bfloat16 products alone, {name} queries: {took * 1e3:.1f} ms")
    del half
    chosen = Retrieval(w_MD, b_M)
    print(f"chosen at load: {chosen.method}, batches from {chosen.batch_from} queries")

    def ask(top_n: int) -> Ask:
        touched = np.sort(rng.choice(items, options.touched, replace=False))
        bonus = rng.random(options.touched, dtype=np.float32)
        x_D = rng.standard_normal(options.size, dtype=np.float32)
        return Ask(x_D, top_n, Allowed(items), touched, bonus)

    for recall in options.approximate:
        x_BD = rng.standard_normal((256, options.size), dtype=np.float32)
        started = time.perf_counter()
        found = Retrieval(w_MD, b_M, chosen.method).approximate(recall, x_BD)
        print(
            f"approximate, asked for {recall}: recall {found.recall:.4f} with {found.probes} of "
            f"{found.lists} lists, {found.seconds * 1e3:.2f} ms a query (exact "
            f"{found.exact_seconds * 1e3:.2f} ms), built in {time.perf_counter() - started:.0f} s",
            flush=True,
        )

    rows = []
    print("| method | top | queries | ms | times the limit of one read | recall |")
    print("|---|---|---|---|---|---|")
    for method, share in ((Method.INT8, 0.25), (Method.FLOAT32, 1.0)):
        index = chosen if method is chosen.method else Retrieval(w_MD, b_M, method)
        for top_n in options.top:
            for batch in (1, options.batch):
                asks = [ask(top_n) for _ in range(batch)]
                rounds = max(3, options.rounds // (1 if batch == 1 else 5))
                took = seconds(lambda asks=asks, index=index: index.top(asks), rounds)
                found = index.top(asks[:3])
                common = [
                    len(np.intersect1d(f.item_C, brute_force(w_MD, b_M, a).item_C)) / top_n
                    for f, a in zip(found, asks, strict=False)
                ]
                recall, ratio = float(np.mean(common)), took / (read * share)
                rows.append(
                    {
                        "method": method.value,
                        "top": top_n,
                        "queries": batch,
                        "seconds": took,
                        "times_limit": ratio,
                        "recall": recall,
                    }
                )
                print(
                    f"| {method} | {top_n} | {batch} | {took * 1e3:.1f} | {ratio:.1f} "
                    f"| {recall:.4f} |",
                    flush=True,
                )
    print(json.dumps({"items": items, "size": options.size, "read_seconds": read, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
