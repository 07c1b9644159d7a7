"""Deploy: a bundle that passed the gate becomes the champion of the model store."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from components.deploy.kserve import (
    Canary,
    InferenceServices,
    RunningService,
    StableService,
    canary_of,
)
from components.deploy.release import RELEASED, Releaser
from components.deploy.watch import ReleaseSettings, web_address
from model.errors import BundleError, InputError, UnavailableError
from model.manifest import verify
from model.settings import SettingsBase
from model.store import Champion, Lineage, ModelStore

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class DeploySettings(SettingsBase):
    """How a model gets to its users; where the store is, every run is told."""

    keep: int = Field(10, ge=1)  # bundles in the store; the champion and the one before always stay
    # The InferenceService on which the candidate is tried as a canary before it is promoted;
    # empty: the pointer moves, and servers follow it.
    service: str = ""
    namespace: str = "hrnn"
    # Where the service answers, if not where its status says. Without `service` (a laptop): the
    # running service, watched after the promotion; the champion of before is put back if it fails.
    service_url: str = ""
    release: ReleaseSettings = ReleaseSettings()

    @field_validator("service", "namespace")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if name and not _NAME.fullmatch(name):
            raise ValueError("must be a name in Kubernetes: small letters, digits and -")
        return name

    @field_validator("service_url")
    @classmethod
    def _is_web_address(cls, address: str) -> str:
        return web_address(address)


def run(
    bundle: Path,
    evaluation: Path,
    verdict: Path,
    model_store: str,
    deployment: Path,
    *,
    settings: dict[str, Any],
    run_id: str = "",
) -> dict[str, Any]:
    """Publish the bundle and make it the champion.

    Doing it twice changes nothing: a run that was killed half-way can be run again, and what a
    release of this run came to is told again, not done again.

    Raises:
        InputError: the verdict did not pass, or is about another model.
        BundleError: the bundle is damaged.
        ConflictError: another run deployed since this one was compared with the champion, or is
            trying a canary.
        RolledBackError: the candidate failed its trial, now or in an earlier attempt of this run.
        UnavailableError: the store cannot be written, or the cluster does not answer.
    """
    chosen = DeploySettings.parse(settings, "deploy")
    judged, measured = (json.loads(path.read_text()) for path in (verdict, evaluation))
    if judged.get("deploy") is not True:
        raise InputError("the gate refused this model: it is not deployed")
    manifest = verify(bundle)
    if judged["model_version"] != manifest.model_version:
        raise InputError(
            f"the verdict is about {judged['model_version']}, not {manifest.model_version}"
        )
    store = ModelStore(model_store)
    version = store.publish(bundle, _lineage(bundle, measured, judged, run_id))
    # Lineage tells of the version's first run; this may be a later one.
    why = f"although the gate refused it: {judged['override']}" if judged["override"] else ""
    champion = _deployed(store, version, judged["champion"], chosen, run_id, why)
    try:
        removed = store.retain(chosen.keep)
    except UnavailableError as error:  # the release is done; the next one tidies up
        print(f"warning: old versions stay: {error}")
        removed = []
    record = {**asdict(champion), "store": model_store, "removed": removed}
    deployment.parent.mkdir(parents=True, exist_ok=True)
    deployment.write_text(json.dumps(record, indent=1) + "\n")
    now = store.champion()
    if now is not None and now.version != version:
        print(f"{version} was deployed; the champion is {now.version} by now")
    else:
        print(f"champion is {version}, before it {champion.previous or 'none'}")
    if removed:
        print(f"removed {len(removed)} old versions")
    return record


def _deployed(
    store: ModelStore,
    version: str,
    replaces: str | None,
    chosen: DeploySettings,
    run_id: str,
    why: str,
) -> Champion:
    """Release the version unless this run did; how `champion.json` names it."""
    if chosen.service or chosen.service_url:
        _releaser(store, version, chosen, run_id, why).release(
            f"{store.uri.rstrip('/')}/versions/{version}", replaces=replaces
        )
    elif store.release(version, run_id) is None:
        store.promote(version, replaces=replaces, reason="deploy")
        store.record(version, run_id, RELEASED, why)
    champion = store.champion()
    if champion is not None and champion.version == version:
        return champion
    told = store.release(version, run_id)
    return Champion(version, f"versions/{version}", None, told.at if told else "", "deploy")


def _releaser(
    store: ModelStore, version: str, chosen: DeploySettings, run_id: str, why: str
) -> Releaser:
    found = on_cluster(chosen)
    service, canary = found or (RunningService(chosen.service_url), None)
    return Releaser(store, version, run_id, service, canary, chosen.release, why)


def on_cluster(chosen: DeploySettings) -> tuple[StableService, Canary] | None:
    """The service of the cluster and its canary; None where releases are not tried on one.

    Raises:
        InputError: there is no such service, or no cluster is configured here.
        UnavailableError: the cluster does not answer.
    """
    if not chosen.service:
        return None
    services = InferenceServices(chosen.namespace)
    stable = StableService(services, chosen.service, chosen.service_url)
    return stable, canary_of(services, stable, chosen.release.traffic_percent)


def _lineage(
    bundle: Path, measured: dict[str, Any], judged: dict[str, Any], run_id: str
) -> Lineage:
    try:
        parameters = json.loads((bundle / "settings.json").read_text())["train"]
    except (ValueError, KeyError) as error:
        raise BundleError(f"{bundle / 'settings.json'} has no training settings: {error}") from None
    figures = {
        model: {r: all_figures[r] for r in ("every", "last") if r in all_figures}
        for model, all_figures in measured["models"].items()
    }
    return Lineage(
        data_digest=measured["data_digest"],
        code_digest=measured["code_digest"],
        run_id=run_id,
        parent=judged["champion"],
        parameters={"train": parameters},
        metrics=figures,
        verdict={name: judged[name] for name in ("passed", "rules")},
        override=judged["override"],
    )
