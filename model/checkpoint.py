"""A training run on disk: one safetensors file, so that it is there whole or not at all.

Tensors are the file's tensors; whatever else belongs to the run is JSON in its header, with the
run's fingerprint and a SHA-256 of the tensors. It is written beside the one before, flushed to the
disk and renamed over it: a kill or a full disk at any moment leaves the older one intact.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import InputError, UnavailableError

FORMAT = "hrnn-meta-checkpoint"
FORMAT_VERSION = 2
FILE = "training.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]  # JSON


@dataclass(frozen=True)
class CheckpointFile:
    """The checkpoint of one run in a folder of its own.

    `fingerprint` tells runs apart: settings and data by name, each as a digest.
    """

    folder: Path
    fingerprint: dict[str, str]

    @property
    def path(self) -> Path:
        return self.folder / FILE

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint.

        Raises:
            UnavailableError: the disk is full or cannot be written; the one before is untouched.
        """
        work = self.folder / f".{FILE}"
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": json.dumps(self.fingerprint),
            "state": json.dumps(checkpoint.state),
            "sha256": _digest(checkpoint.tensors),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(checkpoint.tensors, work, header)
                with work.open("rb") as f:
                    os.fsync(f.fileno())
                work.replace(self.path)
            finally:
                work.unlink(missing_ok=True)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself
            finally:
                os.close(folder)
        except (OSError, SafetensorError) as error:
            raise UnavailableError(
                f"the training checkpoint cannot be written to {self.folder}: {error}; make room "
                "or name another folder and start again: the checkpoint before this one is intact"
            ) from error

    def read(self) -> Checkpoint | None:
        """The checkpoint to go on from; None when there is none.

        Raises:
            InputError: there is one, but it is damaged, no checkpoint, or another run's.
        """
        if not self.path.exists():
            return None
        advice = "name another checkpoint folder, or remove the file to train from the start"
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise InputError(f"{self.path} is no training checkpoint: {advice}")
                if header.get("format_version") != str(FORMAT_VERSION):
                    raise InputError(
                        f"{self.path} has checkpoint format {header.get('format_version')}, this "
                        f"release reads {FORMAT_VERSION}: {advice}"
                    )
                fingerprint = json.loads(header["fingerprint"])
                differing = sorted(
                    name
                    for name in fingerprint.keys() | self.fingerprint.keys()
                    if fingerprint.get(name) != self.fingerprint.get(name)
                )
                if differing:
                    raise InputError(
                        f"{self.path} belongs to another training run (other "
                        f"{', '.join(differing)}): {advice}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads(header["state"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{self.path} cannot be read ({error}): {advice}") from error
        if _digest(tensors) != header.get("sha256"):
            raise InputError(f"{self.path} does not match its digest, it is damaged: {advice}")
        return Checkpoint(tensors, state)

    def remove(self) -> None:
        """The run is over: its result is elsewhere."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # others' files may be there
            self.folder.rmdir()


def digest_of(*parts: Any) -> str:
    """SHA-256 of JSON values and arrays, for a fingerprint."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray) and part.dtype != object:
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
        else:
            value = part.tolist() if isinstance(part, np.ndarray) else part
            digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
