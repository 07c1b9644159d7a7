"""Release: a published candidate is tried beside the champion, watched, and only then promoted."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import Field

from components.deploy.kserve import Canary
from model.errors import HrnnError, InputError, UnavailableError
from model.settings import SettingsBase
from model.store import Champion, ModelStore

REQUEST_SECONDS = 10.0


class ReleaseSettings(SettingsBase):
    """How a candidate is tried; whether it is, says `deploy.service`."""

    traffic_percent: int = Field(10, ge=1, le=99)  # Knative mode: the canary's share
    ready_seconds: float = Field(900.0, gt=0.0)  # to become ready, and to follow the champion
    watch_seconds: float = Field(300.0, ge=0.0)
    poll_seconds: float = Field(5.0, gt=0.0)  # between two looks, with a test request each
    max_error_rate: float = Field(0.01, ge=0.0, le=1.0)  # of test requests, and by Prometheus
    max_p99_seconds: float = Field(0.5, gt=0.0)
    prometheus: str = ""  # its address; empty: the test requests alone are judged
    error_query: str = (
        'sum(rate(hrnn_requests_total{role="transformer", outcome=~"error|unavailable"}[2m]))'
        ' / sum(rate(hrnn_requests_total{role="transformer"}[2m]))'
    )
    p99_query: str = (
        "histogram_quantile(0.99, sum by (le) "
        '(rate(hrnn_request_duration_seconds_bucket{role="transformer"}[2m])))'
    )


class RolledBackError(HrnnError):
    """The candidate failed its trial; the champion goes on serving."""


@dataclass
class _Trial:
    """Test requests so far."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    candidate: int = 0  # answers by the candidate

    @property
    def count(self) -> int:
        return len(self.seconds) + len(self.failures)


def release(
    store: ModelStore,
    version: str,
    *,
    replaces: str | None,
    canary: Canary | None,
    service: Callable[[], str],
    model_dir: str,
    settings: ReleaseSettings,
    model_name: str = "hrnn-meta",
    sleep: Callable[[float], None] = time.sleep,
) -> Champion:
    """Begin the canary, wait until it is ready, ask it, watch it, promote, see the service follow.

    Whatever fails, the canary is ended; after the promotion, the champion of before is put back.

    Args:
        replaces: the champion that the candidate was compared with.
        canary: None: no trial beside the champion; the service is watched after the promotion.
        service: address of the stable service, asked once it is needed.
        model_dir: address of the candidate's bundle.

    Raises:
        RolledBackError: says what was not as it should be.
        ConflictError: another run deployed meanwhile.
        UnavailableError: the cluster, the store or Prometheus does not answer.
    """
    if canary is not None:
        try:
            canary.begin(model_dir)
            print(f"canary of {version} begun", flush=True)
            _until(canary.problem, settings, sleep, "the canary did not become ready")
            _try(canary.url(), version, model_name, settings, sleep)
        finally:
            canary.end()
    before = store.champion()
    champion = store.promote(version, replaces=replaces, reason="deploy")
    try:
        address = service()

        def follows() -> str:
            answer = _ask(address, model_name)
            served = answer if isinstance(answer, str) else answer[0]
            return "" if served == version else f"it answers: {served}"

        _until(follows, settings, sleep, "the service did not take the new champion")
        if canary is None:
            _try(address, version, model_name, settings, sleep)
    except HrnnError:
        if before is not None and champion.version != before.version:
            store.promote(before.version, replaces=version, reason="rollback")
            print(f"champion is {before.version} again", flush=True)
        raise
    return champion


def _until(
    problem: Callable[[], str],
    settings: ReleaseSettings,
    sleep: Callable[[float], None],
    failure: str,
) -> None:
    deadline = time.monotonic() + settings.ready_seconds
    while reason := problem():
        if time.monotonic() > deadline:
            raise RolledBackError(
                f"{failure} within {settings.ready_seconds:.0f} s ({reason}); rolled back"
            )
        sleep(settings.poll_seconds)


SEARCH_SECONDS = 0.1  # between test requests while none has met the candidate


def _try(
    address: str,
    version: str,
    model_name: str,
    settings: ReleaseSettings,
    sleep: Callable[[float], None],
) -> None:
    """Test requests for the time set, and Prometheus' view of the service."""
    trial = _Trial()
    deadline = time.monotonic() + settings.watch_seconds
    # A share of the traffic needs some requests until the candidate is met.
    patience = max(10, math.ceil(500 / settings.traffic_percent))
    while True:
        answer = _ask(address, model_name)
        if isinstance(answer, str):
            trial.failures.append(answer)
        else:
            trial.seconds.append(answer[1])
            trial.candidate += answer[0] == version
        _judge(trial, settings)
        late = time.monotonic() > deadline
        if late and trial.candidate:
            break
        if trial.candidate == 0 and trial.count >= patience and late:
            raise RolledBackError(
                f"of {trial.count} test requests none was answered by {version}; rolled back"
            )
        # Closer together until the candidate is met, never without a pause: it is a live service.
        sleep(
            settings.poll_seconds if trial.candidate else min(SEARCH_SECONDS, settings.poll_seconds)
        )
    print(
        f"{trial.count} test requests, {trial.candidate} answered by {version}, "
        f"{len(trial.failures)} failed",
        flush=True,
    )


def _judge(trial: _Trial, settings: ReleaseSettings) -> None:
    # One failed request of a few says nothing yet, unless nothing else was seen.
    rate = len(trial.failures) / trial.count
    if rate > settings.max_error_rate and (trial.count >= 20 or len(trial.failures) >= 3):
        raise RolledBackError(
            f"{len(trial.failures)} of {trial.count} test requests failed, the last with: "
            f"{trial.failures[-1]}; rolled back"
        )
    if trial.count >= 100:
        p99 = sorted(trial.seconds)[int(0.99 * (len(trial.seconds) - 1))]
        if p99 > settings.max_p99_seconds:
            raise RolledBackError(f"p99 of the test requests is {p99:.3f} s; rolled back")
    if not settings.prometheus:
        return
    for name, query, limit in (
        ("error rate", settings.error_query, settings.max_error_rate),
        ("p99 latency", settings.p99_query, settings.max_p99_seconds),
    ):
        value = _prometheus(settings.prometheus, query)
        if value is not None and value > limit:
            raise RolledBackError(f"{name} is {value:.4g}, above {limit:g}; rolled back")


def _ask(address: str, model_name: str) -> tuple[str, float] | str:
    """One test request as a new user: (model version, seconds), or what went wrong."""
    started = time.perf_counter()
    try:
        answer = httpx.post(
            f"{address}/v1/models/{model_name}:predict",
            json={"instances": [{"num_results": 5}]},
            timeout=REQUEST_SECONDS,
        )
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}"
        (prediction,) = answer.json()["predictions"]
        scores = [float(item["score"]) for item in prediction["items"]]
        version = prediction["model_version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if prediction.get("degraded") and version is None:
        return f"degraded: {', '.join(prediction['degraded'])}"
    if not scores or not all(map(math.isfinite, scores)):
        return "no items, or scores that are not finite"
    return str(version), time.perf_counter() - started


def _prometheus(address: str, query: str) -> float | None:
    """The query's value now; None without any (no requests yet, say)."""
    try:
        answer = httpx.get(
            f"{address.rstrip('/')}/api/v1/query", params={"query": query}, timeout=REQUEST_SECONDS
        )
        body: Any = answer.json()
        if answer.status_code != 200 or body["status"] != "success":
            raise InputError(f"Prometheus refused {query!r}: {body.get('error')}")
        result = body["data"]["result"]
        value = float(result[0]["value"][1]) if result else math.nan
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UnavailableError(
            f"Prometheus at {address} cannot be asked ({type(error).__name__}); a release that "
            "cannot be watched is not made"
        ) from None
    return None if math.isnan(value) else value
