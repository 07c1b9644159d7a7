"""What a local run reads, and what that means for its parameters, its environment and its cache."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError

# As in components.ingest.event_log and components.event_sources, which take seconds to import.
CONFIGURED, EVENT_LOG = "event-log", "HRNN_EVENT_LOG"
SQL_SCHEMES = ("sqlite:", "postgresql:", "postgresql+psycopg:", "postgres:")


@dataclass(frozen=True)
class Source:
    """A named dataset, or tables: files, addresses, an event log."""

    dataset: str = ""
    interactions: str = ""
    users: str = ""
    items: str = ""

    @property
    def in_database(self) -> bool:
        """Whether `interactions` is the address of an event log, which may hold a password."""
        return self.interactions.startswith(SQL_SCHEMES)

    def parameters(self) -> dict[str, str]:
        """Parameters of a pipeline, which are written to its log: an address with a password
        goes through `variables`."""
        return {
            "dataset": self.dataset,
            "interactions": CONFIGURED if self.in_database else absolute(self.interactions),
            "users": absolute(self.users),
            "items": absolute(self.items),
        }

    def variables(self, own_log: Path) -> dict[str, str]:
        """Environment of the steps: the event log, from which also deletions are read.

        Args:
            own_log: the workspace's, used when none is given or configured.
        """
        if self.in_database:
            return {EVENT_LOG: self.interactions}
        if address := os.environ.get(EVENT_LOG):
            return {EVENT_LOG: address}
        return {EVENT_LOG: f"sqlite:///{own_log}"} if own_log.is_file() else {}

    def digest(self, variables: Mapping[str, str]) -> str:
        """Digest of what is read; "" when that is not known beforehand.

        A later deletion of a user from the event log counts as other content.
        """
        log = variables.get(EVENT_LOG)
        deletion = _last_deletion(log) if log else 0
        digest = self._files_digest()
        return f"{digest}-{deletion}" if digest and deletion else digest

    def _files_digest(self) -> str:
        if self.dataset:
            return self.dataset  # checked against its published digest when it is obtained
        digest = hashlib.sha256()
        for path in (self.interactions, self.users, self.items):
            if not is_local(path) and path:
                return ""
            if path:
                with Path(path).open("rb") as f:
                    digest.update(hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()


def is_local(path: str) -> bool:
    """Whether this is a path on this machine, and no address."""
    return bool(path) and "://" not in path and path != CONFIGURED


def absolute(path: str) -> str:
    """Steps run in other folders."""
    return str(Path(path).absolute()) if is_local(path) else path


def _last_deletion(event_log: str) -> int:
    from feature_repo.event_log import EventLog

    try:
        log = EventLog.open(event_log)
    except InputError:
        return 0  # there is no log yet
    with contextlib.closing(log):
        return log.last_deletion()
