"""What every serving process does alike: settings, logs, ports, and how it ends.

Free of KServe, which takes seconds to import.
"""

import argparse
import asyncio
import errno
import gc
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import uvicorn

from model.errors import UnavailableError
from serving import metrics
from serving.settings import ServeSettings

log = logging.getLogger("hrnn.serving")

LINES_WAITING = 512  # two requests of 256 instances; 1,000 items in a line are some 150 kB
CLOSE_SECONDS = 2.0


def log_failure(error: BaseException) -> None:
    """Log an unexpected error by type and place; its text could quote a request."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(frames))
    log.error("%s at %s", type(error).__name__, where)


def freeze_garbage_collection() -> None:
    """Have what exists now not looked at again by the garbage collector.

    To be called when all has been imported: Feast or PyTorch alone are half a million objects, and
    looking through them takes a quarter of a second, in the middle of some request.
    """
    gc.collect()
    gc.freeze()
    # Now and not with every scrape: they are counted one by one, which stops the process for 35 ms.
    metrics.FROZEN.set(gc.get_freeze_count())


class Uvicorn(uvicorn.Server):
    """Uvicorn that leaves signals to its caller."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def reserve(host: str, port: int) -> socket.socket:
    """Bind a port without listening: others get a clear refusal, clients none too early.

    Raises:
        UnavailableError: the port is in use or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise in_use(host, port) from None
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return sock


def in_use(host: str, port: int) -> UnavailableError:
    return UnavailableError(
        f"port {port} on {host} is in use: stop what uses it, or choose another port"
    )


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, role, logger, message, and `data` of the record."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = type(record.exc_info[1]).__name__
        return json.dumps(line)


def configure_logging(role: str) -> None:
    """Structured lines on stderr; no line per request."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(role))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("hrnn").setLevel(logging.INFO)
    for name in ("kserve", "kserve.trace", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        # A handler of its own keeps KServe from configuring per-request logs.
        logger.handlers = [logging.NullHandler()]
        logger.setLevel(logging.WARNING)
        logger.propagate = True


class BackgroundHandler(logging.Handler):
    """Has records written by a thread of its own, so that who logs never waits for the reader.

    At most LINES_WAITING wait to be written; further ones are dropped.
    """

    def __init__(self, handlers: Sequence[logging.Handler], dropped: Callable[[], None]) -> None:
        """
        Args:
            handlers: what writes.
            dropped: called for each record that is not written.
        """
        super().__init__()
        self._handlers, self._dropped = handlers, dropped
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(LINES_WAITING)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped()

    def _write(self) -> None:
        while (record := self._waiting.get()) is not None:
            for handler in self._handlers:
                handler.handle(record)

    def close(self) -> None:
        """Write what waits, for CLOSE_SECONDS at most."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        super().close()


def log_in_background(logger: logging.Logger, dropped: Callable[[], None]) -> None:
    """Have a logger's lines written where all others are, but by a thread of its own."""
    logger.addHandler(BackgroundHandler(logging.getLogger().handlers, dropped))
    logger.propagate = False


class Signals:
    """What ends a server: SIGTERM once it is drained; another one, or SIGINT, at once.

    A load balancer goes on sending new connections to a process that was told to end, until all
    its parts have heard of it (on Kubernetes some seconds). Meanwhile they must be accepted.
    """

    def __init__(self, drain_seconds: float) -> None:
        """To be called in the event loop, before anything that must not be cut off."""
        self._drain_seconds = drain_seconds
        self._told, self._at_once = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    async def wait(self) -> None:
        """Return when no more requests are to be accepted."""
        await self._told.wait()
        if self._drain_seconds and not self._at_once.is_set():
            log.info("draining: new requests are answered for %g s", self._drain_seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._drain_seconds):
                    await self._at_once.wait()
        log.info("stopping")

    def _terminate(self) -> None:
        if self._told.is_set():
            self._at_once.set()
        self._told.set()

    def _interrupt(self) -> None:
        self._at_once.set()
        self._told.set()


def exit_with_parent(seconds: float) -> None:
    """Stop when stdin closes: the launcher holds its other end, and even SIGKILL closes it.

    Unlike PR_SET_PDEATHSIG this does not depend on which thread started the process.

    Args:
        seconds: that stopping may take.
    """

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds + 5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def parse_arguments(role: str, arguments: Sequence[str]) -> ServeSettings:
    """Settings from HRNN_* variables, overridden by flags.

    Flags are the settings' names; `--http-port` and `--grpc-port` are the role's own. Both
    spellings, with - and _, are accepted: the KServe controller passes --predictor_host and such.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m serving.{role}",
        description=f"The {role} of the HRNN-meta service. "
        "Every flag can also be set as HRNN_<NAME>.",
        allow_abbrev=False,
    )
    own = {f"{role}_{kind}_port": f"{kind}_port" for kind in ("http", "grpc")}
    for name, info in ServeSettings.model_fields.items():
        names = [name, own[name]] if name in own else [name]
        spellings = [s for n in names for s in (f"--{n.replace('_', '-')}", f"--{n}")]
        parser.add_argument(
            *dict.fromkeys(spellings),
            dest=name,
            metavar="X",
            help=f"default: {info.default}",
        )
    parser.add_argument("--predictor_protocol", choices=["grpc-v2"], help=argparse.SUPPRESS)
    flags = vars(parser.parse_args(arguments))
    flags.pop("predictor_protocol")
    given = {name: value for name, value in flags.items() if value is not None}
    base = {n: v for n, v in ServeSettings.from_env().model_dump().items() if n not in given}
    return ServeSettings.parse(base | given, where="setting")


def leave(code: int) -> NoReturn:
    """End the process at once; a thread stuck in a store that hangs would hold it back."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
