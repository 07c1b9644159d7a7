"""All settings of a run: one typed section per step, from defaults, a file and --set."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.batch_recommend.steps import BatchRecommendSettings
from components.deploy.steps import DeploySettings
from components.evaluate.steps import EvaluateSettings
from components.features.steps import FeaturesSettings
from components.gate.steps import GateSettings
from components.ingest.steps import IngestSettings
from components.refresh_trends.steps import RefreshTrendsSettings
from components.validate.steps import ValidateSettings
from model.errors import InputError
from model.settings import SettingsBase
from model.training import TrainSettings
from model.trends import TrendSettings

SECTIONS: dict[str, type[SettingsBase]] = {
    "ingest": IngestSettings,
    "validate": ValidateSettings,
    "features": FeaturesSettings,
    "trend": TrendSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "gate": GateSettings,
    "deploy": DeploySettings,
    "refresh_trends": RefreshTrendsSettings,
    "batch_recommend": BatchRecommendSettings,
}
REFRESH = ("refresh_trends",)  # sections of the pipeline of that name
BATCH = ("ingest", "validate", "batch_recommend")
TRAINING = tuple(
    name for name in SECTIONS if name not in (*REFRESH, "batch_recommend")
)  # of train_and_deploy


@dataclass(frozen=True)
class Settings:
    """Checked sections by name; None inside a section means: derived from the data."""

    sections: Mapping[str, SettingsBase]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Every setting with its value in force."""
        return {name: section.model_dump(mode="json") for name, section in self.sections.items()}

    def to_arguments(self, names: Iterable[str] = TRAINING) -> dict[str, dict[str, Any]]:
        """Sections as pipeline parameters: kfp.local takes no null, and null is the default."""
        return {f"{name}_settings": _argument(self.sections[name]) for name in names}


def sections(names: Iterable[str]) -> list[str]:
    """These sections; all of them if none is named.

    Raises:
        InputError: there is no such section.
    """
    wanted = list(names)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise InputError(f"no settings section {unknown[0]!r}{_hint(unknown[0], SECTIONS)}")
    return wanted or list(SECTIONS)


def defaults(name: str) -> dict[str, Any]:
    """A section as the pipelines' parameters have it when nothing is given."""
    return _argument(SECTIONS[name]())


def _argument(section: SettingsBase) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_none=True)


def load(
    file: Path | None = None, assignments: Iterable[str] = (), *, own_data: bool = False
) -> Settings:
    """Defaults, overridden by a YAML or JSON file, overridden by `section.key=value` texts.

    Args:
        own_data: for a log that may grow: users keep their side of the split (`assign: hash`), so
            that candidate and champion can be compared fairly. Named datasets keep the published
            protocol's permutation.

    Raises:
        InputError: names the wrong key or value and the keys that exist.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read(file)
    for assignment in assignments:
        _assign(values, assignment)
    for name in values:
        if name not in SECTIONS:
            raise InputError(f"no settings section {name!r}{_hint(name, SECTIONS)}")
        if not isinstance(values[name], dict):
            raise InputError(f"settings section {name} holds keys, e.g. --set {name}.KEY=VALUE")
    if own_data:
        split = values.setdefault("train", {}).setdefault("split", {})
        if isinstance(split, dict):
            split.setdefault("assign", "hash")
    sections = {n: cls.parse(values.get(n, {}), n) for n, cls in SECTIONS.items()}
    gate = sections["gate"]
    if isinstance(gate, GateSettings):
        sections["gate"] = gate.pinned()  # read and checked before anything starts
        gate.resolved()
    return Settings(sections)


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"--settings {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--settings {file} is neither YAML nor JSON: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"--settings {file}: expected sections ({', '.join(SECTIONS)})")
    return document


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise InputError(f"--set {assignment!r}: expected SECTION.KEY=VALUE")
    if path[0] not in SECTIONS:
        raise InputError(f"--set {key}: no section {path[0]!r}{_hint(path[0], SECTIONS)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {key}: {text!r} is not a value (YAML or JSON)") from None
    if isinstance(value, str):
        value = _number(value)
    node = values
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InputError(f"--set {key}: {part} is a value, it has no keys")
    node[path[-1]] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})"
