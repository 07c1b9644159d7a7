"""Opening Feast's store, and one error for all that it can raise. Feast is imported when used."""

import contextlib
import functools
import hashlib
import io
import warnings
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from feature_repo.names import PROJECT
from feature_repo.settings import REGISTRY_SECONDS, FeatureStoreSettings
from model.errors import HrnnError, UnavailableError

if TYPE_CHECKING:
    from feast import FeatureStore


def open_store(settings: FeatureStoreSettings) -> "FeatureStore":
    from feast import FeatureStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FeatureStore(config=settings.repo_config())


def open_existing(settings: FeatureStoreSettings) -> "FeatureStore":
    """Open without creating anything: Feast would make an empty registry where there is none."""
    if registry_stamp(settings) is None:
        raise UnavailableError(
            f"no feature store in {settings.path}; run the pipeline (or its features step) first"
        )
    return open_store(settings)


def registry_stamp(settings: FeatureStoreSettings) -> Hashable | None:
    """Something that is another after each change of the registry; None: there is no registry."""
    if settings.registry_url is None:
        try:
            status = settings.registry_path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size
    if not _sqlite_file_exists(settings.registry_url):
        return None
    engine = _registry_engine(settings.registry_url)
    if not sa.inspect(engine).has_table("feature_views"):
        return None
    # Feast's own times are of whole seconds. These are a few kilobytes.
    digest = hashlib.sha256()
    with engine.connect() as connection:
        for table, column in (
            ("feature_views", "feature_view"),
            ("feature_services", "feature_service"),
        ):
            view = sa.table(table, sa.column(f"{column}_name"), sa.column(f"{column}_proto"))
            name, proto = view.columns
            query = sa.select(name, proto).order_by(name)
            query = query.where(sa.column("project_id") == PROJECT)
            for row in connection.execute(query):
                digest.update(f"{table} {row[0]} ".encode() + bytes(row[1]))
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _registry_engine(url: str) -> sa.Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        options = {"connect_timeout": REGISTRY_SECONDS}
        return sa.create_engine(parsed, pool_pre_ping=True, pool_size=1, connect_args=options)
    return sa.create_engine(parsed)


def _sqlite_file_exists(url: str) -> bool:
    """Opening would create it."""
    parsed = make_url(url)
    return parsed.get_backend_name() != "sqlite" or Path(parsed.database or "").is_file()


@contextlib.contextmanager
def unavailable(action: str) -> Iterator[None]:
    """Turn what Feast and its stores raise into one error that says what could not be done."""
    try:
        yield
    except HrnnError:
        raise
    except Exception as error:
        # Only the type: messages of stores can hold addresses, keys and passwords.
        raise UnavailableError(f"cannot {action}: {type(error).__name__}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Feast prints colours and progress bars; the step has its own lines."""
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
