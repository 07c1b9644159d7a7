"""Batch: the champion's recommendations for all users, or for a list of them, as Parquet files.

Memory holds one part: users_per_part users with their newest events, and the scores of a small
block of them. Parts appear whole; a batch that was stopped goes on with the first that is missing.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from components.digests import tables_digest
from model.errors import InputError, UnavailableError
from model.query import Event, Query
from model.recommender import Recommender
from model.settings import SettingsBase
from model.store import ModelStore

__all__ = ["BatchRecommendSettings", "run"]

PLAN, DONE = "plan.json", "summary.json"
BLOCK_CELLS = 2**22  # scores held at once (float32: 16 MiB), whatever the catalogue's size
SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "rank": pa.int32(),
        "item_id": pa.string(),
        "score": pa.float32(),
        "affinity": pa.float32(),
        "trend": pa.float32(),
    }
)


class BatchRecommendSettings(SettingsBase):
    """What is asked for every user."""

    num_results: int = Field(25, ge=1)
    timestamp: int | None = Field(None, ge=1)  # of the requests; None: the second after the log
    exclude_seen: bool = False
    trend_weight: float = Field(1.0, ge=0.0)
    users_per_part: int = Field(20_000, ge=1)


@dataclass
class _User:
    user_id: str
    history: list[Event] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


def run(
    clean: Path,
    model_store: str,
    output: str,
    summary: Path,
    *,
    version: str = "",
    users: str = "",
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write `part-00000.parquet` … and `summary.json` into `output`; returns the summary.

    Rows: user_id, rank (from 1), item_id, score, affinity, trend; users in the order of the log,
    listed users that the log does not know last (they get what new users get).

    Args:
        output: folder or address (s3://…) of its own.
        version: of the model; empty: the champion.
        users: text file with one id a line, or Parquet with user_id; empty: everybody in the log.

    Raises:
        InputError: no model, no such list, or `output` holds another batch.
        BundleError: the model is damaged.
        UnavailableError: the model store, or the output, cannot be used.
    """
    config = BatchRecommendSettings.parse(settings, "batch_recommend")
    if not output:
        raise InputError("batch_recommend: give the output a folder or an address")
    store = ModelStore(model_store)
    champion = store.champion()
    if not version and champion is None:
        raise InputError(f"the model store {model_store} has no champion: deploy a model first")
    version = version or (champion.version if champion else "")
    summary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".batch-", dir=summary.parent) as work:
        recommender = Recommender.load(store.fetch(version, Path(work)))
        wanted = _listed(users) if users else None
        moment = config.timestamp or _log_end(clean) + 1
        plan = {
            "model_version": version,
            "data_digest": tables_digest(clean),
            "users": None if wanted is None else _digest(wanted),
            "timestamp": moment,
            **config.model_dump(exclude={"timestamp"}),
        }
        target = _Output(output, Path(work))
        target.begin(plan)
        parts = total = 0
        everybody = _users(clean, recommender.max_history, wanted)
        while part := list(islice(everybody, config.users_per_part)):
            name = f"part-{parts:05d}.parquet"
            parts, total = parts + 1, total + len(part)
            if target.has(name):
                continue
            _with_fields(part, clean)
            target.write(name, _rows(recommender, part, config, moment))
            print(f"{total:,} users done", flush=True)
        record = {**plan, "output": output, "parts": parts, "num_users": total}
        target.finish(record)
    summary.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{total:,} users, {parts} parts of {SCHEMA.names} in {output}")
    return record


def _rows(
    recommender: Recommender,
    users: Sequence[_User],
    config: BatchRecommendSettings,
    moment: int,
) -> Iterator[pa.RecordBatch]:
    block = max(1, min(256, BLOCK_CELLS // max(len(recommender.item_ids), 1)))
    for start in range(0, len(users), block):
        some = users[start : start + block]
        queries = [
            Query(u.history, moment, user=u.fields, exclude_seen=config.exclude_seen) for u in some
        ]
        lists = recommender.recommend(queries, config.num_results, trend_weight=config.trend_weight)
        rows = [
            (user.user_id, rank, r.item_id, r.score, r.affinity, r.trend)
            for user, found in zip(some, lists, strict=True)
            for rank, r in enumerate(found, start=1)
        ]
        columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
        arrays = [pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _users(clean: Path, max_history: int, wanted: Sequence[str] | None) -> Iterator[_User]:
    """Users with their newest events, one after the other as the clean log is sorted."""
    chosen = None if wanted is None else set(wanted)
    seen: set[str] = set()
    user: _User | None = None
    for event in _events(clean):
        if user is None or event["user_id"] != user.user_id:
            if user is not None and (chosen is None or user.user_id in chosen):
                yield user
            user = _User(event["user_id"])
            if chosen is not None and user.user_id in chosen:
                seen.add(user.user_id)
        user.history.append(
            Event(
                event["item_id"],
                float(event["timestamp"]),
                event.get("event_type"),
                event.get("event_value"),
            )
        )
        if len(user.history) > 2 * max_history:
            del user.history[:-max_history]
    if user is not None and (chosen is None or user.user_id in chosen):
        yield user
    for new in dict.fromkeys(wanted or ()):
        if new not in seen:
            yield _User(new)


def _events(clean: Path) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(clean / "interactions.parquet")
    columns = {"user_id", "item_id", "timestamp", "event_type", "event_value"}
    names = [n for n in file.schema_arrow.names if n in columns]
    for batch in file.iter_batches(65_536, columns=names):
        yield from batch.to_pylist()


def _with_fields(users: Sequence[_User], clean: Path) -> None:
    path = clean / "users.parquet"
    if not path.exists():
        return
    ids = pa.array([u.user_id for u in users])
    table = pq.read_table(path, filters=pc.field("user_id").isin(ids))
    rows = {row.pop("user_id"): row for row in table.to_pylist()}
    for user in users:
        user.fields = rows.get(user.user_id, {})


def _log_end(clean: Path) -> int:
    column = pq.read_table(clean / "interactions.parquet", columns=["timestamp"])["timestamp"]
    last = pc.max(column).as_py()
    if last is None:
        raise InputError("the log holds no events: there is nobody to recommend to")
    return int(last)


def _listed(users: str) -> list[str]:
    try:
        if users.endswith(".parquet"):
            with fsspec.open(users, "rb") as f:
                return [
                    str(u) for u in pq.read_table(f, columns=["user_id"])["user_id"].to_pylist()
                ]
        with fsspec.open(users, "rt", encoding="utf-8") as f:
            found = [line.strip() for line in f if line.strip()]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"list of users {users} cannot be read: {error}") from None
    if not found:
        raise InputError(f"list of users {users} is empty")
    return found


def _digest(users: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for user in users:
        digest.update(user.encode() + b"\0")
    return digest.hexdigest()


class _Output:
    """A folder or an address that gets whole files only."""

    def __init__(self, address: str, work: Path) -> None:
        self.address, self._work = address, work
        try:
            self._fs, self._root = fsspec.url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise InputError(f"output {address}: {error}") from None
        self._local = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )

    def begin(self, plan: dict[str, Any]) -> None:
        """Start, or go on with what the same plan has begun."""
        known = self._read(PLAN)
        if known is None:
            if self._call(self._fs.exists, self._root) and self._call(self._fs.ls, self._root):
                raise InputError(f"output {self.address} holds other files: give one of its own")
            self._put(PLAN, json.dumps(plan, indent=1).encode())
        elif known != json.loads(json.dumps(plan)):
            changed = sorted(k for k in plan if known.get(k) != plan[k])
            raise InputError(
                f"output {self.address} holds another batch ({', '.join(changed)} differ): give "
                "this one a folder of its own"
            )

    def has(self, name: str) -> bool:
        return bool(self._call(self._fs.exists, f"{self._root}/{name}"))

    def write(self, name: str, rows: Iterable[pa.RecordBatch]) -> None:
        path = self._work / name
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for batch in rows:
                writer.write_batch(batch)
        self._move(path, name)

    def finish(self, record: dict[str, Any]) -> None:
        self._put(DONE, json.dumps(record, indent=1).encode())

    def _put(self, name: str, content: bytes) -> None:
        path = self._work / name
        path.write_bytes(content)
        self._move(path, name)

    def _move(self, path: Path, name: str) -> None:
        if not self._local:
            self._call(self._fs.put_file, str(path), f"{self._root}/{name}")
            return
        # Perhaps another file system: copied beside its place first, then renamed.
        self._call(self._fs.makedirs, self._root, exist_ok=True)
        self._call(self._fs.put_file, str(path), f"{self._root}/.{name}")
        self._call(Path(f"{self._root}/.{name}").replace, f"{self._root}/{name}")

    def _read(self, name: str) -> Any:
        if not self.has(name):
            return None
        try:
            return json.loads(self._call(self._fs.cat_file, f"{self._root}/{name}"))
        except ValueError as error:
            raise InputError(f"{self.address}/{name} is not a plan: {error}") from None

    def _call(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnavailableError(f"output {self.address} cannot be used ({reason})") from None
