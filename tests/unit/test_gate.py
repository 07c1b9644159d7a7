"""The gate refuses what is worse, unmeasured or broken, and says why."""

import copy
import json
import math

import pytest
import yaml

from components.gate import steps
from components.gate.steps import GateSettings, judge
from model.errors import InputError


def _metrics(ppl, ndcg, coverage=0.4, cases=500):
    return {"ppl": ppl, "ndcg@10": ndcg, "coverage@10": coverage, "cases": cases}


GOOD = {
    "models": {
        "hrnn": {"every": _metrics(250.0, 0.08)},
        "popularity": {"every": _metrics(800.0, 0.02, coverage=0.01)},
    }
}
RULES = GateSettings().resolved()


def _changed(**values):
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["every"].update(values)
    return evaluation


def test_a_good_model_passes_and_every_rule_is_named():
    verdict = judge(GOOD, RULES)
    assert verdict["passed"]
    assert [r["rule"] for r in verdict["rules"]] == [r.name for r in RULES]
    for rule in verdict["rules"]:
        assert rule["passed"]
        assert {"metric", "value", "threshold", "reason"} <= rule.keys()
    ppl = next(r for r in verdict["rules"] if r["metric"] == "hrnn.every.ppl")
    assert ppl["threshold"] == pytest.approx(720)
    assert "0.9 × popularity.every.ppl" in ppl["reason"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"ppl": 790.0}, "beats-popularity-perplexity"),
        ({"ppl": math.nan}, "beats-popularity-perplexity"),
        ({"ppl": None}, "beats-popularity-perplexity"),
        ({"ppl": "12"}, "beats-popularity-perplexity"),
        ({"ndcg@10": 0.01}, "beats-popularity-ranking"),
        ({"coverage@10": 0.0}, "does-not-collapse"),
        ({"cases": 0}, "enough-cases"),
    ],
)
def test_each_defect_is_refused_by_its_rule(changes, rule):
    verdict = judge(_changed(**changes), RULES)
    assert not verdict["passed"]
    assert [r["rule"] for r in verdict["rules"] if not r["passed"]] == [rule]


def test_missing_model_or_baseline_is_refused():
    for name in ("hrnn", "popularity"):
        evaluation = copy.deepcopy(GOOD)
        del evaluation["models"][name]
        assert not judge(evaluation, RULES)["passed"]
    assert not judge({}, RULES)["passed"]


def test_run_writes_the_verdict(tmp_path):
    (tmp_path / "evaluation").write_text(json.dumps(GOOD))
    assert steps.run(tmp_path / "evaluation", tmp_path / "out" / "verdict", settings={})
    assert json.loads((tmp_path / "out" / "verdict").read_text())["passed"] is True


def test_rules_from_a_file(tmp_path):
    path = tmp_path / "rules.yaml"
    rule = {"name": "strict", "metric": "hrnn.every.ppl", "at_most": 100}
    path.write_text(yaml.safe_dump({"rules": [rule]}))
    verdict = judge(GOOD, GateSettings(rules_file=str(path)).resolved())
    assert not verdict["passed"]
    assert verdict["rules"][0]["reason"] == "hrnn.every.ppl = 250 is not at most 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{name: a, metric: b, at_most: 1, at_least: 2}]", "either at_least or at_most"),
        ("rules: [{name: a, metric: b}]", "either at_least or at_most"),
        ("rules: [{name: a, metric: b, atmost: 1}]", "no such setting"),
        ("rules: []", "no rules"),
        ("[1, 2]", "expected one key"),
        ("{", "not YAML"),
    ],
)
def test_wrong_rules_are_refused(tmp_path, text, message):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        GateSettings(rules_file=str(path)).resolved()
    with pytest.raises(InputError, match="No such file"):
        GateSettings(rules_file=str(tmp_path / "none.yaml")).resolved()
