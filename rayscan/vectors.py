"""Correlation clustering of anybody's vectors: a Parquet file or a numpy matrix in, labels out.

No workspace and no Ray: one process holds the vectors (a million of 128 dimensions take half a gigabyte).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan.clustering import Calibration, calibrate, objective, solve, sweep
from rayscan.clustering.objective import check_embeddings
from rayscan.errors import ConfigError, DataError, FormatError, SchemaError

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Vectors:
    """Vectors (N, d), and the other columns of the file they came from (None for a matrix)."""

    values: F32
    columns: pa.Table | None


@dataclass(frozen=True)
class Partition:
    """A clustering and what it is worth."""

    threshold: float
    labels: NDArray[np.int64]
    objective: float
    seconds: float

    def summary(self) -> dict[str, Any]:
        sizes = np.sort(np.bincount(self.labels))[::-1] if len(self.labels) else np.zeros(0, np.int64)
        return {
            "threshold": self.threshold,
            "points": len(self.labels),
            "clusters": len(sizes),
            "singletons": int((sizes == 1).sum()),
            "largest": [int(size) for size in sizes[:10]],
            "objective": self.objective,
            "seconds": round(self.seconds, 2),
        }


def read(path: Path) -> Vectors:
    """Vectors from a Parquet file with a list column `vector`, or from an `.npy` matrix.

    float16, float32 and float64 are read. Raises ConfigError where there is no such file, SchemaError for
    another layout, FormatError and DataError for what is in it.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} is not there; give a Parquet file with a column `vector`, or a .npy matrix"
        )
    with path.open("rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        return Vectors(_matrix(_load_npy(path), path), None)
    if magic[:4] != b"PAR1":
        raise SchemaError(f"{path} is neither Parquet nor .npy")
    table = pq.read_table(path)
    if "vector" not in table.column_names:
        raise SchemaError(f"{path} has no column `vector`; it has {', '.join(table.column_names)}")
    return Vectors(_matrix(_lists(table["vector"], path), path), table.drop_columns(["vector"]))


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except ValueError as error:
        raise FormatError(str(path), f"cannot be read as a matrix of numbers ({error})") from None


def _lists(column: pa.ChunkedArray, path: Path) -> NDArray[Any]:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and pa.types.is_floating(kind.value_type)):
        raise SchemaError(f"{path}: column `vector` is {kind}, not a list of floats")
    if column.null_count:
        raise DataError(f"{path}: row {_first(column.is_null())} has no vector")
    width = len(column[0]) if len(column) else 0
    lengths = np.concatenate([chunk.value_lengths() for chunk in column.chunks] or [np.zeros(0, np.int64)])
    if (lengths != width).any():
        row = int(np.flatnonzero(lengths != width)[0])
        raise DataError(f"{path}: row {row} has {lengths[row]} numbers, the first has {width}")
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = np.concatenate(flat) if flat else np.empty(0, np.float32)
    return values.reshape(len(column), width)


def _first(mask: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(mask.to_numpy())[0])


def _matrix(values: NDArray[Any], path: Path) -> F32:
    if values.ndim != 2 or values.dtype.kind != "f":
        raise SchemaError(f"{path} holds {values.dtype} {values.shape}, not a matrix of floats")
    return np.ascontiguousarray(values, np.float32)


def partitions(
    vectors: F32, thresholds: Sequence[float], seed: int = 0, normalise: bool = False
) -> Iterator[Partition]:
    """Solve at each threshold; several share work."""
    points = check_embeddings(vectors, normalise=normalise)
    if len(thresholds) == 1:
        found = (solve(points, threshold, seed=seed) for threshold in thresholds)
    else:
        found = (labels for labels in sweep(points, thresholds, seed=seed))
    for threshold in thresholds:
        start = time.perf_counter()
        labels = next(found)
        seconds = time.perf_counter() - start
        yield Partition(threshold, labels, objective(points, labels, threshold), seconds)


def calibrated(vectors: Vectors, group: str, seed: int = 0, normalise: bool = False) -> Calibration:
    """A threshold from pairs of rows that share a value of column `group`, against pairs that do not."""
    if vectors.columns is None or group not in vectors.columns.column_names:
        raise ConfigError(
            f"--threshold auto learns from rows that belong together: name their column with --group "
            f"(there is no column `{group}`)"
        )
    codes = vectors.columns[group].combine_chunks().dictionary_encode().indices
    known = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    points = check_embeddings(vectors.values, normalise=normalise)
    return calibrate(points[known], codes.drop_null().to_numpy(), seed=seed)


def grid(text: str) -> list[float]:
    """Thresholds from "start:stop:step", stop left out, or from "0.2,0.4"."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = math.ceil(round((stop - start) / step, 9))
            return [round(start + i * step, 12) for i in range(count)]
        return [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--sweep takes start:stop:step, for example 0:1:0.01, not {text!r}") from None


def write(path: Path, vectors: Vectors, found: Sequence[Partition]) -> None:
    """Labels beside the columns that came with the vectors: `cluster`, or `cluster@0.40` for several."""
    table = (
        vectors.columns if vectors.columns is not None else pa.table({"row": np.arange(len(vectors.values))})
    )
    for one in found:
        name = "cluster" if len(found) == 1 else f"cluster@{one.threshold:g}"
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(one.labels))
    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part)
    part.replace(path)
