"""The batch equals the model asked one by one, whatever its parts, and goes on where it stopped."""

import gc
import json
import subprocess
import sys
import weakref
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.batch_recommend import steps
from components.train import steps as train
from model.errors import InputError, UnavailableError
from model.query import Event, Query
from model.recommender import Recommender
from model.store import Lineage, ModelStore
from tests import synthetic
from tests.servers import S3Server

TRAIN = {"max_epochs": 1, "network": {"embedding": 4, "hidden": 4, "control": 2}}
USERS = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    clean = synthetic.clean_tables(folder / "clean", synthetic.successor(USERS, 8, 10, seed=0))
    synthetic.add_users(clean)
    train.run(clean, folder / "bundle", trend={}, settings=TRAIN)
    store = ModelStore(str(folder / "models"))
    store.promote(store.publish(folder / "bundle", Lineage()))
    return clean, store, folder / "bundle"


def _run(world, tmp_path, name="out", **more):
    clean, store, _ = world
    settings = {"num_results": 3, "users_per_part": 7} | more.pop("settings", {})
    output = str(tmp_path / name)
    return steps.run(
        clean, store.uri, output, tmp_path / f"summary-{name}", settings=settings, **more
    )


def _latest(output):
    """The folder that readers are led to."""
    return output / json.loads((output / "latest.json").read_text())["batch"]


def _lists(output):
    folder = _latest(output)
    table = pq.read_table(folder)  # as anybody would read it
    assert table.schema.names == steps.SCHEMA.names
    found = {}
    for row in table.to_pylist():
        found.setdefault(row["user_id"], []).append((row["rank"], row["item_id"], row["score"]))
    return found


def test_the_batch_equals_the_model_asked_one_by_one(world, tmp_path):
    clean, store, bundle = world
    record = _run(world, tmp_path)
    assert (record["num_users"], record["parts"]) == (USERS, 5)
    assert record["model_version"] == store.champion().version
    got = _lists(tmp_path / "out")
    recommender = Recommender.load(bundle)
    events = pq.read_table(clean / "interactions.parquet").to_pylist()
    fields = {r.pop("user_id"): r for r in pq.read_table(clean / "users.parquet").to_pylist()}
    moment = max(e["timestamp"] for e in events) + 1
    assert set(got) == {e["user_id"] for e in events}
    for user, rows in got.items():
        history = [Event(e["item_id"], e["timestamp"]) for e in events if e["user_id"] == user]
        [own] = recommender.recommend([Query(history, moment, user=fields.get(user, {}))], 3)
        assert [r[0] for r in rows] == [1, 2, 3]
        assert [r[2] for r in rows] == pytest.approx([r.score for r in own], abs=1e-4)
    assert record["output"] == str(_latest(tmp_path / "out"))
    assert json.loads((_latest(tmp_path / "out") / "_summary.json").read_text()) == record


@pytest.mark.parametrize("size", [1, USERS, 1000])
def test_the_size_of_parts_changes_nothing(world, tmp_path, size):
    _run(world, tmp_path)
    _run(world, tmp_path, "other", settings={"users_per_part": size})
    a, b = _lists(tmp_path / "out"), _lists(tmp_path / "other")
    assert list(a) == list(b)
    for user in a:
        assert [r[2] for r in a[user]] == pytest.approx([r[2] for r in b[user]], abs=1e-4)


def test_memory_holds_one_part(world, tmp_path, monkeypatch):
    """However many users the log has, those of one part are held, and the one being read."""
    alive, most = weakref.WeakSet(), []

    class Counted(steps._User):
        __hash__ = object.__hash__

        def __post_init__(self):
            alive.add(self)

    whole = steps.Batches.write

    def write(self, batch, name, rows):
        gc.collect()
        most.append(len(alive))
        return whole(self, batch, name, rows)

    monkeypatch.setattr(steps, "_User", Counted)
    monkeypatch.setattr(steps.Batches, "write", write)
    _run(world, tmp_path, settings={"users_per_part": 5})
    assert len(most) == USERS / 5
    assert max(most) <= 5 + 1


def test_a_list_of_users_with_a_new_one(world, tmp_path):
    (tmp_path / "users.txt").write_text("u3\n\nnobody yet\nu1\nu3\n")
    record = _run(world, tmp_path, users=str(tmp_path / "users.txt"))
    assert record["num_users"] == 3
    assert list(_lists(tmp_path / "out")) == ["u1", "u3", "nobody yet"]
    pq.write_table(pa.table({"user_id": ["u2"]}), tmp_path / "users.parquet")
    _run(world, tmp_path, "parquet", users=str(tmp_path / "users.parquet"))
    assert list(_lists(tmp_path / "parquet")) == ["u2"]


def test_seen_items_are_left_out_when_asked(world, tmp_path):
    clean, _, _ = world
    _run(world, tmp_path, settings={"exclude_seen": True, "num_results": 100})
    events = pq.read_table(clean / "interactions.parquet").to_pylist()
    for user, rows in _lists(tmp_path / "out").items():
        seen = {e["item_id"] for e in events if e["user_id"] == user}
        assert {r[1] for r in rows} == {f"i{j:03d}" for j in range(10)} - seen


# Attempts in processes of their own, each killed before another change of the output.
KILLED = """
import os, signal, sys
from pathlib import Path
from components.batch_recommend import steps
from model.store import _Folder

def attempt(output, point):
    changes = 0
    def dies(wrapped):
        def call(*arguments):
            nonlocal changes
            if changes == point:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1
            return wrapped(*arguments)
        return call
    for change in ("write", "put"):
        setattr(_Folder, change, dies(getattr(_Folder, change)))
    settings = {"num_results": 3, "users_per_part": 7}
    steps.run(Path(clean), store, output, Path(output + "-summary"), settings=settings)

clean, store, points, *outputs = sys.argv[1:]
for point, output in zip(map(int, points.split(",")), outputs, strict=True):
    child = os.fork()
    if not child:
        code = 1
        try:
            attempt(output, point)
            code = 0
        finally:
            os._exit(code)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CHANGES = ("plan", *(f"part {n}" for n in range(5)), "summary", "pointer")


def _killed(world, points):
    """Exit codes of attempts that are killed: {output: number of changes made before}."""
    clean, store, _ = world
    arguments = (clean, store.uri, ",".join(map(str, points.values())), *points)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("code ")]


def test_a_batch_that_was_killed_before_any_change_goes_on_with_what_is_missing(world, tmp_path):
    last = len(CHANGES)
    points = {tmp_path / f"killed-{n}": n for n in (0, 1, 3, last - 2, last - 1, last)}
    assert _killed(world, points) == [-9] * 5 + [0]
    whole = _lists(tmp_path / f"killed-{len(CHANGES)}")
    for output, made in list(points.items())[:-1]:
        assert not (output / "latest.json").exists()  # nobody is led to a half one
        parts = sorted(output.glob("*/part-*"))
        assert len(parts) == min(max(made - 1, 0), 5)
        assert len(list(output.glob("*/_summary.json"))) == (made == len(CHANGES) - 1)
        before = [p.stat().st_mtime_ns for p in parts]
        record = _run(world, tmp_path, output.name, run_id="another-run")
        assert _lists(output) == whole
        assert len(_lists(output)) == USERS
        if 0 < made < len(CHANGES) - 1:  # gone on with
            assert record["batch"] == next(iter(output.glob("*/_plan.json"))).parent.name
            assert [p.stat().st_mtime_ns for p in parts] == before


def test_a_part_that_vanished_is_missed_before_the_batch_is_said_to_be_whole(
    world, tmp_path, monkeypatch
):
    write, output = steps.Batches.write, tmp_path / "out"

    def write_and_lose(self, batch, name, rows):
        write(self, batch, name, rows)
        if name == steps.part_name(2):
            (output / batch / steps.part_name(0)).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(steps.Batches, "write", write_and_lose)
        with pytest.raises(UnavailableError, match=r"lacks part-00000\.parquet \(1 of 5 parts\)"):
            _run(world, tmp_path)
    assert not (output / "latest.json").exists()
    _run(world, tmp_path)
    assert len(_lists(output)) == USERS


def test_every_run_of_a_schedule_has_a_folder_of_its_own(world, tmp_path):
    """The same output again and again, as a schedule gives it."""
    first = _run(world, tmp_path, run_id="run-a")
    second = _run(world, tmp_path, run_id="run-b")
    output = tmp_path / "out"
    assert first["batch"] < second["batch"]
    assert second["batch"].endswith("-run-b")
    assert _latest(output).name == second["batch"]
    for record in (first, second):
        folder = output / record["batch"]
        assert json.loads((folder / "_summary.json").read_text()) == record
        assert len(list(folder.glob("part-*.parquet"))) == record["parts"]
    other = _run(world, tmp_path, settings={"num_results": 1}, run_id="run-c")
    assert {len(rows) for rows in _lists(output).values()} == {1}
    assert other["batch"].endswith("-run-c")


def test_while_a_batch_is_under_way_the_latest_is_the_one_before(world, tmp_path):
    output = tmp_path / "out"
    whole = _run(world, tmp_path)
    assert _killed(world, {output: 3}) == [-9]
    assert _latest(output).name == whole["batch"]


def test_older_batches_are_removed_when_asked_and_nothing_else_is(world, tmp_path):
    output = tmp_path / "out"
    ids = [f"20200101T00000{n}Z-a" for n in range(3)]
    for run_id in ids:
        _run(world, tmp_path, run_id=run_id)
    (output / "20200101T000000Z-a" / "_summary.json").unlink()  # begun, and given up
    (output / "20200101T000000Z-a" / "_plan.json").write_text("{}")
    (output / "mine").mkdir()
    (output / "mine" / "_summary.json").write_text("")
    kept = _run(world, tmp_path, settings={"keep": 2}, run_id="20200101T000009Z-a")
    assert {p.name for p in output.iterdir()} == {ids[2], kept["batch"], "mine", "latest.json"}
    assert _latest(output).name == kept["batch"]


def test_a_batch_under_way_and_the_one_just_done_are_kept(world, tmp_path):
    output = tmp_path / "out"
    for n in (1, 2):
        _run(world, tmp_path, run_id=f"20200101T00000{n}Z-a")
    begun = f"{datetime.now(UTC):%Y%m%d}T000000Z-a"  # today
    (output / begun).mkdir()
    (output / begun / "_plan.json").write_text("{}")
    late = "20200101T000000Z-a"  # begun first, gone on with now
    kept = _run(world, tmp_path, settings={"keep": 1}, run_id=late)
    names = {p.name for p in output.iterdir()}
    assert {begun, kept["batch"], "20200101T000002Z-a"} <= names
    assert "20200101T000001Z-a" not in names
    assert _latest(output).name == "20200101T000002Z-a"


def test_what_cannot_be_done_is_said(world, tmp_path):
    clean, store, _ = world
    (tmp_path / "full").mkdir()
    for content in ("{}", "[1]", "not JSON"):
        (tmp_path / "full" / "latest.json").write_text(content)
        with pytest.raises(InputError, match=r"full/latest\.json"):
            _run(world, tmp_path, "full")
        assert [p.name for p in (tmp_path / "full").iterdir()] == ["latest.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"output .*file cannot be used"):
        _run(world, tmp_path, "file")
    with pytest.raises(InputError, match="no-such-list"):
        _run(world, tmp_path, "o2", users=str(tmp_path / "no-such-list"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        _run(world, tmp_path, "o3", users=str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match="no version"):
        _run(world, tmp_path, "o4", version="v0")
    with pytest.raises(InputError, match="no champion"):
        steps.run(clean, str(tmp_path / "none"), "o5", tmp_path / "s", settings={})
    with pytest.raises(InputError, match="num_results"):
        _run(world, tmp_path, "o6", settings={"num_results": 0})
    with pytest.raises(InputError, match="give the output"):
        steps.run(clean, store.uri, "", tmp_path / "s", settings={})


def test_output_on_an_object_store(world, tmp_path):
    clean, store, _ = world
    address = f"memory://{tmp_path.name}"
    for run_id in ("a", "b"):
        record = steps.run(
            clean,
            store.uri,
            address,
            tmp_path / "s",
            run_id=run_id,
            settings={"users_per_part": 10, "keep": 1},
        )
    import fsspec

    fs, root = fsspec.url_to_fs(address)
    assert json.loads(fs.cat_file(f"{root}/latest.json"))["batch"] == record["batch"]
    assert len(fs.glob(f"{root}/*/part-*.parquet")) == 3
    assert record["output"] == f"{address}/{record['batch']}"


def test_output_on_s3_has_the_stores_deadlines_and_says_what_is_wrong(world, tmp_path, monkeypatch):
    import s3fs

    clean, store, _ = world
    server = S3Server("mails")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()

    def go(output, **more):
        settings = {"users_per_part": 10, "keep": 1}
        return steps.run(clean, store.uri, output, tmp_path / "s", settings=settings, **more)

    try:
        first = go("s3://mails/daily", run_id="a")
        fs = s3fs.S3FileSystem()
        fs.pipe("mails/list.txt", b"u1\nu2\n")
        second = go("s3://mails/daily", run_id="b", users="s3://mails/list.txt")
        assert (first["num_users"], second["num_users"]) == (USERS, 2)
        assert json.loads(fs.cat_file("mails/daily/latest.json"))["batch"] == second["batch"]
        fs.invalidate_cache()
        assert [p.split("/")[-2] for p in fs.glob("mails/daily/*/_plan.json")] == [second["batch"]]
        with pytest.raises(UnavailableError, match="output s3://none/daily cannot be used"):
            go("s3://none/daily")
        with pytest.raises(InputError, match=r"s3://mails/none\.txt cannot be read"):
            go("s3://mails/daily", users="s3://mails/none.txt")
        server.kill()
        with pytest.raises(UnavailableError, match="output s3://mails/daily cannot be used"):
            go("s3://mails/daily")
        with pytest.raises(UnavailableError, match=r"list of users s3://mails/list\.txt cannot"):
            go("s3://mails/daily", users="s3://mails/list.txt")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.close()
