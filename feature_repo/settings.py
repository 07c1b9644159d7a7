"""Where features live: root folder, registry, online and offline store."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from model.errors import InputError
from model.settings import SettingsBase

if TYPE_CHECKING:
    from feast import RepoConfig

PROJECT = "hrnn"


class FeatureStoreSettings(SettingsBase):
    """One feature store. `root` holds the registry, the sources and the SQLite online store."""

    root: str
    online: Literal["sqlite", "redis"] = "sqlite"
    redis_url: str | None = None  # host:port[,password=…] as Feast's connection_string

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read HRNN_FEATURE_ROOT, HRNN_ONLINE_STORE and HRNN_REDIS_URL.

        Raises:
            InputError: HRNN_FEATURE_ROOT is not set.
        """
        if not environ.get("HRNN_FEATURE_ROOT"):
            raise InputError("no feature store: set HRNN_FEATURE_ROOT to its folder")
        return cls.parse(
            {
                "root": environ["HRNN_FEATURE_ROOT"],
                "online": environ.get("HRNN_ONLINE_STORE") or "sqlite",
                "redis_url": environ.get("HRNN_REDIS_URL") or None,
            },
            "feature store",
        )

    @property
    def sources(self) -> Path:
        """Parquet files that the features step writes."""
        return Path(self.root) / "sources"

    def repo_config(self) -> "RepoConfig":
        """Feast's configuration of this store."""
        from feast import RepoConfig

        if self.online == "redis":
            if not self.redis_url:
                raise InputError("online store redis needs HRNN_REDIS_URL (host:port)")
            online = {"type": "redis", "connection_string": self.redis_url}
        else:
            online = {"type": "sqlite", "path": str(Path(self.root) / "online_store.db")}
        return RepoConfig(
            project=PROJECT,
            registry=str(Path(self.root) / "registry.db"),
            provider="local",
            # dask, the default, loses rows in point-in-time joins.
            offline_store={"type": "duckdb"},
            online_store=online,
            entity_key_serialization_version=3,
        )
