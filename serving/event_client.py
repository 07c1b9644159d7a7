"""A typed client of the event collector."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote
from uuid import uuid4

import httpx

from model.errors import InputError, UnavailableError
from model.query import FieldValue


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of events. `refused` has an explanation for each one that was."""

    stored: int
    duplicates: int
    refused: tuple[str, ...]
    visible: bool  # the next recommendation sees them; false: it will soon


class EventClient:
    """Sends to a running collector; a context manager, safe to share between threads."""

    def __init__(self, url: str = "http://127.0.0.1:8100", timeout: float = 10.0) -> None:
        """
        Args:
            timeout: seconds for one call.
        """
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=self._url, timeout=timeout, trust_env=False)

    def send(self, events: Sequence[Mapping[str, Any]]) -> Sent:
        """Store events (as in docs/serving.md); durable when this returns.

        Events without an `event_id` get one here, so that they count once if you call again
        with what this raised for.

        Raises:
            InputError: all of them were refused; the message says why.
            UnavailableError: the collector could not be reached or cannot write now.
        """
        body = [e if e.get("event_id") else {**e, "event_id": uuid4().hex} for e in events]
        answer = self._call("POST", "/events", {"events": body})
        refused = [e.get("error") or e["status"] for e in answer["events"] if "reason" in e]
        return Sent(answer["stored"], answer["duplicates"], tuple(refused), answer["visible"])

    def put_user(self, user_id: str, fields: Mapping[str, FieldValue]) -> None:
        """Set all fields of a user."""
        self._call("PUT", f"/users/{quote(user_id, safe='')}", {"fields": dict(fields)})

    def put_item(
        self, item_id: str, fields: Mapping[str, FieldValue], created_at: float | None = None
    ) -> None:
        """Set all fields of an item; it need not have been seen before.

        Args:
            created_at: Unix seconds.
        """
        body = {"fields": dict(fields), "created_at": created_at}
        self._call("PUT", f"/items/{quote(item_id, safe='')}", body)

    def delete_user(self, user_id: str) -> int:
        """Remove a user's data; returns the number of events removed."""
        return int(self._call("DELETE", f"/users/{quote(user_id, safe='')}")["events"])

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            content = None if body is None else json.dumps(body, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise InputError(f"the request cannot be sent as JSON: {error}") from None
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            response = self._http.request(method, path, content=content, headers=headers)
            answer = response.json()
        except httpx.TimeoutException:
            raise UnavailableError(
                f"{self._url} did not answer within {self._http.timeout.read} s"
            ) from None
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"no event collector at {self._url} ({error}): start one with `hrnn serve`"
            ) from None
        except ValueError:
            raise UnavailableError(
                f"{self._url} is not an event collector: no JSON answer"
            ) from None
        status = response.status_code
        if status == 200 and isinstance(answer, dict):
            return answer
        reason = _reason(answer)
        if 400 <= status < 500 and status not in (408, 429):
            raise InputError(f"the collector refused the request: {reason}")
        raise UnavailableError(f"the collector could not answer (HTTP {status}): {reason}")


def _reason(answer: Any) -> str:
    if not isinstance(answer, dict):
        return "no reason given"
    if "error" in answer:
        return str(answer["error"])
    return "; ".join(str(e.get("error")) for e in answer.get("events", [])[:5])
