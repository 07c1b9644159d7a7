"""KFP wrapper of the step that says which model training begins with."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def warm_start(model_store: str, code: str, settings: dict[str, Any]) -> str:
    """Name the version that training begins with; empty: it starts at random."""
    from components.digests import check_code
    from components.retries import patiently
    from components.warm_start import steps

    check_code(code)
    wanted = settings.get("warm_start", steps.NONE)
    version = patiently(lambda: steps.resolve(wanted, model_store), retries=3, wait_seconds=5)
    print(steps.told(wanted, version), flush=True)
    return version
