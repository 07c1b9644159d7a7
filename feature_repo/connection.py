"""Opening Feast's store, and one error for all that it can raise. Feast is imported when used."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from feature_repo.settings import FeatureStoreSettings
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
    if not settings.registry_path.exists():
        raise UnavailableError(
            f"no feature store in {settings.path}; run the pipeline (or its features step) first"
        )
    return open_store(settings)


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
