"""Dashboard and alerts: fresh, well-formed, and about metrics that the servers really export."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY

from components.deploy.watch import RELEASE_SECONDS
from k8s.monitoring import dashboards
from serving import collector_metrics, metrics  # noqa: F401 - register the metrics

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "k8s/monitoring/rules.yaml").read_text())["spec"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def exported() -> set[str]:
    names = set()
    for family in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + s for s in suffixes.get(family.type, ("",))}
    return names


def expressions() -> list[tuple[str, str]]:
    board = json.loads(dashboards.OUTPUT.read_text())
    panels = [p for p in board["panels"] if p["type"] != "row"]
    found = [(p["title"], t["expr"]) for p in panels for t in p["targets"]]
    return found + [(rule["alert"], rule["expr"]) for rule in ALERTS]


def test_the_committed_dashboard_is_what_the_code_makes():
    assert dashboards.OUTPUT.read_text() == dashboards.render(), (
        "run python -m k8s.monitoring.dashboards"
    )


def test_only_exported_metrics_are_queried():
    known = exported()
    for title, expression in expressions():
        for name in re.findall(r"\b(?:hrnn|process)_\w+", expression):
            assert name in known, f"{title}: {name} is not exported"


def test_panels_have_titles_words_units_and_do_not_overlap():
    board = json.loads(dashboards.OUTPUT.read_text())
    ids = [p["id"] for p in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert [t["refId"] for t in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])


def test_every_alert_has_a_runbook_section():
    text = (ROOT / "docs/operations.md").read_text()
    anchors = {h.lower() for h in re.findall(r"^#+ (\w+)$", text, re.MULTILINE)}
    for rule in ALERTS:
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/operations.md"
        assert anchor in anchors, rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}


@needs_promtool
def test_rules_and_panels_parse_and_alerts_fire_on_their_faults(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    panels = [
        {"record": f"panel:{i}", "expr": e.replace("$__rate_interval", "5m")}
        for i, (_, e) in enumerate(expressions())
    ]
    (tmp_path / "panels.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]})
    )
    shutil.copy(ROOT / "k8s/monitoring/rules_test.yaml", tmp_path)
    for arguments in (
        ["check", "rules", "rules.yaml", "panels.yaml"],
        ["test", "rules", "rules_test.yaml"],
    ):
        done = subprocess.run(
            ["promtool", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_champion_is_overdue_when_the_pod_that_checks_it_is_gone():
    (rule,) = [rule for rule in ALERTS if rule["alert"] == "HrnnChampionNotChecked"]
    assert rule["expr"].endswith(f"> {RELEASE_SECONDS}")
