"""Deploy: a bundle that passed the gate becomes the champion of the model store."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from model.errors import InputError
from model.settings import SettingsBase
from model.store import Lineage, ModelStore


class DeploySettings(SettingsBase):
    """What deployment leaves in the store; where the store is, every run is told."""

    keep: int = Field(10, ge=1)  # bundles in the store; the champion and the one before always stay


def run(
    bundle: Path, verdict: Path, model_store: str, deployment: Path, *, settings: dict[str, Any]
) -> dict[str, Any]:
    """Publish the bundle and make it the champion.

    Doing it twice changes nothing: a run that was killed half-way can be run again.

    Raises:
        InputError: the verdict did not pass.
        BundleError: the bundle is damaged.
        ConflictError: another run deployed since this one was compared with the champion.
        UnavailableError: the store cannot be written.
    """
    chosen = DeploySettings.parse(settings, "deploy")
    judged = json.loads(verdict.read_text())
    if judged.get("passed") is not True:
        raise InputError("the gate refused this model: it is not deployed")
    store = ModelStore(model_store)
    version = store.publish(bundle, Lineage(verdict=judged))
    champion = store.promote(version, reason="deploy")
    removed = store.retain(chosen.keep)
    record = {**asdict(champion), "store": model_store, "removed": removed}
    deployment.parent.mkdir(parents=True, exist_ok=True)
    deployment.write_text(json.dumps(record, indent=1) + "\n")
    print(f"champion is {champion.version}, before it {champion.previous or 'none'}")
    if removed:
        print(f"removed {len(removed)} old versions")
    return record
