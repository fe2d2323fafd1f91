"""Zeek's conn.log -> flows, as tab-separated text and as JSON lines.

The text says in lines that begin with # how it is separated, what stands for "unset", and the names and types
of its columns; such a header may come again, where rotated logs were put together. It has no quotes.

What Zeek calls the originator is the source. It guesses who that is: of a reply whose request it has not seen
(backscatter) it takes the *receiver* for the originator.

| flow      | conn.log                                                                              |
|-----------|---------------------------------------------------------------------------------------|
| dst_port  | id.resp_p; for ICMP id.orig_p, where Zeek keeps the type                              |
| icmp_code | for ICMP id.resp_p                                                                    |
| proto     | ip_proto (a number, since Zeek 7.1), else proto                                       |
| size      | orig_ip_bytes: IP headers included, as in a packet capture; orig_bytes counts payload |
| tcp_flags | what `history` says of the originator: S, H, A, F, R; it is silent on PSH, URG, ECE   |
| label     | of labelled logs: detailed-label where it is set, else label                          |

Lines of the text as nearly all are (dotted addresses, plain numbers, no label) are read by a compiled loop,
more than twice as fast; any other line goes the general way, through Arrow's parser and the conversions that
all tables share. Both give the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray

from rayscan.captures.columns import BATCH, Batch, Converter, Reject, time_limits
from rayscan.captures.delimited import Block, Header, block_bytes, clean, parse, read_pieces
from rayscan.captures.jsonlines import read_objects
from rayscan.captures.values import MISSING_TEXT, TCP_FLAGS, Bytes, Field, Ints, is_text, trimmed
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError, SchemaError
from rayscan.schema import MISSING

_REQUIRED = {
    "ts": "ts",
    "src": "id.orig_h",
    "src_port": "id.orig_p",
    "dst": "id.resp_h",
    "dst_port": "id.resp_p",
    "proto": "proto",
}
_MOST_UNSET = 16
_OPTIONAL = {
    "ip_proto": "ip_proto",
    "size": "orig_ip_bytes",
    "packets": "orig_pkts",
    "history": "history",
    "label": "label",
    "detailed": "detailed-label",
    "log": "_path",
}
_KEYS = {name: key for key, name in (_REQUIRED | _OPTIONAL).items()} | {"detailedlabel": "detailed"}
"""Our key of each column of the log."""

_TYPES = {"time": pa.float64(), "port": pa.int64(), "count": pa.int64()}
_HISTORY = {"S": ("SYN",), "H": ("SYN", "ACK"), "A": ("ACK",), "F": ("FIN",), "R": ("RST",)}
_UNSET = ("-", "(empty)")

_SLOTS = (
    "ts", "src", "dst", "src_port", "dst_port", "proto", "size", "packets", "tcp_flags", "ip_proto",
    "icmp_code",
)  # fmt: skip
"""Rows of the table that `_walk` fills: numbers or MISSING."""

_TS, _SRC, _DST, _SRC_PORT, _DST_PORT, _PROTO, _SIZE, _PACKETS, _TCP_FLAGS, _IP_PROTO, _ICMP_CODE = range(11)
_ODD = -2
_TAB, _LINE_FEED, _RETURN, _HASH, _DASH, _POINT, _0, _9 = np.frombuffer(b"\t\n\r#-.09", np.uint8)
_1, _2, _3, _18 = np.array([1, 2, 3, 18], np.uint64)
_ICMP, _TCP, _UDP = 1, 6, 17

Columns = dict[str, pa.Array]
Rows = NDArray[np.int64]


class _Flows:
    """Columns of the log, by our keys -> batches."""

    def __init__(self, path: str, config: CapturesConfig) -> None:
        names = _REQUIRED | {key: _OPTIONAL[key] for key in ("size", "packets", "label")}
        names |= {"tcp_flags": "history", "icmp_code": "id.resp_p"}
        self.converter = Converter(path, names, config.model_copy(update={"time_unit": "s"}))
        self.earliest, self.latest = time_limits(config)

    def convert(self, columns: Columns, rows: Rows) -> Batch:
        return self.converter.convert(self.prepared(columns), rows)

    def prepared(self, columns: Columns) -> Columns:
        """The columns with the names and meanings of flows."""
        columns = dict(columns)
        if "ip_proto" in columns:
            columns["proto"] = _first(columns.pop("ip_proto"), columns["proto"])
        if "detailed" in columns:
            columns["label"] = _first(columns.pop("detailed"), columns.get("label"))
        if "history" in columns:
            columns["tcp_flags"] = _flags(columns.pop("history"))
        return _by_protocol(columns)


def _first(array: pa.Array, other: pa.Array | None) -> pa.Array:
    """The text of the first array, of the other where it has none."""
    array = trimmed(array)
    return array if other is None else pc.coalesce(array, trimmed(other))


def _flags(history: pa.Array) -> pa.Array:
    coded = trimmed(history).dictionary_encode()
    return pa.array(map(_bits, coded.dictionary.to_pylist()), pa.int64()).take(coded.indices)


def _bits(history: str) -> int:
    """Capital letters are the originator's packets."""
    flags = {flag for letter in history for flag in _HISTORY.get(letter, ())}
    return sum(TCP_FLAGS[flag] for flag in flags)


_LETTERS = np.array(
    [
        _bits(chr(k))
        if chr(k).isascii() and (chr(k).isalpha() or k == ord("^")) and chr(k) not in "nN"
        else -1
        for k in range(256)
    ]
)
"""What each byte of a plain `history` says, -1 for what is none; with n begin words for "unset"."""


def _by_protocol(columns: Columns) -> Columns:
    """Flags of TCP alone; type and code of ICMP, which stand where others have ports."""
    coded = trimmed(columns["proto"]).dictionary_encode()
    names = pc.utf8_lower(coded.dictionary)
    tcp, icmp = (_where(coded, pc.is_in(names, pa.array(known))) for known in (("tcp", "6"), ("icmp", "1")))
    if "tcp_flags" in columns:
        columns["tcp_flags"] = pc.if_else(tcp, columns["tcp_flags"], None)
    if icmp.true_count:
        source, target = columns["src_port"], columns["dst_port"]
        columns["src_port"] = pc.if_else(icmp, None, source)
        columns["dst_port"] = pc.if_else(icmp, source, target)
        columns["icmp_code"] = pc.if_else(icmp, target, None)
    return columns


def _where(coded: pa.DictionaryArray, chosen: pa.Array) -> pa.Array:
    """Rows whose dictionary entry is chosen."""
    return pc.fill_null(chosen.take(coded.indices), False)


# ---------------------------------------------------------------------------------------------
# Tab-separated
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """What the header lines have said so far."""

    separator: str = "\t"
    unset: tuple[str, ...] = _UNSET
    names: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def told(self, line: str, path: str) -> _Layout:
        if line.startswith("#separator"):
            escaped = re.sub(r"\\x([0-9a-fA-F]{2})", lambda code: chr(int(code[1], 16)), line)
            separator = escaped.removeprefix("#separator").strip(" ")
            if len(separator) != 1 or not separator.isascii() or separator in "\r\n\0":
                raise FormatError(path, f"the separator {separator!r} is not one character")
            return replace(self, separator=separator)
        name, *values = line.split(self.separator)
        if name in ("#unset_field", "#empty_field") and values and values[0] not in self.unset:
            if len(self.unset) == _MOST_UNSET:
                raise FormatError(path, f"more than {_MOST_UNSET} values for an unset field")
            return replace(self, unset=(*self.unset, values[0]))
        if name == "#path" and values and values[0] != "conn":
            raise SchemaError(f"{path}: this is Zeek's {values[0]}.log; flows come from conn.log")
        if name == "#fields":
            absent = [column for column in _REQUIRED.values() if column not in values]
            if absent:
                raise SchemaError(
                    f"{path}: the log has no {', '.join(absent)}; flows come from Zeek's conn.log"
                )
            return replace(self, names=tuple(values), types=())
        return replace(self, types=tuple(values)) if name == "#types" else self

    def places(self) -> dict[str, int]:
        """Where each column that is used stands."""
        known = {name: place for place, name in enumerate(self.names) if name in _KEYS and name != "_path"}
        return {_KEYS[name]: place for name, place in known.items()}

    def columns(self, block: Block) -> Columns:
        return {key: _set(block.columns[place], self.unset) for key, place in self.places().items()}

    def slots(self) -> Ints:
        """Row of `_walk`'s table for each field, -1 for none. Empty, so that all lines are odd, if it cannot
        read them."""
        if (
            self.separator != "\t"
            or {"label", "detailed"} & set(self.places())
            or set(self.unset) - set(_UNSET)
        ):
            return np.empty(0, np.int64)
        slots = np.full(len(self.names), -1, np.int64)
        for key, place in self.places().items():
            slots[place] = _SLOTS.index("tcp_flags" if key == "history" else key)
        return slots


def read_zeek(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a conn.log with header lines, or several of them one after the other.

    Rows are numbered from 0, without header lines and blank ones. Raises SchemaError for another log,
    FormatError for a log without a header, and, after the flows before it, for damage.
    """
    layout, flows, row = _Layout(), _Flows(path, config), 0
    for text in read_pieces(file, path, block_bytes(batch_rows, 128, 16)):
        data, place = np.frombuffer(text, np.uint8), 0
        slots: Ints | None = None
        most = min(batch_rows, len(text) // len(_REQUIRED) + 1)
        while place < len(text):
            start = place
            if text.startswith(b"#", start):
                place = text.index(b"\n", start) + 1
                layout = layout.told(clean(text[start:place]).decode().rstrip("\n"), path)
                slots = None
                continue
            slots = layout.slots() if slots is None else slots
            table, odd = np.empty((len(_SLOTS), most), np.int64), np.empty((3, most), np.int64)
            place, n, n_odd = _walk(data, start, slots, flows.earliest, flows.latest, table, odd)
            if n and not layout.names:
                raise FormatError(path, "rows before a #fields line", row)
            if n_odd < n:
                yield from _mostly_plain(text, row, layout, flows, table[:, :n], odd[:, :n_odd])
            elif n:
                yield from _odd(text[start:place], row, layout, flows)
            row += n
    if not layout.names:
        raise FormatError(path, "the log ends before a #fields line")


def _odd(text: bytes, row: int, layout: _Layout, flows: _Flows) -> Iterator[Batch]:
    block = _parsed(text, row, layout)
    yield from _ragged(block.ragged)
    if len(block.rows):
        yield flows.convert(layout.columns(block), block.rows)


def _mostly_plain(
    text: bytes, row: int, layout: _Layout, flows: _Flows, table: Ints, odd: Ints
) -> Iterator[Batch]:
    """Flows of lines that are in `table`, but for those that `odd` says."""
    fields = {key: Field(values, values == MISSING, {}) for key, values in zip(_SLOTS, table, strict=True)}
    del fields["ip_proto"]
    kept = np.arange(table.shape[1])
    if odd.size:
        numbers, begins, ends = odd
        pieces = (text[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True))
        block = _parsed(b"".join(pieces), 0, layout)
        ragged, places = numbers[block.ragged], numbers[block.rows]
        yield from _ragged(row + ragged)
        others = flows.converter.fields(flows.prepared(layout.columns(block)))
        fields |= {key: _put(field, places, fields[key]) for key, field in others.items()}
        if len(ragged):
            kept = np.setdiff1d(kept, ragged, assume_unique=True)
            fields = {key: field.take(kept) for key, field in fields.items()}
    yield flows.converter.assemble(fields, row + kept, {})


def _put(field: Field, places: Rows, among: Field) -> Field:
    """`among` with the rows of `field` at these places."""
    among.values[places], among.missing[places] = field.values, field.missing
    faults = {reason: np.zeros_like(among.missing) for reason in field.faults}
    for reason, rows in field.faults.items():
        faults[reason][places] = rows
    return among._replace(faults=faults)


def _parsed(text: bytes, row: int, layout: _Layout) -> Block:
    header = Header(layout.names, layout.separator, quotes=False)
    places, kinds = sorted(layout.places().values()), dict(enumerate(layout.types))
    types = {place: _TYPES[kinds[place]] for place in places if kinds.get(place) in _TYPES}
    return parse(clean(text), row, header, places, types, (*MISSING_TEXT, *layout.unset))


def _ragged(rows: Rows) -> Iterator[Batch]:
    if len(rows):
        yield Batch(BATCH.empty_table(), [Reject("wrong number of fields", int(rows[0]), len(rows))])


@njit(cache=True, nogil=True)
def _walk(
    data: Bytes, start: int, slots: Ints, earliest: int, latest: int, table: Ints, odd: Ints
) -> tuple[int, int, int]:
    """Read lines from `start` on until `table` (11, N) is full, a header begins or they end: where that is,
    how many lines there were, without blank ones, and how many are odd. Of these, `odd` (3, N) has number,
    begin and end."""
    place: Any = np.uint64(start)  # unsigned: places do not count from the end
    n, n_odd = 0, 0
    while place < len(data) and n < table.shape[1]:
        begin, field, plain = place, 0, True
        if data[place] == _LINE_FEED or (data[place] == _RETURN and data[place + _1] == _LINE_FEED):
            place += _1
            continue
        if data[place] == _HASH:
            break
        for k in range(len(table)):
            table[k, n] = MISSING
        while True:
            slot = slots[field] if field < len(slots) else -1
            if slot >= 0:
                value, place = _value(data, place, slot)
                table[slot, n] = value
                plain &= value != _ODD and (data[place] == _TAB or data[place] == _LINE_FEED)
            while data[place] != _TAB and data[place] != _LINE_FEED:
                place += _1
            field, place = field + 1, place + _1
            if data[place - _1] == _LINE_FEED:
                break
        plain &= field == len(slots) and _protocol_fits(table, n)
        if not plain or table[_TS, n] < earliest or table[_TS, n] >= latest:
            for k in range(len(table)):
                table[k, n] = MISSING
            odd[0, n_odd], odd[1, n_odd], odd[2, n_odd] = n, begin, place
            n_odd += 1
        n += 1
    return place, n, n_odd


@njit(cache=True, nogil=True)
def _value(data: Bytes, place: Any, slot: int) -> tuple[Any, Any]:
    """The number that a field holds, _ODD where that is not plain, and the place behind it."""
    if slot == _TS:
        value, place = _time(data, place)
    elif slot in (_SRC, _DST):
        value, place = _quad(data, place)
    elif slot == _PROTO:
        value, place = _protocol(data, place)
    elif slot >= _SIZE and data[place] == _DASH:
        value, place = MISSING, place + _1
    elif slot == _TCP_FLAGS:
        value, place = _history(data, place)
    else:
        value, place = _digits(data, place)
    if (slot in (_SRC_PORT, _DST_PORT) and value > 65_535) or (slot == _IP_PROTO and value > 255):
        value = _ODD
    return value, place


@njit(cache=True, nogil=True)
def _digits(data: Bytes, place: Any) -> tuple[Any, Any]:
    """A number of up to 18 digits without a leading zero."""
    value: Any = 0
    first = place
    while _0 <= data[place] <= _9:
        value = value * 10 + np.int64(data[place] - _0)
        place += _1
    size = place - first
    plain = (_1 <= size <= _18) and (data[first] != _0 or size == _1)
    return value if plain else _ODD, place


@njit(cache=True, nogil=True)
def _time(data: Bytes, place: Any) -> tuple[Any, Any]:
    """Microseconds from seconds with up to six digits behind the point. Later than in 2038 a float, which the
    general way takes, might not give the same."""
    seconds, place = _digits(data, place)
    micro: Any = 0
    unit = 1_000_000
    if data[place] == _POINT:
        place += _1
        while _0 <= data[place] <= _9 and unit > 1:
            micro, unit = micro * 10 + np.int64(data[place] - _0), unit // 10
            place += _1
        if unit == 1_000_000:
            seconds = _ODD
    return seconds * 1_000_000 + micro * unit if 0 <= seconds < 2**31 else _ODD, place


@njit(cache=True, nogil=True)
def _quad(data: Bytes, place: Any) -> tuple[Any, Any]:
    value, plain = 0, True
    for k in range(4):
        if k:
            plain &= data[place] == _POINT
            place += _1 if plain else np.uint64(0)
        octet, place = _digits(data, place)
        value, plain = value << 8 | octet, plain and 0 <= octet <= 255
    return value if plain else _ODD, place


@njit(cache=True, nogil=True)
def _protocol(data: Bytes, place: Any) -> tuple[Any, Any]:
    """A line feed ends the data, so no comparison reaches behind it."""
    a = data[place]
    if a == ord("t") and data[place + _1] == ord("c") and data[place + _2] == ord("p"):
        return _TCP, place + _3
    if a == ord("u") and data[place + _1] == ord("d") and data[place + _2] == ord("p"):
        return _UDP, place + _3
    is_icm = a == ord("i") and data[place + _1] == ord("c") and data[place + _2] == ord("m")
    if is_icm and data[place + _3] == ord("p"):
        return _ICMP, place + _3 + _1
    return _ODD, place


@njit(cache=True, nogil=True)
def _history(data: Bytes, place: Any) -> tuple[Any, Any]:
    bits: Any = 0
    first = place
    while _LETTERS[data[place]] >= 0:
        bits |= _LETTERS[data[place]]
        place += _1
    return bits if place > first else _ODD, place


@njit(cache=True, nogil=True)
def _protocol_fits(table: Ints, n: int) -> bool:
    """Move a line's ports and flags where `_by_protocol` does; False where that is not plain."""
    if table[_IP_PROTO, n] != MISSING:
        table[_PROTO, n] = table[_IP_PROTO, n]
    if table[_PROTO, n] != _TCP:
        table[_TCP_FLAGS, n] = MISSING
    if table[_PROTO, n] == _ICMP:
        table[_ICMP_CODE, n] = table[_DST_PORT, n]
        table[_DST_PORT, n] = table[_SRC_PORT, n]
        table[_SRC_PORT, n] = MISSING
        return bool(table[_DST_PORT, n] <= 255 and table[_ICMP_CODE, n] <= 255)
    return True


def _set(column: pa.Array, unset: tuple[str, ...]) -> pa.Array:
    if not is_text(column):
        return column
    return pc.if_else(pc.is_in(column, pa.array(unset)), None, column)


# ---------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------


def read_zeek_json(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a conn.log with a JSON object on each line; `ts` may be a number or ISO 8601.

    Where several logs share a file, each object says in `_path` which it is of; those of others are skipped
    and counted. Rows are numbered from 0, without blank lines. Raises FormatError for damage.
    """
    flows = _Flows(path, config)
    keys = {key: (name,) for name, key in _KEYS.items() if name != "detailedlabel"}
    keys["detailed2"] = ("detailedlabel",)
    for objects in read_objects(file, path, keys, batch_rows):
        columns, rows = dict(objects.columns), objects.rows
        columns["detailed"] = _first(columns["detailed"], columns.pop("detailed2"))
        other = pc.fill_null(pc.not_equal(columns.pop("log"), "conn"), False).to_numpy(zero_copy_only=False)
        rejects = objects.rejects
        if other.any():
            rejects.append(
                Reject("of another Zeek log", int(rows[other.argmax()]), int(other.sum()), "left out")
            )
            columns = {key: column.filter(pa.array(~other)) for key, column in columns.items()}
            rows = rows[~other]
        if rejects:
            yield Batch(BATCH.empty_table(), rejects)
        if len(rows):
            yield flows.convert(columns, rows)
