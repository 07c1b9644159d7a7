"""A feature store filled for tests and benchmarks of what reads it."""

import asyncio
import threading

from feature_repo import snapshot as snapshots
from feature_repo.histories import values_of
from feature_repo.names import CATALOGUE_ID, JOIN_KEY, TREND_SNAPSHOT, USER, USER_HISTORY
from feature_repo.online import protos, write_rows
from feature_repo.store import FeatureReader, apply
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


ONE_LOOP_AT_A_TIME = threading.Lock()


class CheckedReader(FeatureReader):
    """Reads users in every way there is, and sees that the answers are the same."""

    def users(self, user_ids):
        users = super().users(user_ids)
        for one, user_id in zip(users, user_ids, strict=True):
            assert _same(super().users([user_id]), [one])
        if self.asynchronous:
            session = self._session

            async def read():
                found = await self.read_users([*user_ids, *user_ids])
                rows = await session.redis.read(self._redis, user_ids)
                await self.close()
                return found, rows

            with ONE_LOOP_AT_A_TIME:
                found, rows = asyncio.run(read())
            assert _same(found, users + users)
            if any(isinstance(row, Exception) for row in rows):
                return users
            # Column by column, also those that `user` does not look at. NaN has no equal.
            expected = session.read(session.user, USER, user_ids)
            for row, other in zip(rows, expected, strict=True):
                other.pop(JOIN_KEY[USER], None)
                assert repr(sorted(row.items())) == repr(sorted(other.items()))
        return users


def _same(found, expected):
    """As equal as errors can be."""
    return len(found) == len(expected) and all(
        repr(a) == repr(b) if isinstance(a, Exception) else a == b
        for a, b in zip(found, expected, strict=True)
    )
