"""A feature store filled for tests and benchmarks of what reads it."""

from feature_repo import snapshot as snapshots
from feature_repo.histories import values_of
from feature_repo.names import CATALOGUE_ID, TREND_SNAPSHOT, USER_HISTORY
from feature_repo.online import protos, write_rows
from feature_repo.store import apply
from model.schema import Schema


def fill(settings, histories, trend, schema=None):
    """Register the features and write histories (events by user) and the trend snapshot."""
    store = apply(settings, schema or Schema())
    rows = (
        (user, protos(values_of(events)), events[-1].timestamp + 1)
        for user, events in histories.items()
    )
    write_rows(store, USER_HISTORY, rows)
    row = protos(snapshots.to_row(trend))
    write_rows(store, TREND_SNAPSHOT, [(CATALOGUE_ID, row, trend.as_of)])
