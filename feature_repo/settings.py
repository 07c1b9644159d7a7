"""Where the feature store lives; Feast's own configuration is derived from it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import field_validator, model_validator

from feature_repo.names import PROJECT, source_name, source_pattern
from model.errors import InputError
from model.settings import SettingsBase

if TYPE_CHECKING:
    from feast import RepoConfig

# A connection that went away without a word must not hold a reader's thread for ever, and the
# client's own retries (~9 s) would: callers have deadlines and fallbacks. Time-outs in seconds.
REDIS_DEFAULTS = {"socket_connect_timeout": "2", "socket_timeout": "5", "retry": "null"}
REGISTRY_SECONDS = 5  # to connect to its database

_VARIABLES = {
    "root": "HRNN_FEATURE_ROOT",
    "online": "HRNN_ONLINE_STORE",
    "redis_url": "HRNN_REDIS_URL",
    "registry_url": "HRNN_REGISTRY_URL",
    "sources_uri": "HRNN_SOURCES_URI",
}


class FeatureStoreSettings(SettingsBase):
    """Sources, and registry and online store where they are files, live under `root`."""

    root: str
    online: Literal["sqlite", "redis"] = "sqlite"
    # redis://[:password@]host:port[/db], rediss://… for TLS, or Feast's host:port[,db=0][,ssl=true]
    redis_url: str | None = None
    # postgresql://[user[:password]]@host/database or sqlite:///PATH; None: a file under the root
    registry_url: str | None = None
    # Where the offline sources are kept, if not under the root: s3://bucket/prefix or what else
    # fsspec knows; the root then holds a working copy.
    sources_uri: str | None = None

    @model_validator(mode="after")
    def _redis_has_an_address(self) -> Self:
        if self.online == "redis" and not self.redis_url:
            raise ValueError("the redis online store needs redis_url (HRNN_REDIS_URL)")
        return self

    @field_validator("registry_url")
    @classmethod
    def _registry_is_known(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("sqlite:///", "postgresql://")):
            # Not a ValueError, of which pydantic would repeat the value: it may hold a password.
            raise InputError(
                "registry_url is not sqlite:///PATH or postgresql://USER@HOST/DATABASE"
            )
        return url

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read HRNN_FEATURE_ROOT and HRNN_ONLINE_STORE, _REDIS_URL, _REGISTRY_URL, _SOURCES_URI.

        Empty counts as unset.

        Raises:
            InputError: no root, or a value that does not fit.
        """
        values = {k: v for k, name in _VARIABLES.items() if (v := environ.get(name))}
        if "root" not in values:
            raise InputError("HRNN_FEATURE_ROOT is not set; give the folder of the feature store")
        return cls.parse(values, "feature store")

    def to_env(self) -> dict[str, str]:
        """Inverse of `from_env`; what is not set is empty."""
        return {name: getattr(self, k) or "" for k, name in _VARIABLES.items()}

    @property
    def path(self) -> Path:
        return Path(self.root).absolute()

    @property
    def registry_path(self) -> Path:
        return self.path / "registry.db"

    @property
    def online_path(self) -> Path:
        """The SQLite online store."""
        return self.path / "online_store.db"

    @property
    def sources(self) -> Path:
        return self.path / "sources"

    def source(self, view: str) -> Path:
        """Parquet file the pipeline writes for a view."""
        return self.sources / source_name(view)

    def pattern(self, view: str) -> Path:
        """Parquet file or files (a glob) a view is read from."""
        return self.sources / source_pattern(view)

    def _registry(self) -> dict[str, object]:
        if self.registry_url is None:
            return {"path": str(self.registry_path)}
        options: dict[str, object] = {"echo": False, "pool_pre_ping": True}
        if self.registry_url.startswith("postgresql:"):
            options["connect_args"] = {"connect_timeout": REGISTRY_SECONDS}
        return {
            "registry_type": "sql",
            "path": self.registry_url,
            "sqlalchemy_config_kwargs": options,
        }

    def repo_config(self) -> "RepoConfig":
        """Feast's configuration: duckdb offline, because dask loses rows in point-in-time joins."""
        from feast import RepoConfig

        online: dict[str, object] = {"type": "sqlite", "path": str(self.online_path)}
        if self.online == "redis":
            online = {
                "type": "redis",
                "connection_string": redis_connection(self.redis_url or ""),
                # Otherwise Redis drops a corrected row of equal time where SQLite takes it. What
                # is newer is decided in `store`, the same way for both.
                "skip_dedup": True,
            }
        return RepoConfig(
            project=PROJECT,
            provider="local",
            # 0: never re-read behind a request's back; FeatureReader notices new registries.
            registry={**self._registry(), "cache_ttl_seconds": 0},
            online_store=online,
            offline_store={"type": "duckdb"},
            entity_key_serialization_version=3,
        )


def redis_connection(url: str) -> str:
    """Feast's connection string (`host:port,key=value,…`) of a Redis URL or such a string.

    Raises:
        InputError: the address has no host, or its port is not a number.
    """
    if "://" not in url:
        head, *options = url.split(",")
        address, given = head, dict(option.partition("=")[::2] for option in options)
    else:
        parts = urlsplit(url)
        try:
            address = f"{parts.hostname or ''}:{parts.port or 6379}"
        except ValueError:
            raise InputError("redis_url: the port is not a number") from None
        given = {"db": parts.path.strip("/") or "0"}
        if parts.username:
            given["username"] = unquote(parts.username)
        if parts.password:
            given["password"] = unquote(parts.password)
        if parts.scheme == "rediss":
            given["ssl"] = "true"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or any("," in value for value in given.values()):
        # The value may hold a password: it is not repeated.
        raise InputError("redis_url is not redis://[:password@]host:port[/db] (no commas)")
    return ",".join([address, *(f"{k}={v}" for k, v in {**REDIS_DEFAULTS, **given}.items())])
