"""Reading one history, and advancing a kept state, against `torch.nn.GRU` and the bare products.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.encode --events 100 --hidden 128

The limit is the matrix-vector products of the recurrence alone, measured in the same run.
"""

import argparse
import json
import sys

import numpy as np
import torch

from benchmarks.machine import seconds
from model.fields import FieldBags
from model.inputs import InputEncodings
from model.lean import LeanGRU
from model.network import HRNNMeta, NetworkSettings
from model.query import Event, History, Query
from model.states import States, beginning


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    encodings = InputEncodings(num_items=options.items, session_gap=1800, value_mean=3.0)
    bags = FieldBags.encode((), {}, options.items)
    settings = NetworkSettings(hidden=options.hidden)
    network = HRNNMeta(settings, encodings, bags, with_trend=False).eval()
    network.items.fold()
    index = {str(j): j for j in range(options.items)}
    anew, kept = (LeanGRU(network, index, States(n)) for n in (0, 1000))
    rng = np.random.default_rng(0)
    history = [
        Event(str(rng.integers(options.items)), 1e9 + 600.0 * k, "play", 3.0)
        for k in range(2 * options.events + options.rounds + 1)
    ]
    whole = History.of(history)  # as the feature store gives it
    time_L = whole.time_L.astype(np.int64)
    key_L = np.array([index[event.item_id] for event in history])
    # Of long histories the first events are not read: one of which `events` are.
    longer = range(options.events, 2 * options.events)
    reads = (n - beginning(time_L[:n], key_L[:n]) for n in longer)
    first = whole[
        : next(n for n, read in zip(longer, reads, strict=True) if read == options.events)
    ]
    query = Query(first, 1e9 + 1e7)
    hidden = options.hidden
    weight = rng.standard_normal((hidden, 3 * hidden), dtype=np.float32)
    state, out = weight[:, 0].copy(), np.empty(3 * hidden, dtype=np.float32)

    def products() -> None:
        for _ in range(options.events):
            np.dot(state, weight, out=out)

    gru = torch.nn.GRU(settings.embedding + settings.control + 3, hidden)
    x = torch.randn(options.events, 1, gru.input_size)
    gates = np.zeros((options.events, 3 * hidden), dtype=np.float32)
    slid = iter([whole[k : k + options.events] for k in range(options.rounds)])

    def advance() -> None:
        events = next(slid)
        kept.read(Query(events, 1e9 + 1e7), events)

    figures = {
        "matrix-vector products alone": seconds(products, options.rounds),
        "recurrence (NumPy, folded)": seconds(
            lambda: anew._steps(gates, anew._begin_H), options.rounds
        ),
        "recurrence of torch.nn.GRU": seconds(lambda: gru(x), options.rounds),
        "one step (NumPy, folded)": seconds(
            lambda: anew._steps(gates[:1], anew._begin_H), options.rounds
        ),
        "one step of torch.nn.GRU": seconds(lambda: gru(x[:1]), options.rounds),
        "whole query, read anew": seconds(lambda: anew.read(query, first), options.rounds),
        "whole query, one new event and the oldest one gone": seconds(advance, options.rounds - 1),
    }
    print(f"{options.events} events, hidden {hidden}\n| | µs |\n|---|---|")
    for name, took in figures.items():
        print(f"| {name} | {took * 1e6:.0f} |")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
