"""Where table expressions run: DuckDB on one machine, Spark beyond it; the expressions are equal.

Spark is optional (`pip install "hrnn-meta[spark]"`, Java 17) and imported when it is asked for.
"""

import re
import shutil
import zlib
from pathlib import Path
from typing import Literal

import ibis.expr.types as ir
import pyarrow.parquet as pq
from ibis.backends import BaseBackend
from ibis.backends.duckdb import Backend as DuckDB

from components.tables import connect
from model.errors import InputError, UnavailableError

EngineName = Literal["duckdb", "spark"]
_SIZE = re.compile(r"(\d+)\s*([KMGT])i?B?", re.IGNORECASE)


def open_engine(
    name: EngineName, scratch: Path, memory_limit: str, spark_master: str
) -> BaseBackend:
    """A connection that spills to `scratch`; its owner calls `disconnect`.

    Args:
        memory_limit: of DuckDB, or of Spark's driver (in local mode: of everything).
        spark_master: `local[*]`, `spark://host:port`, `k8s://…`; not read by DuckDB.

    Raises:
        InputError: `memory_limit` is not a size.
        UnavailableError: Spark or Java is not there, or the master cannot be reached.
    """
    if name == "duckdb":
        return connect(scratch, memory_limit)
    size = _SIZE.fullmatch(memory_limit.strip())
    if size is None:
        raise InputError(f"memory_limit: {memory_limit!r} is not a size; try '2GB'")
    if shutil.which("java") is None:
        raise UnavailableError("the spark engine needs Java 17 or later, and there is no java here")
    try:
        import ibis
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError:
        raise UnavailableError(
            'the spark engine needs pyspark: pip install "hrnn-meta[spark]"'
        ) from None
    builder = SparkSession.builder.master(spark_master).appName("hrnn")
    for key, value in {
        "spark.driver.memory": f"{size[1]}{size[2].lower()}",
        "spark.local.dir": str(scratch),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # Local mode would start 200 tasks for a shuffle of a few megabytes.
        "spark.sql.adaptive.enabled": "true",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    }.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("ERROR")
        # What DuckDB has and Ibis has no word for.
        session.sql(
            "CREATE OR REPLACE TEMPORARY FUNCTION epoch_us(moment TIMESTAMP) RETURNS BIGINT"
            " RETURN unix_micros(moment)"
        )
        return ibis.pyspark.connect(session)
    except (PySparkException, OSError) as error:
        raise UnavailableError(
            f"Spark at {spark_master} cannot be started: {type(error).__name__}"
        ) from error


def read_numbered(backend: BaseBackend, path: Path, name: str) -> ir.Table:
    """A Parquet file with the place of each row in it, from 1, as a further column."""
    if isinstance(backend, DuckDB):
        table = backend.read_parquet(path, file_row_number=True)
        return table.mutate(**{name: table.file_row_number + 1}).drop("file_row_number")
    rows = backend._session.read.parquet(str(path))
    numbered = rows.selectExpr("*", f"_metadata.row_index + 1 AS `{name}`")
    view = f"numbered_{zlib.crc32(str(path).encode()):08x}"
    numbered.createOrReplaceTempView(view)
    return backend.table(view)


def write_parquet(backend: BaseBackend, expression: ir.Table, path: Path) -> int:
    """Write an expression to one compressed Parquet file; returns its rows."""
    if isinstance(backend, DuckDB):
        backend.to_parquet(expression, path, compression="zstd")
        return pq.read_metadata(path).num_rows
    parts = path.with_name(f".{path.name}.parts")
    backend.to_parquet(expression, parts, compression="zstd", mode="overwrite")
    rows = _join(sorted(parts.glob("part-*.parquet")), path)
    shutil.rmtree(parts)
    return rows


def _join(parts: list[Path], path: Path) -> int:
    """Put part files into one, a row group at a time."""
    rows = 0
    with pq.ParquetWriter(path, pq.read_schema(parts[0]), compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    writer.write_table(table)
                    rows += table.num_rows
    return rows
