"""The model store, the same on a folder, on S3 (a local server) and on another fsspec address."""

import contextlib
import errno
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from model import manifest as manifests
from model import store as stores
from model.errors import BundleError, ConflictError, InputError, UnavailableError
from model.store import Lineage, ModelStore
from pipelines.tables import versions_table
from tests.http_server import Handler, HttpServer


def make_bundle(folder: Path, version: str, created="2026-01-01T00:00:00+00:00", size=1000) -> Path:
    """A bundle as far as the store is concerned: files and their digests."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(version.encode() * size)
    (folder / "metrics.json").write_text("{}")
    files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    manifest = manifests.Manifest(
        manifests.FORMAT, manifests.FORMAT_VERSION, version, created, dict(sorted(files.items()))
    )
    (folder / manifests.MANIFEST).write_text(json.dumps(asdict(manifest)))
    return folder


@pytest.fixture
def bundle_of(tmp_path):
    def bundle(version, **more):
        path = tmp_path / "bundles" / version
        return path if path.exists() else make_bundle(path, version, **more)

    return bundle


@pytest.fixture(scope="module")
def s3():
    """An S3 server on a free port, and the environment that names it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("models")
    yield environment
    patch.undo()
    server.stop()


def _address(kind, request, tmp_path):
    if kind == "s3":
        request.getfixturevalue("s3")
        return f"s3://models/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}" if kind == "memory" else str(tmp_path / "store")


@pytest.fixture(params=["folder", "s3", "memory"])
def uri(request, tmp_path):
    return _address(request.param, request, tmp_path)


@pytest.fixture(params=["folder", "s3"])
def guarded_uri(request, tmp_path):
    """Stores that guard the champion against writers at the same moment."""
    return _address(request.param, request, tmp_path)


@pytest.fixture
def store(uri):
    return ModelStore(uri)


def deploy(store, bundle, **how):
    return store.promote(store.publish(bundle, Lineage()), **how)


def test_an_empty_store_has_no_champion_and_nothing_to_go_back_to(store):
    assert store.champion() is None
    assert store.versions() == []
    with pytest.raises(InputError, match="no previous model"):
        store.rollback()
    with pytest.raises(InputError, match="no version 'v1'"):
        store.promote("v1")


def test_publishing_leaves_the_champion_and_promoting_moves_both_pointers(store, bundle_of):
    deploy(store, bundle_of("v1"))
    store.publish(bundle_of("v2"), Lineage())
    assert store.champion().version == "v1"
    second = store.promote("v2", reason="deploy")
    assert store.champion() == second
    assert (second.version, second.previous, second.reason) == ("v2", "v1", "deploy")
    assert {v.version: v.role for v in store.versions()} == {"v2": "champion", "v1": "previous"}


def test_doing_it_twice_changes_nothing(store, bundle_of):
    deploy(store, bundle_of("v1"))
    second = deploy(store, bundle_of("v2"))
    assert deploy(store, bundle_of("v2")) == second
    # Also when it states the champion of before: the same run finishing what it had finished.
    assert store.promote("v2", replaces="v1") == second
    assert len(store.versions()) == 2


def test_rolling_back_goes_back_one_by_one_and_never_to_what_was_rolled_back(store, bundle_of):
    for version in ("v1", "v2", "v3"):
        deploy(store, bundle_of(version))
    back = store.rollback()
    assert (back.version, back.previous, back.reason) == ("v2", "v1", "rollback")
    back = store.rollback()
    assert (back.version, back.previous, back.history) == ("v1", None, ())
    with pytest.raises(InputError, match="no previous model"):
        store.rollback()
    # By hand any of them may serve again.
    assert store.promote("v3").history == ("v1",)


def test_the_same_rollback_from_two_places_goes_back_once(store, bundle_of):
    for version in ("v1", "v2", "v3"):
        deploy(store, bundle_of(version))
    assert store.rollback(replaces="v3").version == "v2"
    with pytest.raises(ConflictError, match="is v2, not v3: nothing was rolled back"):
        store.rollback(replaces="v3")
    assert store.champion().version == "v2"


def test_rollbacks_at_the_same_moment_go_back_once(guarded_uri, bundle_of):
    """Both read the champion before either writes."""
    for version in ("v1", "v2", "v3"):
        deploy(ModelStore(guarded_uri), bundle_of(version))
    both_have_read = threading.Barrier(2)

    def attempt(_):
        store = ModelStore(guarded_uri)
        write, first = store._write_champion, []

        def later(new, tag):
            if not first:
                first.append(tag)
                with contextlib.suppress(threading.BrokenBarrierError):
                    both_have_read.wait(1)  # never met under a folder's lock
            return write(new, tag)

        store._write_champion = later
        try:
            return store.rollback().version
        except ConflictError:
            return "told"

    with ThreadPoolExecutor(2) as pool:
        outcomes = set(pool.map(attempt, range(2)))
    if guarded_uri.startswith("s3"):
        assert outcomes == {"v2"}
        assert ModelStore(guarded_uri).champion().version == "v2"
    else:  # one after the other: two rollbacks
        assert outcomes == {"v2", "v1"}


def test_a_champion_under_check_is_confirmed_or_goes_without_a_trace(store, bundle_of):
    deploy(store, bundle_of("v1"))
    tried = deploy(store, bundle_of("v2"), replaces="v1", reason="deploy", checking="run-2")
    assert (tried.version, tried.previous, tried.checking) == ("v2", "v1", "run-2")
    assert {v.version: v.state for v in store.versions()} == {"v2": "checking", "v1": ""}
    # The same step again: still to be checked, by another run under its own mark.
    assert deploy(store, bundle_of("v2"), replaces="v1", checking="run-2") == tried
    taken = deploy(store, bundle_of("v2"), replaces="v1", checking="run-3")
    assert (taken.version, taken.previous, taken.checking) == ("v2", "v1", "run-3")
    assert store.rollback(replaces="v2").history == ()
    assert store.champion().version == "v1"
    deploy(store, bundle_of("v2"), replaces="v1", checking="run-4")
    assert store.confirm("v2") == store.confirm("v2") == store.champion()
    assert store.champion().checking is None
    with pytest.raises(ConflictError, match="v2 became the champion"):
        store.confirm("v1")


def test_a_champion_that_was_not_confirmed_is_never_gone_back_to(store, bundle_of):
    deploy(store, bundle_of("v1"))
    deploy(store, bundle_of("v2"), checking="run-2")  # killed there
    deploy(store, bundle_of("v3"), replaces="v2", checking="run-3")
    assert store.champion().history == ("v1",)
    assert store.rollback().version == "v1"
    # Promoting it by hand says that it is good.
    deploy(store, bundle_of("v2"), checking="run-2")
    assert store.promote("v2").checking is None
    deploy(store, bundle_of("v3"))
    assert store.champion().previous == "v2"


def test_a_first_champion_that_fails_its_check_leaves_none(store, bundle_of):
    deploy(store, bundle_of("v1"), replaces=None, checking="run-1")
    assert store.rollback(replaces="v1") is None
    assert store.champion() is None
    assert [v.role for v in store.versions()] == [""]
    with pytest.raises(InputError, match="no previous model"):
        store.rollback()
    assert deploy(store, bundle_of("v2"), replaces=None).previous is None


def test_what_became_of_a_version_is_remembered_by_run(store, bundle_of):
    store.publish(bundle_of("v1"), Lineage())
    assert store.release("v1", "run-1") is None
    store.record("v1", "run-1", "trying")
    store.record("v1", "run-1", "rolled_back", "it answers nonsense")
    store.record("v1", "namespace/job:7", "released")
    remembered = store.release("v1", "run-1")
    assert (remembered.state, remembered.reason) == ("rolled_back", "it answers nonsense")
    assert store.release("v1", "namespace/job:7").run_id == "namespace/job:7"
    assert {r.run_id for r in store.version("v1").releases} == {"run-1", "namespace/job:7"}
    store._files.write("releases/v1/run-1.json", b"{")
    with pytest.raises(UnavailableError, match="not a release record"):
        store.release("v1", "run-1")


class LosesAnswers(HttpServer):
    """A connection to the S3 server on which answers to writes of the champion do not come back."""

    def __init__(self, target, lost):
        self.target, self.left, self.written = target, lost, 0
        outer = self

        class Answers(Handler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                connection = http.client.HTTPConnection(outer.target, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if self.command == "PUT" and self.path.split("?")[0].endswith("champion.json"):
                    outer.written += answer.status == 200
                    if outer.left > 0:
                        outer.left -= 1
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                else:
                    self.send_header("Content-Length", answer.getheader("Content-Length") or "0")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        super().__init__(Answers)


@pytest.mark.parametrize("lost", [1, 2], ids=["the driver tries again", "the driver gives up"])
def test_a_rollback_whose_answer_is_lost_goes_back_once(s3, bundle_of, monkeypatch, lost):
    import s3fs

    uri = f"s3://models/{uuid.uuid4().hex}"
    for version in ("v1", "v2", "v3"):
        deploy(ModelStore(uri), bundle_of(version))
    with LosesAnswers(s3["AWS_ENDPOINT_URL"].removeprefix("http://"), lost) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            back = ModelStore(uri).rollback()
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
    assert proxy.left == 0  # the answers were lost
    assert (back.version, back.previous) == ("v2", "v1")
    monkeypatch.undo()
    assert proxy.written == 1


def test_lineage_is_kept_and_the_first_record_stays(store, bundle_of):
    lineage = Lineage(
        data_digest="d",
        code_digest="c",
        run_id="r",
        parent="v0",
        parameters={"train": {"seed": 1}},
        metrics={"hrnn": {"every": {"ppl": 3.0}}},
        verdict={"passed": False},
        override="the old one is worse than it looks",
    )
    store.publish(bundle_of("v1"), lineage)
    store.publish(bundle_of("v1"), Lineage())
    found = store.version("v1")
    assert found.lineage == lineage
    assert found.bytes > 2000


def test_fetch_gives_a_verified_local_bundle(store, bundle_of, tmp_path):
    store.publish(bundle_of("v1"), Lineage())
    cache = tmp_path / "cache"
    path = store.fetch("v1", cache)
    assert manifests.verify(path).model_version == "v1"
    assert store.fetch("v1", cache) == path
    if path.is_relative_to(cache):  # a copy; a damaged one is fetched anew
        (path / "weights.safetensors").write_bytes(b"x")
        assert manifests.verify(store.fetch("v1", cache)).model_version == "v1"
        assert [p.name for p in cache.iterdir()] == ["v1"]
    with pytest.raises(InputError, match="no version 'v2'"):
        store.fetch("v2", cache)


def _damage(store, path):
    store._files.write(path, b"garbage")


def _delete(store, path):
    import fsspec

    fs, root = fsspec.url_to_fs(store.uri)
    fs.rm_file(f"{root}/{path}")


def test_a_damaged_version_is_neither_promoted_nor_fetched(store, bundle_of, tmp_path):
    deploy(store, bundle_of("v1"))
    store.publish(bundle_of("v2"), Lineage())
    _damage(store, "versions/v2/weights.safetensors")
    for use in (
        lambda: store.promote("v2"),
        lambda: store.fetch("v2", tmp_path / "cache"),
        lambda: store.publish(bundle_of("v2"), Lineage()),
    ):
        with pytest.raises(BundleError, match=r"weights\.safetensors does not match its digest"):
            use()
    assert store.champion().version == "v1"
    assert not list((tmp_path / "cache").glob("*"))
    store._files.remove("versions/v2")
    with pytest.raises(InputError, match="no version"):
        store.promote("v2")


def test_a_damaged_bundle_is_not_published(store, bundle_of):
    bundle = bundle_of("v1")
    (bundle / "metrics.json").write_text("[]")
    with pytest.raises(BundleError, match="digest"):
        store.publish(bundle, Lineage())
    assert store.versions() == []


def test_an_upload_that_was_cut_off_is_not_a_version_and_can_be_done_again(store, bundle_of):
    store._files.write("versions/v1/weights.safetensors", b"v1v1")  # no manifest yet
    assert store.versions() == []
    with pytest.raises(InputError, match="no version"):
        store.promote("v1")
    deploy(store, bundle_of("v1"))
    assert [v.version for v in store.versions()] == ["v1"]


def test_another_bundle_under_the_same_version_is_refused(store, bundle_of, tmp_path):
    store.publish(bundle_of("v1"), Lineage())
    with pytest.raises(BundleError, match="another bundle as version v1"):
        store.publish(make_bundle(tmp_path / "other", "v1", size=7), Lineage())


def test_a_deployment_prepared_against_another_champion_is_refused(store, bundle_of):
    deploy(store, bundle_of("v1"), replaces=None)
    deploy(store, bundle_of("v2"), replaces="v1")
    for replaces in ("v1", None):
        with pytest.raises(ConflictError, match="is v2, not"):
            deploy(store, bundle_of("v3"), replaces=replaces)
    assert store.champion().version == "v2"


def test_of_runs_at_once_that_replace_the_same_champion_one_wins(guarded_uri, bundle_of):
    uri = guarded_uri
    deploy(ModelStore(uri), bundle_of("v0"))
    for n in range(1, 9):
        bundle_of(f"v{n}")

    def attempt(n):
        try:
            return deploy(ModelStore(uri), bundle_of(f"v{n}"), replaces="v0").version
        except ConflictError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [v for v in pool.map(attempt, range(1, 9)) if v]
    champion = ModelStore(uri).champion()
    assert winners == [champion.version]
    assert champion.previous == "v0"


def test_changes_at_once_leave_one_whole_champion_and_an_unbroken_chain(guarded_uri, bundle_of):
    uri = guarded_uri
    for n in range(4):
        bundle_of(f"v{n}")

    def change(n):
        return deploy(ModelStore(uri), bundle_of(f"v{n % 4}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(16)))
    champion = ModelStore(uri).champion()
    assert champion.previous != champion.version
    assert {v.version for v in ModelStore(uri).versions()} == {"v0", "v1", "v2", "v3"}


def test_retention_keeps_the_newest_and_whatever_serves(store, bundle_of):
    for day in range(1, 7):
        store.publish(bundle_of(f"v{day}", created=f"2026-01-0{day}T00:00:00+00:00"), Lineage())
    store.promote("v1")
    store.promote("v2")
    assert store.retain(2) == ["v4", "v3"]
    assert [v.version for v in store.versions()] == ["v6", "v5", "v2", "v1"]
    assert store.rollback().version == "v1"
    assert store._files.read("lineage/v3.json") is not None
    with pytest.raises(InputError, match="at least one"):
        store.retain(0)


class PromotesMeanwhile:
    """Another run that promotes a version at a certain moment of the retention."""

    def __init__(self, uri, version):
        self.uri, self.version, self.outcome = uri, version, None

    def __call__(self):
        try:
            self.outcome = ModelStore(self.uri).promote(self.version).version
        except (InputError, BundleError, UnavailableError) as error:
            self.outcome = type(error).__name__


@pytest.mark.parametrize("moment", ["before the manifest goes", "after"])
def test_a_version_promoted_while_it_is_being_removed_is_whole_or_not_promoted(
    uri, bundle_of, monkeypatch, moment
):
    """At every store: the lock keeps the other waiting, or the change is taken back."""
    store = ModelStore(uri)
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.2)
    for day in range(1, 5):
        store.publish(bundle_of(f"v{day}", created=f"2026-01-0{day}T00:00:00+00:00"), Lineage())
    store.promote("v4")
    other = PromotesMeanwhile(uri, "v1")
    name = "remove_file" if moment == "before the manifest goes" else "remove"
    inner = getattr(store._files, name)

    def meanwhile(path):
        if "v1" in path:
            other()
        inner(path)

    monkeypatch.setattr(store._files, name, meanwhile)
    removed = store.retain(2)
    champion = store.champion()
    bundles_left = {v.version for v in store.versions()}
    assert champion.version in bundles_left
    store._check_whole(champion.version)
    assert (other.outcome == "v1") is (champion.version == "v1") is ("v1" not in removed)


@pytest.mark.parametrize("left", [0, 1])  # files of it that are still there
def test_a_version_may_be_removed_while_it_is_looked_at(store, bundle_of, left):
    for version in ("v1", "v2"):
        store.publish(bundle_of(version), Lineage())
    read = store._files.read

    def removes_then(path):
        found = read(path)
        if found and path == "versions/v1/manifest.json":  # by another run's retention, just now
            for name in (*json.loads(found[0])["files"], "manifest.json")[left:]:
                store._files.remove_file(f"versions/v1/{name}")
            if not left:
                store._files.remove("versions/v1")
        return found

    store._files.read = removes_then
    listed = [v.version for v in store.versions()]
    assert listed == ["v2"] or (left and listed == ["v2", "v1"])
    assert [v.version for v in store.versions()] == ["v2"]


def test_retentions_at_the_same_time_do_not_get_in_each_others_way(guarded_uri, bundle_of):
    for day in range(1, 8):
        bundle = bundle_of(f"v{day}", created=f"2026-01-0{day}T00:00:00+00:00")
        ModelStore(guarded_uri).publish(bundle, Lineage())
    ModelStore(guarded_uri).promote("v1")
    with ThreadPoolExecutor(3) as pool:
        removed = list(pool.map(lambda _: ModelStore(guarded_uri).retain(2), range(3)))
    assert {v for found in removed for v in found} == {"v2", "v3", "v4", "v5"}
    assert [v.version for v in ModelStore(guarded_uri).versions()] == ["v7", "v6", "v1"]


def test_a_version_of_another_format_is_listed_and_not_used(store, bundle_of):
    manifest = json.loads((bundle_of("v1") / "manifest.json").read_text())
    old = json.dumps(manifest | {"format_version": 1}).encode()
    store._files.write("versions/v0/manifest.json", old)
    store.publish(bundle_of("v1"), Lineage())
    listed = {v.version: v.problem for v in store.versions()}
    assert listed["v1"] == ""
    assert "retrain" in listed["v0"]
    with pytest.raises(BundleError, match="retrain"):
        store.promote("v0")


@pytest.mark.parametrize("name", ["", "../v1", "a/b", "..", ".hidden", "x" * 200])
def test_versions_are_plain_names(store, name):
    with pytest.raises(InputError, match="not the name of a version"):
        store.promote(name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": "v1"}', b'{"version": "../x", "path": "", "p": 1}']
)
def test_a_broken_pointer_is_said_and_can_be_mended(store, bundle_of, content):
    store.publish(bundle_of("v1"), Lineage())
    store._files.write("champion.json", content)
    with pytest.raises(UnavailableError, match=r"champion\.json cannot be used.*delete it"):
        store.champion()
    _delete(store, "champion.json")
    assert store.promote("v1").previous is None


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"metrics": 5}', '{"no_such": 1}'])
def test_records_that_were_edited_by_hand_are_named_and_the_others_go_on(store, bundle_of, content):
    for n in range(1, 5):
        store.publish(bundle_of(f"v{n}", created=f"2026-01-0{n}T00:00:00+00:00"), Lineage())
        store.record(f"v{n}", "run", "released")
    store.promote("v4")
    store._files.write("lineage/v3.json", content.encode())
    store._files.write("releases/v3/run.json", content.encode())
    store.record("v3", "run-2", "rolled_back")
    found = {v.version: v for v in store.versions()}
    assert list(found) == ["v4", "v3", "v2", "v1"]
    assert found["v3"].lineage is None
    assert "/lineage/v3.json is not a lineage record" in found["v3"].problem
    assert [r.state for r in found["v3"].releases] == ["rolled_back", "unreadable"]
    assert "/releases/v3/run.json is not a release record" in found["v3"].releases[1].reason
    assert not any(found[v].problem for v in ("v1", "v2", "v4"))
    assert store.version("v3").state == "rolled_back"
    versions_table(store.versions(), io.StringIO())
    with pytest.raises(UnavailableError, match=r"releases/v3/run\.json .*delete it"):
        store.release("v3", "run")  # whether it may go on, that run has to know
    assert store.retain(1) == ["v3", "v2", "v1"]
    assert [v.version for v in store.versions()] == ["v4"]


def test_a_deleted_champion_is_a_clear_error_and_the_rest_goes_on(store, bundle_of, tmp_path):
    deploy(store, bundle_of("v1"))
    deploy(store, bundle_of("v2"))
    deploy(store, bundle_of("v3"))
    store._files.remove("versions/v3")
    with pytest.raises(InputError, match="no version 'v3'"):
        store.fetch(store.champion().version, tmp_path)
    store._files.remove("versions/v1")
    assert store.rollback().history == ()  # v1 is no longer there to go back to
    deploy(store, bundle_of("v1"))
    store._files.remove("versions/v2")
    with pytest.raises(InputError, match="v2 is no longer in"):
        store.rollback()
    assert store.champion().version == "v1"


def test_addresses_that_cannot_be_used_are_named(tmp_path, s3):
    with pytest.raises(InputError, match="nowhere"):
        ModelStore("nowhere://a/b")
    missing = ModelStore("s3://no-such-bucket/x")
    with pytest.raises(UnavailableError, match="no bucket no-such-bucket"):
        missing.champion()


def test_a_store_that_cannot_be_reached_is_said_in_time(bundle_of, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        try:
            with pytest.raises(UnavailableError, match="cannot be read"):
                ModelStore("s3://models/x").champion()
            with pytest.raises(UnavailableError, match="cannot be"):
                ModelStore("s3://models/x").publish(bundle_of("v1"), Lineage())
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_where_the_folder_should_be(tmp_path, bundle_of):
    (tmp_path / "store").write_text("")
    with pytest.raises(UnavailableError, match="Not a directory"):
        ModelStore(str(tmp_path / "store")).publish(bundle_of("v1"), Lineage())


FULL = """
import resource, signal, sys
from model.errors import HrnnError
from model.store import ModelStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ModelStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
for change, *arguments in (("promote", "v1"), ("rollback",), ("confirm", "v2")):
    try:
        getattr(store, change)(*arguments)
    except HrnnError as error:
        print(change, error)
"""


def test_no_room_for_the_pointer_leaves_it_as_it_is(tmp_path, bundle_of):
    store = ModelStore(str(tmp_path / "store"))
    deploy(store, bundle_of("v1"))
    before = deploy(store, bundle_of("v2"), checking="run")
    done = subprocess.run(
        [sys.executable, "-c", FULL, store.uri],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told = done.stdout.splitlines()
    assert [line.split()[0] for line in told] == ["promote", "rollback", "confirm"]
    assert all(f"({os.strerror(errno.EFBIG)}); the champion is unchanged" in line for line in told)
    assert store.champion() == before
    assert not list((tmp_path / "store").glob(".champion*"))


PUBLISH = """
import resource, sys
from pathlib import Path
from model.store import Lineage, ModelStore
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ModelStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
store.promote(store.publish(Path(sys.argv[2]), Lineage()))
"""


def test_a_disk_that_fills_up_leaves_the_champion_and_no_rubbish(tmp_path, bundle_of):
    """A limit on the size of files gives the same kind of error as a full disk, by the kernel."""
    store = ModelStore(str(tmp_path / "store"))
    deploy(store, bundle_of("v1"))
    big = bundle_of("v2", size=100_000)
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, store.uri, big],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert f"({os.strerror(errno.EFBIG)}); the champion is unchanged" in done.stderr
    assert store.champion().version == "v1"
    assert [p.name for p in (tmp_path / "store" / "versions").iterdir()] == ["v1"]


KILLED = """
import os, signal, sys
from pathlib import Path
from model import store as stores
from model.store import Lineage, ModelStore
bundle, copies = Path(sys.argv[1]), sys.argv[2:]
for point, copy in enumerate(copies):
    child = os.fork()
    if child == 0:
        count = 0
        def dies(wrapped):
            def call(*arguments, **keywords):
                global count
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return wrapped(*arguments, **keywords)
            return call
        # Every operation by which something in the store changes.
        stores.shutil.copyfile = dies(stores.shutil.copyfile)
        stores._rename = dies(stores._rename)
        stores._sync = dies(stores._sync)
        Path.replace = dies(Path.replace)
        store = ModelStore(copy)
        store.promote(store.publish(bundle, Lineage()), replaces="v1", reason="deploy")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_point_the_store_is_whole_and_a_second_attempt_finishes(tmp_path, bundle_of):
    deploy(ModelStore(str(tmp_path / "fresh")), bundle_of("v1"))
    copies = [tmp_path / f"copy{point}" for point in range(30)]
    for copy in copies:
        shutil.copytree(tmp_path / "fresh", copy)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, bundle_of("v2"), *copies],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    killed = codes.index(0)
    assert killed > 8
    assert codes == [-signal.SIGKILL] * killed + [0] * (len(copies) - killed)
    for copy in copies[: killed + 1]:
        store = ModelStore(str(copy))
        champion = store.champion()
        assert champion.version in ("v1", "v2")
        manifests.verify(copy / champion.path)
        assert all(not v.problem for v in store.versions())
        finished = deploy(store, bundle_of("v2"), replaces="v1", reason="deploy")
        assert (finished.version, finished.previous) == ("v2", "v1")


def test_what_a_killed_upload_left_is_cleared_away_when_it_is_old(tmp_path, bundle_of):
    store = ModelStore(str(tmp_path / "store"))
    deploy(store, bundle_of("v1"))
    left = tmp_path / "store" / "versions" / ".v2-incoming-abc"
    left.mkdir()
    store.retain(5)
    assert left.exists()  # it may be somebody's upload under way
    old = time.time() - stores.ABANDONED_SECONDS - 1
    os.utime(left, (old, old))
    store.retain(5)
    assert not left.exists()
    assert [v.version for v in store.versions()] == ["v1"]


def test_a_lock_whose_holder_died_is_free(tmp_path, bundle_of):
    store = ModelStore(str(tmp_path / "store"))
    deploy(store, bundle_of("v1"))
    code = "import fcntl,sys,time\nf=open(sys.argv[1],'a')\nfcntl.flock(f,fcntl.LOCK_EX)\n"
    code += "print('held',flush=True)\ntime.sleep(600)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "store" / stores.LOCK], stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "LOCK_SECONDS", 0.2)
        with pytest.raises(UnavailableError, match="held by another process"):
            deploy(store, bundle_of("v2"))
    assert store.champion().version == "v1"
    holder.kill()
    holder.wait()
    assert deploy(store, bundle_of("v2")).version == "v2"


def test_two_pods_whose_processes_have_the_same_number_put_one_file(tmp_path, monkeypatch):
    """In a pod everybody's number is 1; the second begins and ends while the first copies."""
    files, sync = stores.files_at(str(tmp_path / "out"), "output"), stores._sync
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 1000)

    def meanwhile(path):
        monkeypatch.setattr(stores, "_sync", sync)
        files.put(tmp_path / "b", "part")
        sync(path)

    monkeypatch.setattr(stores, "_sync", meanwhile)
    files.put(tmp_path / "a", "part")
    assert (tmp_path / "out" / "part").read_text() == "a" * 1000
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part"]
    assert (tmp_path / "out" / "part").stat().st_mode & 0o777 == 0o644
