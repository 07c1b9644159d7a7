"""Gate: rules over an evaluation → a verdict that names every rule, value and threshold."""

import json
import math
from pathlib import Path
from typing import Any

from components.evaluate.document import FORMAT, FORMAT_VERSION
from components.gate.rules import GateSettings, Relative, Rule

__all__ = ["GateSettings", "judge", "run"]

CANDIDATE, CHAMPION = "hrnn", "champion"
# Metrics of which less is better are compared as ratios, the others as differences.
LOWER_IS_BETTER = ("ppl", "rmse")
READABLE, FINITE = "evaluation-is-readable", "figures-are-finite"


def judge(evaluation: Any, rules: list[Rule], override: str = "") -> dict[str, Any]:
    """The verdict: {"passed", "deploy", "override", "champion", "model_version", "rules"}.

    Each of `rules` is {rule, metric, value, threshold, passed, reason}. Two are always judged
    besides: the evaluation has the expected form, and its figures are finite. A metric that is
    missing or not finite fails its rule: what was not measured did not pass.

    Args:
        override: why the candidate is to be deployed whatever the rules say; not possible when
            the evaluation cannot be read or is not finite.
    """
    readable = _readable(evaluation)
    if not readable["passed"]:
        return {
            "passed": False,
            "deploy": False,
            "override": None,
            "champion": None,
            "model_version": None,
            "rules": [readable],
        }
    sound = _finite(evaluation["models"])
    outcomes = [readable, sound, *(_apply(rule, evaluation) for rule in rules)]
    passed = all(outcome["passed"] for outcome in outcomes)
    overridden = bool(override) and not passed and sound["passed"]
    champion = evaluation["champion"]
    return {
        "passed": passed,
        "deploy": passed or overridden,
        "override": override if overridden else None,
        "champion": None if champion is None else champion["version"],
        "model_version": evaluation["model_version"],
        "rules": outcomes,
    }


def _outcome(
    rule: str, metric: str, passed: bool, reason: str, value: Any = None, threshold: Any = None
) -> dict[str, Any]:
    return {
        "rule": rule,
        "metric": metric,
        "value": value,
        "threshold": threshold,
        "passed": passed,
        "reason": reason,
    }


def _readable(evaluation: Any) -> dict[str, Any]:
    problem = ""
    if not isinstance(evaluation, dict) or evaluation.get("format") != FORMAT:
        problem = "this is no evaluation"
    elif evaluation.get("format_version") != FORMAT_VERSION:
        problem = f"version {evaluation.get('format_version')} is not {FORMAT_VERSION}"
    elif missing := {"models", "champion", "model_version"} - evaluation.keys():
        problem = f"it has no {', '.join(sorted(missing))}"
    elif not isinstance(evaluation["models"], dict) or CANDIDATE not in evaluation["models"]:
        problem = "it has no figures of the candidate"
    reason = problem or f"evaluation version {FORMAT_VERSION}"
    return _outcome(READABLE, "format", not problem, reason)


def _finite(models: dict[str, Any]) -> dict[str, Any]:
    """The candidate's own figures over all test cases."""
    for read_out in ("every", "last"):
        for metric, value in dict(models[CANDIDATE].get(read_out, {})).items():
            path = f"{CANDIDATE}.{read_out}.{metric}"
            if _number(value) is None:
                return _outcome(FINITE, path, False, f"{path} is {value}")
    return _outcome(FINITE, f"{CANDIDATE}.every, .last", True, "every figure is finite")


def _apply(rule: Rule, evaluation: dict[str, Any]) -> dict[str, Any]:
    models = evaluation["models"]
    about_champion = rule.against == CHAMPION or any(
        path.startswith(f"{CHAMPION}.")
        for path in (
            rule.metric,
            *(b.of for b in (rule.at_least, rule.at_most) if isinstance(b, Relative)),
        )
    )
    if about_champion and evaluation["champion"] is None:
        return _outcome(rule.name, rule.metric, True, "there is no champion yet: not judged")
    if about_champion and (problem := evaluation["champion"].get("problem")):
        return _outcome(rule.name, rule.metric, False, f"the champion was not measured: {problem}")
    cases = _cases(models, rule.metric)
    if cases is not None and cases < rule.min_cases:
        reason = f"{cases:,} cases are fewer than {rule.min_cases:,}: not judged"
        return _outcome(rule.name, rule.metric, True, reason)
    return _compare(rule, models) if rule.against else _bound(rule, models)


def _bound(rule: Rule, models: dict[str, Any]) -> dict[str, Any]:
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
        reason = f"{rule.metric} = {_text(value)} {verb} {word} {_text(threshold)}{source}"
    return _outcome(rule.name, rule.metric, passed, reason, value, threshold)


def _text(value: float) -> str:
    """Counts whole, all else to four digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _compare(rule: Rule, models: dict[str, Any]) -> dict[str, Any]:
    """By paired bootstrap: is the change, with the stated confidence, on the right side?"""
    path = rule.metric.removeprefix(f"{CANDIDATE}.").removesuffix(".value")
    comparison = _node(models, f"{CANDIDATE}.against_{rule.against}.{path}")
    quantiles = comparison.get("quantiles") if isinstance(comparison, dict) else None
    metric = path.rpartition(".")[2]
    other = _metric(models, f"{rule.against}.{rule.metric.removeprefix(f'{CANDIDATE}.')}")
    if not quantiles or other is None:
        reason = f"{rule.metric} was not compared with the {rule.against} (no cases?)"
        return _outcome(rule.name, rule.metric, False, reason)
    # Loss: how much worse the candidate is, in shares of the other's value; below 0: better.
    lower = metric in LOWER_IS_BETTER

    def loss(change: float) -> float:
        if lower:
            return change - 1.0
        # Of a champion without any hit, every hit is better, and none is the same.
        return -change / other if other else math.copysign(math.inf, -change) if change else 0.0

    tails = [loss(quantiles[f"{q:g}"]) for q in (1 - rule.confidence, rule.confidence)]
    best, worst = min(tails), max(tails)
    threshold = -rule.margin if rule.require == "shown_better" else rule.margin
    passed = {
        "not_shown_worse": best <= threshold,
        "shown_no_worse": worst <= threshold,
        "shown_better": worst < threshold,
    }[rule.require]
    value = loss(float(comparison["value"]))
    word = {
        "not_shown_worse": f"{'not ' if passed else ''}shown to be more than {threshold:.1%} worse",
        "shown_no_worse": f"{'' if passed else 'not '}shown to be at most {threshold:.1%} worse",
        "shown_better": f"{'' if passed else 'not '}shown to be more than {-threshold:.1%} better",
    }[rule.require]
    reason = (
        f"{rule.metric} is {word} than the {rule.against}'s with {rule.confidence:.1%} confidence: "
        f"{abs(value):.2%} {'worse' if value > 0 else 'better'}, one-sided bounds "
        f"{best:+.2%} … {worst:+.2%} worse"
    )
    return _outcome(rule.name, rule.metric, passed, reason, value, threshold)


def _node(models: Any, path: str) -> Any:
    node = models
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _number(node: Any) -> float | None:
    if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
        return None
    return float(node)


def _metric(models: dict[str, Any], path: str) -> float | None:
    return _number(_node(models, path))


def _cases(models: dict[str, Any], path: str) -> int | None:
    """Cases of the group that a metric is of."""
    group = path.removesuffix(".value").rpartition(".")[0]
    cases = _metric(models, f"{group}.cases")
    return None if cases is None else int(cases)


def run(
    evaluation: Path, verdict: Path, *, settings: dict[str, Any], override: str = ""
) -> dict[str, Any]:
    """Judge the evaluation file, write the verdict file, return the verdict."""
    rules = GateSettings.parse(settings, "gate").resolved()
    try:
        measured = json.loads(evaluation.read_text())
    except (OSError, ValueError):
        measured = None  # no evaluation is a refusal, with its reason
    result = judge(measured, rules, override)
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.write_text(json.dumps(result, indent=1) + "\n")
    for outcome in result["rules"]:
        print(f"{'pass' if outcome['passed'] else 'FAIL'}  {outcome['rule']}: {outcome['reason']}")
    if result["override"]:
        print(f"deployed all the same: {result['override']}")
    return result


def markdown(verdict: dict[str, Any]) -> str:
    """The verdict as a page for the pipeline's user interface."""
    head = "passed" if verdict["passed"] else "refused"
    if verdict["override"]:
        head += f", deployed all the same: {verdict['override']}"
    rows = [
        f"| {'✓' if r['passed'] else '✗'} | {r['rule']} | {r['reason'].replace('|', '/')} |"
        for r in verdict["rules"]
    ]
    table = "\n".join(["| | rule | why |", "|---|---|---|", *rows])
    return f"# Gate: {head}\n\nModel {verdict['model_version']}\n\n{table}\n"
