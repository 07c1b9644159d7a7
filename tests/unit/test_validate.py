"""Validate: nothing vanishes, every reason is found, clean tables are typed and sorted."""

import datetime
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.ingest.steps import run as ingest
from components.validate.statistics import spell_seconds
from components.validate.steps import run
from model.errors import InputError
from model.schema import MAX_ID, Schema

NOW = 1_700_000_000
LENIENT = {"max_bad_share": 1.0, "min_users": 1, "min_items": 1, "min_events": 1, "now": NOW}


class Workspace:
    """Tables in, clean tables and quarantine out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clean = folder / "clean"
        self.quarantine = folder / "quarantine"
        self.html = folder / "report.html"

    def tables(self, schema: Schema | None = None, **tables: dict) -> None:
        """Write tables as ingest would."""
        folder = self.folder / "tables"
        folder.mkdir(exist_ok=True)
        for name, columns in tables.items():
            pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        (schema or Schema()).save(folder / "schema.json")
        source = {"name": "test", "uri": "here", "rows": {}, "sha256": {}}
        (folder / "source.json").write_text(json.dumps(source))

    def run(self, **chosen) -> dict:
        return run(
            self.folder / "tables",
            self.clean,
            self.quarantine,
            self.html,
            settings={**LENIENT, **chosen},
        )

    def good(self, table: str = "interactions") -> list[dict]:
        return pq.read_table(self.clean / f"{table}.parquet").to_pylist()

    def bad(self, table: str = "interactions") -> list[dict]:
        return pq.read_table(self.quarantine / f"{table}.parquet").to_pylist()

    def reasons(self) -> dict[int, str]:
        return {row["row"]: row["reason"] for row in self.bad()}


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


def log(timestamps, **columns) -> dict:
    """An interactions table of one user and one item."""
    n = len(timestamps)
    return {"user_id": ["u"] * n, "item_id": ["i"] * n, "timestamp": timestamps, **columns}


# --- reasons ------------------------------------------------------------------------------------


def test_every_reason(workspace):
    workspace.tables(
        interactions={
            "user_id": ["u", None, "u", "u", "u", "u", "u", "u", " ", "u", "u"],
            "item_id": ["i", "i", "", "i", "i", "i", "i", "i", None, "j", "i"],
            "timestamp": ["5", "5", "5", "soon", "-5", str(NOW + 86_401), "5", "5", "5", "6", None],
            "event_value": ["1", "1", "1", "1", "1", "1", "cheap", "inf", "1", "", "1"],
        }
    )
    report = workspace.run()
    assert workspace.reasons() == {
        2: "null_user",
        3: "null_item",
        4: "bad_timestamp",
        5: "negative_timestamp",
        6: "future_timestamp",
        7: "bad_value",
        8: "bad_value",
        9: "null_user",
        11: "bad_timestamp",
    }
    assert [r["event_value"] for r in workspace.good()] == [1.0, None]
    assert report["rows"]["interactions"]["reasons"]["bad_value"] == 2
    assert next(r for r in workspace.bad() if r["row"] == 7)["event_value"] == "cheap"


def test_words_for_nobody_are_no_users(workspace):
    """A shop's guests are not one user, who does most of what is done."""
    workspace.tables(
        interactions={
            "user_id": ["NA", "u", "null", " None ", "nan", "\\N", "Nancy", "undefined"],
            "item_id": ["NA", "null", *["i"] * 6],  # an item may be called anything
            "timestamp": [1, 2, 3, 4, 5, 6, 7, 8],
        }
    )
    workspace.run()
    assert workspace.reasons() == dict.fromkeys([1, 3, 4, 5, 6, 8], "null_user")
    assert [r["user_id"] for r in workspace.good()] == ["Nancy", "u"]


def test_numbers_of_users_are_no_words_for_nobody(workspace):
    workspace.tables(
        interactions={"user_id": [7, None], "item_id": ["i", "j"], "timestamp": [1, 2]}
    )
    workspace.run()
    assert workspace.reasons() == {2: "null_user"}


def test_ids_longer_than_servers_take_are_quarantined(workspace):
    """As many characters as the collector and requests take, in every table."""
    longest, longer = "é" * MAX_ID, "é" * (MAX_ID + 1)
    workspace.tables(
        interactions={
            "user_id": [longest, longer, "u", "u", None],
            "item_id": [longest, "i", longer, "i", longer],
            "timestamp": [1, 2, 3, 4, 5],
            "event_id": [longest, None, "e", longer, None],
        },
        users={"user_id": [longest, longer, None]},
        items={"item_id": [longer, longest]},
    )
    report = workspace.run()
    assert workspace.reasons() == {2: "long_id", 3: "long_id", 4: "long_id", 5: "null_user"}
    assert [r["item_id"] for r in workspace.good()] == [longest]
    assert [r["user_id"] for r in workspace.good("users")] == [longest]
    assert [r["item_id"] for r in workspace.good("items")] == [longest]
    assert report["rows"]["items"]["reasons"] == {"long_id": 1}


def test_first_of_a_duplicated_event_id_stays(workspace):
    workspace.tables(
        interactions={
            "user_id": [None, "a", "b", "c", "d", "e"],
            "item_id": ["i"] * 6,
            "timestamp": [9, 3, 2, 1, 4, 5],
            # The id of the bad first row counts only from its first good row on.
            "event_id": ["x", "x", "x", "y", None, None],
        }
    )
    workspace.run()
    assert workspace.reasons() == {1: "null_user", 3: "duplicate_event_id"}
    assert [r["user_id"] for r in workspace.good()] == ["a", "c", "d", "e"]


def test_bots_are_quarantined_with_all_their_events(workspace):
    users = ["bot"] * 6 + ["a"] * 5
    workspace.tables(
        interactions={
            "user_id": users,
            "item_id": ["i"] * 11,
            "timestamp": list(range(11)),
        }
    )
    workspace.run(max_events_per_user=5)
    assert set(workspace.reasons().values()) == {"bot_user"}
    assert len(workspace.bad()) == 6
    assert {r["user_id"] for r in workspace.good()} == {"a"}


def test_exact_duplicates_stay_and_are_counted(workspace):
    workspace.tables(interactions=log([7, 7, 8]))
    report = workspace.run()
    assert len(workspace.good()) == 3
    assert report["log"]["exact_duplicates"] == 1


def test_malformed_lines_reach_quarantine(tmp_path, workspace):
    source = tmp_path / "a.csv"
    source.write_text("user,item,time\na,b,1\nc,d\ne,f,2\n")
    ingest(tmp_path / "tables", interactions=str(source))
    report = workspace.run()
    assert report["rows"]["interactions"]["in"] == 3
    assert [(r["row"], r["reason"], r["raw_line"]) for r in workspace.bad()] == [
        (2, "malformed_row", "c,d")
    ]


def test_own_columns_named_like_ours_are_kept(workspace):
    table = log(["x", "5"], reason=["mine", "mine"], row=["a", "b"])
    workspace.tables(Schema(context={"reason": "categorical"}), interactions=table)
    workspace.run()
    (bad,) = workspace.bad()
    assert (bad["reason"], bad["row"]) == ("bad_timestamp", 1)
    assert (bad["reason_"], bad["row_"]) == ("mine", "a")
    assert workspace.good()[0]["reason"] == "mine"


raw_id = st.one_of(st.none(), st.sampled_from(["", " ", "a", "b", 'q"u', "new\nline", "😀"]))
raw_time = st.one_of(
    st.none(),
    st.integers(-10, NOW + 200_000).map(str),
    st.sampled_from(["", "x", "nan", "inf", "-inf", "infinity", "now", "1e400", "1e300", "-1e300"]),
    st.sampled_from(["2020-01-01", "2020-13-45", "1960-01-01T00:00:00Z", "9999-12-31", "0x1F"]),
    st.text(max_size=5).filter(lambda s: "\x00" not in s),
)
raw_row = st.tuples(raw_id, raw_id, raw_time, raw_time, raw_id)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(table=st.lists(raw_row, min_size=1, max_size=30))
def test_no_row_is_lost(workspace, table):
    names = ["user_id", "item_id", "timestamp", "event_value", "event_id"]
    strings = pa.string()
    columns = {
        n: pa.array(c, strings) for n, c in zip(names, zip(*table, strict=True), strict=True)
    }
    workspace.tables(interactions=columns)
    try:
        report = workspace.run(max_events_per_user=5)
    except InputError:
        report = json.loads((workspace.quarantine / "report.json").read_text())
    counts = report["rows"]["interactions"]
    assert counts["in"] == len(table)
    assert counts["clean"] == len(workspace.good())
    assert counts["quarantined"] == len(workspace.bad()) == sum(counts["reasons"].values())
    assert counts["clean"] + counts["quarantined"] == len(table)
    # Every quarantined row is the raw row it says it is, and appears once.
    assert len(workspace.reasons()) == counts["quarantined"]
    for row in workspace.bad():
        assert tuple(row[n] for n in names) == table[row["row"] - 1]
    for row in workspace.good():
        assert row["user_id"].strip()
        assert row["item_id"].strip()
        assert 0 <= row["timestamp"] <= NOW + 86_400
    keys = [(r["user_id"], r["timestamp"]) for r in workspace.good()]
    assert keys == sorted(keys)


# --- timestamps ---------------------------------------------------------------------------------

UTC = datetime.UTC
MOMENT = datetime.datetime(2020, 9, 13, 12, 26, 40, 250_000)


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([1_600_000_000], "seconds"),
        ([1_600_000_000.25], "seconds"),
        (["1600000000.25"], "seconds"),
        ([1_600_000_000_250], "milliseconds"),
        (["1600000000250"], "milliseconds"),
        ([1_600_000_000_250_000], "microseconds"),
        ([1_600_000_000_250_000_000], "nanoseconds"),
        (["2020-09-13T12:26:40.25Z"], None),
        (["2020-09-13 12:26:40"], None),
        (["2020-09-13T14:26:40+02:00"], None),
        (pa.array([MOMENT], pa.timestamp("us")), None),
        (pa.array([MOMENT], pa.timestamp("ns")), None),
        (pa.array([MOMENT], pa.timestamp("ms")), None),
        (pa.array([MOMENT.replace(tzinfo=UTC)], pa.timestamp("us", tz="Asia/Tokyo")), None),
    ],
)
def test_every_kind_of_time(workspace, values, unit):
    workspace.tables(interactions=log(values))
    report = workspace.run()
    assert [r["timestamp"] for r in workspace.good()] == [1_600_000_000]
    assert report["timestamps"]["unit"] == unit


def test_dates_are_midnight_utc(workspace):
    workspace.tables(interactions=log(pa.array([datetime.date(2020, 9, 13)])))
    workspace.run()
    assert workspace.good()[0]["timestamp"] == 1_599_955_200


def test_unit_is_chosen_for_the_whole_column(workspace):
    # One early millisecond value is as small as a count of seconds.
    workspace.tables(interactions=log([1_600_000_000_000] * 9 + [1_600_000]))
    workspace.run()
    assert workspace.good()[0]["timestamp"] == 1_600


def test_unit_can_be_set(workspace):
    workspace.tables(interactions=log([5_000, 6_000]))
    report = workspace.run(timestamp_unit="ms")
    assert [r["timestamp"] for r in workspace.good()] == [5, 6]
    assert report["timestamps"]["by"] == "set"


def test_text_and_numbers_may_be_mixed(workspace):
    workspace.tables(interactions=log(["1600000000", "2020-09-13T12:26:41Z"]))
    workspace.run()
    assert [r["timestamp"] for r in workspace.good()] == [1_600_000_000, 1_600_000_001]


def test_equal_seconds_keep_the_finer_order_then_the_files(workspace):
    workspace.tables(
        interactions={
            "user_id": ["u"] * 5,
            "item_id": ["d", "c", "a", "e", "b"],
            "timestamp": [5.75, 5.5, 4.999, 5.75, 5.25],
        }
    )
    workspace.run()
    assert [r["item_id"] for r in workspace.good()] == ["a", "b", "c", "d", "e"]
    assert [r["timestamp"] for r in workspace.good()] == [4, 5, 5, 5, 5]


# --- clean tables -------------------------------------------------------------------------------


def test_clean_tables_are_typed(workspace):
    schema = Schema(
        users={"age": "numeric", "vip": "categorical"},
        items={"genres": "multi_categorical", "tags": "multi_categorical", "size": "categorical"},
        context={"device": "categorical", "battery": "numeric"},
        item_title="title",
    )
    workspace.tables(
        schema,
        interactions={
            "user_id": ["b", "a", "c", "d"],
            "item_id": ["x", "y", "x", "x"],
            "timestamp": ["2", "1", "3", "4"],
            "event_type": ["click", "", "", ""],
            "impression": ["x|y", None, " x  y\tz ", "x y|z| "],
            "device": ["tv", "", "", ""],
            "battery": ["0.5", "full", "", ""],
            "unused": ["1", "2", "3", "4"],
        },
        users={"user_id": ["a", "b"], "age": ["33", "n/a"], "vip": [True, None]},
        items={
            "item_id": ["y", "x"],
            "title": ["Why", "Ex"],
            "genres": ["War| Crime |", None],
            "tags": [[1, 2], []],
            "size": [3.0, 2.5],
            "created_at": ["2020-09-13T12:26:40Z", "?"],
            "unused": ["1", "2"],
        },
    )
    report = workspace.run()
    first = {"user_id": "a", "item_id": "y", "timestamp": 1, "event_type": None}
    good = workspace.good()
    assert [row["impression"] for row in good[2:]] == [["x", "y", "z"], ["x y", "z"]]
    assert good[:2] == [
        {**first, "impression": None, "device": None, "battery": None},
        {
            "user_id": "b",
            "item_id": "x",
            "timestamp": 2,
            "event_type": "click",
            "impression": ["x", "y"],
            "device": "tv",
            "battery": 0.5,
        },
    ]
    assert workspace.good("users") == [
        {"user_id": "a", "age": 33.0, "vip": "true"},
        {"user_id": "b", "age": None, "vip": None},
    ]
    assert workspace.good("items") == [
        {
            "item_id": "x",
            "created_at": None,
            "title": "Ex",
            "genres": None,
            "tags": [],
            "size": "2.5",
        },
        {
            "item_id": "y",
            "created_at": 1_600_000_000,
            "title": "Why",
            "genres": ["War", "Crime"],
            "tags": ["1", "2"],
            "size": "3",
        },
    ]
    assert report["set_to_null"] == {
        "context.battery": 1,
        "users.age": 1,
        "items.created_at": 1,
    }
    assert Schema.load(workspace.clean / "schema.json") == schema
    types = pq.read_schema(workspace.clean / "interactions.parquet")
    assert types.field("timestamp").type == pa.int64()
    assert types.field("battery").type == pa.float64()


def test_side_tables_keep_the_last_row_of_an_id(workspace):
    workspace.tables(
        Schema(users={"age": "numeric"}),
        interactions=log([1, 2]),
        users={"user_id": ["u", "", "u", "v"], "age": [1, 2, 3, 4]},
    )
    report = workspace.run()
    assert workspace.good("users") == [
        {"user_id": "u", "age": 3.0},
        {"user_id": "v", "age": 4.0},
    ]
    assert [(r["row"], r["reason"], r["age"]) for r in workspace.bad("users")] == [
        (1, "duplicate_user", "1"),
        (2, "null_user", "2"),
    ]
    assert report["coverage"]["users"] == {"in_log_only": 0, "in_table_only": 1}


def test_users_absent_from_their_table_are_fine(workspace):
    workspace.tables(
        Schema(items={"kind": "categorical"}),
        interactions=log([1, 2]),
        items={"item_id": ["other"], "kind": ["x"]},
    )
    report = workspace.run()
    assert len(workspace.good()) == 2
    assert report["coverage"]["items"] == {"in_log_only": 1, "in_table_only": 1}
    assert not (workspace.quarantine / "items.parquet").exists()


# --- stops --------------------------------------------------------------------------------------


def test_stops_when_too_many_rows_are_bad(workspace):
    workspace.tables(interactions=log(["1"] * 9 + ["x"]))
    with pytest.raises(InputError, match=r"1 of 10 .*10.0%.*bad_timestamp 1") as caught:
        workspace.run(max_bad_share=0.05)
    assert str(workspace.quarantine) in str(caught.value)
    limit = re.search(r"validate.max_bad_share=([0-9.]+)", str(caught.value))
    assert workspace.bad()[0]["timestamp"] == "x"
    report = json.loads((workspace.quarantine / "report.json").read_text())
    assert report["problem"] == str(caught.value)
    assert "The run stopped" in workspace.html.read_text()
    # The message's advice works.
    workspace.run(max_bad_share=float(limit[1]))


def test_users_may_be_sessions_where_most_have_no_name(workspace):
    users = {"user_id": ["NA"] * 8 + ["a", "b"], "session_id": [*"ssttuuvvwx"]}
    workspace.tables(interactions=log(["1"] * 10) | users)
    with pytest.raises(InputError, match=r"null_user 8.*--set ingest.columns.user_id=NAME"):
        workspace.run(max_bad_share=0.05)


def test_stops_when_nothing_is_left(workspace):
    workspace.tables(interactions=log(["x", "y"]))
    with pytest.raises(InputError, match=r"no interaction is left .*bad_timestamp 2"):
        workspace.run()
    assert len(workspace.bad()) == 2
    assert "The run stopped" in workspace.html.read_text()


@pytest.mark.parametrize("name", ["min_users", "min_items", "min_events"])
def test_stops_when_too_little_is_left(workspace, name):
    workspace.tables(interactions=log([1, 2, 3]))
    with pytest.raises(InputError, match=f"validate.{name}="):
        workspace.run(**{name: 4})


def test_defaults_refuse_a_toy_log(workspace):
    workspace.tables(interactions=log([1, 2, 3]))
    with pytest.raises(InputError, match="only 1 users are left for training, at least 10"):
        run(workspace.folder / "tables", workspace.clean, workspace.quarantine, workspace.html)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"max_bad_share": 2}, "validate.max_bad_share"),
        ({"timestamp_unit": "hours"}, "validate.timestamp_unit"),
        ({"max_bad": 0.1}, "no such setting"),
    ],
)
def test_bad_settings_are_refused(workspace, chosen, message):
    workspace.tables(interactions=log([1]))
    with pytest.raises(InputError, match=message):
        workspace.run(**chosen)


# --- report -------------------------------------------------------------------------------------


def shop_log(days: int, items: int, drift: bool, events: int = 8_000) -> dict:
    """Events of 50 users; with drift, each day's favourites are other items."""
    generator = np.random.default_rng(7)
    time = np.sort(generator.integers(0, days * 86_400, events))
    rank = (items * generator.random(events) ** 3).astype(int)
    item = (rank + drift * 13 * (time // 86_400)) % items
    return {
        "user_id": [f"u{u}" for u in generator.integers(0, 50, events)],
        "item_id": [f"i{i}" for i in item],
        "timestamp": (time + 1_500_000_000).tolist(),
    }


def test_drift_is_told_from_none(workspace):
    workspace.tables(interactions=shop_log(32, 100, drift=True))
    moving = workspace.run()["log"]["shift"]
    assert moving["stale_after_seconds"] <= 86_400
    assert "without that, retrain every" in moving["advice"]
    workspace.tables(interactions=shop_log(32, 100, drift=False))
    still = workspace.run()["log"]["shift"]
    assert still["stale_after_seconds"] is None
    assert "ages slowly" in still["advice"]


def test_shift_equals_brute_force(workspace):
    table = shop_log(20, 30, drift=True, events=600)
    workspace.tables(interactions=table)
    shift = workspace.run()["log"]["shift"]
    curve = next(c for c in shift["curves"] if c["window_seconds"] == 86_400)
    first = min(table["timestamp"])
    period = [(t - first) // 86_400 for t in table["timestamp"]]
    num_items = len(set(table["item_id"]))
    pairs = list(zip(period, table["item_id"], strict=True))
    for lag, loss in enumerate(curve["log_loss"], 1):
        terms = [
            math.log((pairs.count((p - lag, i)) + 1) / (period.count(p - lag) + num_items))
            for p, i in pairs
            if p >= 8
        ]
        assert loss == pytest.approx(-sum(terms) / len(terms))


def test_report_numbers(workspace):
    workspace.tables(
        interactions={
            "user_id": ["a", "a", "a", "b"],
            "item_id": ["x", "x", "y", "x"],
            "timestamp": [10, 10, 110, 50],
        }
    )
    log_report = workspace.run()["log"]
    assert (log_report["events"], log_report["users"], log_report["items"]) == (4, 2, 2)
    assert (log_report["first"], log_report["last"]) == (10, 110)
    assert log_report["events_per_user"]["max"] == 3
    assert log_report["gaps"]["count"] == 2
    assert log_report["gaps"]["zero_share"] == 0.5
    assert sum(log_report["gaps"]["histogram"]["counts"]) == 1
    assert log_report["repeats"] == 0.25
    assert sum(log_report["events_over_time"]["events"]) == 4
    assert sum(log_report["events_per_item"]["histogram"]["counts"]) == 2


def test_html_is_self_contained_and_escaped(workspace):
    table = shop_log(32, 100, drift=True)
    table["item_id"][:500] = ["<script>alert(1)</script>"] * 500
    workspace.tables(Schema(context={}), interactions=table)
    workspace.run()
    html = workspace.html.read_text()
    assert html.count("<svg") == 6
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    # The SVG's own namespaces are names, not addresses that a browser would load.
    assert not re.search(r'(src|href)="(?!#)', html.replace("xlink:href", "href"))
    assert "@import" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_single_event_can_be_reported(workspace):
    workspace.tables(interactions=log([5]))
    report = workspace.run()
    assert report["log"]["events"] == 1
    assert "too short" in report["log"]["shift"]["advice"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (90, "90 seconds"),
        (3600, "1 hour"),
        (5400, "90 minutes"),
        (86_400, "1 day"),
        (604_800, "1 week"),
        (1_209_600, "2 weeks"),
    ],
)
def test_spans_are_spelt(seconds, words):
    assert spell_seconds(seconds) == words
