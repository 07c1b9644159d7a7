"""Training throughput and memory by catalogue size, against the machine's limit and other steps.

    python -m benchmarks.train_throughput                       # the table of docs/results.md
    python -m benchmarks.train_throughput --gru4rec FOLDER      # and the official GRU4Rec's step
    python -m benchmarks.train_throughput --only 1000000:128:sampled --profile
    python -m benchmarks.train_throughput --crossover     # dense or sampled, by catalogue size
    python -m benchmarks.train_throughput --distinct --met 10000 --only 10000:128:sampled \
        1000000:128:sampled                               # what the table's size alone costs

Every configuration runs in a process of its own, on steps alone (no validation), on a log with
Zipf-popular items; the network is the plain one that is compared (ids and times in, a GRU of the
same size as the embedding; no fields, dropout, transition counts or repeats) unless `--full` is
given. Memory is the peak of resident memory beyond what importing took and beyond the tables: the
items' vectors and, with sampled softmax, their moving average. A step counts by the first decile of
its times, ours and theirs, so that other work on the machine blurs the ratios little; what share of
the processors that work took is in the last column: OpenMP's threads wait for each other several
hundred times a step, and a step takes a hundred times as long when one of them has to wait for a
processor. A machine's speed may change from minute to minute: with `--rounds` the processes of all
configurations stay and take as many turns of `--seconds` each, forwards and backwards, so that all
have met the same machine. OMP_NUM_THREADS sets the threads.

Negatives are draws, and a small catalogue's are fewer distinct items, hence fewer scores; a larger
catalogue's log has more distinct items too. With `--distinct` as many are drawn as make the wanted
number of distinct ones on average, and with `--met` the log is that of a catalogue of so many
items, spread over the table: then a step computes nearly the same at every size.

The limit is what the arithmetic of an event would allow at the float32 matrix-product speed
measured beside it: 6 FLOPs per weight an event passes through (2 forward, 4 backward). FOLDER holds
`gru4rec_pytorch.py` of the official PyTorch GRU4Rec (hidasib/GRU4Rec_PyTorch_Official); its model,
loss and optimiser are stepped as its `fit` does, at batch 1,024 or those of `--gru4rec-batches`.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import nn

from benchmarks.machine import copy_bytes, gemm_flops
from model.catalogue import Catalogue
from model.network import NetworkSettings
from model.sampling import frequency_sampler
from model.schema import Schema
from model.sequences import Histories
from model.train_settings import Precision, Softmax, TrainSettings
from model.trainer import EpochState, Trainer

BPTT, BATCH = 32, 1024
LENGTH = 200  # events of a user


def random_log(num_events: int, num_items: int, seed: int, met: int | None = None) -> Histories:
    """Zipf-popular items, exponential gaps; `met`: as in a catalogue of so many."""
    rng = np.random.default_rng(seed)
    num_users = max(2, num_events // LENGTH)
    item_E = np.minimum(rng.zipf(1.1, num_users * LENGTH) - 1, (met or num_items) - 1)
    gap_UL = rng.exponential(3600, (num_users, LENGTH))
    return Histories(
        user_ids=tuple(map(str, range(num_users))),
        item_E=rng.permutation(num_items)[item_E].astype(np.int64),
        timestamp_E=(1e9 + np.cumsum(gap_UL, axis=1)).astype(np.int64).ravel(),
        offset_U1=np.arange(num_users + 1, dtype=np.int64) * LENGTH,
    )


def draws_for(distinct: int, log: Histories, num_items: int) -> int:
    """How many draws make so many distinct negatives on average."""
    q_M = frequency_sampler(log.item_counts(num_items)).log_q_M.double().exp().numpy()

    def missing(draws: float) -> float:
        return distinct + np.expm1(-draws * q_M).sum()

    return round(brentq(missing, distinct / 2, 1e3 * distinct))


def peak_bytes() -> int:
    """The most resident memory so far (ru_maxrss would have that of the parent process)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise SystemExit("/proc/self/status does not tell the peak of memory")


def processor_seconds() -> tuple[float, float]:
    """Time that all processes, and this one, have spent on the processors so far."""
    busy = list(map(int, Path("/proc/stat").read_text().split()[1:9]))
    ticks = sum(busy) - busy[3] - busy[4]  # without idle and waiting for disks
    own = resource.getrusage(resource.RUSAGE_SELF)
    return ticks / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime


class _TimeIsUp(Exception):  # noqa: N818 - no error
    pass


class Stopwatch:
    """The steps of one process: it warms up, and then steps when it is its turn.

    It is told to begin a turn by a line on its standard input, and writes one when it is ready and
    after every turn.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._warm, self._seconds, self._left = config["warm"], config["seconds"], config["rounds"]
        self._steps: list[float] = []
        self._others = self._measured = 0.0
        self._last = self._end = 0.0

    def after_step(self) -> None:
        """Called between steps; raises _TimeIsUp after the last one."""
        if self._warm:
            self._warm -= 1
            if not self._warm:
                self._wait()
            return
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now
        if now < self._end:
            return
        self._measured += now - self._began
        self._others += others(self._before, now - self._began) * (now - self._began)
        self._left -= 1
        if not self._left:
            raise _TimeIsUp
        self._wait()

    def _wait(self) -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        self._before = processor_seconds()
        self._began = self._last = time.perf_counter()
        self._end = self._began + self._seconds

    def result(self, events: int) -> dict[str, float]:
        """Of a step that takes so many events in."""
        seconds = typical(self._steps)
        return {
            "events_per_second": events / seconds,
            "step_ms": 1e3 * seconds,
            "others": self._others / self._measured,
        }


def ours(config: dict[str, Any]) -> dict[str, Any]:
    """Events per second of our trainer's steps."""
    size, items = config["hidden"], config["items"]
    network = NetworkSettings(
        embedding=size,
        hidden=size,
        dropout=0.0,
        user_dropout=0.0,
        transitions=config["full"],
        repeats=config["full"],
        ratings=False,
    )
    before = peak_bytes()
    num_events = max(100_000, 40 * config["batch"])
    log = random_log(num_events, items, seed=0, met=config["met"])
    draws = config["negatives"]
    if config["distinct"] and config["softmax"] == "sampled":
        draws = draws_for(draws, log, items)
    settings = TrainSettings(
        network=network,
        softmax=Softmax(config["softmax"]),
        negatives=draws,
        bptt=config["bptt"],
        batch_events=config["batch"],
        precision=Precision(config["precision"]),
        trend_decomposition=False,
    )
    catalogue = Catalogue(tuple(map(str, range(items))))
    trainer = Trainer(log, catalogue, settings, None, Schema())
    done: EpochState = trainer.start_epoch()
    watch = Stopwatch(config)

    def run() -> None:
        nonlocal done
        try:
            while True:
                trainer.epoch(done, watch.after_step)
                done = trainer.start_epoch()
                done.batches = 0
        except _TimeIsUp:
            pass

    profile = None
    if config["profile"]:
        with torch.profiler.profile() as profile:
            run()
    else:
        run()
    copies = 2 if config["softmax"] == "sampled" else 1
    tables = copies * trainer.network.items.embedding.weight.nbytes
    result = {
        **watch.result(config["batch"]),
        "extra_bytes": peak_bytes() - before - tables,
        "flops_per_event": flops(config),
        "precision": str(trainer.dtype).removeprefix("torch."),
    }
    if profile is not None:
        result["profile"] = profile.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=25
        )
    return result


def flops(config: dict[str, Any]) -> float:
    """Of one event: input and recurrent products of the GRU, the query, the scores."""
    size = config["hidden"]
    columns = config["items"] if config["softmax"] == "dense" else config["negatives"] + 1
    weights = 3 * size * (size + 17 + size) + size * size + size * columns
    return 6.0 * weights


def plain_dense(config: dict[str, Any]) -> dict[str, Any]:
    """The step one would write first: full scores, cross entropy, autograd, Adam over all."""
    size, items = config["hidden"], config["items"]
    before = peak_bytes()
    embedding = nn.Embedding(items, size)
    cell, query = nn.GRU(size, size), nn.Linear(size, size)
    parameters = [*embedding.parameters(), *cell.parameters(), *query.parameters()]
    optimiser = torch.optim.Adam(parameters)
    item = torch.randint(items, (config["bptt"] + 1, config["batch"] // config["bptt"]))

    def step() -> None:
        optimiser.zero_grad()
        h, _ = cell(embedding(item[:-1]))
        scores = query(h).flatten(0, 1) @ embedding.weight.t()
        F.cross_entropy(scores, item[1:].flatten()).backward()
        optimiser.step()

    return {
        **_measured(step, config),
        "extra_bytes": peak_bytes() - before - embedding.weight.nbytes,
        "flops_per_event": flops(config),
    }


def official(config: dict[str, Any]) -> dict[str, Any]:
    """One step of the official GRU4Rec: in-batch negatives and as many samples as ours has."""
    spec = importlib.util.spec_from_file_location(
        "gru4rec_pytorch", Path(config["gru4rec"]) / "gru4rec_pytorch.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    size, items, batch = config["hidden"], config["items"], config["batch"]
    before = peak_bytes()
    model = module.GRU4RecModel(items, [size], embedding=size, constrained_embedding=False)
    if config["tied"]:
        model = module.GRU4RecModel(items, [size], constrained_embedding=True)
    loss = module.GRU4Rec([size], batch_size=batch, n_sample=config["negatives"], device="cpu")
    optimiser = module.IndexedAdagradM(model.parameters(), 0.05)
    state = [torch.zeros(batch, size)]
    log = torch.from_numpy(random_log(200_000, items, seed=0).item_E)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return log[torch.randint(len(log), (n,), generator=generator)]

    def step() -> None:
        item, target = draw(batch), torch.cat([draw(batch), draw(config["negatives"])])
        for h in state:
            h.detach_()
        model.zero_grad()
        scores = model.forward(item, state, target, training=True)
        (loss.loss_function(scores, target, batch) / batch).backward()
        optimiser.step()

    tables = 2 * items * size * 4
    return {**_measured(step, config), "extra_bytes": peak_bytes() - before - tables}


def others(before: tuple[float, float], seconds: float) -> float:
    """Share of the processors that other processes took since `before`."""
    everybody, own = (now - then for now, then in zip(processor_seconds(), before, strict=True))
    return max(0.0, everybody - own) / (seconds * (os.cpu_count() or 1))


def _measured(step: Callable[[], None], config: dict[str, Any]) -> dict[str, float]:
    watch = Stopwatch(config)
    try:
        while True:
            step()
            watch.after_step()
    except _TimeIsUp:
        return watch.result(config["batch"])


def typical(step_seconds: Any) -> float:
    """The first decile: what a step takes when nothing else wants the processor."""
    return float(np.quantile(step_seconds, 0.1))


def crossover(options: argparse.Namespace) -> int:
    """Dense and sampled steps side by side as training would run them by default."""
    print("| items | negatives | dense, events/s | sampled, events/s | sampled / dense |")
    print("|---|---|---|---|---|")
    for items in (2_000, 5_000, 10_000, 20_000, 50_000, 100_000):
        draws = TrainSettings().draws(items)
        speeds = []
        for softmax in ("dense", "sampled"):
            got = measure(
                "ours",
                items=items,
                hidden=options.hidden,
                softmax=softmax,
                negatives=draws,
                bptt=options.bptt,
                seconds=options.seconds,
                rounds=1,
                warm=3,
                precision="auto",
                full=options.full,
                batch=options.batches[0],
                profile=False,
                distinct=False,
                met=None,
            )
            speeds.append(got["events_per_second"])
        print(
            f"| {items:,} | {draws:,} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
            f"{speeds[1] / speeds[0]:.2f} |",
            flush=True,
        )
    return 0


KINDS = {"ours": ours, "plain": plain_dense, "official": official}


class Measurement:
    """One configuration in a process of its own."""

    def __init__(self, kind: str, config: dict[str, Any]) -> None:
        """Returns when the process has warmed up and waits for its turn."""
        command = [sys.executable, "-m", "benchmarks.train_throughput", "--one", kind]
        self._process = subprocess.Popen(
            [*command, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def turn(self) -> dict[str, Any] | None:
        """Let it step; what it has measured, after the last turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._line()
        return None if line == "ready" else json.loads(line)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a measurement ended with status {self._process.wait()}: see above")
        return line


def measure(kind: str, **config: Any) -> dict[str, Any]:
    """One configuration alone, in one turn."""
    result = Measurement(kind, config).turn()
    assert result is not None
    return result


def _runs(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """What is to be measured: kind of step, its name, configuration."""
    runs: list[tuple[str, str, dict[str, Any]]] = []
    for chosen in options.only:
        items, hidden, softmax, *rest = chosen.split(":")
        shared = {
            "items": int(items),
            "hidden": int(hidden),
            "softmax": softmax,
            "negatives": options.negatives,
            "bptt": options.bptt,
            "seconds": options.seconds,
            "rounds": options.rounds,
            "warm": 1 if softmax == "dense" and int(items) > 100_000 else 5,
        }
        for batch in options.batches:
            own = {"precision": rest[0] if rest else "float32", "full": options.full}
            own |= {"batch": batch, "profile": options.profile}
            own |= {"distinct": options.distinct, "met": options.met}
            runs.append(("ours", f"{softmax}{', full' * options.full}", shared | own))
        if options.plain and softmax == "dense":
            runs.append(("plain", "plain dense", shared | {"batch": options.batches[0]}))
        if options.gru4rec and softmax == "sampled" and not rest:
            for tied, batch in product((True, False), options.gru4rec_batches):
                name = f"official GRU4Rec, {'tied' if tied else 'untied'}"
                own = {"gru4rec": options.gru4rec, "tied": tied, "batch": batch}
                runs.append(("official", name, shared | own))
    return runs


OTHERS = "official GRU4Rec, tied", "official GRU4Rec, untied", "dense", "plain dense"


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """The quotients of speed that docs/results.md gives: at the same batch, and best over best."""
    speeds: dict[tuple[int, int, str], dict[int, float]] = {}  # by step, then by batch
    for row in rows:
        key = row["items"], row["hidden"], row["step"].removesuffix(", full")
        by_batch = speeds.setdefault(key, {})
        by_batch[row["batch"]] = max(row["events_per_second"], by_batch.get(row["batch"], 0.0))
    sizes = sorted({items for items, _, _ in speeds})

    def compared(ours: tuple[int, int, str], theirs: tuple[int, int, str]) -> str | None:
        a, b = speeds.get(ours), speeds.get(theirs)
        if not a or not b:
            return None
        same = [f"{a[batch] / b[batch]:.2f} at {batch:,}" for batch in sorted(a.keys() & b.keys())]
        best = [max(by_batch, key=lambda batch, s=by_batch: s[batch]) for by_batch in (a, b)]
        ratio = a[best[0]] / b[best[1]]
        return f"{'; '.join(same)}; {ratio:.2f} best over best ({best[0]:,}, {best[1]:,})"

    lines = []
    for items, hidden in sorted({(items, hidden) for items, hidden, _ in speeds}):
        ours = items, hidden, "sampled"
        for other in OTHERS:
            if found := compared(ours, (items, hidden, other)):
                lines.append(f"{items:,} x {hidden}, sampled over {other}: {found}")
        if items != sizes[0] and (found := compared(ours, (sizes[0], hidden, "sampled"))):
            lines.append(f"{items:,} over {sizes[0]:,} x {hidden}, sampled: {found}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ITEMS:HIDDEN:SOFTMAX[:PRECISION]",
        default=[
            "1000:128:dense",
            "10000:128:dense",
            "10000:128:dense:bfloat16",
            "10000:128:sampled",
            "100000:43:sampled",
            "100000:128:sampled",
            "1000000:43:sampled",
            "1000000:128:sampled",
            "1000000:128:sampled:bfloat16",
        ],
    )
    parser.add_argument("--negatives", type=int, default=1000)
    parser.add_argument("--batches", type=int, nargs="+", default=[BATCH], help="events per step")
    parser.add_argument("--bptt", type=int, default=BPTT)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=1, help="turns of each")
    parser.add_argument("--full", action="store_true", help="with transition counts")
    parser.add_argument("--distinct", action="store_true", help="--negatives are distinct ones")
    parser.add_argument("--met", type=int, metavar="M", help="the log is that of M items")
    parser.add_argument("--gru4rec", metavar="FOLDER")
    parser.add_argument("--gru4rec-batches", type=int, nargs="+", default=[BATCH])
    parser.add_argument("--plain", action="store_true", help="the plain dense step beside ours")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--hidden", type=int, default=128, help="of the crossover")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "JSON"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(KINDS[options.one[0]](json.loads(options.one[1]))))
        return 0
    if options.crossover:
        return crossover(options)
    runs = _runs(options)
    limits, found = [], [{} for _ in runs]
    if options.rounds == 1:  # one after the other: not all of their tables at once
        limits.append((gemm_flops(), gemm_flops(torch.bfloat16), copy_bytes()))
        found = [measure(kind, **config) for kind, _, config in runs]
    else:
        waiting = [Measurement(kind, config) for kind, _, config in runs]
        for number in range(options.rounds):
            limits.append((gemm_flops(), gemm_flops(torch.bfloat16), copy_bytes()))
            turns = list(enumerate(waiting))
            for place, measurement in reversed(turns) if number % 2 else turns:
                found[place] = measurement.turn()
    limit, half, copied = map(max, zip(*limits, strict=True))
    print(
        f"{torch.get_num_threads()} threads; matrix products {limit / 1e9:.0f} GFLOP/s float32, "
        f"{half / 1e9:.0f} bfloat16; copy {copied / 1e9:.1f} GB/s\n"
    )
    print(
        "| items | hidden | step | batch | events/s | step, ms | memory beyond the tables | "
        "share of the float32 limit | others |\n|---|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for (_, name, config), got in zip(runs, found, strict=True):
        share = got.get("flops_per_event", 0.0) * got["events_per_second"] / limit
        rows.append({**config, "step": name, **got, "share": share})
        precision = f", {got['precision']}" if got.get("precision", "float32") != "float32" else ""
        print(
            f"| {config['items']:,} | {config['hidden']} | {name}{precision} | "
            f"{config['batch']:,} | {got['events_per_second']:,.0f} | {got['step_ms']:.1f} | "
            f"{got['extra_bytes'] / 1e9:.2f} GB | {f'{share:.0%}' if share else ''} | "
            f"{got['others']:.0%} |"
        )
        if "profile" in got:
            print(rows[-1].pop("profile"))
    print("\n".join(["", *ratios(rows), ""]))
    print(json.dumps({"gemm_flops": limit, "bf16_flops": half, "copy": copied, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
