"""What Feast's own command line reads: `feast -c feature_repo apply` (also plan, ui, …).

It applies the schema and options of the last `feature_repo.store.apply`, kept under
HRNN_FEATURE_ROOT, so that an edited definition can be registered without a pipeline run.
"""

from feature_repo.definitions import build
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import applied

_settings = FeatureStoreSettings.from_env()
_definitions = build(_settings.sources, *applied(_settings))

# Feast collects module attributes.
user, item, catalogue = _definitions.entities.values()
(
    user_profile,
    user_history,
    item_metadata,
    item_popularity,
    catalogue_popularity,
    trend_snapshot,
    user_live,
    live_checkpoint,
) = _definitions.views.values()
(item_trend,) = _definitions.on_demand.values()
(
    serving_user_v2,
    serving_user_v1,
    serving_trend_v1,
    training_v2,
) = _definitions.services.values()
