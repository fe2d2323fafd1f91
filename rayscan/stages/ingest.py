"""Captures to flows: one task a file, which writes straight into (period, bucket) files.

There is no shuffle. A task holds a bounded number of rows, sorts them into buckets and writes a bucket's
file when the buffer is full; the driver commits what many tasks wrote at once. A capture is known by the hash
of its content: delivered twice it counts once, delivered corrected it takes the old one's place.

Whatever cannot be read becomes rows of `rejects`; an error in one file never touches another. What could be
read of a damaged file counts. A file that storage did not give, or that changed while it was read, is not
committed: what was known of it stays, and the next run reads it again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rayscan import schema
from rayscan.captures.columns import Reject, merge_rejects
from rayscan.captures.detect import read_capture, reader_failed
from rayscan.config import IngestConfig, RunConfig
from rayscan.errors import FormatError, RayscanError, TaskDied, WorkspaceError, why
from rayscan.keys import bucket_of, period_of
from rayscan.planning import PIPE, CaptureFile, ingest_version
from rayscan.progress import say, track
from rayscan.stages import metrics
from rayscan.stages.admission import Admit, admission, check_key
from rayscan.stages.session import run_tasks
from rayscan.storage import filesystem
from rayscan.tables import CommitInfo, File, Table, Workspace, fingerprint, key_name

_COMMIT_EVERY_S = 20.0
_COMMIT_CAPTURES = 64
_LEDGER = "ledger"  # each commit of flows records it, so that no two runs' commits can pass each other
_MANY_FILES, _SMALL_BYTES = 5_000, 100_000

_Row = dict[str, Any]


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
    ended: Reject | None = None  # why nothing was read, or nothing more
    written: list[File] = field(default_factory=list)
    finished: bool = True  # False: something outside the file failed, so the next run tries again

    def lost(self, kind: str) -> int:
        """Rows of one kind of `schema.LOST`."""
        return sum(reject.count for reject in self.rejects if reject.lost == kind)

    def end(self, reason: str, offset: int | None = None, finished: bool = True) -> None:
        text = reason.encode(errors="replace").decode()  # an exception may quote half a surrogate pair
        self.ended, self.finished = Reject(text, offset, 1), finished


@dataclass
class Counts:
    captures: int = 0
    same_content: int = 0  # as another capture: skipped
    flows: int = 0
    rejected: int = 0  # rows that could not be read
    left_out: int = 0  # rows that are no flows, or not by the settings
    incomplete: int = 0  # captures that were not read, or not to their end


def run(workspace: Workspace, config: RunConfig, due: list[CaptureFile], info: CommitInfo) -> Counts:
    """Read the captures that are due and commit their flows. Returns what was read."""
    check_key(workspace, config.ingest)
    counts = Counts()
    ledger = _Ledger(workspace, ingest_version(config), info)
    resources = config.resources

    def work(file: CaptureFile) -> Ingested:
        return ingest_file(workspace, file, config)

    tasks = run_tasks(
        work,
        due,
        cpus=resources.ingest_cpus,
        memory_mb=resources.ingest_memory_mb,
        ordered=True,
        failed=_given_up,
    )
    batch: list[Ingested] = []
    since = time.monotonic()
    with track("ingest", len(due), "captures") as advance:
        read = 0
        for _, result in tasks:
            batch.append(result)
            read += result.flows
            if len(batch) >= _COMMIT_CAPTURES or time.monotonic() - since > _COMMIT_EVERY_S:
                _commit(ledger, batch, counts, config.run)
                batch, since = [], time.monotonic()
            advance(1, f"{read:,} flows")
        _commit(ledger, batch, counts, config.run)
    if advice := advice_on(workspace.table("flows").files()):
        say(advice)
    return counts


def _given_up(file: CaptureFile, error: RayscanError) -> Ingested:
    """A capture that kills its reader costs nothing but itself; a fault of something else ends the run."""
    if not isinstance(error, TaskDied):
        raise error
    result = Ingested(file)
    result.end(f"not taken: {error}", None, False)
    return result


def _commit(ledger: _Ledger, batch: list[Ingested], counts: Counts, run: str) -> None:
    flows, rejected = counts.flows, counts.rejected
    ledger.commit(batch, counts)
    metrics.add("flows", run, counts.flows - flows)
    metrics.add("rejects", run, counts.rejected - rejected)


def advice_on(files: list[File]) -> str | None:
    """What to say of flows in many small files: a file costs as much time as some thousand flows."""
    size = sum(file.bytes for file in files) / max(len(files), 1)
    if len(files) < _MANY_FILES or size > _SMALL_BYTES:
        return None
    return (
        f"flows lie in {len(files):,} files of {size / 1e3:.0f} kB on average, and opening them takes most "
        "of the time; a new workspace with a smaller ingest.n_buckets, or captures that were put together "
        "before, would be faster"
    )


# ---------------------------------------------------------------------------------------------
# In the task
# ---------------------------------------------------------------------------------------------


def ingest_file(workspace: Workspace, file: CaptureFile, config: RunConfig) -> Ingested:
    """Read one capture and write its flows, without committing them. Raises WorkspaceError alone."""
    result = Ingested(file)
    admit = admission(workspace, config)
    try:
        fs, path = filesystem(file.path)
        before = fs.get_file_info(path)
        if before.type == pafs.FileType.Unknown:
            result.end(PIPE)
            return result
        with fs.open_input_file(path) as stream:
            result.file = replace(file, bytes=stream.size(), modified=before.mtime)
            result.capture = _content_hash(stream)
            stream.seek(0)
            _read_to_end(stream, workspace.table("flows"), config, admit, result)
            if _state(fs, path) != (stream.size(), before.mtime_ns, stream.metadata().get(b"ETag")):
                result.end("changed while it was read: not taken; the next run reads it again", None, False)
    except WorkspaceError:
        raise  # it is not the capture that is at fault
    except OSError as error:
        result.end(f"cannot be read: {why(error)}", None, False)
    except Exception as error:  # a reader that fails on one file must not take the others along
        result.end(reader_failed(error, config), None, False)
    return result


def _state(fs: pafs.FileSystem, path: str) -> tuple[int, int | None, bytes | None]:
    """What tells one content of a path from another without reading it; the last is S3's own hash."""
    info = fs.get_file_info(path)
    with fs.open_input_file(path) as stream:
        return stream.size(), info.mtime_ns, stream.metadata().get(b"ETag")


def _content_hash(stream: BinaryIO) -> str:
    hasher = hashlib.blake2b(digest_size=10)
    while block := stream.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()


def _read_to_end(stream: BinaryIO, table: Table, config: RunConfig, admit: Admit, result: Ingested) -> None:
    try:
        _read(stream, table, config, admit, result)
    except FormatError as error:
        result.end(error.reason, error.offset)
    except WorkspaceError:
        raise
    except RayscanError as error:  # the file does not fit the settings
        result.end(str(error).removeprefix(f"{result.file.path}: "))


def _read(stream: BinaryIO, table: Table, config: RunConfig, admit: Admit, result: Ingested) -> None:
    def write(rows: pa.Table, period: str, bucket: int) -> None:
        prefix = f"{result.capture}-{len(result.written):05d}"
        result.written.append(table.write(rows, {"period": period, "bucket": bucket}, prefix))

    buckets = _Buckets(config.ingest, write)
    result.format, batches = read_capture(stream, result.file.path, config.captures, config.ingest.batch_rows)
    try:
        for batch in map(admit, batches):
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

    Of the paths with one content, one carries its flows and rejects in the books; it is the one whose row has
    flows. The others are its twins, with none. Content without any flow is told of at each path.

    The order is flows, rejects, captures. A kill in between leaves a capture that still counts as due; its
    second reading finds the content committed and only completes the books.

    Everything is decided on the tables as they were when this run began, and its own commits since. Whatever
    another one writes meanwhile is a CommitConflict, also in `flows` beside the captures at hand: a content
    has one carrier among all paths, so two of these at once would each take the other's decisions for none.
    """

    def __init__(self, workspace: Workspace, version: int, info: CommitInfo) -> None:
        self.flows = workspace.table("flows")
        self.captures, self.rejects = workspace.table("captures"), workspace.table("rejects")
        self.version, self.info = version, info
        self.seen = {table.name: table.version() for table in (self.flows, self.rejects, self.captures)}
        rows = self.captures.read(columns=["path", "capture"], version=self.seen["captures"])
        self.known: dict[str, str] = {row["path"]: row["capture"] for row in rows.to_pylist()}

    def commit(self, batch: list[Ingested], counts: Counts) -> None:
        if not batch:
            return
        read = {result.file.path: result for result in batch if result.finished}
        touched = {self.known[path] for path in read if path in self.known}
        written = self._commit_flows(batch)
        before = self._where(self.captures, touched | {result.capture for result in read.values()})
        rows, told = self._books(read, before, written)
        told += [row for result in batch if not result.finished for row in _reject_rows(result)]
        paths = {row["path"] for row in rows} | {result.file.path for result in batch}
        self._replace(self.rejects, paths, told)
        self._replace(self.captures, {row["path"] for row in rows}, rows)
        for row in (row for row in rows if row["path"] in read):
            is_twin = not row["flows"] and read[row["path"]].flows > 0
            counts.same_content += is_twin
            counts.flows += row["flows"]
            counts.rejected += row["rejects"]
            counts.left_out += row["left_out"]
            counts.incomplete += read[row["path"]].ended is not None and not is_twin
        counts.captures += len(batch)
        counts.incomplete += len(batch) - len(read)

    def _commit_flows(self, batch: list[Ingested]) -> dict[str, str]:
        """One commit of all new content; content -> the path that it was read from."""
        seen = self.seen["flows"]
        stored = self.flows.done([{"capture": result.capture} for result in batch], seen)
        new: list[File] = []
        done: dict[str, int] = {}
        gone: set[str] = set()
        written: dict[str, str] = {}
        for result in (r for r in batch if r.finished):
            path, capture = result.file.path, result.capture
            name = key_name({"capture": capture})
            self._release(path, capture, gone, done)
            self.known[path] = capture
            if done.get(name, stored[name]) != self.version:
                written[capture] = path
                gone.add(capture)  # read with other settings before
                new += result.written
                done[name] = self.version
        if done:
            files = self.flows.files(version=seen) if gone else []
            old = [file.path for file in files if _capture_of(file) in gone]
            done[_LEDGER] = fingerprint(self.info.run, seen)
            self.seen["flows"] = self.flows.replace_files(old, new, done, self.info, seen)
        return written

    def _replace(self, table: Table, paths: set[str], rows: list[_Row]) -> None:
        found, seen = pa.Table.from_pylist(rows, table.schema), self.seen[table.name]
        self.seen[table.name] = table.replace_rows("path", paths, found, self.info, seen)

    def _where(self, table: Table, captures: set[str]) -> list[_Row]:
        rows = table.read(version=self.seen[table.name])
        wanted = pa.array(sorted(captures), pa.string())
        found: list[_Row] = rows.filter(pc.is_in(rows["capture"], wanted)).to_pylist()
        return found

    def _release(self, path: str, capture: str, gone: set[str], done: dict[str, int]) -> None:
        """Content that `path` had before and that no other path has goes away."""
        before = self.known.get(path)
        if before is None or before == capture:
            return
        if before not in [c for p, c in self.known.items() if p != path]:
            gone.add(before)
            done[key_name({"capture": before})] = 0

    def _books(
        self, read: dict[str, Ingested], before: list[_Row], written: dict[str, str]
    ) -> tuple[list[_Row], list[_Row]]:
        """The rows of `captures` that are new or other than `before`, and the rows of `rejects` for these.

        The carrier of a content is the path that it was just written from; else the one that carried it; else
        one that was just read; else a twin, which takes over what the books said of the last carrier.
        """
        holders: dict[str, dict[str, _Row]] = {}
        for row in before:
            if row["path"] not in read:
                holders.setdefault(row["capture"], {})[row["path"]] = row
        for path, result in read.items():
            holders.setdefault(result.capture, {})[path] = _capture_row(result)
        carried = {row["capture"]: row for row in before if row["flows"]}
        rows: list[_Row] = []
        told: list[_Row] = []
        for capture, group in holders.items():
            last = carried.get(capture)
            fresh = [path for path in group if path in read]
            if last is None and not fresh:
                continue
            choice = [written.get(capture), last and last["path"], *fresh, *sorted(group)]
            carrier = next(path for path in choice if path in group)
            figures = group[carrier] if carrier in read else last
            assert figures is not None
            for path, row in group.items():
                is_twin = figures["flows"] and path != carrier
                if is_twin:
                    row = _twin(row, carrier)
                elif path not in read:
                    row = {**figures, **{name: row[name] for name in ("path", "bytes", "modified")}}
                if path in read or row != group[path]:
                    rows.append(row)
                    told += [] if is_twin else self._rejects(path, row["capture"], read, carrier)
        return rows, told

    def _rejects(self, path: str, capture: str, read: dict[str, Ingested], carrier: str) -> list[_Row]:
        """What `path` tells of its content: as it was read there, or else at the carrier, or else before."""
        result = read.get(path) or read.get(carrier)
        known = self._where(self.rejects, {capture}) if result is None else _reject_rows(result)
        return [{**row, "path": path} for row in known if row["path"] == known[0]["path"]]  # two after a kill


def _capture_row(result: Ingested) -> _Row:
    return {
        "capture": result.capture,
        "path": result.file.path,
        "bytes": result.file.bytes,
        "modified": result.file.modified,
        "format": result.format,
        "flows": result.flows,
        "rejects": result.lost("rows"),
        "left_out": result.lost("left out"),
        "duplicates": result.duplicates,
        "first": result.first,
        "last": result.last,
    }


def _twin(row: _Row, carrier: str) -> _Row:
    figures = dict.fromkeys(("flows", "rejects", "left_out", "duplicates"), 0)
    return {**row, **figures, "format": f"same content as {carrier}"}


def _capture_of(file: File) -> str:
    return file.path.rpartition("/")[2].partition("-")[0]


def _reject_rows(result: Ingested) -> list[dict[str, Any]]:
    found = [(reject.lost, reject) for reject in result.rejects]
    if not result.finished:  # nothing of it is committed
        found = []
    if result.ended is not None:
        nothing = not result.finished or not (result.flows or result.rejects)
        found.append(("file" if nothing else "rest", result.ended))
    return [
        {
            "capture": result.capture if result.finished else "",
            "path": result.file.path,
            "offset": reject.offset,
            "reason": reject.reason,
            "count": reject.count,
            "lost": lost,
        }
        for lost, reject in found
    ]
