"""Recommendations for everybody at once, for mails and offline lists: ingest → validate → batch.

The same tables, checks and model as in real time; no server is needed.
"""

from kfp import dsl

from components.batch_recommend.component import batch_recommend as recommend
from components.digests import code_digest
from components.ingest.component import ingest
from components.validate.component import validate
from pipelines.cluster import resources, retried, stores


@dsl.pipeline(name="batch-recommend", description=__doc__.splitlines()[0])
def batch_recommend(
    output: str,
    dataset: str = "",
    interactions: str = "",
    users: str = "",
    items: str = "",
    cache: str = "",
    model_store: str = "/stores/models",
    version: str = "",
    user_list: str = "",
    code: str = code_digest(),
    source_digest: str = "",
    ingest_settings: dict = {},  # noqa: B006 - KFP reads the default, nothing mutates it
    validate_settings: dict = {},  # noqa: B006
    batch_recommend_settings: dict = {},  # noqa: B006
) -> None:
    """Recommend to all users of a log, or to a list of them.

    Args:
        output: folder or address that gets the Parquet files; a run that was stopped goes on there.
        version: of the model; empty: the champion.
        user_list: text file with one id a line, or Parquet with user_id; empty: everybody.
    """
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
    checked = validate(
        tables=tables.outputs["tables"],
        data_digest=tables.outputs["Output"],
        code=code,
        settings=validate_settings,
    )
    done = recommend(
        clean=checked.outputs["clean"],
        model_store=model_store,
        version=version,
        users=user_list,
        output=output,
        settings=batch_recommend_settings,
    )
    resources(tables, cpu="1", memory="4Gi")
    resources(checked, cpu="1", memory="4Gi", cached=True)
    resources(done, cpu="4", memory="4Gi", timeout_seconds=24 * 3600)
    stores(tables)
    stores(done)
    retried(done)
