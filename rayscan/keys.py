"""Keys that shard the work: period of a time, bucket of a source, and the hash behind both.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014). It is written down here because tables outlive programs: the bucket of a source must
be the same in every version and language.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Period = Literal["day", "week", "month", "all"]
HASH_NAME = "splitmix64"
_DAY_US = 86_400_000_000


def hash64(values: NDArray[np.integer], seed: int = 0) -> NDArray[np.uint64]:
    """SplitMix64 of each value, shape as given. `seed` selects one of many independent hashes."""
    with np.errstate(over="ignore"):
        z = values.astype(np.int64).view(np.uint64) + np.uint64(
            (0x9E3779B97F4A7C15 * (seed + 1)) & 0xFFFFFFFFFFFFFFFF
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(values: NDArray[np.integer], seed: int = 0) -> NDArray[np.float64]:
    """One number in [0, 1) for each value, from its hash."""
    return (hash64(values, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def bucket_of(src: NDArray[np.integer], n_buckets: int) -> NDArray[np.int32]:
    """Bucket of each source address, int32 in [0, n_buckets)."""
    return (hash64(src) % np.uint64(n_buckets)).astype(np.int32)


def period_of(ts_us: NDArray[np.int64], kind: Period) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the periods that occur, in time order, and for each time the position of its name.

    `ts_us` is int64 microseconds UTC. Names: 2024-03-01 (day), 2024-W09 (ISO week), 2024-03 (month), all.
    """
    if kind == "all":
        return ["all"], np.zeros(len(ts_us), np.int64)
    days = np.floor_divide(ts_us, _DAY_US)
    if kind == "week":  # day 0 was a Thursday; weeks begin on Monday
        start = np.floor_divide(days + 3, 7)
    elif kind == "month":
        start = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    else:
        start = days
    values, position = np.unique(start, return_inverse=True)
    return [_name(int(value), kind) for value in values], position.astype(np.int64)


def _name(value: int, kind: Period) -> str:
    if kind == "week":
        year, week, _ = np.datetime64(value * 7 - 3, "D").item().isocalendar()
        return f"{year}-W{week:02d}"
    return str(np.datetime64(value, "M" if kind == "month" else "D"))


def span_of(period: str) -> tuple[datetime, datetime]:
    """First moment of a period by its name, and the first after it, UTC. `all` spans whatever there is."""
    if period == "all":
        return datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    if "W" in period:
        first = date.fromisoformat(f"{period}-1")
        after = first + timedelta(days=7)
    elif len(period) == len("2024-03"):
        first = date.fromisoformat(f"{period}-01")
        after = (first + timedelta(days=31)).replace(day=1)
    else:
        first = date.fromisoformat(period)
        after = first + timedelta(days=1)
    begin, end = (datetime(day.year, day.month, day.day, tzinfo=UTC) for day in (first, after))
    return begin, end
