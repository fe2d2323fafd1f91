"""Correlation clustering of anybody's vectors: a Parquet file or a numpy matrix in, labels out.

No workspace. One process holds the vectors (a million of 128 dimensions take half a gigabyte). A single
threshold is solved here; for many vectors in blocks, which takes half the time and tells how far it is. A
sweep that takes long enough goes on in Ray tasks: its thresholds form runs of neighbours, and work is shared
within a run only. So the labels depend on the vectors, the thresholds and the seed, and not on where runs
are solved or how many at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan.clustering import Calibration, calibrate, canonical, objective, solve, solve_blocked
from rayscan.clustering.multilevel import content_order
from rayscan.clustering.objective import F32, check_embeddings
from rayscan.clustering.runs import Partition, runs, solve_run
from rayscan.errors import ConfigError, DataError, FormatError, SchemaError

RAY_PAYS_S = 15.0
"""Seconds that Ray tasks must save: starting a local Ray and its workers takes some ten."""

LARGE = 100_000
"""Above this many vectors a single threshold is solved in blocks."""

_BATCH = 65_536  # rows read, or solved in one block
_MOST_THRESHOLDS = 10_000


@dataclass(frozen=True)
class Vectors:
    """Unit vectors (N, d), and the other columns of the file they came from (None for a matrix)."""

    values: F32
    columns: pa.Table | None


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read(path: Path, normalise: bool = False) -> Vectors:
    """Vectors from a Parquet file with a list column `vector`, or from an `.npy` matrix.

    float16, float32 and float64 are read, batch by batch. Each vector must have length 1, or with
    `normalise` any but 0. Raises ConfigError where there is no such file, SchemaError for another layout,
    FormatError for a damaged file, and DataError that names the first row at fault.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; "
            "give a Parquet file with a column `vector`, or a .npy matrix"
        )
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic == b"\x93NUMPY":
            values, columns = _matrix(path), None
        elif magic[:4] == b"PAR1":
            values, columns = _parquet(path)
        else:
            raise SchemaError(f"{path} is neither Parquet nor .npy")
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        raise FormatError(str(path), f"cannot be read ({error})") from None
    try:
        return Vectors(check_embeddings(values, normalise=normalise), columns)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _matrix(path: Path) -> F32:
    found = np.load(path, mmap_mode="r", allow_pickle=False)  # cast on the way in: one copy, as float32
    if found.ndim != 2 or found.dtype.kind != "f":
        raise SchemaError(f"{path} holds {found.dtype} {found.shape}, not a matrix of floats")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused by row
        return np.array(found, np.float32, order="C")


def _parquet(path: Path) -> tuple[F32, pa.Table]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SchemaError(f"{path} has more than one column `{twice[0]}`; rename one")
        if "vector" not in names:
            raise SchemaError(f"{path} has no column `vector`; it has {', '.join(names)}")
        kind = file.schema_arrow.field("vector").type
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and pa.types.is_floating(kind.value_type)):
            raise SchemaError(f"{path}: column `vector` is {kind}, not a list of floats")
        values, row = np.empty((file.metadata.num_rows, 0), np.float32), 0
        for batch in file.iter_batches(_BATCH, columns=["vector"]):
            column = batch.column(0)
            column = column.storage if isinstance(column, pa.ExtensionArray) else column
            if row == 0:
                width = len(column[0]) if column[0].is_valid else 0
                values = np.empty((len(values), width), np.float32)
            with np.errstate(over="ignore"):
                values[row : row + len(column)] = _rows(column, values.shape[1], row, path)
            row += len(column)
        return values, file.read([name for name in names if name != "vector"])


def _rows(column: pa.Array, width: int, start: int, path: Path) -> NDArray[Any]:
    """Numbers (rows, width) of one batch of lists; `start` is its first row."""
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{path}: row {start + row} has no vector ({column.null_count} such rows or more)")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        row = int(np.argmax(lengths != width))
        raise DataError(f"{path}: row {start + row} has {lengths[row]} numbers, the first has {width}")
    flat: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), width)


# ---------------------------------------------------------------------------------------------
# Thresholds
# ---------------------------------------------------------------------------------------------


def number(text: str) -> float:
    """A threshold as it is given to --threshold."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--threshold takes a similarity, for example 0.4, or auto, not {text!r}")
    return value


def grid(text: str) -> list[float]:
    """Thresholds from "start:stop:step", stop left out, or from "0.2,0.4"; rising, none twice."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = math.ceil(round((stop - start) / step, 9))
            if not 0 < count <= _MOST_THRESHOLDS:
                raise ConfigError(
                    f"--sweep {text} is {max(count, 0):,} thresholds; it takes 1 to {_MOST_THRESHOLDS:,}"
                )
            found = [start + i * step for i in range(count)]
        else:
            found = [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"--sweep takes start:stop:step, for example 0:1:0.01, not {text!r}") from None
    return sorted({round(value, 12) for value in found})


def calibrated(vectors: Vectors, group: str, seed: int = 0) -> Calibration:
    """A threshold from pairs of rows that share a value of column `group`, against pairs that do not."""
    if vectors.columns is None or group not in vectors.columns.column_names:
        raise ConfigError(
            "--threshold auto learns from rows that belong together: name their column with --group, or "
            f"give --threshold a number (there is no column `{group}`)"
        )
    try:
        codes = vectors.columns[group].combine_chunks().dictionary_encode().indices
    except pa.ArrowException:
        kind = vectors.columns.schema.field(group).type
        raise ConfigError(f"--group {group} is a column of {kind}; take one of plain values") from None
    known = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    groups = codes.drop_null().to_numpy()
    members = np.bincount(groups)
    if len(members) < 2 or members.max() < 2:
        raise DataError(
            f"--threshold auto needs rows that share a value of column `{group}`, and rows that do not; "
            "name another column with --group, or give --threshold a number"
        )
    try:
        return calibrate(vectors.values[known], groups, seed=seed)
    except DataError:
        raise DataError(
            f"rows that share a value of column `{group}` are not more alike than others, so --threshold "
            "auto has nothing to learn from; give a number"
        ) from None


# ---------------------------------------------------------------------------------------------
# Solving
# ---------------------------------------------------------------------------------------------


def partitions(
    points: F32,
    thresholds: Sequence[float],
    seed: int = 0,
    address: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Partition]:
    """Solve at each threshold, in rising order.

    The first run of several is solved here and timed. If it pays the others are Ray tasks, on the cluster at
    `address` or on a local Ray, to which the vectors travel once. `note` is told how far a long search is.
    """
    if len(thresholds) == 1:
        yield _solve_one(points, thresholds[0], seed, note)
        return
    first, *others = runs(thresholds)
    start = time.perf_counter()
    yield from solve_run(points, first, seed)
    left = (time.perf_counter() - start) * len(others)
    places = len(others) if address else len(os.sched_getaffinity(0))  # a cluster may have any number
    if left * (1 - 1 / max(1, min(places, len(others)))) > RAY_PAYS_S:
        from rayscan.stages.sweep import in_tasks

        yield from in_tasks(points, others, seed, address)
    else:
        for run in others:
            yield from solve_run(points, run, seed)


def _solve_one(points: F32, threshold: float, seed: int, note: Callable[[str], None]) -> Partition:
    start = time.perf_counter()
    if len(points) > LARGE:
        labels, left = _solve_large(points, threshold, seed, note)
    else:
        labels, left = solve(points, threshold, seed=seed), 0.0
    seconds = time.perf_counter() - start
    return Partition(threshold, labels, objective(points, labels, threshold), seconds, left)


def _solve_large(
    points: F32, threshold: float, seed: int, note: Callable[[str], None]
) -> tuple[NDArray[np.int64], float]:
    """Blocks of rows in an order that means nothing: of similar rows, as in sorted files, they lose."""
    order = content_order(points, seed)
    blocks = np.split(order, range(_BATCH, len(order), _BATCH))
    passes = itertools.count()

    def telling(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterator[Any]:
        number = next(passes)
        name = f"pass {number}" if number else "first solutions"
        for i, item in enumerate(items, 1):
            yield task(item, shared)
            note(f"{name}: {i} of {len(items)} blocks")

    found = solve_blocked(lambda i: points[blocks[i]], len(blocks), threshold, seed=seed, map=telling)
    labels = np.empty(len(points), np.int64)
    labels[order] = np.concatenate(found.labels)
    if stopped := found.stopped():
        note(stopped)
    return canonical(labels), found.left


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def check_out(path: Path, source: Path) -> None:
    """Raise ConfigError, before any work, where labels could not be written."""
    if path.exists() and path.samefile(source):
        raise ConfigError(f"--out {path} is the file of the vectors itself; give another")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"--out {path} is a folder" if path.is_dir() else f"--out: there is no folder {path.parent}"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--out: the folder {path.parent} is not writable")


def label_name(one: Partition, several: bool) -> str:
    return f"cluster@{one.threshold:.12g}" if several else "cluster"


def write(path: Path, vectors: Vectors, found: Sequence[Partition]) -> list[str]:
    """Labels beside the columns that came with the vectors: `cluster`, or `cluster@0.4` for several.

    Returns the names of columns that had one of these names and were left out for it.
    """
    table = (
        vectors.columns if vectors.columns is not None else pa.table({"row": np.arange(len(vectors.values))})
    )
    labels = {label_name(one, len(found) > 1): one.labels for one in found}
    replaced = [name for name in table.column_names if name in labels]
    table = table.drop_columns(replaced)
    for name, values in labels.items():
        table = table.append_column(name, pa.array(values))
    part = path.with_name(f".{path.name}.part")
    try:
        pq.write_table(table, part)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    return replaced
