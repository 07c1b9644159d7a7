"""The deployed model of a workspace, served on this machine."""

import os
import tempfile
from pathlib import Path

from model.catalogue import Catalogue
from model.errors import InputError
from model.schema import Schema
from model.store import Champion, ModelStore
from pipelines.addresses import check_unsigned
from pipelines.local_runner import store_of
from serving.launcher import LocalServing
from serving.settings import ServeSettings


def champion_of(model_store: str) -> Champion:
    """What is deployed.

    Raises:
        InputError: nothing is.
        UnavailableError: the store cannot be read.
    """
    champion = ModelStore(model_store).champion()
    if champion is None:
        raise InputError(f"no model is deployed in {model_store}: start with `hrnn run`")
    return champion


def champion_catalogue(workspace: Path, model_store: str = "") -> Catalogue:
    """Items of the deployed model, with titles.

    Args:
        model_store: empty: the workspace's.
    """
    store = store_of(workspace, model_store)
    with tempfile.TemporaryDirectory() as work:
        bundle = ModelStore(store).fetch(champion_of(store).version, Path(work))
        schema = Schema.load(bundle / "schema.json")
        return Catalogue.load(bundle / "items.parquet", schema.item_title)


def event_log(workspace: Path) -> str:
    """Address of the event log of a workspace."""
    return os.environ.get("HRNN_EVENT_LOG") or f"sqlite:///{(workspace / 'events.db').absolute()}"


def local_serving(
    workspace: Path,
    port: int | None = None,
    log_dir: Path | None = None,
    model_store: str = "",
) -> LocalServing:
    """All servers for the champion of a workspace, not started yet.

    The event log is `events.db` of the workspace, or HRNN_EVENT_LOG.

    Args:
        port: of the service; None takes free ports for everything.
        model_store: folder or address; empty: the workspace's.

    Raises:
        InputError: nothing is deployed.
    """
    from feature_repo.settings import FeatureStoreSettings

    store = store_of(workspace, model_store)
    check_unsigned({"--model-store": store})
    champion_of(store)
    settings = ServeSettings(event_log=event_log(workspace))
    if port is None:
        settings = settings.with_free_ports()
    else:
        settings = settings.model_copy(update={"transformer_http_port": port})
    return LocalServing(
        store,
        FeatureStoreSettings(root=str((workspace / "features").absolute())),
        settings,
        log_dir=log_dir or workspace / "logs",
    )
