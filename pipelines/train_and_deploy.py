"""The DAG: ingest → validate → features → warm start → train → evaluate → gate → deploy.

The same object runs on a laptop (`pipelines.local_runner`) and compiles for a cluster
(`pipelines.compile`).

Caching: validate and train take the outputs of an earlier run when the data (its digest, which
ingest returns), the settings and the code (its digest) are the same, and for train the version it
starts from. Ingest always runs, since reading a source is the only way to know whether it changed;
features and deploy always run, since they change stores; warm start, evaluate and gate always run,
since the champion may be another.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.deploy.component import deploy
from components.deploy.watch import RELEASE_SECONDS
from components.evaluate.component import evaluate
from components.features.component import features
from components.gate.component import gate
from components.ingest.component import ingest
from components.outcome.component import report_outcome
from components.outcome.steps import TOLD_SECONDS
from components.train.component import train
from components.validate.component import validate
from components.warm_start.component import warm_start
from pipelines.cluster import gpu, resources, retried, stores
from pipelines.parameters import takes
from pipelines.settings import TRAINING

NAME = "train-and-deploy"
JOB = dsl.PIPELINE_JOB_NAME_PLACEHOLDER  # for people; somebody may have given it twice


@dsl.pipeline(name=NAME, description=__doc__.splitlines()[0])
@takes(TRAINING, dataset="movielens-100k")
def train_and_deploy(
    source: Mapping[str, Any],
    code: Any,
    settings: Mapping[str, Any],
    feature_store: str = "",
    model_store: str = "/stores/models",
    checkpoints: str = "/stores/checkpoints",
    override: str = "",
    run_id: str = "",
) -> None:
    """Train on a named dataset or on the tables given, and deploy what passes the gate.

    Args:
        feature_store: root of the feature store; empty: where HRNN_FEATURE_ROOT says.
        model_store: folder or address of the model store.
        checkpoints: folder where an interrupted training finds what it had done; empty: none.
        override: why the model is to be deployed even if the gate refuses it; recorded.
        run_id: name of the run in records; empty: the pipeline's own.
    """
    told = report_outcome(
        pipeline=NAME,
        run_id=run_id,
        job=JOB,
        job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        model_store=model_store,
        deploy=settings["deploy"],
    )
    resources(told, cpu="100m", memory="1Gi", timeout_seconds=TOLD_SECONDS)
    stores(told)
    with dsl.ExitHandler(told, name="run"):
        tables = ingest(**source, code=code, settings=settings["ingest"])
        data_digest = tables.outputs["Output"]
        checked = validate(
            tables=tables.outputs["tables"],
            data_digest=data_digest,
            code=code,
            settings=settings["validate"],
        )
        clean = checked.outputs["clean"]
        stored = features(
            clean=clean,
            feature_store=feature_store,
            code=code,
            trend=settings["trend"],
            settings=settings["features"],
        )
        older = warm_start(model_store=model_store, code=code, settings=settings["train"])
        # Locally steps run one at a time; without this the order of independent ones varies.
        older.after(stored)
        trained = train(
            clean=clean,
            data_digest=data_digest,
            code=code,
            trend=settings["trend"],
            settings=settings["train"],
            checkpoints=checkpoints,
            model_store=model_store,
            start=older.output,
        )
        bundle = trained.outputs["bundle"]
        measured = evaluate(
            clean=clean,
            bundle=bundle,
            model_store=model_store,
            code=code,
            settings=settings["evaluate"],
        )
        judged = gate(
            evaluation=measured.outputs["evaluation"],
            override=override,
            code=code,
            settings=settings["gate"],
        )
        with dsl.If(judged.outputs["Output"] == True, name="passed"):  # noqa: E712 - a KFP condition
            deployed = deploy(
                bundle=bundle,
                evaluation=measured.outputs["evaluation"],
                verdict=judged.outputs["verdict"],
                model_store=model_store,
                run_id=run_id,
                job=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                code=code,
                settings=settings["deploy"],
            )
    resources(tables, cpu="1", memory="4Gi")
    resources(checked, cpu="1", memory="4Gi", cached=True)
    resources(stored, cpu="1", memory="4Gi")
    resources(older, cpu="100m", memory="1Gi", timeout_seconds=600)
    resources(trained, cpu="4", memory="16Gi", timeout_seconds=24 * 3600, cached=True)
    gpu(trained)
    resources(measured, cpu="2", memory="8Gi")
    resources(judged, cpu="100m", memory="1Gi", timeout_seconds=600)
    resources(deployed, cpu="500m", memory="1Gi", timeout_seconds=RELEASE_SECONDS)
    for task in (tables, stored, older, trained, measured, deployed):
        stores(task)
    for task in (stored, trained, measured, deployed):
        retried(task)
