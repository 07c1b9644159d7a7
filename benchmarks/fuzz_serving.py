"""Wrong requests at both real processes, over V1, V2 and gRPC, for as long as you like.

    python -m benchmarks.fuzz_serving --seconds 600

Ends with an error at the first answer that is no answer and no refusal, shows the request that did
it (made small), and checks that both processes are alive and how much they have grown.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import grpc
import httpx
import psutil
from hypothesis import HealthCheck, given, settings

from tests import fuzzing
from tests.e2e.processes import ITEMS, random_bundle, started

BATCH = 500  # examples between two looks at the clock


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hrnn-fuzz-") as folder:
        bundle = random_bundle(Path(folder) / "bundle")
        with (
            started(bundle, bundle, Path(folder)) as serving,
            httpx.Client(timeout=30, trust_env=False) as http,
        ):
            report(serving, http, options.seconds)
    return 0


def report(serving, http, seconds):
    def memory():
        return {r: psutil.Process(p.pid).memory_info().rss for r, p in serving.processes.items()}

    before, end, sent = memory(), time.monotonic() + seconds, 0
    checks = [*http_checks(serving, http), *grpc_checks(serving)]
    while time.monotonic() < end:
        for check in checks:
            check()
            sent += BATCH
        serving.check()
        print(f"{sent:,} requests", flush=True)
    for role, after in memory().items():
        print(f"{role}: {before[role] / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
    print("no answer but 200 and refusals with a reason")


def _many(strategy, check):
    @settings(
        max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(example):
        check(example)

    return run


def http_checks(serving, http):
    name = serving.settings.model_name
    for base in (serving.settings.transformer_url, serving.settings.predictor_url):
        for path, bodies in (
            (f"/v1/models/{name}:predict", fuzzing.v1_bodies(ITEMS)),
            (f"/v2/models/{name}/infer", fuzzing.v2_bodies(ITEMS)),
        ):
            yield _many(bodies, partial(_post, http, base + path))


def _post(http, url, body):
    answer = http.post(url, content=body, headers={"content-type": "application/json"})
    fuzzing.refused_or_answered(answer)


def grpc_checks(serving):
    s = serving.settings
    for port in (s.transformer_grpc_port, s.predictor_grpc_port):
        channel = grpc.insecure_channel(f"{s.host}:{port}")
        messages = fuzzing.grpc_messages(ITEMS, s.model_name)
        yield _many(messages, partial(fuzzing.ask_grpc, channel))


if __name__ == "__main__":
    sys.exit(main())
