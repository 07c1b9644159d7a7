"""KFP wrapper of the ingest step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(
    dataset: str,
    interactions: str,
    users: str,
    items: str,
    cache: str,
    code: str,
    source_digest: str,
    settings: dict[str, Any],
    tables: dsl.Output[dsl.Dataset],
) -> str:
    """Bring a named dataset or the user's files into canonical tables; returns their digest.

    `source_digest` is a part of the cache's key and nothing else.
    """
    from pathlib import Path

    from components.digests import check_code, tables_digest
    from components.ingest import steps

    check_code(code)
    files = {"interactions": interactions, "users": users, "items": items}
    place = Path(cache) if cache else None
    source = steps.run(Path(tables.path), dataset=dataset, cache=place, settings=settings, **files)
    tables.metadata["name"] = source["name"]
    return tables_digest(Path(tables.path))
