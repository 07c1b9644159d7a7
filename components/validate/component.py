"""KFP wrapper of the validate step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(
    tables: dsl.Input[dsl.Dataset],
    data_digest: str,
    code: str,
    settings: dict[str, Any],
    clean: dsl.Output[dsl.Dataset],
    quarantine: dsl.Output[dsl.Dataset],
    data_report: dsl.Output[dsl.HTML],
) -> None:
    """Type, check and sort the tables; bad rows go to quarantine.

    `data_digest` is a part of the cache's key and nothing else.
    """
    from pathlib import Path

    from components.digests import check_code
    from components.validate import steps

    check_code(code)
    outputs = [Path(output.path) for output in (clean, quarantine, data_report)]
    report = steps.run(Path(tables.path), *outputs, settings=settings)
    clean.metadata["events"] = report["log"]["events"]
    quarantine.metadata["reasons"] = report["rows"]["interactions"]["reasons"]
