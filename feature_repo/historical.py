"""Features as they were at past moments (Feast, point in time): what training may know."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from feature_repo.connection import open_existing, quiet, unavailable
from feature_repo.names import (
    CATALOGUE,
    CATALOGUE_ID,
    EVENT_TIMESTAMP,
    ITEM,
    JOIN_KEY,
    TRAINING,
    USER,
)
from feature_repo.settings import FeatureStoreSettings
from feature_repo.sources import pull
from model.errors import UnavailableError

if TYPE_CHECKING:
    import pandas as pd

_ROW = "row"  # Feast answers in an order of its own


def training_features(
    settings: FeatureStoreSettings, rows: Sequence[tuple[str, str, int]]
) -> "pd.DataFrame":
    """The service `training_v2` for (user id, item id, Unix seconds), in the order given.

    A moment sees what was known strictly before its period. Columns are `view__feature`; what was
    not known yet is null.

    Raises:
        UnavailableError: the store cannot be read, or lost a row.
    """
    import pandas as pd

    frame = pd.DataFrame(
        {
            _ROW: range(len(rows)),
            JOIN_KEY[USER]: [user for user, _, _ in rows],
            JOIN_KEY[ITEM]: [item for _, item, _ in rows],
            JOIN_KEY[CATALOGUE]: CATALOGUE_ID,
            EVENT_TIMESTAMP: [datetime.fromtimestamp(second, UTC) for _, _, second in rows],
        }
    )
    with unavailable("read the features of past moments"):
        pull(settings)
        store = open_existing(settings)
        with quiet():
            job = store.get_historical_features(
                frame, store.get_feature_service(TRAINING), full_feature_names=True
            )
            found = job.to_df()
        if len(found) != len(rows):
            raise UnavailableError(
                f"the offline store answered {len(found)} of {len(rows)} rows; its type must be"
                " duckdb, others lose rows"
            )
    found = found.sort_values(_ROW).reset_index(drop=True)
    return found[[name for name in found.columns if "__" in name]]
