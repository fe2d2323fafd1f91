"""Where tables lie and how a commit happens. No other module knows either.

A workspace is a folder or an `s3://bucket/prefix`. Its tables are Delta tables. Workers write Parquet files
that nobody sees yet (`Table.write`) and hand the descriptions back; the driver makes them visible in one
atomic commit (`append`, `replace`). What a crash leaves behind is invisible and goes with `vacuum`.

Every unit of work has a key (period, bucket, ...) and a fingerprint of what it was made from (settings and
input files). The commit that replaces a key's rows records the fingerprint as a Delta application
transaction, so "done" is one lookup, holds for keys that came out empty, and makes two writers of one key
conflict even where neither has anything to remove.

Traded: a commit goes through the driver alone, so a stage commits per period, not per file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import Schema as DeltaSchema
from deltalake.transaction import AddAction, RemoveAction

import rayscan
from rayscan import keys, schema
from rayscan.config import IngestConfig, without_credentials
from rayscan.errors import CommitConflict, ConfigError, Gone, SchemaError, WorkspaceError
from rayscan.storage import delta_options, filesystem, is_remote, storage_errors

Key = Mapping[str, str | int]
"""Values of a table's key columns, e.g. {"period": "2024-03", "bucket": 7}."""

_PARTITIONS: dict[str, dict[str, pa.DataType]] = {
    "flows": {"period": pa.string(), "bucket": pa.int32()},
    "sequences": {"period": pa.string(), "bucket": pa.int32()},
    "embeddings": {"model": pa.string(), "period": pa.string(), "bucket": pa.int32()},
    "clusters": {"run": pa.string(), "period": pa.string()},
    "campaigns": {"run": pa.string(), "period": pa.string()},
    "scanners": {"list": pa.string()},
    "captures": {},
    "rejects": {},
    "leases": {"name": pa.string()},
}
_SCHEMAS: dict[str, pa.Schema] = {
    "flows": schema.FLOWS,
    "sequences": schema.SEQUENCES,
    "embeddings": schema.EMBEDDINGS,
    "clusters": schema.CLUSTERS,
    "campaigns": schema.CAMPAIGNS,
    "scanners": schema.SCANNERS,
    "captures": schema.CAPTURES,
    "rejects": schema.REJECTS,
    "leases": schema.LEASES,
}
TABLE_NAMES = tuple(_SCHEMAS)
_LAYOUT = ("period", "n_buckets", "addresses")
"""What of the settings a workspace is laid out by, for good."""
_ATTEMPTS = 10
_LONGEST_PAUSE_S = 2.0
_TOKEN = "rayscan.commit"
_CHECKPOINT_EVERY = 10  # commits: whoever opens a table reads all those after the last checkpoint
_ROW_GROUP = 131_072  # rows: small enough to read part of a file, large enough to compress well


def fingerprint(*parts: str | int | Sequence[str]) -> int:
    """63-bit number that stands for settings and inputs; equal on every machine."""
    text = json.dumps([list(p) if not isinstance(p, str | int) else p for p in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def key_name(key: Key) -> str:
    """`period=2024-03/bucket=7`, keys in the order given."""
    return "/".join(f"{name}={value}" for name, value in key.items())


# ---------------------------------------------------------------------------------------------
# Workspaces
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    """A folder or prefix with tables, models and run results. Cheap to build and to send to workers."""

    uri: str

    @classmethod
    def open(cls, uri: str | Path, ingest: IngestConfig | None = None) -> Workspace:
        """The workspace at `uri`; with `ingest`, created when missing and checked against its layout.

        Raises WorkspaceError when it is missing, is not a workspace, or is of a newer version;
        ConfigError when it is laid out by another period or number of buckets.
        """
        workspace = cls.at(uri)
        facts = workspace.facts()
        if facts is None:
            if ingest is None:
                raise WorkspaceError(
                    f"{workspace.uri} is no rayscan workspace (it has no workspace.json); "
                    "`rayscan run` or `rayscan ingest` creates one"
                )
            facts = workspace._create(ingest)
        workspace._check(facts, ingest)
        return workspace

    @classmethod
    def at(cls, uri: str | Path) -> Workspace:
        """The place that `uri` names, whatever is there; of a folder, its path from the root.

        Raises ConfigError for a URI with credentials in it.
        """
        text = without_credentials(str(uri)).removeprefix("file://")
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        return cls(text.rstrip("/"))

    @cached_property
    def _storage(self) -> tuple[pafs.FileSystem, str]:
        return filesystem(self.uri)

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}  # a file system may carry credentials: workers build their own

    def facts(self) -> dict[str, Any] | None:
        """workspace.json, or None where there is none."""
        try:
            return dict(json.loads(self.read_bytes("workspace.json")))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise WorkspaceError(f"{self.uri}/workspace.json is damaged: {error}") from None

    @property
    def addresses(self) -> str:
        """How addresses are stored: raw, or as pseudonyms."""
        return str((self.facts() or {}).get("addresses", "raw"))

    def _create(self, ingest: IngestConfig) -> dict[str, Any]:
        """Lay the workspace out; its facts. They are those of another run if that one did so just before.

        The table of flows decides: it is made in one commit, which one of several makers comes through with.
        """
        wanted = {name: str(getattr(ingest, name)) for name in _LAYOUT}
        found = wanted | self.table("flows").layout(wanted)
        facts = {
            "schema_version": schema.VERSION,
            "created_by": f"rayscan {rayscan.__version__}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "period": found["period"],
            "n_buckets": int(found["n_buckets"]),
            "bucket_hash": keys.HASH_NAME,
            "addresses": found["addresses"],
        }
        self.write_bytes("workspace.json", json.dumps(facts, indent=2).encode())
        return facts

    def _check(self, facts: Mapping[str, Any], ingest: IngestConfig | None) -> None:
        version = int(facts.get("schema_version", 0))
        if version > schema.VERSION:
            raise WorkspaceError(
                f"{self.uri} was written by {facts.get('created_by', 'a newer rayscan')} with tables of "
                f"version {version}; this rayscan {rayscan.__version__} knows version {schema.VERSION}. "
                "Upgrade rayscan, or use another workspace"
            )
        if version < schema.VERSION:
            raise WorkspaceError(
                f"{self.uri} has tables of version {version}, and rayscan {rayscan.__version__} writes "
                f"version {schema.VERSION}: run `rayscan upgrade -w {self.uri}` (see --dry-run)"
            )
        if ingest is None:
            return
        facts = {"addresses": "raw", **facts}  # what was there before the setting
        for name in _LAYOUT:
            if facts[name] != getattr(ingest, name):
                raise ConfigError(
                    f"{self.uri} is laid out with ingest.{name}={facts[name]}, not {getattr(ingest, name)}; "
                    f"set ingest.{name}={facts[name]}, or use another workspace"
                )

    def table(self, name: str) -> Table:
        return Table(self, name)

    # -- plain files: models, reports, run facts

    def read_bytes(self, path: str) -> bytes:
        """Content of a file of the workspace. Raises FileNotFoundError."""
        fs, root = self._storage
        with storage_errors(f"read {self.url(path)}"):
            try:
                with fs.open_input_stream(f"{root}/{path}", compression=None) as stream:
                    return bytes(stream.readall())
            except NotADirectoryError as error:
                raise FileNotFoundError(str(error)) from None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file as a whole: readers see the old one or the new one."""
        fs, root = self._storage
        target = f"{root}/{path}"
        with storage_errors(f"write {self.url(path)}"):
            if not isinstance(fs, pafs.LocalFileSystem):
                with fs.open_output_stream(target, compression=None) as stream:
                    stream.write(data)
                return
            _make_folder(Path(target).parent)
            part = Path(f"{target}.{uuid.uuid4().hex[:8]}.part")
            try:
                part.write_bytes(data)
                part.replace(target)
            except OSError:
                part.unlink(missing_ok=True)
                raise

    def read_json(self, path: str) -> dict[str, Any] | None:
        """A JSON file of the workspace, or None where there is none."""
        try:
            return dict(json.loads(self.read_bytes(path)))
        except FileNotFoundError:
            return None

    def write_json(self, path: str, data: Mapping[str, Any]) -> None:
        self.write_bytes(path, json.dumps(data, indent=1, allow_nan=False).encode())

    def delete(self, path: str) -> None:
        """Remove a folder of the workspace with all that is in it; nothing happens when it is not there."""
        fs, root = self._storage
        with storage_errors(f"remove {self.url(path)}"):
            if fs.get_file_info(f"{root}/{path}").type == pafs.FileType.Directory:
                fs.delete_dir(f"{root}/{path}")

    def remove(self, path: str) -> None:
        """Remove a file of the workspace; nothing happens when it is not there."""
        fs, root = self._storage
        with storage_errors(f"remove {self.url(path)}"):
            if fs.get_file_info(f"{root}/{path}").type == pafs.FileType.File:
                fs.delete_file(f"{root}/{path}")

    def location(self, path: str) -> tuple[pafs.FileSystem, str]:
        """File system and full path of a place in the workspace, for libraries that write by themselves."""
        fs, root = self._storage
        return fs, f"{root}/{path}"

    def url(self, path: str) -> str:
        """Full path or URI of a file of the workspace, for people."""
        return f"{self.uri}/{path}"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkspaceError(f"cannot create the folder {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A Parquet file of a table: written by a worker, or listed from the table."""

    path: str  # relative to the table
    partition: tuple[tuple[str, str], ...]
    rows: int
    bytes: int
    stats: str = ""

    @property
    def key(self) -> dict[str, str]:
        return dict(self.partition)


def _anybody_may() -> None:
    """What a commit asks that needs no lease."""


@dataclass(frozen=True)
class CommitInfo:
    """What a commit says of its origin; and `check`, which raises once that may commit no more."""

    run: str
    config_hash: str
    input_version: str = ""
    check: Callable[[], None] = _anybody_may

    def as_dict(self) -> dict[str, str]:
        return {
            "rayscan.run": self.run,
            "rayscan.config": self.config_hash,
            "rayscan.input": self.input_version,
            "rayscan.version": rayscan.__version__,
        }


@dataclass(frozen=True)
class _State:
    """What a commit rests on: nobody else may change it in between."""

    files: tuple[File, ...]  # that the commit removes
    recorded: tuple[int | None, ...]  # fingerprints of its keys


class Table:
    """One table of a workspace."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self.name = name
        self.schema: pa.Schema = _SCHEMAS[name]
        self.partition_types = _PARTITIONS[name]

    # -- worker side

    def write(self, data: pa.Table, key: Key, prefix: str = "part") -> File:
        """Write rows to a new file that no reader sees before it is committed. Empty tables are refused.

        The name ends in random digits, so that a retried task cannot collide with its first try.
        """
        if data.num_rows == 0:
            raise ValueError("an empty file cannot be committed; replace the key with no files instead")
        partition = tuple((name, str(key[name])) for name in self.partition_types)
        folder = "/".join(f"{name}={value}" for name, value in partition)
        path = f"{folder}/{prefix}-{uuid.uuid4().hex[:12]}.parquet".lstrip("/")
        fs, root = self.workspace.location(self.name)
        collected: list[Any] = []
        data = _conform(data, self.schema, self.name)
        with storage_errors(f"write {self.url(path)}"):
            if isinstance(fs, pafs.LocalFileSystem):
                _make_folder(Path(f"{root}/{path}").parent)
            try:
                pq.write_table(
                    data,
                    f"{root}/{path}",
                    filesystem=fs,
                    compression="zstd",
                    row_group_size=_ROW_GROUP,
                    metadata_collector=collected,
                )
            except RuntimeError as error:  # of asking for metadata after a write that failed
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            size = fs.get_file_info(f"{root}/{path}").size
        return File(path, partition, data.num_rows, size, _stats(data.num_rows, collected[0]))

    def read_files(self, files: Iterable[File], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of these files, file after file in the order given, without partition columns.

        Raises Gone for a file that is not there any more, WorkspaceError for one that is damaged or cannot be
        had.
        """
        fs, root = self.workspace.location(self.name)
        wanted = self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        parts = []
        for file in files:
            with self._reading(file):  # with a schema, columns that came after a file was written are null
                rows = pq.read_table(
                    f"{root}/{file.path}",
                    columns=wanted.names,
                    filesystem=fs,
                    partitioning=None,
                    schema=wanted,
                )
                parts.append(rows.cast(wanted))
        return pa.concat_tables(parts) if parts else wanted.empty_table()

    def read_rows(self, file: File, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows start to stop - 1 of one file; only the row groups that hold them are read.

        Raises WorkspaceError as `read_files` does.
        """
        fs, root = self.workspace.location(self.name)
        wanted = pa.schema([self.schema.field(c) for c in columns])
        with self._reading(file), pq.ParquetFile(fs.open_input_file(f"{root}/{file.path}")) as parquet:
            sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            ends = list(itertools.accumulate(sizes))
            groups = [g for g, end in enumerate(ends) if end > start and end - sizes[g] < stop]
            first = ends[groups[0]] - sizes[groups[0]] if groups else 0
            rows = parquet.read_row_groups(groups, columns=wanted.names).cast(wanted)
        return rows.slice(start - first, stop - start)

    def url(self, path: str) -> str:
        """Full path or URI of a file of the table, for people."""
        return self.workspace.url(f"{self.name}/{path}")

    @contextmanager
    def _reading(self, file: File) -> Iterator[None]:
        try:
            with storage_errors(f"read {self.url(file.path)}"):
                yield
        except FileNotFoundError as error:
            raise Gone(f"{self.url(file.path)} is gone: vacuumed, or deleted by hand") from error
        except pa.ArrowException as error:
            raise WorkspaceError(f"{self.url(file.path)} is damaged: {error}") from error

    def records(self, files: Iterable[File], column: str) -> bool:
        """Has every row of these files a value in this column? Told by their footers alone.

        Raises WorkspaceError as `read_files` does.
        """
        fs, root = self.workspace.location(self.name)
        for file in files:
            with self._reading(file), pq.ParquetFile(fs.open_input_file(f"{root}/{file.path}")) as parquet:
                if any(_nulls(parquet.metadata.row_group(g), column) for g in range(parquet.num_row_groups)):
                    return False
        return True

    # -- driver side: looking

    def version(self) -> int:
        """Number of the newest commit; -1 when the table does not exist yet."""
        delta = self._load()
        return -1 if delta is None else int(delta.version())

    def files(self, where: Key | None = None, version: int | None = None) -> list[File]:
        """Files whose partition matches, sorted by path: key by key, and captures in a fixed order."""
        delta = self._load(version)
        return [] if delta is None else self._files(delta, where or {})

    def committed(self, where: Key) -> datetime | None:
        """When the newest of the files that fit was committed, UTC; None where there are none."""
        delta = self._load()
        listed = [] if delta is None else pa.table(delta.get_add_actions(flatten=True)).to_pylist()
        wanted = [(f"partition.{name}", str(value)) for name, value in where.items()]
        times = [
            row["modification_time"]
            for row in listed
            if all(str(row[name]) == value for name, value in wanted)
        ]
        return datetime.fromtimestamp(max(times) / 1000, UTC) if times else None

    def read(
        self, where: Key | None = None, columns: Sequence[str] | None = None, version: int | None = None
    ) -> pa.Table:
        """Rows whose partition matches, with their partition columns, at a version or the newest.

        Raises Gone where the files or the log of that version have been cleaned up.
        """
        parts = []
        names = list(self.partition_types) + self.schema.names if columns is None else list(columns)
        full = pa.schema([pa.field(n, t) for n, t in self.partition_types.items()] + list(self.schema))
        for file in self.files(where, version):
            rows = self.read_files([file], [n for n in names if n in self.schema.names])
            for name, kind in self.partition_types.items():
                value = pa.scalar(file.key[name]).cast(kind)
                rows = rows.append_column(name, pa.repeat(value, file.rows))
            parts.append(rows.select(names))
        wanted = pa.schema([full.field(n) for n in names])
        return pa.concat_tables([p.cast(wanted) for p in parts]) if parts else wanted.empty_table()

    def is_done(self, key: Key, made_from: int) -> bool:
        """Was this key last committed with exactly this fingerprint?"""
        return self.done([key])[key_name(key)] == made_from

    def done(self, keys: Iterable[Key], version: int | None = None) -> dict[str, int | None]:
        """Fingerprint of each key's last commit, up to a version, by `key_name`; None where none was."""
        delta = self._load(version)
        names = [key_name(key) for key in keys]
        return {name: None if delta is None else delta.transaction_version(name) for name in names}

    # -- driver side: committing

    def layout(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """The layout that the table says it has; it is made with the one wanted where it is not there."""
        properties = self._create(wanted).metadata().configuration
        named = {name: properties.get(f"rayscan.{name}") for name in wanted}
        return {name: value for name, value in named.items() if value is not None}

    def append(self, files: Iterable[File], done: Mapping[str, int], info: CommitInfo) -> int:
        """Add files and record `done` (key name -> fingerprint) in one commit; the new version.

        Raises CommitConflict when another writer has recorded one of the keys since this call began.
        """
        return self._commit(list(files), lambda _: False, done, info, None)

    def replace(
        self,
        keys: Iterable[Key],
        files: Iterable[File],
        done: Mapping[str, int],
        info: CommitInfo,
        read_version: int | None = None,
    ) -> int:
        """Replace all rows of `keys` by `files` in one commit; the new version.

        `read_version` is the version the caller decided on; when another writer has changed one of the keys
        since, nothing is committed and CommitConflict is raised. Files outside `keys` are refused.
        """
        wanted = [{k: str(v) for k, v in key.items()} for key in keys]

        def belongs(file: File) -> bool:
            return any(key.items() <= file.key.items() for key in wanted)

        files = list(files)
        for file in files:
            if not belongs(file):
                raise ValueError(f"{file.path} does not belong to a key that is replaced")
        return self._commit(files, belongs, done, info, read_version)

    def replace_rows(
        self,
        column: str,
        values: Iterable[str],
        rows: pa.Table,
        info: CommitInfo,
        read_version: int | None = None,
    ) -> int:
        """Replace the rows where `column` is one of `values`: for small unpartitioned tables only.

        Raises CommitConflict when anybody has written the table since `read_version`, or since this began.
        """
        version = self.version() if read_version is None else read_version
        old = self.read(version=version)
        keep = old.filter(pc.invert(pc.is_in(old[column], pa.array(list(values), pa.string()))))
        merged = pa.concat_tables([keep, _conform(rows, self.schema, self.name)])
        files = [self.write(merged, {})] if merged.num_rows else []
        return self.replace([{}], files, {f"rows of {self.name}": version + 1}, info, version)

    def replace_files(
        self,
        old: Iterable[str],
        files: Iterable[File],
        done: Mapping[str, int],
        info: CommitInfo,
        read_version: int | None = None,
    ) -> int:
        """Replace single files, by path: a corrected capture takes the place of its first delivery.

        `read_version` as for `replace`.
        """
        gone = set(old)
        return self._commit(list(files), lambda file: file.path in gone, done, info, read_version)

    def lacking(self) -> list[str]:
        """Columns that an older rayscan did not know, so that the table lacks them. Raises SchemaError.

        Only columns that may be null can come later; any other difference is an error.
        """
        delta = self._load()
        if delta is None:
            return []
        there = {name: pa.field(name, kind) for name, kind in self.partition_types.items()}
        there |= {field.name: field for field in pa.schema(delta.schema().to_arrow())}
        for field in self.schema:
            if field.name in there and there[field.name].type != field.type:
                raise SchemaError(
                    f"{self.name}: column {field.name} is {there[field.name].type}, not {field.type}: no "
                    "upgrade is known; use another workspace"
                )
        missing = [field for field in self.schema if field.name not in there]
        if must := [field.name for field in missing if not field.nullable]:
            raise SchemaError(f"{self.name} lacks {must}, which cannot be empty; use another workspace")
        return [field.name for field in missing]

    def add_columns(self, names: Sequence[str]) -> None:
        """Add columns of the schema to a table that lacks them; its rows have none of them: a null each."""
        fields = pa.schema([self.schema.field(name) for name in names])
        DeltaTable(
            self.workspace.url(self.name), storage_options=delta_options(self.workspace.uri)
        ).alter.add_columns([*DeltaSchema.from_arrow(fields).fields])

    def restore(self, version: int, info: CommitInfo) -> None:
        """Go back to the rows, columns and fingerprints of an earlier version, as a new commit.

        Raises WorkspaceError where its files or its log are not there any more.
        """
        delta, old = self._load(), self._load(version)
        if delta is None or old is None:
            raise Gone(f"{self.name} has no version {version} any more")
        since = self._recorded_since(version)
        try:
            delta.restore(version)
        except DeltaError as error:
            raise WorkspaceError(f"{self.name} cannot go back to version {version}: {error}") from None
        done = {name: old.transaction_version(name) or 0 for name in since}
        if done:
            self._commit([], lambda _: False, done, info, None)

    def _recorded_since(self, version: int) -> set[str]:
        """Names of the keys that were committed after a version, from the table's log."""
        names = set()
        for number in range(version + 1, self.version() + 1):
            log = self.workspace.read_bytes(f"{self.name}/_delta_log/{number:020d}.json")
            actions = [json.loads(line) for line in log.splitlines()]
            names |= {action["txn"]["appId"] for action in actions if "txn" in action}
        return names

    def vacuum(self, retention_hours: float, dry_run: bool = False) -> list[str]:
        """Delete files that no version within the retention uses, leftovers of crashes too; their paths.

        The retention is rounded up to whole hours, which is what Delta knows. One that is shorter than a
        running job would delete files that the job is about to commit.
        """
        delta = self._load()
        if delta is None:
            return []
        with storage_errors(f"clean up {self.url('')}"):
            return list(
                delta.vacuum(
                    retention_hours=math.ceil(retention_hours),
                    dry_run=dry_run,
                    enforce_retention_duration=False,
                    full=True,
                )
            )

    # -- inside

    def _commit(
        self,
        files: list[File],
        removes: Callable[[File], bool],
        done: Mapping[str, int],
        info: CommitInfo,
        read_version: int | None,
    ) -> int:
        """Commit, unless what the commit rests on has changed; the new version.

        Of a commit whose answer was lost, nobody knows whether it took effect: storage may even refuse its
        own repetition. So each carries a token, and whatever went wrong, the log is asked for it first.
        """
        base = self._create() if read_version == -1 else self._load(read_version) or self._create()
        state = self._state(base, removes, done)
        expected = _State((), (None,) * len(done)) if read_version == -1 else state
        token, remote = uuid.uuid4().hex, is_remote(self.workspace.uri)
        trouble: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if state != expected:
                names = ", ".join(sorted(done)[:3])
                raise CommitConflict(
                    f"{self.name}: another run has replaced {names} meanwhile; nothing was written. "
                    "Run again: what it did will not be done twice"
                )
            info.check()
            try:
                return self._try_commit(base, state.files, files, done, {**info.as_dict(), _TOKEN: token})
            except (DeltaError, OSError) as error:  # somebody committed first, or storage failed
                trouble = error
            conflict = isinstance(trouble, CommitFailedError)
            if remote and not conflict:
                time.sleep(min(0.1 * 2**attempt, _LONGEST_PAUSE_S))
            newest = self._create()
            found = self._find(newest, token, base.version())
            if found is not None:
                return found
            if not (conflict or remote):
                break  # a disk that is full or broken does not mend in seconds
            base, state = newest, self._state(newest, removes, done)
        assert trouble is not None
        if isinstance(trouble, CommitFailedError):
            raise CommitConflict(f"{self.name}: gave up after {_ATTEMPTS} conflicts with other writers")
        tried = f", tried {attempt + 1} times" if attempt else ""
        with storage_errors(f"commit to {self.url('')}{tried}"):
            raise trouble

    def _state(self, delta: DeltaTable, removes: Callable[[File], bool], done: Mapping[str, int]) -> _State:
        old = tuple(file for file in self._files(delta, {}) if removes(file))
        return _State(old, tuple(delta.transaction_version(name) for name in sorted(done)))

    def _try_commit(
        self,
        delta: DeltaTable,
        old: Iterable[File],
        files: Iterable[File],
        done: Mapping[str, int],
        metadata: dict[str, str],
    ) -> int:
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            RemoveAction(f.path, True, now, f.bytes, dict[str, str | None](f.partition)) for f in old
        ]
        actions += [AddAction(f.path, f.bytes, f.key, now, True, f.stats) for f in files]
        delta.create_write_transaction(
            actions,
            "append",
            delta.schema(),
            list(self.partition_types),
            commit_properties=CommitProperties(
                custom_metadata=metadata,
                max_commit_retries=_ATTEMPTS,
                app_transactions=[Transaction(name, value) for name, value in done.items()],
            ),
        )
        delta.update_incremental()
        return int(delta.version())

    def _find(self, delta: DeltaTable, token: str, after: int) -> int | None:
        """The version that the commit with this token made, looking at those after `after`."""
        versions = range(delta.version(), after, -1)
        with storage_errors(f"read the log of {self.url('')}"):
            commits = delta.history(len(versions)) if versions else []
        return next(
            (v for v, commit in zip(versions, commits, strict=False) if commit.get(_TOKEN) == token), None
        )

    def _load(self, version: int | None = None) -> DeltaTable | None:
        """The table at a version or the newest; None where it is not there, as at version -1.

        Raises Gone for a version whose log has been cleaned up.
        """
        if version == -1:
            return None
        with storage_errors(f"open the table {self.url('')}"):
            try:
                return DeltaTable(
                    self.workspace.url(self.name),
                    version=version,
                    storage_options=delta_options(self.workspace.uri),
                )
            except TableNotFoundError:
                if version is None:
                    return None
            except DeltaError:
                if version is None:
                    raise
        if self._load() is None:  # which also raises when it is storage that is at fault
            return None
        raise Gone(f"{self.name} has no version {version} any more: the log of it has been cleaned up")

    def _create(self, layout: Mapping[str, str] | None = None) -> DeltaTable:
        """The table, made when it is not there; of makers at once one makes it, and all get that one."""
        found = self._load()
        if found is not None:
            return found
        fields = [pa.field(name, kind) for name, kind in self.partition_types.items()]
        with storage_errors(f"create the table {self.url('')}"):
            if not is_remote(self.workspace.uri):
                _make_folder(Path(self.workspace.url(self.name)))
            try:
                return DeltaTable.create(
                    self.workspace.url(self.name),
                    schema=pa.schema(fields + list(self.schema)),
                    mode="ignore",
                    partition_by=list(self.partition_types),
                    configuration={
                        "rayscan.schema": str(schema.VERSION),
                        "rayscan.bucket_hash": keys.HASH_NAME,
                        "delta.checkpointInterval": str(_CHECKPOINT_EVERY),
                        **{f"rayscan.{name}": value for name, value in (layout or {}).items()},
                    },
                    storage_options=delta_options(self.workspace.uri),
                    commit_properties=CommitProperties(max_commit_retries=0),  # or it would replace another's
                    raise_if_key_not_exists=False,
                )
            except CommitFailedError:  # it is there by now: another's, or ours if the answer was lost
                made = self._load()
                if made is None:
                    raise
                return made

    def _files(self, delta: DeltaTable, where: Key) -> list[File]:
        listed = pa.table(delta.get_add_actions(flatten=True)).to_pylist()
        wanted = {(name, str(value)) for name, value in where.items()}
        files = []
        for row in listed:
            partition = tuple((name, str(row[f"partition.{name}"])) for name in self.partition_types)
            if wanted <= set(partition):
                files.append(File(row["path"], partition, row["num_records"], row["size_bytes"]))
        return sorted(files, key=lambda file: file.path)


def _conform(data: pa.Table, wanted: pa.Schema, name: str) -> pa.Table:
    """The columns of `wanted`, in its order and types. A missing or surplus column is a SchemaError."""
    if set(data.column_names) != set(wanted.names):
        missing = sorted(set(wanted.names) - set(data.column_names))
        surplus = sorted(set(data.column_names) - set(wanted.names))
        raise SchemaError(f"rows for table {name} lack columns {missing} or have others {surplus}")
    return data.select(wanted.names).cast(wanted)


def _stats(rows: int, metadata: pq.FileMetaData) -> str:
    """Delta's file statistics (row count, least and greatest values) from the Parquet footer."""
    least: dict[str, Any] = {}
    greatest: dict[str, Any] = {}
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            stats = column.statistics
            if "." in column.path_in_schema or stats is None or not stats.has_min_max:
                continue
            name = column.path_in_schema
            least[name] = stats.min if name not in least else min(least[name], stats.min)
            greatest[name] = stats.max if name not in greatest else max(greatest[name], stats.max)
    return json.dumps(
        {
            "numRecords": rows,
            "minValues": {k: _plain(v) for k, v in least.items()},
            "maxValues": {k: _plain(v) for k, v in greatest.items()},
        }
    )


def _nulls(group: pq.RowGroupMetaData, column: str) -> int:
    """Rows without a value (no list holds nulls inside); all rows of a file older than the column."""
    parts = [group.column(c) for c in range(group.num_columns)]
    found = [x.statistics.null_count for x in parts if x.path_in_schema.split(".")[0] == column]
    return sum(found) if found else int(group.num_rows)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.isoformat() if isinstance(value, date) else value
