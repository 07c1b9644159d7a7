"""Real collector processes for the tests: started, killed, frozen, limited."""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import httpx

from serving.settings import ServeSettings

REPO = Path(__file__).resolve().parents[2]
DEADLINE = 90  # seconds until a process must be ready, on a busy machine


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["serving.collector", "feature_repo.live", "feast", "psycopg"])


def run_collector(environment, log, max_file_bytes):
    """In the child: what `python -m serving.collector` does."""
    os.environ.update(environment)
    with open(log, "ab") as file:  # noqa: PTH123
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if max_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    from serving.collector import main
    from serving.process import leave

    leave(main([]))


class CollectorProcess:
    """A collector on a free port."""

    def __init__(self, log_url, features, folder, **settings):
        self.settings = ServeSettings(
            event_log=log_url,
            feature_root=features.root,
            online_store=features.online,
            redis_url=features.redis_url,
            **settings,
        ).with_free_ports()
        self.url = self.settings.collector_url
        self.log = folder / f"collector-{self.settings.collector_http_port}.log"
        self.process = None
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def start(self, max_file_bytes=None):
        """A process of its own, forked from one that has imported everything: ready at once."""
        environment = {**self.settings.to_env(), "PYTHONPATH": str(REPO)}
        self.process = _FORKS.Process(
            target=run_collector, args=(environment, str(self.log), max_file_bytes)
        )
        self.process.start()
        self.wait(self.ready)
        return self

    def wait(self, condition, deadline=DEADLINE):
        end = time.monotonic() + deadline
        while not condition():
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def ready(self):
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/v2/health/ready", timeout=5).status_code == 200
        return False

    def metric(self, line):
        for text in self.http.get("/metrics").text.splitlines():
            if text.startswith(line + " "):
                return float(text.rpartition(" ")[2])
        return 0.0

    def caught_up(self):
        """The online store has everything."""
        return (
            self.metric("hrnn_collector_lag_changes") == 0
            and self.metric("hrnn_collector_lag_seconds") == 0
        )

    def kill(self):
        self.process.kill()
        self.process.join()

    def close(self):
        if self.process is not None and self.process.is_alive():
            self.kill()
        self.http.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()
