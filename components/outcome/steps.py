"""Outcome: what became of a run, said once at its end, whatever happened.

A run that did not succeed may have been stopped in the middle of a release: what is left of that
is settled here first, as there may be no other run for days.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from model.errors import HrnnError

if TYPE_CHECKING:
    from components.deploy.settle import Settled

SECONDS = 10.0  # for each of: connecting, sending, waiting for the answer
SETTLE_SECONDS = 600.0  # for a canary to be gone
TOLD_SECONDS = 1200  # of the step's pod, with the above


def run(
    outcome: Path,
    *,
    pipeline: str,
    run_id: str,
    state: str,
    step: str,
    error: str,
    notify: str,
    settle: Callable[[], "Settled"] | None = None,
) -> dict[str, Any]:
    """Write the outcome as JSON, print it and, if asked, post it.

    An address that does not take it is no failure of the run: that is a line of its own, and
    `warning` of the record. So is what cannot be settled.

    Args:
        state: SUCCEEDED, FAILED or CANCELLED. Refused by the gate is a success: the pipeline did
            its work; the verdict says which it was.
        step: what failed.
        notify: address that gets the outcome as JSON with a `text`, as chat web hooks want it;
            empty: nobody is told.
        settle: takes back what a run that did not succeed left half done; None: nothing can be.
    """
    succeeded = state == "SUCCEEDED"
    text = f"{pipeline} {run_id}: {state.lower()}"
    if not succeeded:
        text += f" at {step}: {error}" if error else f" at {step}"
    record: dict[str, Any] = {
        "pipeline": pipeline,
        "run_id": run_id,
        "state": state,
        "step": "" if succeeded else step,
        "error": "" if succeeded else error,
        "text": text,
    }
    print(text, flush=True)
    outcome.parent.mkdir(parents=True, exist_ok=True)
    outcome.write_text(json.dumps(record, indent=1) + "\n")
    warnings: list[str] = []
    if not succeeded and settle is not None:
        settled, warnings = _settled(settle)
        for line in settled:
            print(f"settled: {line}", flush=True)
        record["text"] = "; ".join([text, *settled, *warnings])
        record |= {"settled": settled}
    if notify and (reason := _post(notify, record)):
        warnings.append(f"HRNN_NOTIFY_URL was not told of this outcome: {reason}")
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    if warnings:
        record |= {"warning": "; ".join(warnings)}
    outcome.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _settled(settle: Callable[[], "Settled"]) -> tuple[list[str], list[str]]:
    """What was settled, and what could not be: nothing of that may keep the outcome from being
    told."""
    try:
        settled = settle()
    except Exception as error:
        kind = "" if isinstance(error, HrnnError) else f"{type(error).__name__}: "
        return [], [f"what the run left could not be settled: {kind}{error}"]
    return settled.done, [f"not settled: {problem}" for problem in settled.problems]


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
