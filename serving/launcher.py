"""The serving processes on this machine, for the laptop, the demo and the tests."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from model.errors import UnavailableError
from serving.settings import (
    COLLECTOR,
    EXIT_WITH_PARENT,
    MULTIPROCESS,
    PREDICTOR,
    TRANSFORMER,
    ServeSettings,
)

LOG_LINES = 15  # shown when a process does not start


class FeatureStoreSettings(Protocol):
    """feature_repo.store.FeatureStoreSettings, named here because importing Feast takes seconds."""

    @property
    def root(self) -> str: ...
    @property
    def online(self) -> str: ...
    @property
    def redis_url(self) -> str | None: ...


class LocalServing:
    """Predictor, transformer and, with an event log, collector as child processes.

    A context manager.

    The children stop with this process, however it ends: they hold one end of a pipe and exit
    when the other closes.
    """

    def __init__(
        self,
        model_dir: Path | str,
        feature_store: FeatureStoreSettings,
        settings: ServeSettings | None = None,
        log_dir: Path | str | None = None,
    ) -> None:
        """
        Args:
            model_dir: a bundle, or a model store: a folder or an address such as s3://….
            settings: addresses and limits; see `ServeSettings.with_free_ports`.
            log_dir: where predictor.log and transformer.log go; None: a temporary folder.
        """
        where = str(model_dir)
        self.settings = (settings or ServeSettings()).model_copy(
            update={
                "model_dir": where if "://" in where else str(Path(where).absolute()),
                "feature_root": str(Path(feature_store.root).absolute()),
                "online_store": feature_store.online,
                "redis_url": feature_store.redis_url,
            }
        )
        if self.settings.event_log and not self.settings.items_url:
            update = {"items_url": self.settings.collector_url}
            self.settings = self.settings.model_copy(update=update)
        self.log_dir = Path(log_dir or tempfile.mkdtemp(prefix="hrnn-serving-"))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Where requests go: the transformer."""
        return self.settings.transformer_url

    @property
    def predict_url(self) -> str:
        return f"{self.url}/v1/models/{self.settings.model_name}:predict"

    @property
    def metrics_urls(self) -> dict[str, str]:
        return {role: f"{self._base_url(role)}/metrics" for role in self.roles}

    @property
    def roles(self) -> tuple[str, ...]:
        """The processes, in the order in which they are started."""
        collector = (COLLECTOR,) if self.settings.event_log else ()
        return (PREDICTOR, TRANSFORMER, *collector)

    def _base_url(self, role: str) -> str:
        url: str = getattr(self.settings, f"{role}_url")
        return url

    def log_file(self, role: str) -> Path:
        return self.log_dir / f"{role}.log"

    def start(self, timeout: float = 120.0) -> Self:
        """Start all and wait until all are ready.

        Args:
            timeout: seconds.

        Raises:
            UnavailableError: one stopped or was not ready in time; holds the end of its log.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout
        try:
            for role in self.roles:
                self.start_one(role)
            for role in self.roles:
                self.wait_ready(role, deadline - time.monotonic())
        except BaseException:
            self.stop()
            raise
        return self

    def command(self, role: str) -> list[str]:
        """How a process is started; settings go by environment, as a URL may hold a password."""
        return [sys.executable, "-m", f"serving.{role}"]

    def start_one(self, role: str) -> None:
        """Start one process without waiting for it."""
        environment = {**os.environ, **self.settings.to_env(), EXIT_WITH_PARENT: "1"}
        # The package may be run from a checkout without being installed.
        here = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [here, os.environ.get("PYTHONPATH")])
        )
        environment["PYTHONUNBUFFERED"] = "1"
        # Feast sets it when imported; metrics of a single process would then go through files.
        environment.pop(MULTIPROCESS, None)
        with self.log_file(role).open("ab") as log:
            self.processes[role] = subprocess.Popen(
                self.command(role),
                stdin=subprocess.PIPE,  # never written to; closes when this process ends
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle, in order
            )

    def wait_ready(self, role: str, timeout: float) -> None:
        """Wait until a process answers that it is ready.

        Raises:
            UnavailableError: it stopped, or `timeout` seconds passed.
        """
        base = self._base_url(role)
        process = self.processes[role]
        deadline = time.monotonic() + timeout
        while True:
            for name, other in self.processes.items():
                if other.poll() is not None:
                    raise UnavailableError(
                        f"the {name} stopped while starting (exit code {other.returncode}): "
                        f"{self._reason(name)}"
                    )
            # The port is this process's own: it refuses to start on one in use.
            if _is_ready(f"{base}/v2/health/ready"):
                return
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"the {role} (pid {process.pid}) was not ready within {timeout:.0f} s: "
                    f"{self._reason(role)}"
                )
            time.sleep(0.05)

    def _reason(self, role: str) -> str:
        path = self.log_file(role)
        lines = path.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1].removeprefix("error: ")
        return "\n".join([f"end of {path}:", *lines[-LOG_LINES:]])

    def check(self) -> None:
        """Raises UnavailableError if a process has stopped."""
        for role, process in self.processes.items():
            if process.poll() is not None:
                raise UnavailableError(
                    f"the {role} stopped (exit code {process.returncode}): {self._reason(role)}"
                )

    def wait(self) -> None:
        """Block until a process stops (an error) or Ctrl-C.

        Raises:
            UnavailableError: a process stopped.
        """
        while True:
            self.check()
            time.sleep(0.5)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after drain and grace time; returns when no process is left."""
        processes = [p for p in self.processes.values() if p.poll() is None]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        seconds = self.settings.drain_seconds + self.settings.grace_seconds + 2
        deadline = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in self.processes.values():
            if process.stdin is not None:
                process.stdin.close()
        self.processes.clear()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _is_ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=1) as response:
            return json.load(response).get("ready") is True
    except (OSError, ValueError, urllib.error.URLError):
        return False
