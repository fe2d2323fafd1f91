"""Captures to flows: one task a file, which writes straight into (period, bucket) files.

There is no shuffle. A task holds a bounded number of rows, sorts them into buckets and writes a bucket's
file when the buffer is full; the driver commits what many tasks wrote at once. A capture is known by the hash
of its content: delivered twice it counts once, delivered corrected it takes the old one's place.

Whatever cannot be read becomes rows of `rejects`; an error in one file never touches another.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayscan import schema
from rayscan.captures.columns import Reject, merge_rejects
from rayscan.captures.detect import read_capture
from rayscan.config import IngestConfig, RunConfig
from rayscan.errors import FormatError, RayscanError
from rayscan.keys import bucket_of, period_of
from rayscan.planning import CaptureFile, ingest_version
from rayscan.progress import track
from rayscan.stages.session import run_tasks
from rayscan.tables import CommitInfo, File, Table, Workspace, filesystem, key_name

_COMMIT_EVERY_S = 20.0
_COMMIT_CAPTURES = 64


@dataclass
class Ingested:
    """What a task made of one capture."""

    file: CaptureFile
    capture: str = ""
    format: str = "unknown"
    flows: int = 0
    duplicates: int = 0
    first: datetime | None = None
    last: datetime | None = None
    rejects: list[Reject] = field(default_factory=list)
    written: list[File] = field(default_factory=list)
    finished: bool = True  # False: something outside the file failed, so the next run tries again

    @property
    def rows_lost(self) -> int:
        return sum(reject.count for reject in self.rejects if reject.rows_lost)


@dataclass
class Counts:
    captures: int = 0
    same: int = 0
    flows: int = 0
    rejected: int = 0


def run(workspace: Workspace, config: RunConfig, due: list[CaptureFile], info: CommitInfo) -> Counts:
    """Read the captures that are due and commit their flows. Returns what was read."""
    counts = Counts()
    ledger = _Ledger(workspace, ingest_version(config), info)
    resources = config.resources

    def work(file: CaptureFile) -> Ingested:
        return ingest_file(workspace, file, config)

    tasks = run_tasks(
        work, due, cpus=resources.ingest_cpus, memory_mb=resources.ingest_memory_mb, ordered=True
    )
    batch: list[Ingested] = []
    since = time.monotonic()
    with track("ingest", len(due), "captures") as advance:
        read = 0
        for _, result in tasks:
            batch.append(result)
            read += result.flows
            if len(batch) >= _COMMIT_CAPTURES or time.monotonic() - since > _COMMIT_EVERY_S:
                ledger.commit(batch, counts)
                batch, since = [], time.monotonic()
            advance(1, f"{read:,} flows")
        ledger.commit(batch, counts)
    return counts


# ---------------------------------------------------------------------------------------------
# In the task
# ---------------------------------------------------------------------------------------------


def ingest_file(workspace: Workspace, file: CaptureFile, config: RunConfig) -> Ingested:
    """Read one capture and write its flows, without committing them. Never raises for a bad file."""
    result = Ingested(file)
    try:
        fs, path = filesystem(file.path)
        with fs.open_input_file(path) as stream:
            result.capture = _content_hash(stream)
            stream.seek(0)
            _read(stream, workspace.table("flows"), config, result)
    except FormatError as error:
        result.rejects.append(Reject(error.reason, error.offset, 1))
    except RayscanError as error:  # the file does not fit the settings
        result.rejects.append(Reject(str(error), None, 1))
    except OSError as error:
        result.rejects.append(Reject(f"cannot be read: {error.strerror or error}", None, 1))
        result.finished = False
    except Exception as error:  # a reader that fails on one file must not take the others along
        result.rejects.append(Reject(f"reader failed: {type(error).__name__}: {error}", None, 1))
        result.finished = False
    return result


def _content_hash(stream: BinaryIO) -> str:
    hasher = hashlib.blake2b(digest_size=10)
    while block := stream.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()


def _read(stream: BinaryIO, table: Table, config: RunConfig, result: Ingested) -> None:
    def write(rows: pa.Table, period: str, bucket: int) -> None:
        prefix = f"{result.capture}-{len(result.written):05d}"
        result.written.append(table.write(rows, {"period": period, "bucket": bucket}, prefix))

    buckets = _Buckets(config.ingest, write)
    result.format, batches = read_capture(stream, result.file.path, config.captures, config.ingest.batch_rows)
    try:
        for batch in batches:
            result.rejects = merge_rejects([*result.rejects, *batch.rejects])
            result.duplicates += batch.duplicates
            flows = batch.flows
            if flows.num_rows:
                _note_span(result, flows)
                flows = flows.append_column("capture", pa.repeat(result.capture, flows.num_rows))
                buckets.add(flows.select(schema.FLOWS.names))
    finally:  # what was read before an error is kept
        buckets.flush()


def _note_span(result: Ingested, flows: pa.Table) -> None:
    span = pc.min_max(flows["ts"]).as_py()
    result.flows += flows.num_rows
    result.first = min(result.first or span["min"], span["min"])
    result.last = max(result.last or span["max"], span["max"])


class _Buckets:
    """Rows waiting for their file, at most twice `batch_rows` of them."""

    def __init__(self, ingest: IngestConfig, write: Callable[[pa.Table, str, int], None]) -> None:
        self.ingest, self.write = ingest, write
        self.waiting: dict[tuple[str, int], list[pa.Table]] = {}
        self.rows = 0

    def add(self, flows: pa.Table) -> None:
        for key, rows in _by_key(flows, self.ingest):
            self.waiting.setdefault(key, []).append(rows)
        self.rows += flows.num_rows
        if self.rows > self.ingest.batch_rows:
            self._write_largest(self.ingest.batch_rows // 4)

    def _write_largest(self, keep: int) -> None:
        sizes = {key: sum(t.num_rows for t in parts) for key, parts in self.waiting.items()}
        for key in sorted(sizes, key=lambda k: (-sizes[k], k)):
            if self.rows <= keep:
                return
            self.write(pa.concat_tables(self.waiting.pop(key)), *key)
            self.rows -= sizes[key]

    def flush(self) -> None:
        self._write_largest(0)


def _by_key(flows: pa.Table, ingest: IngestConfig) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """Rows of each (period, bucket), in their order."""
    ts = flows["ts"].cast(pa.int64()).to_numpy()
    names, period = period_of(ts, ingest.period)
    bucket = bucket_of(flows["src"].to_numpy(), ingest.n_buckets)
    key = period * ingest.n_buckets + bucket
    order = np.argsort(key, kind="stable")
    flows, key = flows.take(order), key[order]
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(key)], strict=True):
        number = int(key[start])
        yield (names[number // ingest.n_buckets], number % ingest.n_buckets), flows.slice(start, stop - start)


# ---------------------------------------------------------------------------------------------
# On the driver
# ---------------------------------------------------------------------------------------------


class _Ledger:
    """Which capture stands in the tables, and the commits that change it.

    The order is flows, rejects, captures. A kill in between leaves a capture that still counts as due; its
    second reading finds the content committed and only completes the books.
    """

    def __init__(self, workspace: Workspace, version: int, info: CommitInfo) -> None:
        self.flows = workspace.table("flows")
        self.captures, self.rejects = workspace.table("captures"), workspace.table("rejects")
        self.version, self.info = version, info
        self.known: dict[str, str] = {
            row["path"]: row["capture"] for row in self.captures.read(columns=["path", "capture"]).to_pylist()
        }

    def commit(self, batch: list[Ingested], counts: Counts) -> None:
        if not batch:
            return
        same = self._commit_flows(batch)
        rows = [self._capture_row(result, same) for result in batch if result.finished]
        paths = [result.file.path for result in batch]
        self.rejects.replace_rows("path", paths, _reject_rows(batch), self.info)
        self.captures.replace_rows("path", paths, pa.Table.from_pylist(rows, schema.CAPTURES), self.info)
        for result in batch:
            counts.captures += 1
            counts.same += result.file.path in same
            counts.flows += 0 if result.file.path in same else result.flows
            counts.rejected += result.rows_lost

    def _commit_flows(self, batch: list[Ingested]) -> dict[str, str]:
        """One commit of all new content; path -> the path whose content is the same, for the others."""
        stored = self.flows.done([{"capture": result.capture} for result in batch])
        claimed = {capture: path for path, capture in self.known.items()}
        same: dict[str, str] = {}
        new: list[File] = []
        done: dict[str, int] = {}
        gone: set[str] = set()
        for result in (r for r in batch if r.finished):
            path, capture = result.file.path, result.capture
            name = key_name({"capture": capture})
            self._release(path, capture, gone, done)
            self.known[path] = capture
            if claimed.setdefault(capture, path) != path and (name in done or stored[name] == self.version):
                same[path] = claimed[capture]
            elif name not in done and stored[name] != self.version:
                claimed[capture] = path
                gone.add(capture)  # read with other settings before
                new += result.written
                done[name] = self.version
        old = [file.path for file in self.flows.files() if _capture_of(file) in gone] if gone else []
        if done:
            self.flows.replace_files(old, new, done, self.info)
        return same

    def _release(self, path: str, capture: str, gone: set[str], done: dict[str, int]) -> None:
        """Content that `path` had before and that no other path has goes away."""
        before = self.known.get(path)
        if before is None or before == capture:
            return
        if before not in [c for p, c in self.known.items() if p != path]:
            gone.add(before)
            done[key_name({"capture": before})] = 0

    def _capture_row(self, result: Ingested, same: dict[str, str]) -> dict[str, Any]:
        twin = same.get(result.file.path)
        return {
            "capture": result.capture,
            "path": result.file.path,
            "bytes": result.file.bytes,
            "modified": result.file.modified,
            "format": f"same content as {twin}" if twin else result.format,
            "flows": 0 if twin else result.flows,
            "rejects": 0 if twin else result.rows_lost,
            "duplicates": 0 if twin else result.duplicates,
            "first": result.first,
            "last": result.last,
        }


def _capture_of(file: File) -> str:
    return file.path.rpartition("/")[2].partition("-")[0]


def _reject_rows(batch: list[Ingested]) -> pa.Table:
    rows = [
        {
            "capture": result.capture,
            "path": result.file.path,
            "offset": reject.offset,
            "reason": reject.reason,
            "count": reject.count,
        }
        for result in batch
        for reject in result.rejects
    ]
    return pa.Table.from_pylist(rows, schema.REJECTS)
