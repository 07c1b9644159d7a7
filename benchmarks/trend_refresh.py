"""Seconds to count the trend of a log and put it in force, as `refresh_trends` does.

    python -m benchmarks.trend_refresh --events 10_000_000

Counted by DuckDB from a Parquet file of clean interactions; every item's count has changed, so all
of them are written, offline and into the online store (SQLite), and the snapshot is read back.
The ratio is against a pass over the same file with pandas (`value_counts`) that publishes nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ingest import write_log


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--window-days", type=int, default=0, help="0: the whole log")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hrnn-refresh-", dir=options.folder) as name:
        return run(Path(name), options)


def run(folder: Path, options: argparse.Namespace) -> int:
    import duckdb
    import pandas as pd

    from components.features import steps as features
    from components.refresh_trends import steps as refresh
    from feature_repo.settings import FeatureStoreSettings
    from feature_repo.store import FeatureReader
    from model.schema import Schema

    log, past = folder / "log.parquet", folder / "past"
    past.mkdir()
    write_log(log, options.events, max(100, options.events // 100), options.items, days=30)
    # The store a pipeline run on the log's first thousandth has left.
    with duckdb.connect() as connection:
        connection.execute(
            f"COPY (FROM '{log}' LIMIT {options.events // 1000})"
            f" TO '{past / 'interactions.parquet'}' (FORMAT parquet)"
        )
    Schema().save(past / "schema.json")
    window = options.window_days * 86_400
    trend = {"period_seconds": 3600, "window_seconds": window}
    store = FeatureStoreSettings(root=str(folder / "store"))
    features.run(past, store.root, trend, {}, folder / "features")
    last = duckdb.sql(f"SELECT max(timestamp) FROM '{log}'").fetchone()[0]  # noqa: S608
    rows = []
    for k in reversed(range(options.repeats)):
        started = time.perf_counter()
        # Each a little later, so that each is put in force.
        settings = {"as_of": last + 1 - k}
        summary = refresh.run(str(log), store.root, settings, folder / "refresh")
        seconds = time.perf_counter() - started
        assert FeatureReader(store).trend().version == summary["trend_version"]
        started = time.perf_counter()
        counted = pd.read_parquet(log, columns=["item_id"])["item_id"].value_counts()
        naive = time.perf_counter() - started
        assert window or abs(int(counted.sum()) - summary["events"]) < options.events // 1000
        rows.append(
            {
                "events": summary["events"],
                "items": summary["num_items"],
                "written": summary["changed_items"],
                "seconds": seconds,
                **summary["seconds"],
                "pandas": naive,
                "ratio": seconds / naive,
            }
        )
    print("| events counted | counts written | seconds | of it counting | publishing | / pandas |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['events']:,} | {r['written']:,} | {r['seconds']:.2f} | {r['count']:.2f} |"
            f" {r['publish']:.2f} | {r['ratio']:.2f} |"
        )
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
