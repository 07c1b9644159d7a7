"""Rows in batches, so that no statement and no memory grows with a table."""

from collections.abc import Iterable, Iterator
from typing import Any

BATCH_ROWS = 500  # written to, or asked of, a store at a time


def batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
