"""New and changed items, served from their metadata until the next training run has them.

The predictor asks the collector (`GET /items?after=`) what was written since the last time, and
builds its model anew with it: no training, the item's fields say where it stands.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import orjson

from model.errors import UnavailableError
from model.query import FieldValue
from serving import metrics

log = logging.getLogger("hrnn.serving")

PAGE = 1000  # items of one answer
MAX_PAGE_BYTES = 64 * 2**20

Fields = Mapping[str, FieldValue]
Select = Callable[[Mapping[str, Fields]], tuple[Mapping[str, Fields], int]]


class ItemFeed:
    """What the event log says of items that a model has not, or otherwise; for one thread."""

    def __init__(self, url: str, deadline: float, max_items: int) -> None:
        """
        Args:
            url: of the collector, http://HOST:PORT.
            deadline: seconds for one look.
            max_items: kept; further ones are left out until a training run has taken some over.
        """
        self._http = httpx.Client(base_url=url.rstrip("/"), timeout=deadline, trust_env=False)
        self._deadline = deadline
        self._max_items = max_items
        self._log_id = ""
        self.items: dict[str, Fields] = {}  # by id, with the fields that the model reads
        self.changed = False  # since a model was built with them; the builder sets it back
        self._begin()

    def _begin(self) -> None:
        self._after = 0
        self._left_out: set[str] = set()

    def rebase(self, select: Select) -> None:
        """Begin again for another model; what is known stays until it is read anew."""
        self.items = dict(select(self.items)[0])
        self.changed = bool(self.items)
        self._begin()

    def revision(self) -> str:
        """A short name of `items`: the same wherever they are the same."""
        text = orjson.dumps(self.items, option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(text, digest_size=6).hexdigest()

    def poll(self, select: Select) -> None:
        """Read what was written since the last time.

        What cannot be read within the deadline is read by the next call.

        Args:
            select: model.recommender.Recommender.readable of the model.

        Raises:
            UnavailableError: the collector cannot be reached or talks nonsense; what was read
                before is kept.
        """
        end = time.monotonic() + self._deadline
        while time.monotonic() < end:
            page = self._page(end)
            if page["log_id"] != self._log_id or page["seq"] < self._after:
                # Another log, or an older state of it: what it lacks is gone.
                self.changed = self.changed or bool(self.items)
                self.items.clear()
                self._log_id = page["log_id"]
                self._begin()
                continue
            given = {item["item_id"]: item["fields"] for item in page["items"]}
            found, unfit = select(given)
            metrics.LIVE_ITEM_VALUES_UNFIT.inc(unfit)
            for item in given:
                if item in found:
                    self._take(item, found[item])
                elif self.items.pop(item, None) is not None:  # the model has it as it is
                    self.changed = True
            if given:
                self._after = page["items"][-1]["seq"]
            if len(given) < PAGE:
                metrics.ITEM_FEED_READ.set_to_current_time()
                break
        metrics.LIVE_ITEMS_LEFT_OUT.set(len(self._left_out))

    def close(self) -> None:
        self._http.close()

    def _take(self, item: str, fields: Fields) -> None:
        if item in self.items or len(self.items) < self._max_items:
            self.changed = self.changed or self.items.get(item) != fields
            self.items[item] = fields
            return
        if not self._left_out:
            log.error(
                "more than %d new items (HRNN_MAX_LIVE_ITEMS): further ones wait for a training"
                " run",
                self._max_items,
            )
        if len(self._left_out) < self._max_items:
            self._left_out.add(item)

    def _page(self, end: float) -> dict[str, Any]:
        """The next items; `end` in monotonic seconds."""
        query = {"after": self._after, "limit": PAGE}
        body = bytearray()
        try:
            with self._http.stream(
                "GET", "/items", params=query, timeout=max(0.001, end - time.monotonic())
            ) as answer:
                if answer.status_code != 200:
                    raise UnavailableError(f"HTTP {answer.status_code}")
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > MAX_PAGE_BYTES:
                        raise UnavailableError("an answer without end")
                    if time.monotonic() > end:  # a trickle does not run into the time-out
                        raise UnavailableError("too slow")
        except httpx.HTTPError as error:
            raise UnavailableError(type(error).__name__) from None
        return _checked(bytes(body), self._after)


def _checked(body: bytes, after: int) -> dict[str, Any]:
    """A page, if it is one.

    Raises:
        UnavailableError: it is not what a collector answers.
    """
    try:
        page: dict[str, Any] = orjson.loads(body)
        good = isinstance(page["log_id"], str) and isinstance(page["seq"], int)
        last = after
        for item in page["items"]:
            good = good and isinstance(item["item_id"], str) and item["item_id"] != ""
            good = good and isinstance(item["fields"], dict) and item["seq"] > last
            last = item["seq"]
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise UnavailableError("not an answer of a collector")
    return page
