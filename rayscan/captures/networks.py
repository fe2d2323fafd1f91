"""Which networks hold an address: CIDR prefixes as disjoint pieces of the address space.

All ends of the networks cut the space into pieces, and each piece keeps the list of the networks that hold
it, longest first. A lookup is one bisection, whatever the prefixes' lengths and however they nest. Bisecting
everything at random misses the cache at every step, so a table says for each /20 which pieces it touches
(nearly always one), and compiled code bisects among these. The table costs 4 MB.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray

from rayscan.captures.addresses import IS_IPV6, address
from rayscan.captures.values import Ints, Mask, whole_text

_BLOCK_BITS = 12  # of an address within a /20


class Networks:
    """N IPv4 networks, by their numbers 0 to N - 1."""

    def __init__(self, network: Ints, length: Ints) -> None:
        """`network` (N,) are addresses, whose bits beyond the prefix `length` (N,), 0 to 32, do not count."""
        start = network >> (32 - length) << (32 - length)
        stop = start + (1 << (32 - length))
        bounds = np.unique(np.r_[0, start, stop])
        self._bounds = bounds[bounds < 2**32]
        low, high = np.searchsorted(self._bounds, start), np.searchsorted(self._bounds, stop)
        size = high - low
        number = np.repeat(np.arange(len(size)), size)
        piece = np.arange(len(number)) + np.repeat(low - (np.cumsum(size) - size), size)
        order = np.lexsort((number, -length[number], piece))
        self.members: Ints = number[order]
        """Networks of piece after piece, in each the longest first."""
        self.first: Ints = np.searchsorted(piece[order], np.arange(len(self._bounds) + 1))
        """Where each piece's networks begin in `members`, and at the end where the last one's end."""
        blocks = np.arange((1 << (32 - _BLOCK_BITS)) + 1) << _BLOCK_BITS
        self._at_block = (np.searchsorted(self._bounds, blocks, side="right") - 1).astype(np.int32)

    def pieces(self, addresses: Ints) -> NDArray[np.int32]:
        """The piece (N,) in which each address lies. Raises ValueError for a number that is no address."""
        if len(addresses) and not (addresses.min() >= 0 and addresses.max() < 2**32):
            raise ValueError("a number beyond 32 bits is no IPv4 address")
        found: NDArray[np.int32] = _pieces(addresses, self._at_block, self._bounds)
        return found

    def covering(self, addresses: Ints) -> tuple[Ints, Ints]:
        """For each address where its networks begin in `members`, and how many they are."""
        piece = self.pieces(addresses)
        return self.first[piece], self.first[piece + 1] - self.first[piece]

    def longest(self, addresses: Ints) -> Ints:
        """Number of the longest network that holds each address, -1 where none does."""
        first, count = self.covering(addresses)
        found = np.full(len(addresses), -1, np.int64)
        hit = count > 0
        found[hit] = self.members[first[hit]]
        return found


@njit(cache=True, nogil=True)
def _pieces(addresses: Ints, at_block: NDArray[np.int32], bounds: Ints) -> NDArray[np.int32]:
    found = np.empty(len(addresses), np.int32)
    for i in range(len(addresses)):
        block = addresses[i] >> _BLOCK_BITS
        low, high = at_block[block], at_block[block + 1]
        while low < high:
            middle = (low + high + 1) // 2
            if bounds[middle] <= addresses[i]:
                low = middle
            else:
                high = middle - 1
        found[i] = low
    return found


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


class Parsed(NamedTuple):
    """Networks of N texts; where one is IPv6 or bad, its numbers mean nothing."""

    network: Ints  # (N,), bits beyond the prefix cleared
    length: Ints
    ipv6: Mask
    bad: Mask


def parse(texts: pa.Array) -> Parsed:
    """Networks written as 192.0.2.0/24, or as a single address."""
    parts = pc.split_pattern(texts, "/", max_splits=1)
    found = address(pc.list_element(parts, 0)) if len(texts) else address(pa.array([], pa.string()))
    has_length = pc.match_substring(texts, "/").to_numpy(zero_copy_only=False)
    given = whole_text(pc.replace_substring_regex(texts, "^[^/]*/", ""))
    length = np.where(has_length, given.values, 32)
    ipv6 = found.faults.get(IS_IPV6, np.zeros(len(texts), np.bool_))
    in_range = (given.present & (given.values >= 0) & (given.values <= 32)) | ~has_length
    dotted = pc.match_substring(texts, ".").to_numpy(zero_copy_only=False)  # a bare number is no address
    bad = ~ipv6 & ~(found.present & in_range & dotted)
    length = np.where(ipv6 | bad, 32, length)
    network = np.where(ipv6 | bad, 0, found.values)
    return Parsed(network >> (32 - length) << (32 - length), length, ipv6, bad)


def networks_of_range(first: str, last: str) -> list[str]:
    """The networks that make up the addresses from `first` to `last`. Raises ValueError."""
    ends = (ipaddress.ip_address(first), ipaddress.ip_address(last))
    return [str(network) for network in ipaddress.summarize_address_range(*ends)]


def as_text(network: int, length: int) -> str:
    return str(ipaddress.IPv4Network((network, length)))
