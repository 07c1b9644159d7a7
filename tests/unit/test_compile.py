"""The compiled pipeline is a golden file: `make golden` writes it anew, git diff reviews it."""

from pathlib import Path

import yaml

from components.digests import code_digest
from pipelines.compile import compile_all

GOLDEN = Path(__file__).parents[1] / "golden"


def _documents(path):
    # The code's digest, a default of the pipeline, changes with every commit.
    return list(yaml.safe_load_all(path.read_text().replace(code_digest(), "golden")))


def test_compiled_pipelines_equal_the_golden_files(tmp_path):
    for path in compile_all(tmp_path):
        assert _documents(path) == _documents(GOLDEN / path.name), "run `make golden`, review it"


def test_training_asks_for_a_gpu_and_tolerates_its_node(tmp_path):
    path = compile_all(tmp_path)[0]
    pipeline, platform = _documents(path)
    executors = pipeline["deploymentSpec"]["executors"]
    resources = executors["exec-train"]["container"]["resources"]
    assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "1"
    with_gpu = [n for n, e in executors.items() if "accelerator" in e["container"]["resources"]]
    assert with_gpu == ["exec-train"]
    options = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert options["exec-train"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    for name in ("exec-features", "exec-deploy"):
        assert options[name]["configMapAsEnv"]
    assert options["exec-train"]["nodeSelector"]["labels"] == {"nvidia.com/gpu.present": "true"}
    (shm,) = options["exec-train"]["emptyDirMounts"]
    assert (shm["mountPath"], shm["medium"]) == ("/dev/shm", "Memory")  # noqa: S108
    for name, executor in executors.items():
        assert executor["container"]["resources"]["memoryLimit"], name
        assert options[name]["activeDeadlineSeconds"], name
        labels = options[name]["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == name.removeprefix("exec-")


def test_deployment_hangs_on_the_gate(tmp_path):
    path = compile_all(tmp_path)[0]
    pipeline = _documents(path)[0]
    tasks = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    (condition,) = [t for t in tasks.values() if "triggerPolicy" in t]
    assert "gate" in condition["dependentTasks"]
    assert "true" in condition["triggerPolicy"]["condition"]
    assert "deploy" not in tasks


def _steps(pipeline):
    dags = [
        pipeline["root"]["dag"],
        *(c["dag"] for c in pipeline["components"].values() if "dag" in c),
    ]
    return {name: task for dag in dags for name, task in dag["tasks"].items()}


def test_what_changes_stores_is_never_cached_and_what_is_cached_knows_data_and_code(tmp_path):
    pipeline = _documents(compile_all(tmp_path)[0])[0]
    steps = _steps(pipeline)
    cached = {n for n, task in steps.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached & {"ingest", "features", "evaluate", "gate", "deploy"} == set()
    for name in ("validate", "train"):
        assert name in cached
        inputs = steps[name]["inputs"]["parameters"]
        assert inputs["code"]["componentInputParameter"].endswith("code")
        assert inputs["data_digest"]["taskOutputParameter"]["producerTask"] == "ingest"
    assert pipeline["root"]["inputDefinitions"]["parameters"]["code"]["defaultValue"] == "golden"


def test_retries_are_for_steps_after_the_input_was_checked(tmp_path):
    steps = _steps(_documents(compile_all(tmp_path)[0])[0])
    retried = {n for n, task in steps.items() if task.get("retryPolicy", {}).get("maxRetryCount")}
    assert retried == {"features", "train", "evaluate", "deploy"}


def test_the_outcome_is_told_whatever_happens(tmp_path):
    tasks = _documents(compile_all(tmp_path)[0])[0]["root"]["dag"]["tasks"]
    assert set(tasks) == {"exit-handler-1", "report-outcome"}
    assert tasks["report-outcome"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_a_refresh_is_never_cached_and_reaches_the_stores(tmp_path):
    path = compile_all(tmp_path)[1]
    pipeline, platform = _documents(path)
    assert path.name == "refresh_trends.yaml"
    (task,) = pipeline["root"]["dag"]["tasks"].values()
    assert not task["cachingOptions"].get("enableCache")
    assert task["retryPolicy"]["maxRetryCount"] == 2
    (options,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    variables = {v["envVar"] for m in options["configMapAsEnv"] for v in m["keyToEnv"]}
    assert {"HRNN_EVENT_LOG", "HRNN_FEATURE_ROOT", "HRNN_REDIS_URL"} <= variables
    assert options["pvcMount"]
