"""The recurring pipeline between trainings: one step that counts and publishes the trend.

Schedule it as often as a period of the trend is long (hourly for news); models are not touched.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.refresh_trends.component import refresh_trends as count_and_publish
from pipelines.cluster import resources, retried, stores
from pipelines.parameters import takes
from pipelines.settings import REFRESH


@dsl.pipeline(name="refresh-trends", description=__doc__.splitlines()[0])
@takes(REFRESH)
def refresh_trends(
    code: Any,
    settings: Mapping[str, Any],
    interactions: str = "",
    feature_store: str = "",
) -> None:
    """Refresh the trend from the event log or from tables.

    Args:
        interactions: the log to count; empty: the one in HRNN_EVENT_LOG.
        feature_store: root of the feature store; empty: where HRNN_FEATURE_ROOT says.
    """
    task = count_and_publish(
        interactions=interactions,
        feature_store=feature_store,
        code=code,
        settings=settings["refresh_trends"],
    )
    resources(task, cpu="1", memory="4Gi", timeout_seconds=1800)
    stores(task)
    # A refresh that failed for a moment is worth another try before the next one is due.
    retried(task, wait_seconds=30)
