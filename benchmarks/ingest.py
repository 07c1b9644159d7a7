"""Peak memory and time of ingest, validate and features on a generated log of any size.

    python -m benchmarks.ingest --events 100_000_000 --folder /var/tmp
    python -m benchmarks.ingest --events 100_000_000 --folder /var/tmp --steps features

Without validate among the steps, features gets a log written as validate would leave it.

The log: Zipf-popular items, users with geometrically many events, in order of time, two context
columns. Every step runs in a process of its own, whose peak memory is what the kernel says of it;
it includes the libraries (the first row). The folder needs some 40 bytes per event, plus what the
engine spills; it is emptied afterwards.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.schema import Schema

START = 1_600_000_000
MIB = 2**20


def write_log(
    path: Path, events: int, users: int, items: int, days: int, as_clean: bool = False
) -> None:
    """A Parquet file as a collector would have written it, a row group at a time.

    Args:
        as_clean: in the order in which validate leaves it.
    """
    import duckdb

    order = "ORDER BY user_id, timestamp" if as_clean else ""
    with duckdb.connect(config={"temp_directory": str(path.parent)}) as connection:
        connection.execute("SET memory_limit = '1GB'")
        # Hashes instead of random(): the same log every time. u, v in [0, 1).
        connection.execute(
            f"""
            COPY (
                SELECT 'user-' || CAST(floor({users} * pow(u, 1.7)) AS BIGINT) AS user_id,
                       'item-' || CAST(floor(pow({items}, v)) AS BIGINT) AS item_id,
                       {START} + CAST(i * {days * 86_400 / events} AS BIGINT) AS timestamp,
                       CASE WHEN w < 0.8 THEN 'view' ELSE 'purchase' END AS event_type,
                       round(w * 5, 1) AS event_value,
                       CASE WHEN v < 0.3 THEN 'tv' WHEN u < 0.5 THEN 'phone' ELSE 'web'
                       END AS device
                FROM (SELECT i, hash(i) / 18446744073709551616.0 AS u,
                             hash(i + {events}) / 18446744073709551616.0 AS v,
                             hash(i + {2 * events}) / 18446744073709551616.0 AS w
                      FROM range({events}) AS t(i))
                {order}
            ) TO '{path}' (FORMAT parquet, COMPRESSION zstd)
            """  # noqa: S608 - our own numbers
        )


def measured(step: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Seconds and peak resident bytes of a step in a fresh process."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(send, step, arguments)
    )
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        result = {"error": "it was killed (out of memory?)"}
    process.join()
    if "error" in result:
        raise SystemExit(f"{step.__name__}: {result['error']}")
    return result


def _child(send: Any, step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the life of this process
    started = time.perf_counter()
    try:
        step(*arguments)
    except BaseException as error:
        send.send({"error": f"{type(error).__name__}: {error}"})
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    send.send({"seconds": time.perf_counter() - started, "peak_bytes": peak})


def libraries() -> None:
    import feast  # noqa: F401

    from components.features import steps  # noqa: F401


def ingest(folder: Path, limit: str) -> None:
    from components.ingest import steps

    steps.run(
        folder / "tables",
        interactions=str(folder / "log.parquet"),
        settings={"memory_limit": limit},
    )


def validate(folder: Path, limit: str) -> None:
    from components.validate import steps

    outputs = (folder / name for name in ("clean", "quarantine", "report.html"))
    steps.run(folder / "tables", *outputs, settings={"memory_limit": limit})


def features(folder: Path, limit: str) -> None:
    from components.features import steps

    trend = {"period_seconds": 86_400, "window_seconds": 7 * 86_400}
    steps.run(
        folder / "clean",
        str(folder / "store"),
        trend,
        {"memory_limit": limit},
        folder / "features",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--users", type=int, help="default: one per 100 events")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--memory-limit", default="2GB", help="of the engine")
    parser.add_argument("--steps", nargs="+", default=["ingest", "validate", "features"])
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    options = parser.parse_args(arguments)
    users = options.users or max(100, options.events // 100)
    with tempfile.TemporaryDirectory(prefix="hrnn-ingest-", dir=options.folder) as name:
        folder = Path(name)
        sizes = (options.events, users, options.items, options.days)
        path = folder / "log.parquet"
        if "validate" not in options.steps:
            (folder / "clean").mkdir()
            path = folder / "clean" / "interactions.parquet"
            schema = Schema.parse({"context": {"device": "categorical"}})
            (folder / "clean" / "schema.json").write_text(schema.model_dump_json())
        # Not in this process: its peak would be that of every process it starts.
        measured(write_log, path, *sizes, path.parent != folder)
        size = path.stat().st_size
        print(f"{options.events:,} events of {users:,} users, {size / MIB:,.0f} MiB of Parquet")
        print("| step | seconds | events/s | peak MiB |\n|---|---|---|---|")
        rows = []
        for step in (libraries, *(globals()[name] for name in options.steps)):
            found = measured(step, *(() if step is libraries else (folder, options.memory_limit)))
            rows.append({"step": step.__name__, **found})
            speed = "" if step is libraries else f"{options.events / found['seconds']:,.0f}"
            print(
                f"| {step.__name__} | {found['seconds']:.1f} | {speed} |"
                f" {found['peak_bytes'] / MIB:,.0f} |",
                flush=True,
            )
    summary = {"events": options.events, "memory_limit": options.memory_limit, "rows": rows}
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
