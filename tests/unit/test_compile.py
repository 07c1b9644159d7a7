"""The compiled pipeline is a golden file: `make golden` writes it anew, git diff reviews it."""

from pathlib import Path

import yaml

from pipelines.compile import compile_all

GOLDEN = Path(__file__).parents[1] / "golden"


def _documents(path):
    return list(yaml.safe_load_all(path.read_text()))


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
    for name, executor in executors.items():
        assert executor["container"]["resources"]["memoryLimit"], name
        assert options[name]["activeDeadlineSeconds"], name


def test_deployment_hangs_on_the_gate(tmp_path):
    path = compile_all(tmp_path)[0]
    pipeline = _documents(path)[0]
    tasks = pipeline["root"]["dag"]["tasks"]
    (condition,) = [t for t in tasks.values() if "triggerPolicy" in t]
    assert "gate" in condition["dependentTasks"]
    assert "true" in condition["triggerPolicy"]["condition"]
    assert "deploy" not in tasks


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
