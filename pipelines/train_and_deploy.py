"""The DAG: ingest → validate → features → train → evaluate → gate → deploy.

The same object runs on a laptop (`pipelines.local_runner`) and compiles for a cluster
(`pipelines.compile`).
"""

from kfp import dsl

from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.features.component import features
from components.gate.component import gate
from components.ingest.component import ingest
from components.train.component import train
from components.validate.component import validate
from pipelines.cluster import gpu, resources, stores


@dsl.pipeline(name="train-and-deploy", description=__doc__.splitlines()[0])
def train_and_deploy(
    dataset: str = "movielens-100k",
    interactions: str = "",
    users: str = "",
    items: str = "",
    cache: str = "",
    feature_store: str = "",
    model_store: str = "/stores/models",
    checkpoints: str = "/stores/checkpoints",
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
    trained = train(
        clean=clean, trend=trend_settings, settings=train_settings, checkpoints=checkpoints
    )
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
        resources(deployed, cpu="500m", memory="1Gi")
        stores(deployed)
    for task in (tables, checked, measured):
        resources(task, cpu="1", memory="4Gi")
    resources(judged, cpu="100m", memory="512Mi")
    resources(stored, cpu="1", memory="4Gi")
    for task in (tables, stored, trained):
        stores(task)
    resources(trained, cpu="4", memory="16Gi")
    gpu(trained)
