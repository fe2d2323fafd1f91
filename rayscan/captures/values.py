"""Columns of any type, as files have them -> the numbers that flows are made of.

Every function takes one Arrow array and returns a `Field`: numbers, which rows have none, and which hold
something that cannot be meant, by reason. None raises for a value, however strange: a bad row costs only
itself. A *type* that can never hold the column (a list as a port) is a TypeError, also for an empty array,
so that a file can be checked before its rows are read.

Text is parsed by gathering bytes from Arrow's buffers, one position of all rows at a time: 5 to 20 million
values a second, where a parser called per value manages one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

MISSING_TEXT = ("", "-", "null", "NULL", "NA", "N/A", "None", "nan", "NaN", "\\N")
"""Text that says there is no value."""

PROTOCOLS = {
    "hopopt": 0, "icmp": 1, "igmp": 2, "ggp": 3, "ipv4": 4, "ipip": 4, "ip-in-ip": 4, "st": 5, "tcp": 6,
    "cbt": 7, "egp": 8, "igp": 9, "chaos": 16, "udp": 17, "hmp": 20, "xns-idp": 22, "rdp": 27, "dccp": 33,
    "idpr": 35, "ipv6": 41, "ipv6-route": 43, "ipv6-frag": 44, "idrp": 45, "rsvp": 46, "gre": 47, "esp": 50,
    "ah": 51, "skip": 57, "ipv6-icmp": 58, "icmp6": 58, "icmpv6": 58, "ipv6-nonxt": 59, "ipv6-opts": 60,
    "eigrp": 88, "ospf": 89, "ospfigp": 89, "ax.25": 93, "etherip": 97, "encap": 98, "pim": 103,
    "ipcomp": 108, "vrrp": 112, "l2tp": 115, "isis": 124, "sctp": 132, "fc": 133, "mobility": 135,
    "udplite": 136, "mpls-in-ip": 137, "hip": 139, "shim6": 140,
}  # fmt: skip
"""Names of protocols, from IANA's "Protocol Numbers" and the usual variants."""

TCP_FLAGS = {"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32, "ECE": 64, "CWR": 128}
_FLAG_LETTERS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32, "E": 64, "C": 128, "W": 128}
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]{1,15}")
_WORDS = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0}


class Field(NamedTuple):
    """One column of N rows. Where a row is missing or has a fault, its value means nothing."""

    values: Ints
    missing: Mask
    faults: dict[str, Mask]  # reason -> rows; the reason stands after the column's name

    @property
    def unreadable(self) -> Mask:
        """Rows with any fault."""
        rows: Mask = np.logical_or.reduce([np.zeros_like(self.missing), *self.faults.values()])
        return rows

    @property
    def present(self) -> Mask:
        return ~(self.missing | self.unreadable)

    @classmethod
    def of(cls, values: Ints, missing: Mask, faults: dict[str, Mask]) -> Field:
        """A field with those of the faults that some row has."""
        return cls(values, missing, {reason: rows for reason, rows in faults.items() if rows.any()})

    def take(self, rows: Ints) -> Field:
        faults = {reason: mask[rows] for reason, mask in self.faults.items()}
        return Field(self.values[rows], self.missing[rows], faults)

    def with_faults(self, more: dict[str, Mask]) -> Field:
        return Field.of(self.values, self.missing, self.faults | more)


# ---------------------------------------------------------------------------------------------
# Whole numbers
# ---------------------------------------------------------------------------------------------


def plain(array: pa.Array) -> pa.Array:
    """The array without dictionaries, views or long offsets. Bytes as such; text is valid UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_large_binary(kind) or kind == pa.binary_view():
        return array.cast(pa.binary())
    if pa.types.is_large_string(kind) or kind == pa.string_view():
        array = array.cast(pa.string())
    return _valid_text(array) if pa.types.is_string(array.type) else array


def _valid_text(array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
        return array
    except pa.ArrowInvalid:  # rare: bytes that are not UTF-8 become U+FFFD
        values = array.cast(pa.binary()).to_pylist()
        return pa.array([v if v is None else v.decode(errors="replace") for v in values], pa.string())


def text(array: pa.Array) -> pa.Array:
    """The column as strings, with null for MISSING_TEXT and trimmed of blanks."""
    return trimmed(plain(array))


def trimmed(array: pa.Array) -> pa.Array:
    """The same for an array that is plain already."""
    if pa.types.is_nested(array.type):
        raise TypeError("text or numbers are needed")
    if pa.types.is_binary(array.type) or pa.types.is_fixed_size_binary(array.type):
        array = _valid_text(array.cast(pa.binary()).view(pa.string()))
    trimmed = pc.ascii_trim_whitespace(array.cast(pa.string()))
    return pc.if_else(pc.is_in(trimmed, pa.array(MISSING_TEXT)), None, trimmed)


def whole(array: pa.Array) -> Field:
    """Whole numbers of any integer, float, decimal, boolean or text column; others are "unreadable"."""
    array = plain(array)
    kind, missing = array.type, nulls(array)
    if pa.types.is_null(kind):
        return Field.of(np.zeros(len(array), np.int64), missing, {})
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        array = array.cast(pa.int64(), safe=False)
        values = (pc.fill_null(array, 0) if array.null_count else array).to_numpy()
        too_large = values < 0 if kind == pa.uint64() else np.zeros_like(missing)
        return Field.of(values, missing, {"unreadable": too_large & ~missing})
    if pa.types.is_floating(kind):
        return whole_floats(array.cast(pa.float64()).to_numpy(zero_copy_only=False))
    if pa.types.is_decimal(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind):
        return whole_text(trimmed(array))
    raise TypeError("a whole number is needed")


def whole_floats(values: NDArray[np.float64]) -> Field:
    missing = np.isnan(values)
    with np.errstate(invalid="ignore"):
        exact = (np.abs(values) < 2.0**63) & (np.rint(values) == values)
        ints = np.where(exact, values, 0).astype(np.int64)
    return Field.of(ints, missing, {"unreadable": ~exact & ~missing})


def whole_text(array: pa.Array) -> Field:
    missing = nulls(array)
    values, parsed = cast_text(array, pl.Int64())
    left = np.flatnonzero(~parsed & ~missing)
    if len(left):  # 443.0, as pandas writes a column with gaps, and 0x1bb
        texts = array.take(pa.array(left))
        floats, numeric = cast_text(texts, pl.Float64())
        again = whole_floats(np.where(numeric, floats, np.inf))
        hexadecimal = _by_distinct(texts, _hexadecimal)
        values[left] = np.where(again.present, again.values, hexadecimal.values)
        parsed[left] = again.present | hexadecimal.present
    return Field.of(values, missing, {"unreadable": ~parsed & ~missing})


def _hexadecimal(value: str) -> int | None:
    return int(value, 16) if _HEXADECIMAL.fullmatch(value) else None


def cast_text(array: pa.Array, kind: pl.DataType) -> tuple[Any, Mask]:
    """Values (0 where unparsable) and whether each was parsed."""
    series = pl.Series(array).cast(kind, strict=False)
    return series.fill_null(0).to_numpy().copy(), series.is_not_null().to_numpy().copy()


def bounded(array: pa.Array, low: int, high: int) -> Field:
    """Whole numbers in [low, high]; others are "below low" or "above high"."""
    field = whole(array)
    ok = field.present
    below, above = ok & (field.values < low), ok & (field.values > high)
    return field.with_faults({f"below {low}": below, f"above {high}": above})


def protocol(array: pa.Array) -> Field:
    """Protocol numbers from numbers or names in any case."""
    array = plain(array)
    if not is_text(array):
        return bounded(array, 0, 255)
    return _by_distinct(trimmed(array), lambda name: PROTOCOLS.get(name.lower(), _number(name)))


def tcp_flags(array: pa.Array) -> Field:
    """Flag bits from numbers, letters (SA, .A..S.) or words (SYN ACK, SYN|ACK)."""
    array = plain(array)
    if not is_text(array):
        return bounded(array, 0, 255)
    return _by_distinct(trimmed(array), _flag_bits)


def yes_or_no(array: pa.Array) -> Field:
    """1 and 0 from booleans, numbers or text (true, no, ...)."""
    array = plain(array)
    if not is_text(array):
        return bounded(array, 0, 1)
    return _by_distinct(trimmed(array), lambda word: _WORDS.get(word.lower()))


def _flag_bits(value: str) -> int | None:
    bits = 0
    for word in value.upper().translate(str.maketrans("|,+-/;.", "       ")).split():
        if word in TCP_FLAGS:
            bits |= TCP_FLAGS[word]
        elif all(letter in _FLAG_LETTERS for letter in word):
            bits |= sum(_FLAG_LETTERS[letter] for letter in set(word))
        else:
            return _number(value)
    return bits


def _number(value: str) -> int | None:
    """A number up to 255, also in hexadecimal as 0x12."""
    try:
        number = int(value, 16) if value[:2].lower() == "0x" else float(value)
    except ValueError:
        return None
    return int(number) if number in range(256) else None  # 6.0 is, 6.5 is not


def _by_distinct(array: pa.Array, parse: Callable[[str], int | None]) -> Field:
    """Parse each distinct text once."""
    coded = array.dictionary_encode()
    parsed = [parse(value) for value in coded.dictionary.to_pylist()]
    missing = nulls(array)
    code = pc.fill_null(coded.indices, len(parsed)).to_numpy()
    table = np.array([-1 if value is None else value for value in parsed] + [0], np.int64)
    values = table[code]
    return Field.of(values, missing, {"unreadable": values < 0})


def is_text(array: pa.Array) -> bool:
    return bool(pa.types.is_string(array.type) or pa.types.is_binary(array.type))


def nulls(array: pa.Array) -> Mask:
    if not array.null_count:
        return np.zeros(len(array), np.bool_)
    mask: Mask = array.is_null().to_numpy(zero_copy_only=False)
    return mask


# ---------------------------------------------------------------------------------------------
# Bytes of text
# ---------------------------------------------------------------------------------------------


def bytes_of(array: pa.Array) -> tuple[Bytes, Ints, Ints]:
    """Bytes of a text column, at least one, and where each value begins and how long it is (0 for null)."""
    if not len(array):
        return np.zeros(1, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    content = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data is not None and data.size else None
    if content is None or not len(content):
        content = np.zeros(1, np.uint8)
    start = ends[:-1] - ends[0]
    return content, start, np.where(nulls(array), 0, np.diff(ends))


def at(data: Bytes, position: Ints, k: int) -> Ints:
    """Positions k further on, kept inside the data: what lies outside a value is masked by its length."""
    return np.clip(position + k, 0, len(data) - 1)
