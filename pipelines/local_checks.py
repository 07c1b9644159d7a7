"""What a run on this machine is refused for before anything starts."""

import json
from pathlib import Path

import httpx

from components.deploy.steps import DeploySettings, on_cluster
from components.warm_start.steps import CHAMPION, NONE, resolve
from model.errors import InputError, UnavailableError
from model.manifest import MANIFEST
from model.store import ModelStore
from model.training import TrainSettings
from pipelines.addresses import check_unsigned
from pipelines.settings import Settings
from pipelines.sources import Source

CONNECT_SECONDS = 5.0
OF_THIS_MACHINE = ("file", "local", "memory")  # schemes of what no pod reaches


def check_source(source: Source, **others: str) -> None:
    """Whether the addresses may be written down; an event log's are not (`Source.variables`).

    Args:
        others: further addresses by option, without the dashes.

    Raises:
        InputError: one holds a secret.
    """
    given = {"interactions": "" if source.in_database else source.interactions}
    given |= {"users": source.users, "items": source.items, **others}
    check_unsigned({f"--{name.replace('_', '-')}": address for name, address in given.items()})


def check_training(settings: Settings, model_store: str) -> Settings:
    """Whether the store can be used, and what `train.warm_start` and `deploy` name is there.

    Returns the settings with paths that also the steps find, which run in other folders.

    Raises:
        InputError, BundleError, UnavailableError: says what is not there.
    """
    ModelStore(model_store).champion()
    train, deploy = settings.sections["train"], settings.sections["deploy"]
    assert isinstance(train, TrainSettings) and isinstance(deploy, DeploySettings)  # noqa: S101
    if train.warm_start not in (NONE, CHAMPION):
        resolve(train.warm_start, model_store)
        if (folder := Path(train.warm_start).absolute() / MANIFEST).exists():
            changed = train.model_copy(update={"warm_start": str(folder.parent)})
            settings = Settings({**settings.sections, "train": changed})
    check_unsigned(
        {
            "deploy.service_url": deploy.service_url,
            "deploy.release.prometheus": deploy.release.prometheus,
        }
    )
    if deploy.service:
        scheme, named, _ = model_store.partition("://")
        if not named or scheme.rpartition("::")[2] in OF_THIS_MACHINE:
            raise InputError(
                f"deploy.service={deploy.service}: its pods cannot read {model_store}: give "
                "--model-store an address that both they and this machine reach (s3://…)"
            )
        on_cluster(deploy)
    elif deploy.service_url:
        _answers("deploy.service_url", deploy.service_url)
    if deploy.release.prometheus and (deploy.service or deploy.service_url):
        _answers("deploy.release.prometheus", deploy.release.prometheus)
    return settings


def check_batch(model_store: str, version: str) -> None:
    """Whether the model is there.

    Raises:
        InputError, UnavailableError: it is not, or the store cannot be read.
    """
    store = ModelStore(model_store)
    if version:
        store.version(version)
    elif store.champion() is None:
        raise InputError(f"the model store {model_store} has no champion: deploy a model first")


def _answers(setting: str, address: str) -> None:
    """Raises UnavailableError when nobody answers there; whatever the answer is."""
    try:
        with httpx.stream("GET", address, timeout=CONNECT_SECONDS):
            pass
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UnavailableError(
            f"{setting}={json.dumps(address)}: nobody answers there ({type(error).__name__}): "
            "start it first, or leave the setting out"
        ) from None
