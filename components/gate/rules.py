"""The rules' schema: what a gate file may say."""

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from components.evaluate.document import CONFIDENCES
from model.errors import InputError
from model.settings import SettingsBase

DEFAULT_RULES = Path(__file__).parent / "rules.yaml"
Reference = Literal["champion", "popularity"]
Requirement = Literal["not_shown_worse", "shown_no_worse", "shown_better"]


class Relative(SettingsBase):
    """A threshold relative to another metric: value(of) · times."""

    of: str
    times: float = 1.0


class Rule(SettingsBase):
    """One requirement on one metric; `metric` is a path such as hrnn.every.ppl."""

    name: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    at_least: float | Relative | None = None
    at_most: float | Relative | None = None
    against: Reference | None = None
    require: Requirement = "not_shown_worse"
    margin: float = Field(0.0, ge=0.0, lt=1.0)
    confidence: float = 0.95
    min_cases: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_requirement(self) -> Self:
        if [self.at_least, self.at_most, self.against].count(None) != 2:
            raise ValueError("give either at_least or at_most or against")
        comparison = (self.require, self.margin, self.confidence)
        if self.against is None and comparison != ("not_shown_worse", 0.0, 0.95):
            raise ValueError("require, margin and confidence belong to a rule with 'against'")
        if self.against is not None and not self.metric.startswith("hrnn."):
            raise ValueError("a rule with 'against' is about the candidate: metric hrnn.…")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence is one of {', '.join(map(str, CONFIDENCES))}")
        return self


class GateSettings(SettingsBase):
    """Which rules apply; the built-in ones unless a file or a list is given."""

    rules_file: str | None = None
    rules: list[Rule] | None = None

    def resolved(self) -> list[Rule]:
        """The rules in force.

        Raises:
            InputError: the file is missing or not a list of rules, or there are none.
        """
        rules = self.rules
        if rules is None:
            rules = _read(Path(self.rules_file) if self.rules_file else DEFAULT_RULES)
        if not rules:
            raise InputError("the gate has no rules: a gate that lets everything pass is refused")
        names = [rule.name for rule in rules]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise InputError(f"gate rules need names of their own: {', '.join(twice)} twice")
        return rules

    def pinned(self) -> Self:
        """The same with the file's rules inside: what a pipeline elsewhere cannot read here."""
        if not self.rules_file:
            return self
        return self.model_copy(update={"rules": self.resolved(), "rules_file": None})


def _read(path: Path) -> list[Rule]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"gate.rules_file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"gate.rules_file {path} is not YAML: {error}") from None
    if not isinstance(document, dict) or set(document) != {"rules"}:
        raise InputError(f"gate.rules_file {path}: expected one key, 'rules'")
    return GateSettings.parse({"rules": document["rules"]}, str(path)).rules or []
