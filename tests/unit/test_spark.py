"""The same ingestion on Spark (local mode) and on DuckDB: clean tables, quarantine, popularity."""

import csv
import shutil
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

from components.features import steps as features
from components.ingest import steps as ingest
from components.validate import steps as validate
from feature_repo.names import source_name
from tests.clean_tables import make_log, write_clean

pytestmark = pytest.mark.skipif(not shutil.which("java"), reason="no Java for Spark")

ENGINES = ("duckdb", "spark")
NOW = 1_700_000_000
ODD = ["it's", '"quoted"', "🎬", "line\nbreak", "a\\b", "NULL", "%", "é"]


def write(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def when(k):
    """A moment in one of the shapes that one column of text may have."""
    second = 1_600_000_000 + (k * 7919) % 100_000
    if k % 4 == 0:
        return str(second)
    if k % 4 == 1:
        return f"{second}.75"
    moment = datetime.fromtimestamp(second, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ" if k % 4 == 2 else "%Y-%m-%d %H:%M:%S.123456")


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spark")
    header = ["user_id", "item_id", "timestamp", "event_id", "event_type", "rating", "impression"]
    rows = [
        [
            f"u{k % 37}{ODD[k % 8] if k % 11 == 0 else ''}",
            f"i{k * k % 23}{ODD[k % 8] if k % 7 == 0 else ''}",
            when(k),
            # Some ids come twice, once in a bad row that does not count.
            f"e{k // 2 if k % 50 < 2 else k + 10**6}",
            ["view", "buy", ""][k % 3],
            ["3.5", "x", "", " 2 ", "1e3", "nan"][k % 6] if k % 97 < 6 else "4",
            "|".join(f"i{j}" for j in range(k % 4)),
        ]
        for k in range(1200)
    ]
    broken = ["yesterday", "-5", "99999999999", "", "2020-13-45", "infinity", "1e400"]
    rows += [["u1", "i1", text, "", "", "", ""] for text in broken]
    rows += [["u" * 513, "i1", "5", "", "", "", ""], ["é" * 512, "i1", "5", "", "", "", ""]]
    rows += [["", "i1", "5", "", "", "", ""], ["u1", " ", "5", "", "", "", ""]]
    rows += [["bot", f"i{k % 5}", str(1_600_000_000 + k), "", "", "", ""] for k in range(60)]
    write(
        folder / "log.csv", [*header, "device"], [[*r, ["tv", "web"][len(r[0]) % 2]] for r in rows]
    )
    users = [[f"u{k}", k % 80, ["a|b", "b", "", " c | |a"][k % 4]] for k in range(30)]
    write(folder / "users.csv", ["user_id", "age", "tags"], [*users, ["u3", 7, "z"], ["", 1, "a"]])
    items = [[f"i{k}", f"Title {k} {ODD[k % 8]}", when(k), k / 4] for k in range(23)]
    write(folder / "items.csv", ["item_id", "title", "created_at", "price"], items)
    tables = {t: str(folder / f"{t}.csv") for t in ("users", "items")}
    ingest.run(folder / "tables", interactions=str(folder / "log.csv"), **tables)
    reports = {}
    for engine in ENGINES:
        reports[engine] = validate.run(
            folder / "tables",
            *(folder / engine / name for name in ("clean", "quarantine", "report.html")),
            settings={
                "engine": engine,
                "now": NOW,
                "max_bad_share": 0.2,
                "max_events_per_user": 50,
            },
        )
    return folder, reports


@pytest.mark.parametrize("table", ["interactions", "users", "items"])
def test_clean_tables_are_identical(ingested, table):
    folder, _ = ingested
    duckdb, spark = (pq.read_table(folder / e / "clean" / f"{table}.parquet") for e in ENGINES)
    assert duckdb.num_rows > 20
    assert spark.schema.remove_metadata() == duckdb.schema.remove_metadata()
    assert spark.to_pylist() == duckdb.to_pylist()


def test_the_same_rows_are_in_quarantine_for_the_same_reasons(ingested):
    folder, reports = ingested
    found = [
        pq.read_table(folder / e / "quarantine" / "interactions.parquet").to_pylist()
        for e in ENGINES
    ]
    assert found[0] == found[1]
    assert reports["duckdb"]["rows"] == reports["spark"]["rows"]
    assert set(reports["spark"]["rows"]["interactions"]["reasons"]) == {
        *("null_user", "null_item", "bad_timestamp", "negative_timestamp", "future_timestamp"),
        *("bad_value", "duplicate_event_id", "bot_user", "long_id"),
    }
    for name in ("timestamps", "set_to_null", "coverage", "top_items", "warnings"):
        assert reports["duckdb"][name] == reports["spark"][name], name
    exact = ("events", "users", "items", "events_per_user", "popularity", "repeats")
    for name in (*exact, "events_over_time", "exact_duplicates"):
        assert reports["duckdb"]["log"][name] == reports["spark"]["log"][name], name


@pytest.mark.parametrize("window", [0, 2000])
def test_popularity_is_identical(tmp_path, window):
    clean = write_clean(tmp_path / "clean", make_log())
    trend = {"period_seconds": 900, "window_seconds": window}
    rows = []
    for engine in ENGINES:
        store = tmp_path / engine
        features.run(clean, str(store), trend, {"engine": engine}, tmp_path / "out")
        views = ("item_popularity", "catalogue_popularity")
        tables = [pq.read_table(store / "sources" / source_name(view)) for view in views]
        rows.append([sorted(map(str, table.to_pylist())) for table in tables])
        assert len(rows[-1][0]) > 100
    assert rows[0] == rows[1]
