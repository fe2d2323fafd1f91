"""Parquet and delimited text with a row for each flow: which column is which, and rows -> flows.

A column is found by the user's map, else by the names that tools give it (`NAMES`, upper or lower case, with
any punctuation). Rows are read in batches, so memory does not grow with the file. Every row of the file is
in a batch or in a reject of rows; a value of an optional column that cannot be read becomes null
and is counted too.

Rows that repeat an earlier one of the same file are counted in each batch, compared as flows (after
conversion) over all columns that were recognised, and taken out where captures.duplicates says so.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan.captures import times, values
from rayscan.captures.addresses import IS_IPV6, address
from rayscan.captures.delimited import block_bytes, read_blocks, read_header
from rayscan.captures.duplicates import Seen
from rayscan.captures.fingerprints import fingerprints
from rayscan.captures.programs import program_of
from rayscan.captures.source import DAMAGE, Source, expansion
from rayscan.captures.times import Clock
from rayscan.captures.values import Field
from rayscan.config import CapturesConfig
from rayscan.errors import ConfigError, FormatError, SchemaError
from rayscan.schema import FINGERPRINTS, FLOWS, MISSING

BATCH = FLOWS.remove(FLOWS.get_field_index("capture"))
"""Columns of a batch."""


@dataclass(frozen=True)
class Reject:
    """Something that was not read, and why. `reason` comes from a small fixed set."""

    reason: str
    offset: int | None  # row (tables) or byte (packets) where it first happened
    count: int  # rows; 1 where their number is unknown
    lost: str = "rows"  # or "left out", or "values": see schema.LOST

    @property
    def rows_lost(self) -> bool:
        """False: the rows are there, but lack a value of an optional column."""
        return self.lost != "values"


class Batch(NamedTuple):
    """Some rows of a capture."""

    flows: pa.Table  # columns as in BATCH
    rejects: list[Reject]
    duplicates: int = 0  # rows that repeat an earlier one of the capture, in `flows` or dropped from it


def merge_rejects(rejects: Iterable[Reject]) -> list[Reject]:
    """One reject for each reason: counts added up, offset of the first."""
    merged: dict[tuple[str, str], Reject] = {}
    for reject in rejects:
        before = merged.setdefault((reject.reason, reject.lost), replace(reject, count=0))
        merged[reject.reason, reject.lost] = replace(before, count=before.count + reject.count)
    return list(merged.values())


# ---------------------------------------------------------------------------------------------
# Which column is which
# ---------------------------------------------------------------------------------------------

NAMES = {
    "ts": "ts timestamp time start_time starttime first_seen firstseen first_switched stime flow_start "
    "datetime date_time frame_time_epoch",
    "src": "src src_ip source_ip srcip saddr src_addr srcaddr ip_src id_orig_h source "
    "source_address src_address sa sip",
    "dst": "dst dst_ip dest_ip destination_ip dstip daddr dst_addr dstaddr ip_dst id_resp_h destination "
    "dest destination_address dst_address da dip",
    "dst_port": "dst_port dport dstport dest_port destination_port tcp_dstport id_resp_p port dp",
    "proto": "proto protocol ip_proto ip_protocol prot pr pro",
    "src_port": "src_port sport srcport source_port tcp_srcport id_orig_p sp",
    "ttl": "ttl ip_ttl",
    "size": "size length len bytes ip_len pkt_len octets srcbytes totbytes ibyt",
    "packets": "packets pkts packet_cnt packet_count num_packets srcpkts totpkts ipkt",
    "tcp_flags": "tcp_flags tcpflags flags flg",
    "icmp_code": "icmp_code icmpcode",
    "sensor": "sensor telescope sen",
    "label": "label",
    "service": "service",
    "fingerprint": "fingerprint",
    "zmap": "zmap is_zmap",
    "masscan": "masscan is_masscan",
    "mirai": "mirai is_mirai",
    "ip_id": "ip_id ipid",
    "tcp_seq": "tcp_seq tcpseq snum",  # not seq, by which Argus numbers its records
}
"""Names a column is recognised by, best first. `service` is proto * 65536 + dst_port, and stands in for the
two where a file has not got them; the last six give the fingerprint."""

REQUIRED = ("ts", "src", "proto", "dst_port")
PORTED = (6, 17, 33, 132, 136)  # TCP, UDP, DCCP, SCTP, UDP-Lite: without a port such a flow says nothing
IPV6 = "IPv6 is not supported yet"


def resolve(names: Sequence[str], mapped: Mapping[str, str], path: str) -> dict[str, int]:
    """Place of each recognised column among the `names` of a file.

    Of two columns that one name fits, the name further ahead in `NAMES` wins, then the column further left.
    Raises ConfigError for a map with an unknown key, SchemaError where a mapped column is not in the file or
    a required one is not found.
    """
    for key in mapped:
        if key not in NAMES:
            raise ConfigError(f"captures.columns: unknown column {key!r}{_nearest(key)}")
    places: dict[str, int] = {}
    for place, name in reversed(list(enumerate(names))):
        places[_normal(name)] = place
    found = {key: _mapped(key, name, names, path) for key, name in mapped.items()}
    for key, candidates in NAMES.items():
        match = next((places[name] for name in candidates.split() if name in places), None)
        if key not in found and match is not None:
            found[key] = match
    if "dst_port" in found and "proto" in found:
        found.pop("service", None)
    _require(found, names, path)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _nearest(key: str) -> str:
    match = difflib.get_close_matches(key, list(NAMES), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; valid are {', '.join(NAMES)}"


def _mapped(key: str, name: str, names: Sequence[str], path: str) -> int:
    if name in names:
        return names.index(name)
    folded = [place for place, other in enumerate(names) if other.lower() == name.lower()]
    if len(folded) != 1:
        raise SchemaError(f"{path}: captures.columns.{key} is {name!r}, but the columns are {_listed(names)}")
    return folded[0]


def _require(found: Mapping[str, int], names: Sequence[str], path: str) -> None:
    absent = [key for key in REQUIRED if key not in found]
    if "service" in found:
        absent = [key for key in absent if key not in ("proto", "dst_port")]
    if not absent:
        return
    tried = "; ".join(f"{key}: tried {', '.join(NAMES[key].split())}" for key in absent)
    setting = ", ".join(f"{key}: NAME" for key in absent)
    raise SchemaError(
        f"{path}: no column found for {', '.join(absent)} among {_listed(names)} ({tried}). "
        f"Name it in the configuration: captures: {{columns: {{{setting}}}}}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:60])
    return shown if len(names) <= 60 else f"{shown} and {len(names) - 60} more"


# ---------------------------------------------------------------------------------------------
# Rows to flows
# ---------------------------------------------------------------------------------------------

_Mask = NDArray[np.bool_]
_Rows = NDArray[np.int64]

_BOUNDS = {
    "dst_port": (0, 65_535),
    "src_port": (0, 65_535),
    "ttl": (0, 255),
    "size": (0, 2**63 - 1),
    "packets": (0, 2**63 - 1),
    "icmp_code": (0, 255),
    "service": (0, 256 * 65_536 - 1),
    "fingerprint": (0, sum(FINGERPRINTS.values())),
    "ip_id": (0, 65_535),
    "tcp_seq": (0, 2**32 - 1),
}
_TEXT = ("sensor", "label")


class Converter:
    """Columns of one file -> batches of flows. Holds what lasts from batch to batch."""

    def __init__(self, path: str, names: Mapping[str, str], config: CapturesConfig) -> None:
        """`names` are the file's own names of the recognised columns, for messages."""
        self.path, self.names, self.config = path, names, config
        self.clock = Clock(config.time_unit, config.time_zone, *time_limits(config))
        self._seen = Seen()
        self._unchecked = {"ts", "service"} & set(names)

    def check_types(self, types: Mapping[str, pa.DataType]) -> None:
        """Raise SchemaError for a column whose type cannot hold it, before any row is read."""
        for key, kind in types.items():
            try:
                self._field(key, pa.array([], kind)) if key not in _TEXT else values.text(pa.array([], kind))
            except (TypeError, pa.ArrowException) as error:
                raise SchemaError(f"{self._where(key)} has type {kind}; {error}") from None
        kind = types["ts"]
        if pa.types.is_timestamp(kind) and kind.tz is None and self.clock.zone is None:
            raise SchemaError(
                f"{self._where('ts')} has no time zone: set captures.time_zone, for example to UTC"
            )
        if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and self.clock.unit is None:
            raise SchemaError(f"{self._where('ts')} holds numbers: set captures.time_unit to s, ms, us or ns")

    def convert(self, columns: Mapping[str, pa.Array], rows: _Rows) -> Batch:
        """Flows of the rows whose numbers in the file are `rows`, and what was wrong with the others."""
        fields = self.fields(columns)
        self._check_first(fields, columns)
        return self.assemble(fields, rows, columns)

    def fields(self, columns: Mapping[str, pa.Array]) -> dict[str, Field]:
        """The numbers of each column that holds them."""
        return {key: self._field(key, array) for key, array in columns.items() if key not in _TEXT}

    def assemble(self, fields: dict[str, Field], rows: _Rows, columns: Mapping[str, pa.Array]) -> Batch:
        """The same from fields, with the text among `columns`."""
        _split_service(fields)
        _split_icmp(fields)
        rejects, lost = _reject_rows(fields, rows)
        rejects += _reject_values(fields, rows, lost)
        kept = np.flatnonzero(~lost)
        labels = {key: values.text(columns[key]).take(pa.array(kept)) for key in _TEXT if key in columns}
        if "label" in labels:
            labels["label"] = self._named(labels["label"])
        if len(kept) < len(rows):
            fields = {key: field.take(kept) for key, field in fields.items()}
        return self._without_duplicates(self._flows(fields, labels, len(kept)), fields, rows[kept], rejects)

    def _field(self, key: str, array: pa.Array) -> Field:
        if key == "ts":
            return times.time(array, self.clock)
        if key in ("src", "dst"):
            return address(array)
        if key == "proto":
            return values.protocol(array)
        if key == "tcp_flags":
            return values.tcp_flags(array)
        if key in FINGERPRINTS:
            return values.yes_or_no(array)
        return values.bounded(array, *_BOUNDS[key])

    def _check_first(self, fields: Mapping[str, Field], columns: Mapping[str, pa.Array]) -> None:
        """Settings or a column that do not suit the first value that is there do not suit the file."""
        for key in sorted(self._unchecked):
            field = fields[key]
            skipped = field.faults.get("unreadable", False) if key == "ts" else False
            there = np.flatnonzero(~(field.missing | skipped))
            if not len(there):
                continue
            first = int(there[0])
            self._unchecked.remove(key)
            wrong = [reason for reason, mask in field.faults.items() if mask[first]]
            if set(wrong) & {times.NAIVE, times.UNITLESS} or (wrong and key == "service"):
                value = columns[key][first].as_py()
                raise SchemaError(f"{self._where(key)} ({value!r}) {wrong[0]}")

    def _named(self, labels: pa.Array) -> pa.Array:
        """The labels without those that name nobody."""
        nobody = pa.array([label.lower() for label in self.config.no_label], pa.string())
        return pc.if_else(pc.is_in(pc.utf8_lower(labels), nobody), None, labels)

    def _where(self, key: str) -> str:
        return f"{self.path}: column {self.names[key]!r} ({key})"

    def _flows(self, fields: Mapping[str, Field], labels: Mapping[str, pa.Array], n: int) -> pa.Table:
        arrays = dict(labels)
        if self.config.sensor is not None:
            sensor = arrays.get("sensor", pa.nulls(n, pa.string()))
            arrays["sensor"] = pc.fill_null(sensor, self.config.sensor)
        fields = dict(fields)
        fingerprint = _fingerprint(fields)
        if fingerprint is not None:
            fields["fingerprint"] = fingerprint
        for column in BATCH:
            if column.name in fields:
                arrays[column.name] = _array(fields[column.name], column.type)
            elif column.name not in arrays:
                arrays[column.name] = pa.nulls(n, column.type)
        return pa.Table.from_arrays([arrays[name] for name in BATCH.names], schema=BATCH)

    def _without_duplicates(
        self, flows: pa.Table, fields: Mapping[str, Field], rows: _Rows, rejects: list[Reject]
    ) -> Batch:
        compared = flows
        for key in ("ip_id", "tcp_seq"):
            if key in fields:
                compared = compared.append_column(key, _array(fields[key], pa.int64()))
        again = self._seen.repeats(compared)
        count = int(again.sum())
        if count and self.config.duplicates == "drop":
            flows = flows.filter(pa.array(~again))
            rejects.append(Reject("duplicate row", int(rows[again.argmax()]), count, "left out"))
        return Batch(flows, rejects, count)


def time_limits(config: CapturesConfig) -> tuple[int, int]:
    """Microseconds since 1970 of captures.earliest and captures.latest."""
    return _us(config.earliest), _us(config.latest)


def _us(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _split_service(fields: dict[str, Field]) -> None:
    service = fields.pop("service", None)
    if service is not None:
        service = service._replace(faults={"unreadable in service": service.unreadable})
        for key, part in (("proto", service.values >> 16), ("dst_port", service.values & 0xFFFF)):
            fields.setdefault(key, service._replace(values=part))


def _split_icmp(fields: dict[str, Field]) -> None:
    """Type and code of ICMP where they share the port as type * 256 + code, as NetFlow has it.

    A type alone is below 256, and what is below 256 and both is type 0, whose only code is 0.
    """
    proto, port = fields["proto"], fields["dst_port"]
    both = port.present & proto.present & (proto.values == 1) & (port.values > 255)
    if not both.any():
        return
    code = fields.get("icmp_code", Field(np.zeros_like(port.values), np.ones_like(both), {}))
    faults = {reason: rows & ~both for reason, rows in code.faults.items()}
    fields["icmp_code"] = Field(np.where(both, port.values & 255, code.values), code.missing & ~both, faults)
    fields["dst_port"] = port._replace(values=np.where(both, port.values >> 8, port.values))


def _reject_rows(fields: dict[str, Field], rows: _Rows) -> tuple[list[Reject], _Mask]:
    """Rejects for the rows that lack a required value, each counted once, and which rows these are."""
    rejects, lost = [], np.zeros(len(rows), np.bool_)
    portless = fields["proto"].present & ~np.isin(fields["proto"].values, PORTED)
    for key in REQUIRED:
        field = fields[key]
        missing = field.missing & ~portless if key == "dst_port" else field.missing
        for fault, mask in [("missing", missing), *field.faults.items()]:
            new = mask & ~lost
            if new.any():
                kind = "left out" if fault == IS_IPV6 else "rows"
                rejects.append(Reject(_reason(key, fault), int(rows[new.argmax()]), int(new.sum()), kind))
                lost |= new
    return rejects, lost


def _reason(key: str, fault: str) -> str:
    return IPV6 if fault == IS_IPV6 else f"{key} {fault}"


def _reject_values(fields: Mapping[str, Field], rows: _Rows, lost: _Mask) -> list[Reject]:
    """What cannot be read in optional columns of the rows that are kept."""
    rejects = []
    for key, field in fields.items():
        bad = field.unreadable & ~lost if field.faults and key not in REQUIRED else None
        if bad is not None and bad.any():
            reason = f"{key} unreadable (kept as missing)"
            rejects.append(Reject(reason, int(rows[bad.argmax()]), int(bad.sum()), "values"))
    return rejects


def _array(field: Field, kind: pa.DataType) -> pa.Array:
    absent = field.missing | field.unreadable if field.faults else field.missing
    if not absent.any():
        return pa.array(field.values).cast(kind)
    return pa.array(np.where(absent, 0, field.values), mask=absent).cast(kind)


def _fingerprint(fields: dict[str, Field]) -> Field | None:
    """From the column itself, from flags of single tools, or from the packet's fields; None if all are
    absent."""
    flags = [(fields[name], bit) for name, bit in FINGERPRINTS.items() if name in fields]
    if "fingerprint" in fields:
        return fields["fingerprint"]
    if flags:
        bits = sum(np.where(field.present & (field.values == 1), bit, 0) for field, bit in flags)
        absent = np.logical_and.reduce([~field.present for field, _ in flags])
        return Field(np.asarray(bits, np.int64), absent, {})
    if "ip_id" not in fields and "tcp_seq" not in fields:
        return None
    n = len(fields["ts"].values)
    marks = [_or_missing(fields.get(key), n) for key in ("proto", "dst", "dst_port", "ip_id", "tcp_seq")]
    found, known = fingerprints(*marks)
    return Field(found.astype(np.int64), ~known, {})


def _or_missing(field: Field | None, n: int) -> NDArray[np.int64]:
    return np.full(n, MISSING, np.int64) if field is None else np.where(field.present, field.values, MISSING)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def read_parquet(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a Parquet file, row group by row group.

    A row group that cannot be decoded is lost from the failing batch on, and counted by the footer's
    word; page checksums are verified where the file has them. Raises FormatError for a damaged footer,
    SchemaError for columns that are missing or of the wrong type, ConfigError for a column map or zone that
    does not exist.
    """
    source = Source(file)
    try:
        parquet = pq.ParquetFile(
            pa.PythonFile(source, "r"), page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20
        )
        names, types = parquet.schema_arrow.names, parquet.schema_arrow.types
    except DAMAGE as error:
        if source.failure is not None:
            raise
        raise FormatError(path, f"damaged: Parquet footer: {_short(error)}") from None
    groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    if sum(groups) != parquet.metadata.num_rows:
        raise FormatError(
            path, "damaged: Parquet footer: the row groups do not add up to the rows of the file"
        )
    places = resolve(names, config.columns, path)
    _check_size(parquet.metadata, len(places), source, path, config)
    converter = Converter(path, {key: names[place] for key, place in places.items()}, config)
    converter.check_types({key: types[place] for key, place in places.items()})
    return _row_groups(parquet, groups, source, places, converter, batch_rows)


def _check_size(
    footer: pq.FileMetaData, columns: int, source: Source, path: str, config: CapturesConfig
) -> None:
    """Refuse a bomb: runs of one value take no room in the file, and 8 bytes each once they are read.

    Honest captures, whose times and addresses differ from row to row, become 10 to 30 times as large.
    """
    pages = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
    size = source.seek(0, io.SEEK_END)
    bomb = expansion(max(pages, footer.num_rows * columns * 8), size, config)
    if bomb is not None:
        raise FormatError(path, bomb)


def _row_groups(
    parquet: pq.ParquetFile,
    groups: Sequence[int],
    source: Source,
    places: Mapping[str, int],
    converter: Converter,
    batch_rows: int,
) -> Iterator[Batch]:
    names = parquet.schema_arrow.names
    wanted = sorted({names[place] for place in places.values()})
    first = 0
    for group, group_rows in enumerate(groups):
        row, end = first, first + group_rows
        cause = "fewer rows than the footer says"
        batches = parquet.iter_batches(batch_rows, row_groups=[group], columns=wanted, use_threads=False)
        while row < end:
            try:
                batch = next(batches, None)
            except DAMAGE as error:
                if source.failure is not None:
                    raise
                batch, cause = None, _short(error)
            if batch is None:
                yield Batch(BATCH.empty_table(), [Reject(f"damaged: {cause}", row, end - row)])
                break
            columns = {key: _column(batch, names[place]) for key, place in places.items()}
            yield converter.convert(columns, np.arange(row, row + batch.num_rows))
            row += batch.num_rows
        first = end


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_all_field_indices(name)[0])


def _short(error: BaseException) -> str:
    """The first line of a message, without what changes from place to place."""
    return re.sub(r"0x[0-9a-f]+|\d+", "N", str(error).partition("\n")[0])[:120]


def read_csv(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of delimited text with a header line; comma, semicolon, tab or | are told from it.

    All columns are read as text first, so that a value that cannot be read costs its own row only. Rows are
    numbered from 0 after the header, without blank lines. Raises as `read_parquet` does.
    """
    header = read_header(file, path)
    places = resolve(header.names, config.columns, path)
    program = program_of(header.names)
    header = replace(header, end=program.end)
    config = config.model_copy(update=dict(program.settings))
    converter = Converter(path, {key: header.names[place] for key, place in places.items()}, config)
    places |= {name: header.names.index(name) for name in program.extra if name in header.names}
    blocks = read_blocks(file, path, header, sorted(set(places.values())), block_bytes(batch_rows, 64, 16))
    for block in blocks:
        if len(block.ragged):
            reject = Reject("wrong number of fields", int(block.ragged[0]), len(block.ragged))
            yield Batch(BATCH.empty_table(), [reject])
        for start in range(0, len(block.rows), batch_rows):
            part = slice(start, start + batch_rows)
            columns = {key: block.columns[place][part] for key, place in places.items()}
            yield converter.convert(program.adapt(columns), block.rows[part])
