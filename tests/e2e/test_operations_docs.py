"""The commands of docs/operations.md that rebuild and restore, run as they are written there."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from feature_repo.event_log import EventLog, NewEvent, Outcome
from feature_repo.live import LiveFeatures
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import FeatureReader, apply
from model.recommender import Recommender
from model.store import ModelStore
from tests import synthetic
from tests.feature_sources import AS_OF, SCHEMA, write_sources

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
BLOCKS = dict(re.findall(r"```sh (\S+)\n(.*?)```", DOCS.read_text(), flags=re.DOTALL))
# What a small log needs to be trained on in seconds; the documented command has no settings.
QUICK = (
    "train.max_epochs=2",
    "train.network={embedding: 8, hidden: 8, control: 2, dropout: 0.0}",
    "evaluate.samples=20",
    "gate.rules=[{name: some, metric: hrnn.every.cases, at_least: 1}]",
)


class Shell:
    """A folder in which documented commands are run, with `hrnn` on the path."""

    def __init__(self, folder, path=(), **environment):
        self.folder, self.workspace = folder, folder / "workspace"
        self.workspace.mkdir()
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("HRNN_")}
        programs = folder / "bin"
        programs.mkdir()
        hrnn = programs / "hrnn"
        settings = " ".join(f"--set '{text}'" for text in QUICK)
        hrnn.write_text(
            f'#!/bin/sh\n[ "$1" = run ] && set -- "$@" {settings}\n'
            f'exec {sys.executable} -m pipelines.cli "$@"\n'
        )
        hrnn.chmod(0o755)
        places = [str(programs), *map(str, path), os.environ["PATH"]]
        self._environment |= {"PATH": os.pathsep.join(places), **environment}

    def run(self, block):
        done = subprocess.run(
            ["sh", "-e", "-c", BLOCKS[block]],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done


def histories(features):
    reader = FeatureReader(features)
    reader.trend()
    return lambda user: [(e.item_id, e.timestamp) for e in reader.user(user).history]


def test_everything_is_rebuilt_from_the_log(tmp_path):
    shell = Shell(tmp_path)
    made = synthetic.successor(40, 8, 12, seed=0)
    url = f"sqlite:///{shell.workspace}/events.db"
    with closing(EventLog.open(url, create=True)) as log:
        with log.write() as transaction:
            for u, user in enumerate(made.user_ids):
                own = range(made.offset_U1[u], made.offset_U1[u + 1])
                transaction.append(
                    [
                        NewEvent(f"{e}", user, f"i{made.item_E[e]}", int(made.timestamp_E[e]))
                        for e in own
                    ]
                )
            transaction.put_item("new", {"title": "New"})
            transaction.delete_user("u3")
        done = shell.run("rebuild")
        assert "deployed" in done.stderr and "is in force" in done.stderr
        states = log.states(made.user_ids, 100)
        head = log.position().seq
    assert f"up to change {head:,} of the event log" in done.stdout
    features = FeatureStoreSettings(root=str(shell.workspace / "features"))
    found = histories(features)
    for user, state in states.items():
        assert found(user) == [(e.item_id, e.timestamp) for e in state.history], user
    assert found("u3") == [] != found("u4")
    newest = max(e.timestamp for s in states.values() for e in s.history)
    snapshot = FeatureReader(features).trend()
    assert (snapshot.as_of, snapshot.num_items) == (newest + 1, 13)
    store = ModelStore(str(shell.workspace / "models"))
    bundle = store.fetch(store.champion().version, tmp_path)
    assert set(Recommender.load(bundle).item_ids) == {"new", *(f"i{n}" for n in range(12))}


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """(shell, address of a log that does not exist yet, how it is lost)"""
    if request.param == "sqlite":
        if not shutil.which("sqlite3"):
            pytest.skip("sqlite3, the command, is not installed")
        shell = Shell(tmp_path)
        path = shell.workspace / "events.db"

        def lose():
            for name in ("events.db", "events.db-wal"):
                (path.parent / name).write_bytes(b"\0garbage" * 1000)

        return request.param, shell, f"sqlite:///{path}", lose
    server = request.getfixturevalue("postgres_server")
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE restored")
    url = f"postgresql://postgres@/restored?host={server.folder}"

    def lose():
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP TABLE events; UPDATE log_head SET seq = 0")

    return request.param, Shell(tmp_path, [server._bin], HRNN_EVENT_LOG=url), url, lose


def event(name, user, at=AS_OF):
    return NewEvent(name, user, f"item {name}", at)


def test_a_lost_log_is_restored_from_its_backup(database):
    kind, shell, url, lose = database
    features = FeatureStoreSettings(root=str(shell.workspace / "features"))
    write_sources(features)
    apply(features, SCHEMA)
    with closing(EventLog.open(url, create=True)) as log:
        with log.write() as transaction:
            transaction.append([event("a", "kept"), event("b", "gone"), event("c", "gone")])
        shell.run(f"{kind}-backup")
        with log.write() as transaction:
            transaction.append([event("d", "kept"), event("e", "lost")])
        with log.write() as transaction:
            assert transaction.delete_user("gone") == 2
        live = LiveFeatures(features, log)
        live.follow()
        assert histories(features)("lost") == [("item e", AS_OF)]
    lose()
    shell.run(f"{kind}-restore")
    with closing(EventLog.open(url)) as log:
        # More than was lost, before a follower has looked: as many changes as the store has seen.
        with log.write() as transaction:
            transaction.append([event(f"new {n}", "kept", AS_OF + 1 + n) for n in range(10)])
        LiveFeatures(features, log).follow()
        found = histories(features)
        assert found("kept") == [("item a", AS_OF)] + [
            (f"item new {n}", AS_OF + 1 + n) for n in range(10)
        ]
        assert found("lost") == []
        assert found("gone") == [] and not FeatureReader(features).user("gone").known
        with log.write() as transaction:
            again = transaction.append([event("b", "gone"), event("d", "kept")])
        assert again == [Outcome.USER_DELETED, Outcome.STORED]
