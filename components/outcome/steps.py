"""Outcome: what became of a run, said once at its end, whatever happened."""

import json
from pathlib import Path
from typing import Any

import httpx

SECONDS = 10.0  # for each of: connecting, sending, waiting for the answer


def run(
    outcome: Path, *, pipeline: str, run_id: str, state: str, step: str, error: str, notify: str
) -> dict[str, Any]:
    """Write the outcome as JSON, print it and, if asked, post it.

    An address that does not take it is no failure of the run: that is a line of its own, and
    `warning` of the record.

    Args:
        state: SUCCEEDED, FAILED or CANCELLED. Refused by the gate is a success: the pipeline did
            its work; the verdict says which it was.
        step: what failed.
        notify: address that gets the outcome as JSON with a `text`, as chat web hooks want it;
            empty: nobody is told.
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
    print(text, flush=True)
    if notify and (reason := _post(notify, record)):
        warning = f"HRNN_NOTIFY_URL was not told of this outcome: {reason}"
        print(f"warning: {warning}", flush=True)
        record |= {"warning": warning}
        outcome.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _post(address: str, record: dict[str, Any]) -> str:
    """Why the address did not take the record, without the address: it may hold a token."""
    if not address.startswith(("http://", "https://")):
        return "it is no http(s) address"
    try:
        # The answer's body is of no interest, and need not end.
        with httpx.stream("POST", address, json=record, timeout=SECONDS) as answer:
            return "" if answer.is_success else f"HTTP {answer.status_code}"
    except httpx.TimeoutException:
        return f"no answer within {SECONDS:g} s"
    except httpx.ConnectError:
        return "no connection"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return type(error).__name__
