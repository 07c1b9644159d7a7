"""KFP wrapper of the ingest step."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(
    dataset: str,
    interactions: str,
    users: str,
    items: str,
    cache: str,
    settings: dict,
    tables: dsl.Output[dsl.Dataset],
) -> None:
    """Bring a named dataset or the user's files into canonical tables."""
    from pathlib import Path

    from components.ingest import steps

    files = {"interactions": interactions, "users": users, "items": items}
    place = Path(cache) if cache else None
    source = steps.run(Path(tables.path), dataset=dataset, cache=place, settings=settings, **files)
    tables.metadata["name"] = source["name"]
