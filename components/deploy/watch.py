"""Watching a candidate that serves: test requests, and what Prometheus knows of its own pods."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from string import Template
from typing import Any, Self

import httpx
from pydantic import Field, field_validator, model_validator

from components.deploy.kserve import Served
from model.errors import HrnnError, InputError, UnavailableError
from model.settings import SettingsBase

REQUEST_SECONDS = 10.0
SEARCH_SECONDS = 0.1  # between test requests while none has met the candidate
WINDOW_SECONDS = 120.0  # that Prometheus looks back, at most
RELEASE_SECONDS = 7200  # of the step's pod: five waits of `ready_seconds` at most, and the watch
SPARE_SECONDS = 600  # of them for all else


def web_address(address: str) -> str:
    """The address, "" for none.

    Raises:
        ValueError: it is none that can be asked over HTTP.
    """
    if address and not re.match(r"https?://[^/?#]", address):
        raise ValueError("must be http://HOST… or https://HOST…")
    return address


class ReleaseSettings(SettingsBase):
    """How a candidate is tried; whether it is, says `deploy.service`."""

    traffic_percent: int = Field(10, ge=1, le=99)  # Knative mode: the canary's share
    ready_seconds: float = Field(900.0, gt=0.0)  # to become ready, and to follow the champion
    watch_seconds: float = Field(300.0, ge=0.0)  # with Prometheus, several of its scrapes
    poll_seconds: float = Field(5.0, gt=0.0)  # between two looks, with a test request each
    # Of the candidate's answers to test requests (a failure that names no version counts as its
    # own), and by Prometheus.
    max_error_rate: float = Field(0.01, ge=0.0, le=1.0)
    max_p99_seconds: float = Field(0.5, gt=0.0)
    prometheus: str = ""  # its address; empty: the test requests alone are judged
    # $labels: matchers of the candidate's own pods; $window: since the watch began, 120 s at most.
    error_query: str = (
        '(sum(rate(hrnn_requests_total{$labels, outcome=~"error|unavailable"}[$window]))'
        " or vector(0)) / sum(rate(hrnn_requests_total{$labels}[$window]))"
    )
    p99_query: str = (
        "histogram_quantile(0.99, sum by (le) "
        "(rate(hrnn_request_duration_seconds_bucket{$labels}[$window])))"
    )

    @model_validator(mode="after")
    def _ends_in_time(self) -> Self:
        longest = 5 * self.ready_seconds + self.watch_seconds
        if longest > RELEASE_SECONDS - SPARE_SECONDS:
            raise ValueError(
                f"5 x ready_seconds + watch_seconds is {longest:.0f} s; the step is stopped after "
                f"{RELEASE_SECONDS} s, {SPARE_SECONDS} of which it needs for the rest"
            )
        return self

    @field_validator("prometheus")
    @classmethod
    def _is_web_address(cls, address: str) -> str:
        return web_address(address)

    @field_validator("error_query", "p99_query")
    @classmethod
    def _about_the_candidate(cls, query: str) -> str:
        if "$labels" not in query:
            raise ValueError(
                "must select by {$labels}, which stands for the candidate's own pods: the "
                "champion's answers would hide its failures"
            )
        return query


class FailedError(HrnnError):
    """The candidate did something that it must not; says what."""


@dataclass
class _Trial:
    """Test requests so far."""

    seconds: list[float] = field(default_factory=list)  # of the candidate's answers
    failures: list[str] = field(default_factory=list)
    others: int = 0  # answers by another version

    @property
    def count(self) -> int:
        return len(self.seconds) + len(self.failures) + self.others


def watch(
    served: Served,
    version: str,
    client: httpx.Client,
    model_name: str,
    settings: ReleaseSettings,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Test requests for the time set, each with a look at Prometheus.

    The share of failures is that of the candidate alone: answers by another version count for
    nothing, and a failure, which names no version, counts as the candidate's.

    Raises:
        FailedError: it failed too often, was too slow, or was never met.
        UnavailableError: Prometheus does not answer, or at the end knows nothing of it.
        ConflictError: the candidate was taken away by somebody else.
    """
    address = served.url()
    trial = _Trial()
    began = clock()
    # A share of the traffic needs some requests until the candidate is met.
    patience = max(10, math.ceil(500 / settings.traffic_percent))
    while True:
        answer = ask(client, address, model_name)
        if isinstance(answer, str):
            trial.failures.append(answer)
        elif answer[0] == version:
            trial.seconds.append(answer[1])
        else:
            trial.others += 1
        elapsed = clock() - began
        late = elapsed > settings.watch_seconds
        met = bool(trial.seconds)
        _judge_requests(trial, settings)
        if late and not met and trial.count >= patience:
            raise FailedError(
                f"of {trial.count} test requests none was answered by it, "
                f"{len(trial.failures)} failed"
            )
        problem = served.problem()
        if settings.prometheus:
            labels = "" if problem else served.labels()
            _judge_metrics(client, labels, elapsed, late and met, settings)
        if late and met:
            if problem:
                raise FailedError(f"it is not ready any more ({problem})")
            break
        # Closer together until the candidate is met, never without a pause: it is a live service.
        sleep(settings.poll_seconds if met else min(SEARCH_SECONDS, settings.poll_seconds))
    print(
        f"{trial.count} test requests, {len(trial.seconds)} answered by {version}, "
        f"{len(trial.failures)} failed",
        flush=True,
    )


def _judge_requests(trial: _Trial, settings: ReleaseSettings) -> None:
    # One failed request of a few says nothing yet, unless nothing else was seen.
    own = len(trial.seconds) + len(trial.failures)
    rate = len(trial.failures) / max(1, own)
    if rate > settings.max_error_rate and (own >= 20 or len(trial.failures) >= 3):
        raise FailedError(
            f"{len(trial.failures)} of {own} test requests failed, the last with: "
            f"{trial.failures[-1]}"
        )
    if len(trial.seconds) >= 100:
        p99 = sorted(trial.seconds)[int(0.99 * (len(trial.seconds) - 1))]
        if p99 > settings.max_p99_seconds:
            raise FailedError(f"p99 of its answers to test requests is {p99:.3f} s")


def _judge_metrics(
    client: httpx.Client, labels: str, elapsed: float, last: bool, settings: ReleaseSettings
) -> None:
    """Figures that are not there yet are waited for, until the last look."""
    # Not longer ago than the watch: another candidate's pods may have had the same labels.
    window = f"{max(1, round(1000 * min(elapsed, WINDOW_SECONDS)))}ms"
    for name, query, limit in (
        ("error rate", settings.error_query, settings.max_error_rate),
        ("p99 latency", settings.p99_query, settings.max_p99_seconds),
    ):
        asked = Template(query).safe_substitute(labels=labels, window=window)
        value = _prometheus(client, settings.prometheus, asked) if labels else None
        if value is not None and value > limit:
            raise FailedError(f"its {name} is {value:.4g} by Prometheus, above {limit:g}")
        if value is None and last:
            raise UnavailableError(
                f"Prometheus at {settings.prometheus} knows no {name} of the candidate after "
                f"{elapsed:.0f} s (query: {asked}): a release that cannot be watched is not made. "
                "Are its pods scraped with these labels (k8s/monitoring/podmonitor.yaml), and is "
                "deploy.release.watch_seconds longer than two scrapes?"
            )


def http_client() -> httpx.Client:
    """For test requests, each on a connection of its own: a share of them meets the candidate."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(timeout=REQUEST_SECONDS, limits=limits)


def ask(client: httpx.Client, address: str, model_name: str) -> tuple[str, float] | str:
    """One test request as a new user: (model version, seconds), or what went wrong."""
    started = time.perf_counter()
    try:
        answer = client.post(
            f"{address}/v1/models/{model_name}:predict",
            json={"instances": [{"num_results": 5}]},
        )
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}"
        (prediction,) = answer.json()["predictions"]
        scores = [float(item["score"]) for item in prediction["items"]]
        version = prediction["model_version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    if prediction.get("degraded") and version is None:
        return f"degraded: {', '.join(prediction['degraded'])}"
    if not scores or not all(map(math.isfinite, scores)):
        return "no items, or scores that are not finite"
    return str(version), time.perf_counter() - started


def _prometheus(client: httpx.Client, address: str, query: str) -> float | None:
    """The query's value now; None without any (no requests yet, say)."""
    try:
        answer = client.get(f"{address.rstrip('/')}/api/v1/query", params={"query": query})
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
