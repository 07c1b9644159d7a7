"""The deployed model of a workspace, served on this machine."""

import os
from pathlib import Path

from model import bundle as bundles
from model.catalogue import Catalogue
from model.errors import InputError
from model.schema import Schema
from model.store import ModelStore
from serving.launcher import LocalServing
from serving.settings import ServeSettings


def champion_bundle(workspace: Path) -> Path:
    """Folder of the deployed bundle.

    Raises:
        InputError: nothing is deployed in this workspace.
    """
    store = workspace / "models"
    champion = ModelStore(str(store)).champion()
    if champion is None:
        raise InputError(f"no model is deployed in {workspace}: start with `hrnn run`")
    return store / champion.path


def champion_catalogue(workspace: Path) -> Catalogue:
    """Items of the deployed model, with titles."""
    bundle = champion_bundle(workspace)
    bundles.verify(bundle)
    schema = Schema.load(bundle / "schema.json")
    return Catalogue.load(bundle / "items.parquet", schema.item_title)


def event_log(workspace: Path) -> str:
    """Address of the event log of a workspace."""
    return os.environ.get("HRNN_EVENT_LOG") or f"sqlite:///{(workspace / 'events.db').absolute()}"


def local_serving(
    workspace: Path, port: int | None = None, log_dir: Path | None = None
) -> LocalServing:
    """All servers for the champion of a workspace, not started yet.

    The event log is `events.db` of the workspace, or HRNN_EVENT_LOG.

    Args:
        port: of the service; None takes free ports for everything.

    Raises:
        InputError: nothing is deployed.
    """
    from feature_repo.settings import FeatureStoreSettings

    champion_bundle(workspace)
    settings = ServeSettings(event_log=event_log(workspace))
    if port is None:
        settings = settings.with_free_ports()
    else:
        settings = settings.model_copy(update={"transformer_http_port": port})
    return LocalServing(
        workspace / "models",
        FeatureStoreSettings(root=str((workspace / "features").absolute())),
        settings,
        log_dir=log_dir or workspace / "logs",
    )
