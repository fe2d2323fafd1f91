"""Marks that scanning tools leave in their packets, as pure vectorised rules.

| tool    | rule                                              | who else applies it                          |
|---------|---------------------------------------------------|----------------------------------------------|
| ZMap    | IP id is 54321                                    | CAIDA greynetanalysis, Merit darknet-events  |
| masscan | TCP, IP id is (dst ^ dst_port ^ seq) mod 2^16     | the same                                     |
| Mirai   | TCP, sequence number is the destination address   | the same                                     |

ZMap draws a random IP id since v4.1.0 (zmap/zmap#798, 2024), so its rule finds older builds only. The
masscan rule holds by chance for one packet in 65,536. So a mark is a fact about a packet, and what is said
of a source is the share of its packets that carry it, never a yes or no.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayscan.captures.values import Ints, Mask
from rayscan.schema import FINGERPRINTS, MISSING

ZMAP_IP_ID = 54_321
TCP = 6


def is_zmap(ip_id: Ints) -> Mask:
    return np.equal(ip_id, ZMAP_IP_ID)


def is_masscan(ip_id: Ints, dst: Ints, dst_port: Ints, tcp_seq: Ints) -> Mask:
    """For TCP packets whose four fields are all recorded."""
    expected: Ints = (dst ^ dst_port ^ tcp_seq) & 0xFFFF
    return np.equal(ip_id, expected)


def is_mirai(tcp_seq: Ints, dst: Ints) -> Mask:
    """For TCP packets whose two fields are recorded."""
    return np.equal(tcp_seq, dst)


def fingerprints(
    proto: Ints, dst: Ints, dst_port: Ints, ip_id: Ints, tcp_seq: Ints
) -> tuple[NDArray[np.int16], Mask]:
    """Bits of `schema.FINGERPRINTS` for each packet, and whether any rule could be asked of it.

    All arguments are int64 of shape (N,), with MISSING (-1) where a field is not recorded. A rule whose
    fields are missing leaves its bit 0; where that is so of every rule, the second array is False and the
    bits mean nothing.
    """
    has_id, has_dst = ip_id != MISSING, dst != MISSING
    has_seq = (tcp_seq != MISSING) & (proto == TCP) & has_dst
    bits = np.where(has_id & is_zmap(ip_id), FINGERPRINTS["zmap"], 0)
    bits |= np.where(has_seq & is_mirai(tcp_seq, dst), FINGERPRINTS["mirai"], 0)
    masscan = has_seq & has_id & (dst_port != MISSING) & is_masscan(ip_id, dst, dst_port, tcp_seq)
    bits |= np.where(masscan, FINGERPRINTS["masscan"], 0)
    return bits.astype(np.int16), has_id | has_seq
