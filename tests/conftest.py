"""Real Redis and PostgreSQL for all tests, started when first needed, one of each a test run."""

import os
from pathlib import Path

import pytest

from feature_repo.settings import FeatureStoreSettings
from tests.servers import PostgresServer, RedisServer

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processors belong to several test processes: threads that wait for each other at the end
    # of every small operator would wait for the other process's work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read by Spark's JVM when the first test needs it.
os.environ.setdefault("SPARK_CONF_DIR", str(Path(__file__).with_name("spark")))


@pytest.fixture(scope="session")
def redis_server():
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres_server():
    # What it must survive here is the death of its clients, not of the machine.
    server = PostgresServer("fsync=off", "max_connections=200")
    yield server
    server.close()


@pytest.fixture(scope="session")
def redis_url(redis_server):
    """A database shared by the test run; `redis_server.database()` gives further ones."""
    return redis_server.database()


@pytest.fixture(scope="session")
def postgres_url(postgres_server):
    """A database shared by the test run; `postgres_server.database()` gives further ones."""
    return postgres_server.database()


@pytest.fixture(params=["sqlite", "postgresql"])
def log_url(request, tmp_path):
    """Address of an event log that does not exist yet, on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/events.db"
    return request.getfixturevalue("postgres_server").database()


@pytest.fixture(params=["sqlite", "redis"])
def settings(request, tmp_path):
    """A feature store that does not exist yet, on both online stores."""
    if request.param == "sqlite":
        return FeatureStoreSettings(root=str(tmp_path / "features"))
    url = request.getfixturevalue("redis_server").database()
    return FeatureStoreSettings(root=str(tmp_path / "features"), online="redis", redis_url=url)
