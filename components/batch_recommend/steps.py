"""Batch: the champion's recommendations for all users, or for a list of them, as Parquet files.

Every batch has a folder of its own below the output, and `latest.json` there names the newest
whole one. Memory holds one part: users_per_part users with their newest events, and the scores of a
small block of them. Parts appear whole; a batch that was stopped goes on with the first that is
missing.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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
from model.store import ModelStore, driver_options, files_at, said_in_one_sentence

__all__ = ["BatchRecommendSettings", "run"]

ABANDONED = timedelta(days=2)  # a batch that is not whole by then is given up
# Readers of a folder of Parquet (Arrow, Spark, DuckDB's *.parquet) leave out names with a `_`.
PLAN, DONE, LATEST = "_plan.json", "_summary.json", "latest.json"
_DATED = re.compile(r"\d{8}T\d{6}Z")  # names of batches begin with the moment they began
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
    keep: int = Field(0, ge=0)  # newest batches left below the output; 0: all


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
    run_id: str = "",
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write `part-00000.parquet` … and `_summary.json` into a folder of `output`; return that.

    Rows: user_id, rank (from 1), item_id, score, affinity, trend; users in the order of the log,
    listed users that the log does not know last (they get what new users get).

    A batch of the same plan (model, data, users, moment, settings) that was begun and not finished
    is gone on with; otherwise a new one begins.

    Args:
        output: folder or address (s3://…) of batches, of this pipeline's own.
        version: of the model; empty: the champion.
        users: text file with one id a line, or Parquet with user_id; empty: everybody in the log.
        run_id: part of the name of a new batch, after its time.

    Raises:
        InputError: no model, no such list, or `output` holds something else.
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
            **config.model_dump(exclude={"timestamp", "keep"}),
        }
        target = Batches(output, Path(work))
        batch = target.begin(plan, run_id)
        parts = total = 0
        everybody = _users(clean, recommender.max_history, wanted)
        while part := list(islice(everybody, config.users_per_part)):
            name = part_name(parts)
            parts, total = parts + 1, total + len(part)
            if target.has(batch, name):
                continue
            _with_fields(part, clean)
            target.write(batch, name, _rows(recommender, part, config, moment))
            print(f"{total:,} users done", flush=True)
        record = {
            **plan,
            "batch": batch,
            "output": f"{output.rstrip('/')}/{batch}",
            "parts": parts,
            "num_users": total,
        }
        target.finish(batch, record, config.keep)
    summary.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{total:,} users in {parts} Parquet files in {record['output']}")
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
    def sentence(reason: str) -> str:
        return f"list of users {users} cannot be read: {reason}"

    try:
        with said_in_one_sentence(sentence), fsspec.open(users, "rb", **driver_options(users)) as f:
            if users.endswith(".parquet"):
                column = pq.read_table(f, columns=["user_id"])["user_id"]
                found = [str(user) for user in column.to_pylist()]
            else:
                lines = f.read().decode("utf-8").splitlines()
                found = [line.strip() for line in lines if line.strip()]
    except UnavailableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise InputError(sentence("there is no such file")) from None
        raise
    except (ValueError, KeyError, ImportError, pa.ArrowException) as error:
        raise InputError(sentence(str(error))) from None
    if not found:
        raise InputError(f"list of users {users} is empty")
    return found


def _digest(users: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for user in users:
        digest.update(user.encode() + b"\0")
    return digest.hexdigest()


class Batches:
    """A folder or an address below which every batch has a folder; all files appear whole.

    Methods raise `UnavailableError` when it cannot be read or written.
    """

    def __init__(self, address: str, work: Path) -> None:
        """Reach the address; nothing is written yet.

        Args:
            work: folder for files under way.

        Raises:
            InputError: it is of an unknown kind.
        """
        self.address, self._work = address, work
        self._files = files_at(address, "output")

    def begin(self, plan: dict[str, Any], run_id: str) -> str:
        """Name of the batch: one of this plan that was begun, or a new one."""
        plan = json.loads(json.dumps(plan))
        self._check_latest()
        for batch in sorted(self._with(PLAN) - self._with(DONE), reverse=True):
            if self._read(f"{batch}/{PLAN}") == plan:
                print(f"going on with the batch {batch}", flush=True)
                return batch
        now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        # Ids of local runs begin with their time already.
        batch = run_id if _DATED.match(run_id) else "-".join(filter(None, [now, run_id]))
        if self.has(batch, PLAN):
            raise InputError(f"output {self.address} has a batch {batch} already: run it again")
        self._put(f"{batch}/{PLAN}", plan)
        return batch

    def has(self, batch: str, name: str) -> bool:
        with self._errors():
            return self._files.has(f"{batch}/{name}")

    def write(self, batch: str, name: str, rows: Iterable[pa.RecordBatch]) -> None:
        path = self._work / name
        with (
            said_in_one_sentence(lambda reason: f"{path} cannot be written ({reason})"),
            pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer,
        ):
            for part in rows:
                writer.write_batch(part)
        with self._errors():
            self._files.put(path, f"{batch}/{name}")
        path.unlink()

    def finish(self, batch: str, record: dict[str, Any], keep: int) -> None:
        """Say that a batch is whole, make it the latest, remove what is older than `keep` batches.

        Names begin with their time. An old batch that was gone on with replaces no newer one, and
        one that is not whole may be under way: it stays for `ABANDONED`.

        Raises:
            UnavailableError: parts are gone; another run of the same plan makes them anew.
        """
        names = [part_name(n) for n in range(record["parts"])]
        if gone := [name for name in names if not self.has(batch, name)]:
            raise UnavailableError(
                f"output {self.address}/{batch} lacks {gone[0]} ({len(gone)} of {len(names)} "
                "parts), which had been written: somebody removed it; run again to make it anew"
            )
        self._put(f"{batch}/{DONE}", record)
        whole = sorted(self._with(DONE), reverse=True)
        if batch == whole[0]:
            self._put(LATEST, {"batch": batch, "output": record["output"]})
        if keep and len(whole) > keep:
            abandoned = f"{datetime.now(UTC) - ABANDONED:%Y%m%dT%H%M%SZ}"
            for old in self._with(PLAN):
                ended = old in whole or old < abandoned
                if ended and old < whole[keep - 1] and old != batch:
                    with self._errors():
                        self._files.remove(old)

    def _check_latest(self) -> None:
        """Somebody else's file is not overwritten."""
        found = self._read(LATEST)
        if found is not None and (not isinstance(found, dict) or "batch" not in found):
            raise InputError(
                f"{self.address}/{LATEST} is not of this program: give the batches an output of "
                "their own"
            )

    def _with(self, name: str) -> set[str]:
        """Batches that have this file."""
        with self._errors():
            found = self._files.find(f"*/{name}")
        batches = (path.split("/")[-2] for path in found)
        return {batch for batch in batches if _DATED.match(batch)}

    def _put(self, name: str, content: dict[str, Any]) -> None:
        with self._errors():
            self._files.write(name, (json.dumps(content, indent=1) + "\n").encode())

    def _read(self, name: str) -> Any:
        """The JSON in a file, None if it is not there."""
        with self._errors():
            found = self._files.read(name)
        try:
            return None if found is None else json.loads(found[0])
        except ValueError as error:
            raise InputError(f"{self.address}/{name} cannot be read: {error}") from None

    def _errors(self) -> AbstractContextManager[None]:
        return said_in_one_sentence(
            lambda reason: f"output {self.address} cannot be used ({reason})"
        )


def part_name(number: int) -> str:
    """Of a batch's part, from 0."""
    return f"part-{number:05d}.parquet"
