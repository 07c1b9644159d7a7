"""The event log as a source of training: through ingest and validate, nothing lost or made up."""

import csv
from contextlib import closing

import pyarrow.parquet as pq
import pytest

from components.ingest import event_log
from components.ingest.steps import run
from components.validate import steps as validate
from feature_repo.event_log import EventLog, NewEvent
from model.errors import InputError
from model.schema import Schema
from pipelines import sources

START = 893_286_000
HARSH = ['say "hi"', "it's", "☃🎬", "line\nbreak", "a,b;c", "\\", "NULL"]


@pytest.fixture
def log(log_url):
    with closing(EventLog.open(log_url, create=True)) as log:
        yield log


def fill(log, users=12, each=10):
    with log.write() as transaction:
        for u in range(users):
            transaction.append(
                [
                    NewEvent(
                        f"e{u}-{n}",
                        f"u{u}",
                        HARSH[n % len(HARSH)],
                        START + 60 * n + u,
                        "view" if n % 3 else "buy",
                        float(n) if n % 2 else None,
                        (HARSH[n % len(HARSH)], "not clicked", "nor\nthis"),
                        {"device": "tv" if n % 2 else "phone", "volume": n, 'odd "/~key': "x"},
                    )
                    for n in range(each)
                ]
            )
            fields = {"age": 20 + u, "tags": ["a", "b,c"][: u % 3], "zip": "01"}
            transaction.put_user(f"u{u}", fields)
        transaction.put_item(HARSH[0], {"title": "One", "genres": ["x", "y"]}, START - 5)
        transaction.put_item("never seen", {"title": "New", "genres": ["x"]}, START + 7)


def test_what_is_in_the_log_is_trained_on(log, log_url, tmp_path):
    fill(log)
    source = run(tmp_path / "tables", interactions=log_url)
    assert source["rows"] == {"interactions": 120, "users": 12, "items": 2}
    assert source["name"] == source["uri"] == "event-log"
    validate.run(tmp_path / "tables", tmp_path / "clean", tmp_path / "q", tmp_path / "r.html")
    rows = pq.read_table(tmp_path / "clean" / "interactions.parquet").to_pylist()
    assert len(rows) == 120
    row = next(r for r in rows if r["event_id"] == "e3-5")
    assert (row["user_id"], row["item_id"], row["timestamp"]) == ("u3", HARSH[5], START + 303)
    assert (row["event_type"], row["event_value"], row["device"]) == ("view", 5.0, "tv")
    assert row["impression"] == [HARSH[5], "not clicked", "nor\nthis"]
    users = pq.read_table(tmp_path / "clean" / "users.parquet").to_pylist()
    assert {u["user_id"]: u["tags"] for u in users}["u2"] == ["a", "b,c"]
    items = {
        r["item_id"]: r for r in pq.read_table(tmp_path / "clean" / "items.parquet").to_pylist()
    }
    assert items["never seen"]["genres"] == ["x"]
    assert items["never seen"]["created_at"] == START + 7
    schema = Schema.load(tmp_path / "clean" / "schema.json")
    assert schema.context["device"] == "categorical"
    assert schema.users["tags"] == "multi_categorical"
    assert schema.item_title == "title"


def test_a_deleted_user_is_not_in_the_next_run(log, log_url, tmp_path):
    fill(log)
    with log.write() as transaction:
        transaction.delete_user("u3")
    run(tmp_path / "tables", interactions=log_url)
    for table in ("interactions", "users"):
        text = pq.read_table(tmp_path / "tables" / f"{table}.parquet").column("user_id").to_pylist()
        assert "u3" not in text


def test_nor_in_one_on_other_tables(log, log_url, tmp_path, monkeypatch, capsys):
    rows = [("user_id", "item_id", "timestamp")]
    rows += [(f"u{n % 4}", HARSH[n % 7], START + n) for n in range(40)]
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "users.csv").write_text("user_id,age\nu1,1\nu3,3\n")
    given = {"interactions": str(tmp_path / "log.csv"), "users": str(tmp_path / "users.csv")}
    monkeypatch.setenv("HRNN_EVENT_LOG", log_url)
    assert run(tmp_path / "all", **given)["rows"] == {"interactions": 40, "users": 2}
    with log.write() as transaction:
        transaction.delete_user("u3")
    assert run(tmp_path / "some", **given)["rows"] == {"interactions": 30, "users": 1}
    assert "10 rows of users deleted on request" in capsys.readouterr().out
    before, after = (
        pq.read_table(tmp_path / name / "interactions.parquet").to_pylist()
        for name in ("all", "some")
    )
    assert after == [row for row in before if row["user_id"] != "u3"]


def test_nor_in_lines_that_fit_no_header(log, log_url, tmp_path, monkeypatch):
    """Whose they are is not known: any column that says a deleted id counts."""
    gone = ["u3", "7", 'say "hi", you', "a;b", "☃"]
    lines = [("u1", "i", START + n) for n in range(30)]
    odd = [(u, "i", START, "too", "many") for u in ["u33", *gone, "77", "say", "a"]]
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp"), *lines, *odd])
    (tmp_path / "users.csv").write_text("user_id,age\nu3,3\n7,4\n")
    monkeypatch.setenv("HRNN_EVENT_LOG", log_url)
    with log.write() as transaction:
        for user in gone:
            transaction.delete_user(user)
    tables = tmp_path / "tables"
    given = {"interactions": str(tmp_path / "log.csv"), "users": str(tmp_path / "users.csv")}
    # A table that held nobody else is not there.
    assert run(tables, **given)["rows"] == {"interactions": 30 + 4}
    left = pq.read_table(tables / "malformed_interactions.parquet").column("raw_line").to_pylist()
    assert [line.partition(",")[0] for line in left] == ["u33", "77", "say", "a"]
    validate.run(tables, *(tmp_path / n for n in ("clean", "q", "r.html")), settings=LENIENT)
    assert not (tmp_path / "clean" / "users.parquet").exists()


LENIENT = {"min_users": 1, "min_items": 1, "min_events": 1, "max_bad_share": 1.0}


def test_other_tables_can_be_given(log, log_url, tmp_path):
    fill(log)
    (tmp_path / "items.csv").write_text("item_id,colour\na,red\nb,blue\n")
    source = run(tmp_path / "t", interactions=log_url, items=str(tmp_path / "items.csv"))
    assert source["rows"]["items"] == 2
    assert "colour" in pq.read_table(tmp_path / "t" / "items.parquet").column_names


def test_the_address_comes_from_the_environment_and_is_written_nowhere(
    log, log_url, tmp_path, monkeypatch
):
    fill(log)
    monkeypatch.setenv("HRNN_EVENT_LOG", log_url)
    run(tmp_path / "tables", interactions="event-log")
    assert log_url not in (tmp_path / "tables" / "source.json").read_text()
    monkeypatch.delenv("HRNN_EVENT_LOG")
    with pytest.raises(InputError, match="HRNN_EVENT_LOG is not set"):
        run(tmp_path / "tables", interactions="event-log")


def test_the_runners_names_are_the_steps_own():
    from components.event_sources import SQL_SCHEMES

    assert (sources.CONFIGURED, sources.EVENT_LOG) == (
        event_log.CONFIGURED,
        event_log.VARIABLE,
    )
    assert sources.SQL_SCHEMES == SQL_SCHEMES


def test_an_empty_log_and_no_log(log, log_url, tmp_path):
    with pytest.raises(InputError, match="holds no events yet"):
        run(tmp_path / "tables", interactions=log_url)
    with pytest.raises(InputError, match="no event log there"):
        run(tmp_path / "tables", interactions=f"sqlite:///{tmp_path}/nothing.db")


def test_fields_that_cannot_be_told_apart_and_fields_named_like_columns(
    log, log_url, tmp_path, capsys
):
    fill(log)
    with log.write() as transaction:
        transaction.put_user("u1", {"user_id": "x", "age": 5})
    run(tmp_path / "tables", interactions=log_url)
    assert "field 'user_id' of users is left out" in capsys.readouterr().out
    with log.write() as transaction:
        transaction.put_user("u1", {"Age": 5})
    with pytest.raises(InputError, match="'Age' and 'age'"):
        run(tmp_path / "tables", interactions=log_url)


def test_a_flood_of_fields_is_refused(log, log_url, tmp_path):
    fill(log)
    with log.write() as transaction:
        for n in range(6):
            transaction.put_user(f"v{n}", {f"f{n}-{k}": "x" for k in range(100)})
    with pytest.raises(InputError, match="more than 500 fields"):
        run(tmp_path / "tables", interactions=log_url)


def check(folder):
    paths = [folder / name for name in ("tables", "clean", "q", "r.html")]
    validate.run(*paths, settings={"min_users": 1, "min_items": 1, "min_events": 1})


def test_a_run_is_imported_once_and_trains_to_the_same_tables(log, log_url, tmp_path):
    rows = [("u1", "song", START, "tv")] * 2 + [("u2", HARSH[3], START + 1, "")]
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp", "device"), *rows])
    (tmp_path / "items.csv").write_text("item_id,title,colour\nsong,A song,red\nnew,B,blue\n")
    kinds = {"fields": {"items": {"colour": "categorical"}, "context": {"device": "categorical"}}}
    given = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
    run(tmp_path / "tables", **given, settings=kinds)
    check(tmp_path)
    with log.write() as transaction:
        transaction.put_item("new", {"title": "Newer"})
    added = event_log.import_clean(log, tmp_path / "clean")
    assert added == {"interactions": (3, 3), "items": (1, 2)}
    assert event_log.import_clean(log, tmp_path / "clean")["interactions"] == (0, 3)
    again = tmp_path / "again"
    run(again / "tables", interactions=log_url, settings=kinds)
    check(again)
    before, after = (
        pq.read_table(folder / "clean" / "interactions.parquet")
        .select(["user_id", "item_id", "timestamp", "device"])
        .to_pylist()
        for folder in (tmp_path, again)
    )
    assert before == after
    items = pq.read_table(again / "clean" / "items.parquet").to_pylist()
    assert {i["item_id"]: i["title"] for i in items} == {"song": "A song", "new": "Newer"}


def test_a_cached_ingest_is_not_taken_after_a_deletion(log, log_url):
    source = sources.Source(dataset="movielens-100k")
    before = source.digest({"HRNN_EVENT_LOG": log_url})
    assert before == source.digest({}) == "movielens-100k"
    with log.write() as transaction:
        transaction.delete_user("u3")
    assert source.digest({"HRNN_EVENT_LOG": log_url}) not in (before, "")
