"""The DAG: ingest → validate → features → train → evaluate → gate → deploy.

The same object runs on a laptop (`pipelines.local_runner`) and compiles for a cluster
(`pipelines.compile`).

Caching: validate and train take the outputs of an earlier run when the data (its digest, which
ingest returns), the settings and the code (its digest) are the same. Ingest always runs, since
reading a source is the only way to know whether it changed; features and deploy always run, since
they change stores; evaluate and gate always run, since the champion may be another.

Retries are for what has nothing to do with the input: a pod whose node went away, a store that
does not answer. Ingest and validate, where input is refused, have none.
"""

from kfp import dsl

from components.deploy.component import deploy
from components.digests import code_digest
from components.evaluate.component import evaluate
from components.features.component import features
from components.gate.component import gate
from components.ingest.component import ingest
from components.outcome.component import report_outcome
from components.train.component import train
from components.validate.component import validate
from pipelines.cluster import configured, gpu, resources, retried, stores

NAME = "train-and-deploy"
JOB = dsl.PIPELINE_JOB_NAME_PLACEHOLDER


@dsl.pipeline(name=NAME, description=__doc__.splitlines()[0])
def train_and_deploy(
    dataset: str = "movielens-100k",
    interactions: str = "",
    users: str = "",
    items: str = "",
    cache: str = "",
    feature_store: str = "",
    model_store: str = "/stores/models",
    checkpoints: str = "/stores/checkpoints",
    override: str = "",
    run_id: str = "",
    code: str = code_digest(),
    source_digest: str = "",
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

    Args:
        dataset: a named dataset, when no interactions are given.
        interactions: table of who did what when: a file, an address, or an event log.
        users: table of user fields.
        items: table of item fields.
        cache: folder for downloads.
        feature_store: root of the feature store; empty: where HRNN_FEATURE_ROOT says.
        model_store: folder or address of the model store.
        checkpoints: folder where an interrupted training finds what it had done; empty: none.
        override: why the model is to be deployed even if the gate refuses it; recorded.
        run_id: name of the run in records; empty: the pipeline's own.
        code: digest of the steps' code, part of the cache's key.
        source_digest: digest of the source, part of the key of ingest where that is cached.
        ingest_settings: how columns are read. `hrnn settings` prints the keys of every section.
        validate_settings: which rows are refused, and how many may be.
        features_settings: how features are counted and stored.
        trend_settings: period and window of the trend; left out: chosen on the log.
        train_settings: network, schedule, split.
        evaluate_settings: cut-offs, intervals, frames of time.
        gate_settings: the rules.
        deploy_settings: how many bundles stay; the service and its canary.
    """
    told = report_outcome(pipeline=NAME, run_id=run_id, job=JOB)
    resources(told, cpu="100m", memory="256Mi", timeout_seconds=300)
    configured(told)
    with dsl.ExitHandler(told, name="run"):
        tables = ingest(
            dataset=dataset,
            interactions=interactions,
            users=users,
            items=items,
            cache=cache,
            code=code,
            source_digest=source_digest,
            settings=ingest_settings,
        )
        data_digest = tables.outputs["Output"]
        checked = validate(
            tables=tables.outputs["tables"],
            data_digest=data_digest,
            code=code,
            settings=validate_settings,
        )
        clean = checked.outputs["clean"]
        stored = features(
            clean=clean,
            feature_store=feature_store,
            trend=trend_settings,
            settings=features_settings,
        )
        trained = train(
            clean=clean,
            data_digest=data_digest,
            code=code,
            trend=trend_settings,
            settings=train_settings,
            checkpoints=checkpoints,
            model_store=model_store,
        )
        # Locally steps run one at a time; without this the order of independent ones varies.
        trained.after(stored)
        bundle = trained.outputs["bundle"]
        measured = evaluate(
            clean=clean, bundle=bundle, model_store=model_store, settings=evaluate_settings
        )
        judged = gate(
            evaluation=measured.outputs["evaluation"], override=override, settings=gate_settings
        )
        with dsl.If(judged.outputs["Output"] == True, name="passed"):  # noqa: E712 - a KFP condition
            deployed = deploy(
                bundle=bundle,
                evaluation=measured.outputs["evaluation"],
                verdict=judged.outputs["verdict"],
                model_store=model_store,
                run_id=run_id,
                job=JOB,
                settings=deploy_settings,
            )
    resources(tables, cpu="1", memory="4Gi")
    resources(checked, cpu="1", memory="4Gi", cached=True)
    resources(stored, cpu="1", memory="4Gi")
    resources(trained, cpu="4", memory="16Gi", timeout_seconds=24 * 3600, cached=True)
    gpu(trained)
    resources(measured, cpu="2", memory="8Gi")
    resources(judged, cpu="100m", memory="1Gi", timeout_seconds=600)
    resources(deployed, cpu="500m", memory="1Gi", timeout_seconds=3600)
    for task in (tables, stored, trained, measured, deployed):
        stores(task)
    for task in (stored, trained, measured, deployed):
        retried(task)
