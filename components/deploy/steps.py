"""Deploy: a bundle that passed the gate becomes the champion of the model store."""

import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model import bundle as bundles
from model.errors import InputError, UnavailableError
from model.settings import SettingsBase

CHAMPION = "champion.json"


class DeploySettings(SettingsBase):
    """Nothing to set yet beyond where the model store is, which every run is told."""


def run(
    bundle: Path, verdict: Path, model_store: str, deployment: Path, *, settings: dict[str, Any]
) -> dict[str, Any]:
    """Publish the bundle and point champion.json at it.

    Both steps are atomic, and doing them twice changes nothing: a run that was killed half-way
    can be run again.

    Raises:
        InputError: the verdict did not pass.
        BundleError: the bundle is damaged.
        UnavailableError: the store cannot be written.
    """
    DeploySettings.parse(settings, "deploy")
    judged = json.loads(verdict.read_text())
    if judged.get("passed") is not True:
        raise InputError("the gate refused this model: it is not deployed")
    manifest = bundles.verify(bundle)
    store = Path(model_store)
    try:
        target = store / "versions" / manifest.model_version
        _publish(bundle, target)
        previous = champion(store)
        record = {
            "version": manifest.model_version,
            "path": f"versions/{manifest.model_version}",
            "previous": None if previous is None else previous["version"],
            "deployed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "verdict": judged,
        }
        if previous is not None and previous["version"] == manifest.model_version:
            record = previous
        else:
            _write_atomically(store / CHAMPION, record)
    except OSError as error:
        raise UnavailableError(
            f"the model store {store} cannot be written ({error.strerror}); the champion is "
            "unchanged"
        ) from error
    deployment.parent.mkdir(parents=True, exist_ok=True)
    deployment.write_text(json.dumps(record, indent=1) + "\n")
    print(f"champion is {record['version']}, before it {record['previous'] or 'none'}")
    return record


def champion(store: Path) -> dict[str, Any] | None:
    """The store's champion record, None when nothing was deployed yet.

    Raises:
        UnavailableError: the record is there but not readable.
    """
    try:
        record: dict[str, Any] = json.loads((store / CHAMPION).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{store / CHAMPION} cannot be read: {error}") from None
    return record


def _publish(bundle: Path, target: Path) -> None:
    if target.exists():
        bundles.verify(target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".incoming-", dir=target.parent))
    try:
        for source in bundle.iterdir():
            shutil.copyfile(source, work / source.name)
            _sync(work / source.name)
        bundles.verify(work)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not target.exists():
                raise
            bundles.verify(target)  # another run published the same bundle first
            shutil.rmtree(work)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _write_atomically(path: Path, value: dict[str, Any]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    Path(name).chmod(0o644)
    Path(name).replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
