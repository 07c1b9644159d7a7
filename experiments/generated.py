"""HRNN-meta beside the baselines on generated logs: short sessions, sparse ones, odd shapes.

    python -m experiments.generated --logs followers sparse --results FILE
    python -m experiments.generated --table FILE

What a log's items depend on is known here: the last item, the last two, or nothing at all. So a
baseline that reads just that is as good as any model can be, and HRNN-meta, whose defaults know
nothing of it, must not rank below it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.accuracy import Row, Task, assigned, run_models
from model.catalogue import Catalogue
from model.schema import Schema
from model.sequences import Histories
from model.splits import Cases, SplitSettings, later_events, split_users
from model.tables import Log

START = 1_700_000_000
MONTH = 30 * 86_400

Next = Callable[[list[int], np.random.Generator], int]


def zipf(num_items: int, exponent: float = 1.0) -> NDArray[np.float64]:
    """Probabilities ∝ 1 / rank^exponent: float64 `[M]`."""
    p_M = np.arange(1.0, num_items + 1) ** -exponent
    return p_M / p_M.sum()


def sessions(
    num: int,
    p_M: NDArray[np.float64],
    follow: Next,
    seed: int,
    length: tuple[int, int] = (2, 8),
    gap: float = 60.0,
) -> Histories:
    """Sessions of `length` events (both included), each a user's only one.

    Args:
        p_M: of first items.
        follow: the next item of a session so far.
        gap: mean seconds between events; 0: everything happens in one second.
    """
    rng = np.random.default_rng(seed)
    items: list[int] = []
    times: list[int] = []
    offset = [0]
    first_S = rng.choice(len(p_M), size=num, p=p_M)
    for first, size in zip(first_S, rng.integers(length[0], length[1] + 1, size=num), strict=True):
        session = [int(first)]
        while len(session) < size:
            session.append(follow(session, rng))
        items += session
        begin = rng.uniform(0, MONTH) if gap else 0.0
        times += (START + begin + np.cumsum(rng.exponential(gap, size))).astype(int).tolist()
        offset.append(len(items))
    return Histories(
        user_ids=tuple(f"s{n:06d}" for n in range(num)),
        item_E=np.array(items, dtype=np.int64),
        timestamp_E=np.array(times, dtype=np.int64),
        offset_U1=np.array(offset, dtype=np.int64),
    )


def one_of(p_M: NDArray[np.float64]) -> Next:
    """Independent of the session."""
    cumulative = np.cumsum(p_M)
    last = len(p_M) - 1
    return lambda session, rng: min(int(np.searchsorted(cumulative, rng.random())), last)


def after_last(
    p_M: NDArray[np.float64], followers: tuple[float, ...], noise: float, seed: int, order: int = 1
) -> Next:
    """The last item (the last two: `order` 2) has followers of these probabilities.

    Followers are drawn from `p_M`; with probability `noise` any item comes, by `p_M`.
    """
    rng = np.random.default_rng(seed)
    any_item = one_of(p_M)
    share_F = np.cumsum(followers)
    known: dict[tuple[int, ...], NDArray[np.int64]] = {}

    def follow(session: list[int], own: np.random.Generator) -> int:
        if own.random() < noise or len(session) < order:
            return any_item(session, own)
        key = tuple(session[-order:])
        if key not in known:
            known[key] = rng.choice(len(p_M), size=len(followers), replace=False, p=p_M)
        return int(known[key][min(int(np.searchsorted(share_F, own.random())), len(share_F) - 1)])

    return follow


def _after(
    num: int,
    num_items: int,
    followers: tuple[float, ...] = (1.0,),
    noise: float = 0.05,
    order: int = 1,
    exponent: float = 0.8,
    length: tuple[int, int] = (2, 8),
) -> Callable[[int], tuple[Histories, int]]:
    def made(seed: int) -> tuple[Histories, int]:
        p_M = zipf(num_items, exponent)
        follow = after_last(p_M, followers, noise, seed, order)
        return sessions(num, p_M, follow, seed, length), num_items

    return made


def _cycle(num: int, num_items: int, noise: float) -> Callable[[int], tuple[Histories, int]]:
    """Every item is followed by the next of one long cycle: all are equally popular."""

    def made(seed: int) -> tuple[Histories, int]:
        p_M = np.full(num_items, 1 / num_items)
        order_M = np.random.default_rng(seed).permutation(num_items)
        next_M = np.empty(num_items, dtype=np.int64)
        next_M[order_M] = np.roll(order_M, -1)
        any_item = one_of(p_M)

        def follow(session: list[int], rng: np.random.Generator) -> int:
            return any_item(session, rng) if rng.random() < noise else int(next_M[session[-1]])

        return sessions(num, p_M, follow, seed), num_items

    return made


def _independent(
    num: int,
    p_M: NDArray[np.float64],
    length: tuple[int, int] = (2, 8),
    gap: float = 60.0,
) -> Callable[[int], tuple[Histories, int]]:
    return lambda seed: (sessions(num, p_M, one_of(p_M), seed, length, gap), len(p_M))


LOGS: dict[str, Callable[[int], tuple[Histories, int]]] = {
    # one follower each, some noise
    "cycle": _cycle(4000, 500, 0.05),
    "followers": _after(4000, 500),
    "followers-3": _after(4000, 500, (0.6, 0.3, 0.1)),
    "followers-large": _after(6000, 3000, (0.7, 0.3)),
    # most pairs were seen once or twice
    "sparse": _after(1500, 2000, (0.6, 0.4), noise=0.1, exponent=0.3),
    "sparse-10": _after(2500, 1500, (0.25, 0.2, 0.15, 0.1, 0.1, 0.1, 0.1), 0.1, exponent=0.3),
    # the last two items decide
    "order-2": _after(6000, 30, (0.8, 0.2), order=2, length=(4, 10)),
    # nothing to learn but popularity
    "noise": _independent(2000, zipf(300)),
    "noise-even": _independent(2000, np.full(300, 1 / 300)),
    "one-event": _independent(4000, zipf(300), (1, 1)),
    "three-items": _independent(1000, np.array([0.5, 0.3, 0.2])),
    "one-second": _independent(2000, zipf(300), gap=0.0),
    "few": _independent(60, zipf(300)),
}


def generated_task(name: str, seed: int) -> Task:
    """One generated log, users split; every event but the first is read out, if there are any."""
    log, num_items = LOGS[name](seed)
    catalogue = Catalogue(tuple(f"i{j:05d}" for j in range(num_items)))
    split = split_users(log, SplitSettings(min_events=1))
    test_N = later_events(split.test)
    if not len(test_N):
        test_N = np.arange(split.test.num_events)
    return Task(Log(Schema(), catalogue, log), split.train, split.valid, Cases(split.test, test_N))


def table(lines: Sequence[str]) -> str:
    """Markdown: a line per log; means over seeds, and the difference to the counts by seed."""
    rows: dict[tuple[str, str, int], Row] = {}
    for line in lines:
        row = json.loads(line)
        rows[row["data"], row["model"], row["seed"]] = row
    models = list(dict.fromkeys(model for _, model, _ in rows))
    header = ["log", *(f"{m}: PPL, NDCG@10" for m in models), f"NDCG@10 of hrnn less {models[0]}"]
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in dict.fromkeys(data for data, _, _ in rows):
        cells = [name]
        for model in models:
            own = [r for (data, m, _), r in rows.items() if (data, m) == (name, model)]
            ppl, ndcg = (np.mean([r[key] for r in own]) for key in ("ppl", "ndcg@10"))
            cells.append(f"{ppl:.1f}, {ndcg:.4f}")
        own = [r for (data, m, _), r in rows.items() if (data, m) == (name, "hrnn")]
        cells.append(
            "; ".join("{:+.4f} [{:+.4f}, {:+.4f}]".format(*r["ndcg_difference"]) for r in own)
        )
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", nargs="+", choices=LOGS, default=list(LOGS))
    parser.add_argument("--log-seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=["transition-counts", "popularity", "hrnn"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="train setting: a.b=value")
    parser.add_argument("--results", type=Path, help="file to append JSON lines to")
    parser.add_argument("--table", type=Path, help="print the results of this file, no more")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.table.read_text().splitlines()))
        return 0
    for name in options.logs:
        options.name, options.protocol = name, "user"
        run_models(options, generated_task(name, options.log_seed), assigned(options.set))
    return 0


if __name__ == "__main__":
    sys.exit(main())
