"""The DAG: ingest → validate → features → train → evaluate → gate → deploy.

The same object runs on a laptop (`pipelines.local_runner`) and compiles for a cluster
(`pipelines.compile`).
"""

from kfp import dsl, kubernetes

from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.features.component import features
from components.gate.component import gate
from components.ingest.component import ingest
from components.train.component import train
from components.validate.component import validate

CONFIG_MAP = "hrnn-config"  # k8s/base: where the stores are
STORE_VARIABLES = {
    name: name for name in ("HRNN_FEATURE_ROOT", "HRNN_ONLINE_STORE", "HRNN_REDIS_URL")
}


def _resources(task: dsl.PipelineTask, *, cpu: str, memory: str) -> None:
    task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
    task.set_caching_options(False)
    kubernetes.set_timeout(task, seconds=6 * 3600)


def _gpu(task: dsl.PipelineTask) -> None:
    """Training runs on one GPU; only this step occupies a GPU node."""
    _resources(task, cpu="4", memory="16Gi")
    task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)
    kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    kubernetes.empty_dir_mount(
        task,
        volume_name="shm",
        mount_path="/dev/shm",  # noqa: S108 - the pod's own
        medium="Memory",
        size_limit="1Gi",
    )


def _stores(task: dsl.PipelineTask) -> None:
    kubernetes.use_config_map_as_env(
        task, config_map_name=CONFIG_MAP, config_map_key_to_env=STORE_VARIABLES
    )
    kubernetes.mount_pvc(task, pvc_name="hrnn-stores", mount_path="/stores")


@dsl.pipeline(name="train-and-deploy", description=__doc__.splitlines()[0])
def train_and_deploy(
    dataset: str = "movielens-100k",
    interactions: str = "",
    users: str = "",
    items: str = "",
    cache: str = "",
    feature_store: str = "",
    model_store: str = "/stores/models",
    ingest_settings: dict = {},  # noqa: B006 - KFP reads the default, nothing mutates it
    validate_settings: dict = {},  # noqa: B006
    features_settings: dict = {},  # noqa: B006
    trend_settings: dict = {},  # noqa: B006
    train_settings: dict = {},  # noqa: B006
    evaluate_settings: dict = {},  # noqa: B006
    gate_settings: dict = {},  # noqa: B006
    deploy_settings: dict = {},  # noqa: B006
) -> None:
    """Train on a named dataset or on the files given, and deploy what passes the gate.

    Empty `feature_store` means: where HRNN_FEATURE_ROOT says.
    """
    tables = ingest(
        dataset=dataset,
        interactions=interactions,
        users=users,
        items=items,
        cache=cache,
        settings=ingest_settings,
    )
    checked = validate(tables=tables.outputs["tables"], settings=validate_settings)
    clean = checked.outputs["clean"]
    stored = features(
        clean=clean,
        feature_store=feature_store,
        trend=trend_settings,
        settings=features_settings,
    )
    trained = train(clean=clean, trend=trend_settings, settings=train_settings)
    # Locally steps run one at a time; without this the order of independent ones varies.
    trained.after(stored)
    measured = evaluate(clean=clean, bundle=trained.outputs["bundle"], settings=evaluate_settings)
    judged = gate(evaluation=measured.outputs["evaluation"], settings=gate_settings)
    with dsl.If(judged.outputs["Output"] == True, name="passed"):  # noqa: E712 - a KFP condition
        deployed = deploy(
            bundle=trained.outputs["bundle"],
            verdict=judged.outputs["verdict"],
            model_store=model_store,
            settings=deploy_settings,
        )
        _resources(deployed, cpu="500m", memory="1Gi")
        _stores(deployed)
    for task in (tables, checked, measured):
        _resources(task, cpu="1", memory="4Gi")
    _resources(judged, cpu="100m", memory="512Mi")
    _resources(stored, cpu="1", memory="4Gi")
    _stores(stored)
    _gpu(trained)
