"""The lists of known scanners of a workspace: taking them in, and asking them where a stage needs to know.

Nothing before the campaigns asks them, so a new list makes no sequence, embedding or cluster stale.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayscan.captures.networks import as_text
from rayscan.captures.scanner_lists import Given, Listed, read_list
from rayscan.captures.scanners import NOT_KNOWN, Scanners
from rayscan.captures.source import Decompressed, compression_of
from rayscan.config import CapturesConfig, RunConfig
from rayscan.errors import ConfigError, DataError, why
from rayscan.storage import filesystem
from rayscan.tables import CommitInfo, Workspace, key_name

HIDDEN = "addresses are pseudonyms here (ingest.addresses=cryptopan), so nobody can be looked up"


@dataclass(frozen=True)
class Imported:
    """What became of a file of a list."""

    list: str  # its name in the table: a hash of its entries
    new: bool  # False: the very same entries are there already
    listed: Listed


def import_list(workspace: Workspace, path: str, given: Given) -> Imported:
    """Read a list and add it to the workspace, unless it is there.

    Raises FormatError, ConfigError as `read_list` does, and DataError where addresses are pseudonyms.
    """
    if workspace.addresses != "raw":
        raise DataError(f"{workspace.uri}: {HIDDEN}: a name for a pseudonym would give its whole prefix away")
    listed = read_list(read_whole(path), path, given)
    table = workspace.table("scanners")
    name = _hash(listed.entries)
    key = {"list": name}
    if table.is_done(key, 1):
        return Imported(name, False, listed)
    table.replace([key], [table.write(listed.entries, key)], {key_name(key): 1}, CommitInfo("scanners", ""))
    return Imported(name, True, listed)


def remove_list(workspace: Workspace, name: str) -> int:
    """Take a list out; its entries. Raises DataError where there is none of that name."""
    table = workspace.table("scanners")
    rows = sum(file.rows for file in table.files({"list": name}))
    if not rows:
        raise DataError(f"{workspace.uri} has no scanner list {name}; `rayscan scanners list` shows them")
    table.replace([{"list": name}], [], {key_name({"list": name}): 0}, CommitInfo("scanners", ""))
    return rows


def overview(workspace: Workspace) -> pa.Table:
    """One row for each list and source: networks, organisations, and the days for which it vouches."""
    rows = workspace.table("scanners").read(
        columns=["list", "source", "organisation", "valid_from", "valid_to"]
    )
    what = [
        ("organisation", "count"),
        ("organisation", "count_distinct"),
        ("valid_from", "min"),
        ("valid_to", "max"),
    ]
    found = rows.group_by(["list", "source"], use_threads=False).aggregate(what)
    return found.rename_columns(
        ["list", "source", "networks", "organisations", "valid_from", "valid_to"]
    ).sort_by([("source", "ascending"), ("valid_from", "ascending")])


def scanners(workspace: Workspace, config: RunConfig) -> Scanners | None:
    """Everybody on any list, or None where no list is there, or addresses are pseudonyms."""
    if workspace.addresses != "raw":
        return None
    entries = workspace.table("scanners").read(columns=workspace.table("scanners").schema.names)
    return Scanners(entries, config.scanners.tolerance_days) if entries.num_rows else None


def lookup(workspace: Workspace, config: RunConfig, address: str, day: date | None) -> list[dict[str, Any]]:
    """Entries that hold an address, for people: all of them, or the one that counts on a day.

    Raises ConfigError for what is no IPv4 address, DataError where nobody can be looked up.
    """
    try:
        number = int(ipaddress.IPv4Address(address))
    except ValueError as error:
        raise ConfigError(f"{address} is no IPv4 address: {error}") from None
    if workspace.addresses != "raw":
        raise DataError(f"{workspace.uri}: {HIDDEN}")
    known = scanners(workspace, config)
    if known is None:
        return []
    if day is None:
        rows = known.covering(number).to_pylist()
    else:
        found = known.find(np.array([number]), np.array([(day - date(1970, 1, 1)).days]))
        rows = known.entries.take(pa.array(found.entry[found.entry != NOT_KNOWN])).to_pylist()
        rows = [{**row, "days_off": int(found.days_off[0])} for row in rows]
    return [{"network": as_text(row.pop("network"), row.pop("length")), **row} for row in rows]


def label_lists(workspace: Workspace, config: RunConfig) -> Scanners | None:
    """The lists, where `evaluate.labels` asks for theirs in place of the captures' labels, else None."""
    wanted = config.evaluate.labels
    if wanted == "capture" or (wanted == "auto" and _has_labels(workspace)):
        return None
    found = scanners(workspace, config)
    if found is None and wanted == "scanners":
        none = "none is imported: see `rayscan scanners import`" if workspace.addresses == "raw" else HIDDEN
        raise DataError(f"evaluate.labels asks for scanner lists, but {none}")
    return found


def relabelled(sequences: pa.Table, known: Scanners | None) -> pa.Table:
    """The sequences with the organisations of known scanners as their labels; unchanged without lists."""
    if known is None:
        return sequences
    place = sequences.schema.get_field_index("label")
    return sequences.set_column(place, sequences.schema.field("label"), known.known(sequences).organisation)


def read_whole(path: str) -> bytes:
    """A file of a path or URI, decompressed. Raises ConfigError where it cannot be read."""
    fs, inner = filesystem(path)
    try:
        with fs.open_input_stream(inner, compression=None) as stream:
            data = bytes(stream.read())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {why(error)}") from None
    compression = compression_of(data)
    if compression is None:
        return data
    return Decompressed(io.BytesIO(data), path, compression, CapturesConfig()).readall() or b""


def _has_labels(workspace: Workspace) -> bool:
    table = workspace.table("sequences")
    return any(pc.count(table.read_files([file], ("label",))["label"]).as_py() for file in table.files())


def _hash(entries: pa.Table) -> str:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, entries.schema) as stream:
        stream.write_table(entries.combine_chunks())
    return hashlib.blake2b(sink.getvalue(), digest_size=6).hexdigest()
