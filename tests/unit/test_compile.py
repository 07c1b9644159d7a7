"""The compiled pipeline is a golden file: `make golden` writes it anew, git diff reviews it."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from components.digests import code_digest
from pipelines.compile import compile_all
from pipelines.settings import SECTIONS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def _documents(path):
    # The code's digest, a default of the pipeline, changes with every commit.
    return list(yaml.safe_load_all(path.read_text().replace(code_digest(), "golden")))


def test_compiled_pipelines_equal_the_golden_files(tmp_path):
    for path in compile_all(tmp_path):
        assert _documents(path) == _documents(GOLDEN / path.name), "run `make golden`, review it"


def test_compiling_twice_gives_the_same_text(tmp_path):
    code = "import sys, pathlib; from pipelines.compile import *; compile_all(pathlib.Path('.'))"
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / seed,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            check=True,
            timeout=240,
        )
    for path in (tmp_path / "1").iterdir():
        assert path.read_text() == (tmp_path / "2" / path.name).read_text(), path.name


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
    for name in ("exec-features", "exec-warm-start", "exec-deploy", "exec-report-outcome"):
        assert options[name]["configMapAsEnv"] and options[name]["pvcMount"], name
        secrets = {v["envVar"] for m in options[name]["secretAsEnv"] for v in m["keyToEnv"]}
        assert {"AWS_SECRET_ACCESS_KEY", "HRNN_REDIS_URL", "HRNN_NOTIFY_URL"} <= secrets
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
    always = {"ingest", "features", "warm-start", "evaluate", "gate", "deploy"}
    assert always <= set(steps) and cached & always == set()
    start = steps["train"]["inputs"]["parameters"]["start"]["taskOutputParameter"]
    assert start["producerTask"] == "warm-start"  # a version, whichever was the champion
    for name in ("validate", "train"):
        assert name in cached
        inputs = steps[name]["inputs"]["parameters"]
        assert inputs["code"]["componentInputParameter"].endswith("code")
        assert inputs["data_digest"]["taskOutputParameter"]["producerTask"] == "ingest"
    assert pipeline["root"]["inputDefinitions"]["parameters"]["code"]["defaultValue"] == "golden"


def test_pods_are_started_again_only_after_the_input_was_checked(tmp_path):
    """Ingest and validate refuse input; ingest asks a source that is away again by itself."""
    steps = _steps(_documents(compile_all(tmp_path)[0])[0])
    retried = {n for n, task in steps.items() if task.get("retryPolicy", {}).get("maxRetryCount")}
    assert retried == {"features", "train", "evaluate", "deploy"}


def test_every_step_but_the_last_word_checks_the_code_of_its_image(tmp_path):
    for path in compile_all(tmp_path):
        pipeline = _documents(path)[0]
        for name, task in _steps(pipeline).items():
            if "componentRef" not in task or name.startswith(("exit-handler", "condition")):
                continue
            label = pipeline["components"][task["componentRef"]["name"]]["executorLabel"]
            source = pipeline["deploymentSpec"]["executors"][label]["container"]["command"][-1]
            told = name == "report-outcome"  # says how the run ended, whatever is wrong
            assert ("check_code(code)" in source) is not told, name
            assert ("code" in task["inputs"]["parameters"]) is not told, name


def test_the_form_of_a_new_run_shows_every_setting_with_its_default(tmp_path):
    """Kubeflow's form is filled with the defaults; descriptions stand beside them in the YAML."""
    for path in compile_all(tmp_path):
        parameters = _documents(path)[0]["root"]["inputDefinitions"]["parameters"]
        shown = {n.removesuffix("_settings"): p for n, p in parameters.items() if "settings" in n}
        assert shown
        for section, parameter in shown.items():
            assert SECTIONS[section].parse(parameter["defaultValue"]) == SECTIONS[section]()
            for key in SECTIONS[section].model_fields:
                assert key in parameter["defaultValue"] or key in parameter["description"], key
        for name, parameter in parameters.items():
            assert parameter["description"].endswith("."), name


def test_volumes_are_mounted_where_they_are_declared(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "compile", "-o", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HRNN_VOLUMES": "a=/a,b=/b"},
        check=True,
        timeout=240,
    )
    platform = _documents(tmp_path / "refresh_trends.yaml")[1]
    (options,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert [m["mountPath"] for m in options["pvcMount"]] == ["/a", "/b"]


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
