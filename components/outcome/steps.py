"""Outcome: what became of a run, said once at its end, whatever happened."""

import json
from pathlib import Path
from typing import Any

import httpx

from model.errors import InputError, UnavailableError

SECONDS = 10.0


def run(
    outcome: Path, *, pipeline: str, run_id: str, state: str, step: str, error: str, notify: str
) -> dict[str, Any]:
    """Write the outcome as JSON and, if asked, post it.

    Args:
        state: SUCCEEDED, FAILED or CANCELLED. Refused by the gate is a success: the pipeline did
            its work; the verdict says which it was.
        step: what failed.
        notify: address that gets the outcome as JSON with a `text`, as chat web hooks want it;
            empty: nobody is told.

    Raises:
        UnavailableError: the address did not take it.
    """
    succeeded = state == "SUCCEEDED"
    text = f"{pipeline} {run_id}: {state.lower()}"
    if not succeeded:
        text += f" at {step}: {error}" if error else f" at {step}"
    record = {
        "pipeline": pipeline,
        "run_id": run_id,
        "state": state,
        "step": "" if succeeded else step,
        "error": "" if succeeded else error,
        "text": text,
    }
    outcome.parent.mkdir(parents=True, exist_ok=True)
    outcome.write_text(json.dumps(record, indent=1) + "\n")
    print(text)
    if notify:
        _post(notify, record)
    return record


def _post(address: str, record: dict[str, Any]) -> None:
    if not address.startswith(("http://", "https://")):
        raise InputError("HRNN_NOTIFY_URL: expected an http(s) address")
    try:
        httpx.post(address, json=record, timeout=SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        # The address may hold a token: it is not printed.
        reason = type(error).__name__
        if isinstance(error, httpx.HTTPStatusError):
            reason = f"HTTP {error.response.status_code}"
        raise UnavailableError(f"nobody could be told of the outcome: {reason}") from None
