"""Gate: rules over an evaluation → a verdict that names every rule, value and threshold."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from model.errors import InputError
from model.settings import SettingsBase

DEFAULT_RULES = Path(__file__).parent / "rules.yaml"


class Relative(SettingsBase):
    """A threshold relative to another metric: value(of) · times."""

    of: str
    times: float = 1.0


class Rule(SettingsBase):
    """One requirement on one metric; `metric` is a path such as hrnn.every.ppl."""

    name: str
    metric: str
    at_least: float | Relative | None = None
    at_most: float | Relative | None = None


class GateSettings(SettingsBase):
    """Which rules apply; the built-in ones unless a file or a list is given."""

    rules_file: str | None = None
    rules: list[Rule] | None = None

    def resolved(self) -> list[Rule]:
        """The rules in force.

        Raises:
            InputError: the file is missing or not a list of rules, or there are none.
        """
        if self.rules is not None:
            rules = self.rules
        else:
            path = Path(self.rules_file) if self.rules_file else DEFAULT_RULES
            try:
                document = yaml.safe_load(path.read_text())
            except OSError as error:
                raise InputError(f"gate.rules_file {path}: {error.strerror}") from None
            except yaml.YAMLError as error:
                raise InputError(f"gate.rules_file {path} is not YAML: {error}") from None
            if not isinstance(document, dict) or set(document) != {"rules"}:
                raise InputError(f"gate.rules_file {path}: expected one key, 'rules'")
            rules = GateSettings.parse({"rules": document["rules"]}, str(path)).rules or []
        if not rules:
            raise InputError("the gate has no rules: a gate that lets everything pass is refused")
        for rule in rules:
            if (rule.at_least is None) == (rule.at_most is None):
                raise InputError(f"gate rule {rule.name}: give either at_least or at_most")
        return rules


def judge(evaluation: dict[str, Any], rules: list[Rule]) -> dict[str, Any]:
    """The verdict: {"passed", "rules": [{rule, metric, value, threshold, passed, reason}]}.

    A metric that is missing or not finite fails its rule: what was not measured did not pass.
    """
    outcomes = [_apply(rule, evaluation.get("models", {})) for rule in rules]
    return {"passed": all(outcome["passed"] for outcome in outcomes), "rules": outcomes}


def _apply(rule: Rule, models: dict[str, Any]) -> dict[str, Any]:
    limit = rule.at_least if rule.at_least is not None else rule.at_most
    sign, word = (1, "at least") if rule.at_least is not None else (-1, "at most")
    value = _metric(models, rule.metric)
    if isinstance(limit, Relative):
        base = _metric(models, limit.of)
        threshold = None if base is None else base * limit.times
        source = f" ({limit.times:g} × {limit.of})"
    else:
        threshold, source = limit, ""
    if value is None:
        passed, reason = False, f"{rule.metric} is missing or not a finite number"
    elif threshold is None:
        passed, reason = False, f"the threshold{source} is missing or not a finite number"
    else:
        passed = sign * value >= sign * threshold
        verb = "is" if passed else "is not"
        reason = f"{rule.metric} = {value:.4g} {verb} {word} {threshold:.4g}{source}"
    return {
        "rule": rule.name,
        "metric": rule.metric,
        "value": value,
        "threshold": threshold,
        "passed": passed,
        "reason": reason,
    }


def _metric(models: dict[str, Any], path: str) -> float | None:
    node: Any = models
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
        return None
    return float(node)


def run(evaluation: Path, verdict: Path, *, settings: dict[str, Any]) -> bool:
    """Judge the evaluation file, write the verdict file, return whether it passed."""
    rules = GateSettings.parse(settings, "gate").resolved()
    result = judge(json.loads(evaluation.read_text()), rules)
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.write_text(json.dumps(result, indent=1) + "\n")
    for outcome in result["rules"]:
        print(f"{'pass' if outcome['passed'] else 'FAIL'}  {outcome['rule']}: {outcome['reason']}")
    return bool(result["passed"])
