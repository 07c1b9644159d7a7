"""The recurring pipeline between trainings: one step that counts and publishes the trend.

Schedule it as often as a period of the trend is long (hourly for news); models are not touched.
"""

from kfp import dsl

from components.refresh_trends.component import refresh_trends as count_and_publish
from pipelines.cluster import resources, stores


@dsl.pipeline(name="refresh-trends", description=__doc__.splitlines()[0])
def refresh_trends(
    interactions: str = "",
    feature_store: str = "",
    refresh_trends_settings: dict = {},  # noqa: B006 - KFP reads the default, nothing mutates it
) -> None:
    """Refresh the trend from the event log or from tables.

    Empty `interactions` and `feature_store` mean: where HRNN_EVENT_LOG and HRNN_FEATURE_ROOT say.
    """
    task = count_and_publish(
        interactions=interactions, feature_store=feature_store, settings=refresh_trends_settings
    )
    # A refresh that failed for a moment is worth another try before the next one is due.
    task.set_retry(num_retries=2, backoff_duration="30s")
    resources(task, cpu="1", memory="4Gi", timeout_seconds=1800)
    stores(task)
