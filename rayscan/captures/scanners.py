"""Who is a known scanner, at the time of the traffic.

Lists age: an address of a cloud that scanned for one organisation in 2023 scans for nobody in 2026. So every
entry carries the days for which its list vouches, and traffic is looked up with its own date:

1. an entry that holds on that day wins over one that does not;
2. of equals the longest prefix wins;
3. then the entry whose days are nearest, then the organisation's name, so that the answer is unique.

An entry that does not hold on that day counts only within a tolerance (`scanners.tolerance_days`), and the
answer says how many days off it is. Traded: a list says who was seen, not who had gone; an entry that a newer
list of the same source has dropped still counts within the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray

from rayscan.captures.networks import Networks
from rayscan.captures.values import Ints

DAY_US = 86_400_000_000
NOT_KNOWN = -1
_NEVER = np.iinfo(np.int64).max
_DAY_BITS, _ENTRY_BITS = 22, 31  # of a rank: 1 bit off or not, 6 bits length, days, entry


class Found(NamedTuple):
    """The best entry for each of N addresses."""

    entry: Ints  # its number, NOT_KNOWN where there is none
    days_off: Ints  # from the nearest day for which the entry vouches; 0 where it holds


@dataclass(frozen=True)
class Known:
    """Who each of N sequences' sources is."""

    organisation: pa.Array  # string (N,), null where no list knows it
    days_off: Ints  # (N,), 0 where no list knows it


class Scanners:
    """The entries of all lists, ready for lookup. Sent to workers as it is: some 60 bytes an entry."""

    def __init__(self, entries: pa.Table, tolerance_days: int) -> None:
        """`entries` are rows of schema.SCANNERS, in any order."""
        keys = ["organisation", "source", "valid_from", "valid_to", "network", "length"]
        self.entries = entries.sort_by([(name, "ascending") for name in keys])
        self.tolerance_days = tolerance_days
        numbers = {name: self.entries[name].to_numpy().astype(np.int64) for name in ("network", "length")}
        self._networks = Networks(**numbers)
        members = self._networks.members
        self._from, self._to = (_days(self.entries[name])[members] for name in ("valid_from", "valid_to"))
        self._static = (32 - numbers["length"][members]) << (_DAY_BITS + _ENTRY_BITS) | members

    def find(self, addresses: Ints, days: Ints) -> Found:
        """The best entry for each address (N,) on its day (N,), counted from 1970-01-01."""
        piece, first = self._networks.pieces(addresses), self._networks.first
        rank = _best(piece, days, first, self._from, self._to, self._static, self.tolerance_days)
        known = rank < _NEVER
        entry = np.where(known, rank & (1 << _ENTRY_BITS) - 1, NOT_KNOWN)
        off = np.where(known, rank >> _ENTRY_BITS & (1 << _DAY_BITS) - 1, 0)
        return Found(entry, off)

    def known(self, sequences: pa.Table) -> Known:
        """Who the source of each sequence (columns src, start) is, on the day of its first flow."""
        day = sequences["start"].cast(pa.int64()).to_numpy() // DAY_US
        found = self.find(sequences["src"].to_numpy(), day)
        place = pa.array(found.entry, mask=found.entry == NOT_KNOWN)
        return Known(pc.take(self.entries["organisation"].combine_chunks(), place), found.days_off)

    def covering(self, address: int) -> pa.Table:
        """Every entry that holds an address, whatever its date, longest prefix first."""
        first, count = self._networks.covering(np.array([address]))
        return self.entries.take(pa.array(self._networks.members[first[0] : first[0] + count[0]]))


@njit(cache=True, nogil=True)
def _best(
    piece: NDArray[np.int32], day: Ints, first: Ints, from_: Ints, to: Ints, static: Ints, tolerance: int
) -> Ints:
    """The least rank (N,) among the members of each address's piece: the less the better, _NEVER where all
    are out of tolerance. A rank packs what decides, and last which entry it is of."""
    best = np.full(len(piece), _NEVER)
    for i in range(len(piece)):
        for place in range(first[piece[i]], first[piece[i] + 1]):
            off = max(from_[place] - day[i], day[i] - to[place], 0)
            if off <= tolerance:
                rank = np.int64(off > 0) << (6 + _DAY_BITS + _ENTRY_BITS) | off << _ENTRY_BITS
                best[i] = min(best[i], rank | static[place])
    return best


def _days(column: pa.ChunkedArray) -> Ints:
    days: Ints = column.cast(pa.int32()).to_numpy().astype(np.int64)
    return days
