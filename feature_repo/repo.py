"""For Feast's own command line: `HRNN_FEATURE_ROOT=… feast -c feature_repo apply`.

Feast registers every definition it finds in this module.
"""

from feature_repo.definitions import build
from feature_repo.settings import FeatureStoreSettings
from model.schema import Schema

_settings = FeatureStoreSettings.from_env()
_definitions = build(Schema.load(_settings.sources / "schema.json"), _settings.sources)

user, item, catalogue = _definitions.entities
user_profile = _definitions.views["user_profile"]
user_history = _definitions.views["user_history"]
item_metadata = _definitions.views["item_metadata"]
item_popularity = _definitions.views["item_popularity"]
catalogue_popularity = _definitions.views["catalogue_popularity"]
trend_snapshot = _definitions.views["trend_snapshot"]
serving_user_v1, serving_trend_v1, training_v1 = _definitions.services
