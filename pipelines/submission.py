"""Parameters of a run on a cluster, checked before the cluster is asked for anything."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from model.errors import InputError
from pipelines.addresses import holds_secret
from pipelines.sources import CONFIGURED
from pipelines.volumes import is_mounted, volumes

SOURCE = ("dataset", "interactions", "users", "items")
# Options of each pipeline, by the names of its parameters.
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "train_and_deploy": (*SOURCE, "model_store", "override"),
    "refresh_trends": ("interactions",),
    "batch_recommend": (*SOURCE, "model_store", "version", "user_list", "output"),
}
ADDRESSES = ("interactions", "users", "items", "user_list", "model_store", "output")
WRITTEN = ("model_store", "output")
# Of a file where the program runs; `sqlite` and `file` may be below a mounted folder.
LOCAL_SCHEMES = ("file", "local", "sqlite", "")
THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104 - refused, not bound


@dataclass(frozen=True)
class Options:
    """What a person gave on the command line; "" means nothing."""

    dataset: str = ""
    interactions: str = ""
    users: str = ""
    items: str = ""
    user_list: str = ""
    model_store: str = ""
    version: str = ""
    output: str = ""
    override: str = ""


def parameters(
    pipeline: str, options: Options, assignments: list[str] | None, settings_file: Path | None
) -> dict[str, Any]:
    """Parameters of the pipeline.

    Raises:
        InputError: names the wrong setting, pipeline, option or address.
    """
    from pipelines.settings import BATCH, REFRESH, TRAINING, load

    if pipeline not in PIPELINES:
        raise InputError(f"no pipeline {pipeline!r} (known: {', '.join(PIPELINES)})")
    given = {f.name: value for f in fields(options) if (value := getattr(options, f.name))}
    for name in given:
        if name not in PIPELINES[pipeline]:
            takers = [p for p, names in PIPELINES.items() if name in names]
            raise InputError(f"{option(name)} goes with {' and '.join(takers)}, not {pipeline}")
    if options.dataset and options.interactions:
        raise InputError("give either --dataset or --interactions, not both")
    if options.dataset:
        from components.ingest.datasets import find

        find(options.dataset)
    if pipeline == "batch_recommend" and not options.output:
        raise InputError("batch_recommend: give --output, a folder or address of its own")
    for name in ADDRESSES:
        if address := given.get(name):
            check_address(option(name), address, written=name in WRITTEN)
    given |= _stores(pipeline, given)
    settings = load(settings_file, assignments or [], own_data=bool(options.interactions))
    sections = {"refresh_trends": REFRESH, "batch_recommend": BATCH}.get(pipeline, TRAINING)
    if options.interactions and pipeline != "refresh_trends":
        given["dataset"] = ""  # the pipeline's default is one
    if version := given.get("version"):
        _check_version("--version", version)
    if "deploy" in sections:
        _check_services(settings.to_json()["deploy"])
        _check_warm_start(settings.to_json()["train"]["warm_start"])
    return {**given, **settings.to_arguments(sections)}


def check_address(option: str, address: str, *, written: bool) -> None:
    """Whether pods can use an address that a person gave here.

    Args:
        written: they write there.

    Raises:
        InputError: says what pods would find instead, and what to give.
    """
    if address == CONFIGURED and option == "--interactions":
        return
    if holds_secret(address):
        raise InputError(
            f"{option}: an address with a password or a signature would be shown with the run; put "
            "it into the "
            + (
                f"Secret hrnn-secrets as HRNN_EVENT_LOG and give {CONFIGURED}"
                if option == "--interactions"
                else "Secret hrnn-secrets (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and leave it "
                "out here"
            )
        )
    parts = urlsplit(address)
    scheme = parts.scheme if "://" in address else ""
    if scheme in LOCAL_SCHEMES:
        path = parts.path if scheme else address
        # sqlite:////stores/events.db is the absolute form
        if not is_mounted(path.removeprefix("/") if scheme == "sqlite" else path):
            raise _not_mounted(option, address, written)
    elif scheme == "memory":
        raise _not_mounted(option, address, written)
    elif parts.hostname in THIS_MACHINE:
        raise InputError(
            f"{option} {address}: to a pod, {parts.hostname} is the pod itself; give the name by "
            "which the cluster reaches this machine"
        )
    elif written and scheme in ("http", "https"):
        raise InputError(f"{option} {address}: cannot be written to; give s3://…, gs://… or alike")


def _not_mounted(option: str, address: str, written: bool) -> InputError:
    folders = ", ".join(volumes().values())
    below = f"a path below {folders}" if folders else "a path on a volume"
    what = (
        "it would be written inside a pod and be gone with it"
        if written
        else "the pods cannot read a file of this machine"
    )
    kinds = "s3://…" if written else "s3://…, https://…"
    return InputError(
        f"{option} {address}: {what}; give an address ({kinds}) or {below} (HRNN_VOLUMES names "
        "what is mounted)"
    )


def _stores(pipeline: str, given: Mapping[str, str]) -> dict[str, str]:
    """Where the pipeline's own defaults are not mounted, something has to be said."""
    from importlib import import_module

    found = getattr(import_module(f"pipelines.{pipeline}"), pipeline).component_spec.inputs
    unmounted = {
        name: str(found[name].default)
        for name in ("model_store", "checkpoints")
        if name in found and name not in given and not is_mounted(str(found[name].default))
    }
    if "model_store" in unmounted:
        raise InputError(
            f"--model-store: {unmounted['model_store']}, the default, is not mounted (HRNN_VOLUMES "
            "names what is); give an address or a path that is"
        )
    return dict.fromkeys(unmounted, "")  # no checkpoints: training begins anew after a stop


def _check_services(deploy: Mapping[str, Any]) -> None:
    services = {
        "deploy.service_url": deploy["service_url"],
        "deploy.release.prometheus": deploy["release"]["prometheus"],
    }
    for setting, address in services.items():
        if holds_secret(address):
            raise InputError(
                f"{setting}: an address with a password would be shown with the run; give one that "
                "pods may ask without"
            )
        parts = urlsplit(address)
        if parts.hostname in THIS_MACHINE:
            raise InputError(
                f"{setting}={address}: to a pod, {parts.hostname} is the pod itself; "
                "give the service's name in the cluster"
            )


def _check_version(what: str, version: str) -> None:
    """What the store holds only the pods know; but a name of a version it has to be."""
    from model.store import is_version

    if not is_version(version) or version in ("champion", "previous"):
        raise InputError(f"{what}: {version!r} is not the name of a version (`hrnn models list`)")


def _check_warm_start(wanted: str) -> None:
    if wanted in ("none", "champion"):
        return
    if "/" not in wanted:
        _check_version("train.warm_start", wanted)
    elif not is_mounted(wanted):
        raise InputError(
            f"train.warm_start={wanted}: the pods cannot read a folder of this machine; give a "
            "version of the model store, or a bundle's folder on a volume (HRNN_VOLUMES names "
            "what is mounted)"
        )


def option(name: str) -> str:
    """The command line's word for a parameter."""
    return "--" + name.replace("_", "-")
