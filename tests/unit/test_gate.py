"""The gate refuses what is worse, unmeasured or broken, and says why."""

import copy
import json
import math

import pytest
import yaml

from components.evaluate.measure import QUANTILES
from components.gate import steps
from components.gate.steps import GateSettings, judge
from model.errors import InputError


def _metrics(ppl, ndcg, coverage=0.4, cases=500):
    return {"ppl": ppl, "ndcg@10": ndcg, "coverage@10": coverage, "cases": cases}


def _slice(ppl, cases=200):
    return {"history/first": {"cases": cases, "ppl": {"value": ppl, "low": ppl, "high": ppl}}}


def _comparison(value, low, high, nothing):
    """As from a bootstrap whose quantiles run evenly from low (.5%) to high (99.5%)."""
    span = QUANTILES[-1] - QUANTILES[0]
    quantiles = {f"{q:g}": low + (high - low) * (q - QUANTILES[0]) / span for q in QUANTILES}
    excludes = low > nothing or high < nothing
    return {"value": value, "low": low, "high": high, "excludes_zero": excludes} | {
        "quantiles": quantiles
    }


def _against(ppl=(0.99, 0.97, 1.01), ndcg=(0.0, -0.001, 0.001)):
    return {
        "comparable": {
            "cases": 500,
            "ppl": _comparison(*ppl, 1.0),
            "ndcg@10": _comparison(*ndcg, 0.0),
        }
    }


FIRST = {
    "format": "hrnn-meta-evaluation",
    "format_version": 2,
    "model_version": "v2",
    "champion": None,
    "models": {
        "hrnn": {
            "every": _metrics(250.0, 0.08),
            "last": _metrics(260.0, 0.07),
            "slices": _slice(500.0),
        },
        "popularity": {
            "every": _metrics(800.0, 0.02, coverage=0.01),
            "slices": _slice(490.0),
        },
    },
}
GOOD = copy.deepcopy(FIRST)
GOOD["champion"] = {"version": "v1", "problem": ""}
GOOD["models"]["hrnn"] |= {"comparable": _metrics(250.0, 0.08), "against_champion": _against()}
GOOD["models"]["champion"] = {
    "every": _metrics(252.0, 0.08),
    "comparable": _metrics(252.0, 0.08),
}
RULES = GateSettings().resolved()
BUILT_IN = ["evaluation-is-readable", "figures-are-finite"]


def _changed(**values):
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["every"].update(values)
    return evaluation


def _failed(verdict):
    return [r["rule"] for r in verdict["rules"] if not r["passed"]]


def test_a_good_model_passes_and_every_rule_is_named():
    verdict = judge(GOOD, RULES)
    assert verdict["passed"], verdict
    assert verdict["deploy"] is True
    assert (verdict["champion"], verdict["model_version"]) == ("v1", "v2")
    assert [r["rule"] for r in verdict["rules"]] == BUILT_IN + [r.name for r in RULES]
    for rule in verdict["rules"]:
        assert rule["passed"]
        assert {"metric", "value", "threshold", "reason"} <= rule.keys()
    ppl = next(r for r in verdict["rules"] if r["metric"] == "hrnn.every.ppl")
    assert ppl["threshold"] == pytest.approx(720)
    assert "0.9 × popularity.every.ppl" in ppl["reason"]


def test_the_first_model_needs_no_champion():
    verdict = judge(FIRST, RULES)
    assert verdict["passed"]
    assert verdict["champion"] is None
    reasons = [r["reason"] for r in verdict["rules"] if "champion" in r["rule"]]
    assert reasons == ["there is no champion yet: not judged"] * 2


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"ppl": 790.0}, ["beats-popularity-perplexity"]),
        ({"ppl": math.nan}, ["figures-are-finite", "beats-popularity-perplexity"]),
        ({"ppl": math.inf}, ["figures-are-finite", "beats-popularity-perplexity"]),
        ({"ppl": None}, ["figures-are-finite", "beats-popularity-perplexity"]),
        ({"ppl": "12"}, ["figures-are-finite", "beats-popularity-perplexity"]),
        ({"ndcg@10": 0.01}, ["beats-popularity-ranking"]),
        ({"coverage@10": 0.0}, ["does-not-collapse"]),
        ({"cases": 0}, ["enough-cases"]),
    ],
)
def test_each_defect_is_refused_by_its_rule(changes, rules):
    verdict = judge(_changed(**changes), RULES)
    assert not verdict["passed"]
    assert not verdict["deploy"]
    assert _failed(verdict) == rules


def test_a_missing_baseline_or_slice_is_refused():
    evaluation = copy.deepcopy(GOOD)
    del evaluation["models"]["popularity"]
    assert "beats-popularity-perplexity" in _failed(judge(evaluation, RULES))
    evaluation = copy.deepcopy(GOOD)
    del evaluation["models"]["hrnn"]["slices"]
    assert _failed(judge(evaluation, RULES)) == ["serves-new-users"]


@pytest.mark.parametrize(
    "evaluation",
    [
        None,
        [],
        {},
        {**FIRST, "format": "other"},
        {**FIRST, "format_version": 1},
        {name: value for name, value in FIRST.items() if name != "champion"},
        {**FIRST, "models": {"popularity": {}}},
        {**FIRST, "models": None},
    ],
)
def test_what_is_no_evaluation_is_refused_and_cannot_be_overridden(evaluation):
    verdict = judge(evaluation, RULES, override="because")
    assert _failed(verdict) == ["evaluation-is-readable"]
    assert not verdict["deploy"]
    assert verdict["override"] is None


def test_a_slice_floor_counts_only_with_enough_cases():
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["slices"] = _slice(700.0)
    assert _failed(judge(evaluation, RULES)) == ["serves-new-users"]
    evaluation["models"]["hrnn"]["slices"] = _slice(700.0, cases=99)
    verdict = judge(evaluation, RULES)
    assert verdict["passed"]
    assert any("99 cases are fewer than 100" in r["reason"] for r in verdict["rules"])


PPL, NDCG = "keeps-up-with-champion-perplexity", "keeps-up-with-champion-ranking"


@pytest.mark.parametrize(
    ("against", "failed"),
    [
        ({"ppl": (1.05, 1.03, 1.07)}, [PPL]),  # surely more than 2% worse
        ({"ppl": (1.05, 0.99, 1.11)}, []),  # worse, but the data do not show it
        ({"ppl": (1.01, 1.005, 1.015)}, []),  # surely worse, by less than the margin
        ({"ndcg": (-0.01, -0.012, -0.008)}, [NDCG]),  # 12.5% of .08
        ({"ndcg": (-0.01, -0.03, 0.01)}, []),
        ({"ndcg": (0.02, 0.01, 0.03), "ppl": (0.5, 0.4, 0.6)}, []),
    ],
)
def test_the_champion_is_kept_when_the_data_show_that_the_candidate_is_worse(against, failed):
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["against_champion"] = _against(**against)
    verdict = judge(evaluation, RULES)
    assert _failed(verdict) == failed
    for rule in verdict["rules"]:
        if rule["rule"] in failed:
            assert "with 95.0% confidence" in rule["reason"]


@pytest.mark.parametrize(
    ("require", "margin", "ppl", "passed"),
    [
        ("shown_no_worse", 0.02, (1.0, 0.99, 1.01), True),
        ("shown_no_worse", 0.02, (1.0, 0.96, 1.04), False),
        ("shown_no_worse", 0.0, (0.98, 0.97, 0.99), True),
        ("shown_better", 0.0, (0.98, 0.97, 0.99), True),
        ("shown_better", 0.0, (1.0, 1.0, 1.0), False),
        ("shown_better", 0.05, (0.98, 0.97, 0.99), False),
        ("not_shown_worse", 0.0, (1.0, 1.0, 1.0), True),
    ],
)
def test_requirements_of_comparisons(require, margin, ppl, passed):
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["against_champion"] = _against(ppl=ppl)
    rule = {
        "name": "r",
        "metric": "hrnn.comparable.ppl",
        "against": "champion",
        "require": require,
        "margin": margin,
        "confidence": 0.99,
    }
    rules = GateSettings.parse({"rules": [rule]}).resolved()
    assert judge(evaluation, rules)["passed"] is passed


def test_confidence_decides_between_chance_and_defect():
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["against_champion"] = _against(ppl=(1.05, 0.995, 1.105))
    rule = {"name": "r", "metric": "hrnn.comparable.ppl", "against": "champion"}
    outcome = {
        confidence: judge(
            evaluation,
            GateSettings.parse({"rules": [rule | {"confidence": confidence}]}).resolved(),
        )["passed"]
        for confidence in (0.9, 0.995)
    }
    assert outcome == {0.9: False, 0.995: True}


def test_a_champion_that_was_not_measured_is_a_reason_to_refuse():
    evaluation = copy.deepcopy(GOOD)
    evaluation["champion"]["problem"] = "its fields are not those of this data"
    verdict = judge(evaluation, RULES)
    assert _failed(verdict) == [PPL, NDCG]
    assert "its fields are not those" in verdict["rules"][-1]["reason"]
    evaluation = copy.deepcopy(GOOD)
    evaluation["models"]["hrnn"]["against_champion"]["comparable"] = {"cases": 0}
    assert "was not compared" in judge(evaluation, RULES)["rules"][-1]["reason"]


def test_an_override_is_recorded_and_only_where_it_was_needed():
    refused = judge(_changed(ppl=790.0), RULES, override="the old model is on fire")
    assert not refused["passed"]
    assert refused["deploy"]
    assert refused["override"] == "the old model is on fire"
    assert "deployed all the same: the old model is on fire" in steps.markdown(refused)
    assert judge(GOOD, RULES, override="not needed")["override"] is None
    broken = judge(_changed(ppl=math.nan), RULES, override="please")
    assert not broken["deploy"]


def test_run_writes_the_verdict(tmp_path):
    (tmp_path / "evaluation").write_text(json.dumps(GOOD))
    verdict = tmp_path / "out" / "verdict"
    assert steps.run(tmp_path / "evaluation", verdict, settings={})["deploy"]
    assert json.loads(verdict.read_text())["passed"] is True
    for content in ("", "{", "nothing"):
        (tmp_path / "evaluation").write_text(content)
        assert not steps.run(tmp_path / "evaluation", verdict, settings={})["deploy"]
    assert not steps.run(tmp_path / "none", verdict, settings={})["deploy"]


def test_rules_from_a_file_travel_with_the_settings(tmp_path):
    path = tmp_path / "rules.yaml"
    rule = {"name": "strict", "metric": "hrnn.every.ppl", "at_most": 100}
    path.write_text(yaml.safe_dump({"rules": [rule]}))
    pinned = GateSettings(rules_file=str(path)).pinned()
    path.unlink()
    again = GateSettings.parse(pinned.model_dump(mode="json", exclude_none=True))
    verdict = judge(GOOD, again.resolved())
    assert not verdict["passed"]
    assert verdict["rules"][-1]["reason"] == "hrnn.every.ppl = 250 is not at most 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{name: a, metric: b, at_most: 1, at_least: 2}]", "either at_least or at_most"),
        ("rules: [{name: a, metric: b}]", "either at_least or at_most"),
        ("rules: [{name: a, metric: b, at_most: 1, against: champion}]", "either at_least"),
        ("rules: [{name: a, metric: b, atmost: 1}]", "no such setting"),
        ("rules: [{name: a, metric: b, at_most: 1, margin: 0.1}]", "belong to a rule with"),
        ("rules: [{name: a, metric: hrnn.x, against: elvis}]", "against"),
        ("rules: [{name: a, metric: champion.x, against: popularity}]", "about the candidate"),
        ("rules: [{name: a, metric: hrnn.x, against: champion, confidence: 0.42}]", "one of 0.8"),
        ("rules: [{name: a, metric: b, at_most: 1}, {name: a, metric: c, at_most: 1}]", "a twice"),
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


def test_counts_are_told_whole():
    assert [steps._text(v) for v in (18_518, 20, 0.023261, 732.68)] == [
        "18,518",
        "20",
        "0.02326",
        "732.7",
    ]
