"""Recommendations for everybody at once, for mails and offline lists: ingest → validate → batch.

The same tables, checks and model as in real time; no server is needed.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.batch_recommend.component import batch_recommend as recommend
from components.ingest.component import ingest
from components.validate.component import validate
from pipelines.cluster import resources, retried, stores
from pipelines.parameters import takes
from pipelines.settings import BATCH


@dsl.pipeline(name="batch-recommend", description=__doc__.splitlines()[0])
@takes(BATCH)
def batch_recommend(
    output: str,
    source: Mapping[str, Any],
    code: Any,
    settings: Mapping[str, Any],
    model_store: str = "/stores/models",
    version: str = "",
    user_list: str = "",
    run_id: str = "",
) -> None:
    """Recommend to all users of a log, or to a list of them.

    Args:
        output: folder or address below which every batch gets a folder of its own; latest.json
            there names the newest.
        model_store: folder or address of the model store.
        version: of the model; empty: the champion.
        user_list: text file with one id a line, or Parquet with user_id; empty: everybody.
        run_id: name of the batch; empty: the pipeline's own.
    """
    tables = ingest(**source, code=code, settings=settings["ingest"])
    checked = validate(
        tables=tables.outputs["tables"],
        data_digest=tables.outputs["Output"],
        code=code,
        settings=settings["validate"],
    )
    done = recommend(
        clean=checked.outputs["clean"],
        model_store=model_store,
        version=version,
        users=user_list,
        output=output,
        run_id=run_id,
        job=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        code=code,
        settings=settings["batch_recommend"],
    )
    resources(tables, cpu="1", memory="4Gi")
    resources(checked, cpu="1", memory="4Gi", cached=True)
    resources(done, cpu="4", memory="4Gi", timeout_seconds=24 * 3600)
    stores(tables)
    stores(done)
    retried(done)
