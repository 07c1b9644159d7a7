"""Manifests render, are valid and hardened; images are pinned; wrong manifests are refused."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from k8s.validate import problems, render
from model.train_settings import TrainSettings
from serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
FOLDERS = ("k8s/base", "k8s/overlays/example")
TRAINING = ROOT / "k8s/training"
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
SERVICE = yaml.safe_load((ROOT / "k8s/base/inferenceservice.yaml").read_text())


@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS)
def test_rendered_manifests_are_valid(folder):
    documents = render(ROOT / folder)
    assert len(documents) >= 12
    assert problems(documents) == []


def _pods(documents):
    for d in documents:
        if d["kind"] == "InferenceService":
            yield "predictor", d["spec"]["predictor"]
            yield "transformer", d["spec"]["transformer"]
        elif d["kind"] in ("Deployment", "StatefulSet"):
            yield d["metadata"]["name"], d["spec"]["template"]["spec"]


@needs_kubectl
def test_every_pod_is_hardened_probed_and_limited():
    pods = dict(_pods(render(ROOT / "k8s/overlays/example")))
    assert set(pods) == {"predictor", "transformer", "hrnn-collector", "hrnn-redis"}
    for name, pod in pods.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"]["drop"] == ["ALL"], name
            assert container["resources"]["requests"]["cpu"], name
            assert container["resources"]["limits"]["memory"], name
            assert container["readinessProbe"], name
            assert container["livenessProbe"], name
            tag = container["image"].rpartition(":")[2]
            assert re.search(r"\d", tag), f"{name}: image is not pinned"


@needs_kubectl
def test_traffic_is_denied_by_default():
    policies = [d for d in render(ROOT / "k8s/base") if d["kind"] == "NetworkPolicy"]
    (deny,) = [p for p in policies if p["metadata"]["name"] == "deny-all"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def _selects(selector, labels):
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize("name", ["hrnn-meta", "hrnn-meta-canary"])
def test_pods_of_the_service_and_of_its_canary_are_reached_and_scraped(name):
    """Labels as KServe 0.21 puts them on pods."""

    def pod(role):
        return {"serving.kserve.io/inferenceservice": name, "component": role}

    policies = {
        p["metadata"]["name"]: p["spec"]
        for p in yaml.safe_load_all((ROOT / "k8s/base/network.yaml").read_text())
    }
    for role in ("transformer", "predictor"):
        assert _selects(policies[role]["podSelector"], pod(role))
    (to,) = policies["transformer"]["egress"][0]["to"]
    assert _selects(to["podSelector"], pod("predictor"))
    assert _selects(
        policies["predictor"]["ingress"][0]["from"][0]["podSelector"], pod("transformer")
    )
    monitor, _ = yaml.safe_load_all((ROOT / "k8s/monitoring/podmonitor.yaml").read_text())
    assert _selects(monitor["spec"]["selector"], pod("predictor"))


def test_the_labels_by_which_a_release_is_watched_are_put_on_by_the_monitor():
    monitor, _ = yaml.safe_load_all((ROOT / "k8s/monitoring/podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    labels = {r["targetLabel"]: r["sourceLabels"][0] for r in endpoint["relabelings"]}
    assert labels.keys() == {"role", "inferenceservice", "revision"}
    for label, pods in (
        ("inferenceservice", "serving.kserve.io/inferenceservice"),
        ("revision", "serving.knative.dev/revision"),
        ("role", "component"),
    ):
        plain = re.sub(r"[^a-z]", "_", pods)
        assert labels[label] == f"__meta_kubernetes_pod_label_{plain}"


def test_the_pipeline_may_do_what_a_canary_needs_and_no_more():
    """That it is enough show the releases: the stand-in of a cluster holds them to it."""
    role, binding = yaml.safe_load_all((ROOT / "k8s/base/pipeline-access.yaml").read_text())
    assert problems([role, binding]) == []
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert {s["namespace"] for s in binding["subjects"]} == {"hrnn"}
    for rule in role["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        assert rule["verbs"] == ["create"] or rule["resourceNames"]
        if "delete" in rule["verbs"]:
            assert rule["resourceNames"] == ["hrnn-meta-canary"]


def test_variables_in_manifests_are_settings_of_the_servers():
    known = {f"HRNN_{name.upper()}" for name in ServeSettings.model_fields} | {"HRNN_IMAGE"}
    for path in (ROOT / "k8s").rglob("*"):
        if path.suffix in {".yaml", ".Dockerfile"}:
            used = set(re.findall(r"\bHRNN_[A-Z_]+\b", path.read_text()))
            assert used <= known, path


def test_manifest_ports_are_the_servers_own():
    settings = ServeSettings()
    for role in ("predictor", "transformer"):
        (container,) = SERVICE["spec"][role]["containers"]
        ports = [p["containerPort"] for p in container["ports"]]
        own = [getattr(settings, f"{role}_{kind}_port") for kind in ("http", "grpc")]
        assert ports == own
        module = container["command"][-1]
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_pods_that_end_drain_first_and_have_the_time_for_it():
    collector, *_ = yaml.safe_load_all((ROOT / "k8s/base/collector.yaml").read_text())
    pods = {role: SERVICE["spec"][role] for role in ("predictor", "transformer")}
    pods["collector"] = collector["spec"]["template"]["spec"]
    for name, pod in pods.items():
        (container,) = pod["containers"]
        environ = {v["name"]: v["value"] for v in container["env"] if "value" in v}
        settings = ServeSettings.from_env(environ)
        assert settings.drain_seconds >= 5, name
        # The collector has that time for requests, for the event log and for the online store.
        times = 3 if name == "collector" else 1
        seconds = settings.drain_seconds + times * settings.grace_seconds
        assert pod["terminationGracePeriodSeconds"] >= seconds + 5, name


def test_the_collector_takes_its_log_from_a_secret_and_serves_its_own_port():
    deployment, service, _, policy = yaml.safe_load_all(
        (ROOT / "k8s/base/collector.yaml").read_text()
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {v["name"]: v for v in container["env"]}
    key = variables["HRNN_EVENT_LOG"]["valueFrom"]["secretKeyRef"]
    assert key == {"name": "hrnn-secrets", "key": "HRNN_EVENT_LOG"}
    port = ServeSettings().collector_http_port
    assert [p["containerPort"] for p in container["ports"]] == [port]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": port, "protocol": "TCP"}]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    module = container["command"][-1]
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize("image", ["pipeline", "serving"])
def test_images_are_pinned_and_run_as_nobody(image):
    text = (ROOT / f"k8s/images/{image}.Dockerfile").read_text()
    base = re.search(r"^FROM (\S+)$", text, re.MULTILINE)[1]
    assert re.search(r":\d+\.\d+\.\d+", base), "base image is not pinned"
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE)
    assert "latest" not in text
    allowed = (ROOT / ".dockerignore").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in allowed, f"{source} is kept out by .dockerignore"
    module = re.search(r'CMD \["python", "-m", "([\w.]+)"', text)[1]
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def _break(path, value):
    broken = copy.deepcopy(SERVICE)
    node = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return broken


CONTAINER = ("spec", "predictor", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "predictor", "minReplica"), 1, "spec.predictor.minReplica: no such field"),
        (("spec", "predictor", "minReplicas"), "two", "expected int, got 'two'"),
        (("spec", "predictor", "minReplicas"), True, "expected int, got True"),
        ((*CONTAINER, "imagePullPolicyy"), "Always", "imagePullPolicyy: no such field"),
        ((*CONTAINER, "ports"), {"containerPort": 1}, "expected a list"),
        ((*CONTAINER, "ports", 0, "containerPort"), "8090", "expected int, got '8090'"),
        (("spec", "predictor"), None, "spec.predictor: missing"),
        (("metadata", "name"), "HRNN meta", "not a DNS name"),
    ],
)
def test_broken_inference_services_are_refused(path, value, message):
    assert any(message in problem for problem in problems([_break(path, value)]))


def test_broken_core_resources_are_refused():
    good = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}}
    assert problems([good]) == []
    assert problems([good | {"dta": {}}])
    assert problems([good | {"data": {"k": 1}}])
    assert problems([good | {"kind": "ConfigMapp"}])


def test_no_secrets_in_manifests():
    for path in (ROOT / "k8s").rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert not document or document.get("kind") != "Secret", path


def _training():
    return [yaml.safe_load((TRAINING / f).read_text()) for f in ("runtime.yaml", "trainjob.yaml")]


def test_the_training_runtime_and_its_example_job_are_valid():
    runtime, job = _training()
    job["metadata"]["name"] = "generated"
    assert problems([runtime, job]) == []
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")  # what Trainer looks for
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    # The job calls what this repository has.
    command = [*job["spec"]["trainer"]["command"], *job["spec"]["trainer"]["args"]]
    assert command[:3] == ["torchrun", "-m", "components.train.job"]
    settings = next(a for a in command if a.startswith("--settings=")).partition("=")[2]
    TrainSettings.parse(json.loads(settings))


def test_wrong_training_manifests_are_refused():
    runtime, job = _training()
    job["metadata"]["name"] = "generated"
    job["spec"]["nodes"] = 2
    runtime["spec"]["mlPolicy"]["numNodes"] = "many"
    found = problems([runtime, job])
    assert any("spec.nodes: no such field" in p for p in found)
    assert any("numNodes" in p for p in found)


@needs_kubectl
def test_the_training_folder_renders():
    (runtime,) = render(TRAINING)
    assert problems([runtime]) == []
