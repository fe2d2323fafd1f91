"""Times in any of the forms that files have -> microseconds since 1970 UTC.

ISO 8601 text is parsed by its bytes, one place of all rows at a time. What a number or a time without a zone
means is never guessed: it takes the settings captures.time_unit and captures.time_zone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan.captures.values import (
    Bytes,
    Field,
    Ints,
    Mask,
    at,
    bytes_of,
    cast_text,
    is_text,
    nulls,
    plain,
    trimmed,
    whole,
)
from rayscan.errors import ConfigError

NAIVE = "without a zone: set captures.time_zone"
UNITLESS = "is a number: set captures.time_unit"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_US = 86_400 * 10**6


@dataclass(frozen=True)
class Clock:
    """How the times of a file are meant. Times outside [earliest_us, latest_us) are faults."""

    unit: str | None  # of numbers
    zone: str | None  # of times without one
    earliest_us: int
    latest_us: int

    def __post_init__(self) -> None:
        try:
            if self.zone is not None:
                _from_zone(np.zeros(1, np.int64), self.zone)
        except pl.exceptions.ComputeError:
            name = f"captures.time_zone: unknown zone {self.zone!r}"
            raise ConfigError(f"{name}; give an IANA name such as UTC or Europe/Berlin") from None


def time(array: pa.Array, clock: Clock) -> Field:
    """Microseconds since 1970 UTC, from timestamps, numbers in `clock.unit` or ISO 8601 text.

    Finer digits than a microsecond are cut off; floats are rounded, since 1634159075.307 is not a float. Of
    two readings of a local time, when clocks go back, the earlier is taken; one that clocks skip is a fault.
    """
    array = plain(array)
    if pa.types.is_timestamp(array.type):
        field = _timestamps(array, clock)
    elif is_text(array):
        field = _time_text(trimmed(array), clock)
    else:
        field = _epoch(array, clock)
    ok = field.present
    early, late = ok & (field.values < clock.earliest_us), ok & (field.values >= clock.latest_us)
    limits = {"before captures.earliest": early, "after captures.latest": late}
    return field.with_faults(limits)


def _timestamps(array: pa.Array, clock: Clock) -> Field:
    missing = nulls(array)
    values = _to_us(pc.fill_null(array.view(pa.int64()), 0).to_numpy(), array.type.unit)
    if array.type.tz is None:
        return _localised(values, missing, ~missing, clock)
    return Field.of(values, missing, {})


def _to_us(values: Ints, unit: str) -> Ints:
    """Whole units as microseconds; what does not fit ends at the limits, which lie outside any range."""
    per_second = _PER_SECOND[unit]
    if per_second >= 10**6:
        return values // (per_second // 10**6)
    factor = 10**6 // per_second
    limit = (2**63 - 1) // factor
    return np.clip(values, -limit, limit) * factor


def _epoch(array: pa.Array, clock: Clock) -> Field:
    if pa.types.is_boolean(array.type):
        raise TypeError("a time is needed")
    if pa.types.is_floating(array.type):
        return _epoch_floats(array.cast(pa.float64()).to_numpy(zero_copy_only=False), clock)
    if pa.types.is_decimal(array.type):
        return _time_text(trimmed(array), clock)
    field = whole(array)
    if clock.unit is None:
        return field.with_faults({UNITLESS: field.present})
    return field._replace(values=_to_us(field.values, clock.unit))


def _epoch_floats(values: NDArray[np.float64], clock: Clock) -> Field:
    missing = np.isnan(values)
    if clock.unit is None:
        return Field.of(np.zeros(len(values), np.int64), missing, {UNITLESS: ~missing})
    infinite = np.isinf(values)
    scaled = np.where(missing | infinite, 0, values) * (10**6 / _PER_SECOND[clock.unit])
    scaled = np.floor(scaled) if clock.unit == "ns" else np.rint(scaled)
    us = np.clip(scaled, -(2.0**62), 2.0**62).astype(np.int64)
    return Field.of(us, missing, {"unreadable": infinite})


def _localised(values: Ints, missing: Mask, naive: Mask, clock: Clock) -> Field:
    """UTC from values whose `naive` rows are in the clock's zone."""
    if not naive.any() or clock.zone == "UTC":
        return Field.of(values, missing, {})
    if clock.zone is None:
        return Field.of(values, missing, {NAIVE: naive})
    margin = 2 * _DAY_US  # beyond any zone's offset: what is clipped lies outside the range anyway
    local = np.clip(values[naive], clock.earliest_us - margin, clock.latest_us + margin)
    values, skipped = values.copy(), np.zeros_like(naive)
    values[naive], skipped[naive] = _from_zone(local, clock.zone)
    return Field.of(values, missing, {"does not exist in captures.time_zone": skipped})


def _from_zone(local_us: Ints, zone: str) -> tuple[Ints, Mask]:
    series = pl.Series(local_us).cast(pl.Datetime("us"))
    utc = series.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null").cast(pl.Int64)
    return utc.fill_null(0).to_numpy(), utc.is_null().to_numpy()


def _time_text(array: pa.Array, clock: Clock) -> Field:
    missing = nulls(array)
    data, start, length = bytes_of(array)
    if _Places(data, start, length).is_in(4, "-/").any():
        values, offset, zoned, parsed = _iso(data, start, length)
    else:  # numbers, which would only be looked at twice
        values, offset = np.zeros_like(start), np.zeros_like(start)
        zoned, parsed = np.zeros_like(missing), np.zeros_like(missing)
    field = _localised(values - offset, missing, parsed & ~zoned & ~missing, clock)
    left = np.flatnonzero(~parsed & ~missing)
    unreadable, unitless = np.zeros_like(missing), np.zeros_like(missing)
    if len(left):
        numbers = _numeric_times(array.take(pa.array(left)), clock)
        field.values[left] = numbers.values
        unitless[left] = numbers.faults.get(UNITLESS, False)
        unreadable[left] = numbers.unreadable & ~unitless[left]
    return field.with_faults({UNITLESS: unitless, "unreadable": unreadable})


def _numeric_times(array: pa.Array, clock: Clock) -> Field:
    ints, is_int = cast_text(array, pl.Int64())
    floats, is_float = cast_text(array, pl.Float64())
    field = _epoch_floats(np.where(is_float & np.isfinite(floats), floats, np.inf), clock)
    if clock.unit is None:
        return Field.of(ints, ~is_int & ~is_float, {UNITLESS: is_float, "unreadable": ~is_float})
    return field._replace(values=np.where(is_int, _to_us(ints, clock.unit), field.values))


def _iso(data: Bytes, start: Ints, length: Ints) -> tuple[Ints, Ints, Mask, Mask]:
    """Local microseconds, offset of the zone in microseconds, whether there is a zone, whether it parsed.

    YYYY-MM-DD hh:mm:ss, with / for -, T for the blank, a fraction of up to nine digits after . or , and a
    zone as Z, UTC, +hh, +hhmm or +hh:mm. The second 60 is taken as the first of the next minute.
    """
    text = _Places(data, start, length)
    century, year, month, day, hour, minute, second = (text.pair(k) for k in (0, 2, 5, 8, 11, 14, 17))
    ok = (century >= 0) & (year >= 0) & (month >= 1) & (month <= 12) & (day >= 1)
    ok &= _within(hour, 23) & _within(minute, 59) & _within(second, 60)
    ok &= text.is_in(4, "-/") & (text.byte(7) == text.byte(4)) & text.is_in(10, " Tt")
    ok &= text.is_in(13, ":") & text.is_in(16, ":")
    months = ((century * 100 + year - 1970) * 12 + np.clip(month, 1, 12) - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]").astype(np.int64) + day - 1
    ok &= days < (months + 1).astype("datetime64[D]").astype(np.int64)
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second
    micro, end = _fraction(text)
    offset, zoned, good = _zone(data, start + end, np.maximum(length - end, 0))
    return seconds * 10**6 + micro, offset, zoned, ok & good


class _Places:
    """Bytes at fixed places of N values; 0 behind a value's end."""

    def __init__(self, data: Bytes, start: Ints, length: Ints) -> None:
        self.data, self.start, self.length = data, start, length

    def byte(self, k: int) -> Bytes:
        there: Bytes = np.where(self.length > k, self.data[at(self.data, self.start, k)], np.uint8(0))
        return there

    def is_in(self, k: int, characters: str) -> Mask:
        byte = self.byte(k)
        return np.isin(byte, [ord(c) for c in characters])

    def pair(self, k: int) -> Ints:
        """The number of two digits, -1 where there are none."""
        tens, ones = self.byte(k) - np.uint8(48), self.byte(k + 1) - np.uint8(48)
        return np.where((tens <= 9) & (ones <= 9), tens.astype(np.int64) * 10 + ones, -1)


def _within(values: Ints, high: int) -> Mask:
    return np.logical_and(values >= 0, values <= high)


def _fraction(text: _Places) -> tuple[Ints, Ints]:
    """Microseconds after the second, and the place after them: 19 where there are none."""
    running = text.is_in(19, ".,")
    micro, width = np.zeros(len(running), np.int64), np.zeros(len(running), np.int64)
    for k in range(9):
        if not running.any():
            break
        digit = text.byte(20 + k) - np.uint8(48)
        running &= digit <= 9
        if k < 6:
            micro += np.where(running, digit.astype(np.int64) * 10 ** (5 - k), 0)
        width += running
    return micro, 19 + np.where(width > 0, width + 1, 0)


def _zone(data: Bytes, start: Ints, length: Ints) -> tuple[Ints, Mask, Mask]:
    """Offset in microseconds, whether anything stands there, and whether that is a zone (or nothing)."""
    offset, zoned, good = np.zeros(len(start), np.int64), length > 0, length == 0
    rows = np.flatnonzero(zoned)
    if len(rows):
        blank = _Places(data, start[rows], length[rows]).is_in(0, " ")
        text = _Places(data, start[rows] + blank, length[rows] - blank)
        utc = (text.length == 1) & text.is_in(0, "Zz")
        utc |= (text.length == 3) & text.is_in(0, "U") & text.is_in(1, "T") & text.is_in(2, "C")
        size, signed = _offset(text)
        offset[rows], good[rows] = np.where(signed, size, 0), utc | signed
    return offset, zoned, good


def _offset(text: _Places) -> tuple[Ints, Mask]:
    """Offset of +hh, +hhmm or +hh:mm in microseconds, and whether it is one."""
    colon, short = text.is_in(3, ":"), text.length == 3
    hours = text.pair(1)
    minutes = np.where(short, 0, np.where(colon, text.pair(4), text.pair(3)))
    whole_text = short | (text.length == np.where(colon, 6, 5))
    ok = text.is_in(0, "+-") & whole_text & _within(hours, 18) & _within(minutes, 59)
    size = (hours * 60 + minutes) * 60 * 10**6
    return np.where(text.byte(0) == ord("-"), -size, size), ok
