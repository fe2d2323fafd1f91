"""Addresses in any of the forms that files have -> IPv4 as numbers.

Dotted text is parsed by its bytes in a compiled loop: some 10 million addresses a second, where a parser that
is called for each manages one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from rayscan.captures.values import (
    Bytes,
    Field,
    Ints,
    Mask,
    at,
    bytes_of,
    nulls,
    plain,
    trimmed,
    whole,
    whole_text,
)

IS_IPV6 = "is IPv6"
_IPV6 = r"^([0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}$|^[0-9A-Fa-f:.]*::[0-9A-Fa-f:.]*(%\w+)?$"
_MAPPED = r"^(?i:::ffff:)(\d+\.\d+\.\d+\.\d+)$"  # IPv4 as an IPv6 socket reports it


def address(array: pa.Array) -> Field:
    """IPv4 addresses, from numbers, dotted text or bytes in network order, as numbers in [0, 2^32).

    An int32 column holds them as two's complement. Addresses of IPv6 are a fault, except IPv4 written as one
    (::ffff:192.0.2.1). A leading zero is not IPv4, since programs disagree on 010.
    """
    array = plain(array)
    if pa.types.is_fixed_size_binary(array.type):
        array = array.cast(pa.binary())
    if pa.types.is_binary(array.type):
        return _address_bytes(array)
    if pa.types.is_string(array.type):
        return _address_text(trimmed(array))
    field = whole(array)
    values = field.values & 0xFFFFFFFF if array.type == pa.int32() else field.values
    return _ipv4(values, field.missing, ~field.missing & ~field.unreadable)


def _ipv4(values: Ints, missing: Mask, parsed: Mask, ipv6: Mask | None = None) -> Field:
    ipv6 = np.zeros_like(missing) if ipv6 is None else ipv6
    wrong = ~missing & ~ipv6 & ~(parsed & (values >= 0) & (values < 2**32))
    return Field.of(values, missing, {"is not IPv4": wrong, IS_IPV6: ipv6})


def _address_bytes(array: pa.Array) -> Field:
    missing = nulls(array)
    data, start, length = bytes_of(array)
    mapped = length == 16
    for k in range(12):
        mapped &= data[at(data, start, k)] == (0xFF if k >= 10 else 0)
    four = (length == 4) | mapped
    last = start + length - 4
    values = np.zeros(len(array), np.int64)
    for k in range(4):
        values = values << 8 | data[at(data, last, k)]
    field = _ipv4(values, missing, four, (length == 16) & ~mapped & ~missing)
    return _or_text(field, array, ~four & (length != 16) & ~missing)


def _or_text(field: Field, array: pa.Array, rows: Mask) -> Field:
    """The field, with `rows` read as text instead: bytes may also hold 192.0.2.1."""
    if not rows.any():
        return field
    as_text = _address_text(trimmed(pc.if_else(pa.array(rows), array, None)))
    values = np.where(rows, as_text.values, field.values)
    missing = np.where(rows, as_text.missing, field.missing)
    faults = {reason: mask & ~rows for reason, mask in field.faults.items()}
    for reason, mask in as_text.faults.items():
        faults[reason] = faults.get(reason, np.zeros_like(rows)) | mask
    return Field.of(values, missing, faults)


def _address_text(array: pa.Array) -> Field:
    missing = nulls(array)
    values, parsed = _dotted(array)
    left = np.flatnonzero(~parsed & ~missing)
    if len(left):
        numbers = whole_text(array.take(pa.array(left)))
        values[left], parsed[left] = numbers.values, numbers.present
    left = np.flatnonzero(~parsed & ~missing)
    ipv6 = np.zeros_like(missing)
    if len(left):
        unmapped = pc.replace_substring_regex(array.take(pa.array(left)), _MAPPED, r"\1")
        values[left], parsed[left] = _dotted(unmapped)
        ipv6[left] = pc.match_substring_regex(unmapped, _IPV6).to_numpy(zero_copy_only=False)
    return _ipv4(values, missing, parsed, ipv6)


def _dotted(array: pa.Array) -> tuple[Ints, Mask]:
    """Value of each dotted quad, and whether it is one."""
    data, start, length = bytes_of(array)
    values, parsed = np.zeros(len(start), np.int64), np.zeros(len(start), np.bool_)
    _parse_quads(data, start, length, values, parsed)
    return values, parsed


@njit(cache=True, nogil=True)
def _parse_quads(data: Bytes, start: Ints, length: Ints, values: Ints, parsed: Mask) -> None:
    for row in range(len(start)):
        value, octet, digits, dots, good = 0, 0, 0, 0, 7 <= length[row] <= 15
        for place in range(start[row], start[row] + length[row]):
            if not good:
                break
            byte = data[place]
            if byte == 46:  # .
                good = digits > 0
                value, octet, digits, dots = value << 8 | octet, 0, 0, dots + 1
            else:
                good = 48 <= byte <= 57 and (digits == 0 or octet > 0)  # no leading zero
                octet, digits = octet * 10 + byte - 48, digits + 1
                good = good and octet <= 255
        values[row] = value << 8 | octet
        parsed[row] = good and dots == 3 and digits > 0
