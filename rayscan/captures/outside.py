"""From outside to inside: what a telescope is for, and what of a capture is something else.

A source in private or otherwise special space (RFC 6890) cannot have sent a packet over the Internet: the
address is forged, or the packet is from the local net. A source within the telescope is forged too, or is
somebody's own traffic in the capture. Such flows say nothing of who scans, so they are left out, counted by
reason. Flows without a recorded destination are kept: nothing says that they went elsewhere.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rayscan.captures.columns import Batch, Reject
from rayscan.captures.networks import Networks, parse
from rayscan.config import CapturesConfig
from rayscan.schema import MISSING

RESERVED = {
    "0.0.0.0/8": "of this network (RFC 791)",
    "10.0.0.0/8": "private (RFC 1918)",
    "100.64.0.0/10": "shared by a provider (RFC 6598)",
    "127.0.0.0/8": "of the host itself (RFC 1122)",
    "169.254.0.0/16": "link-local (RFC 3927)",
    "172.16.0.0/12": "private (RFC 1918)",
    "192.0.0.0/24": "of protocols (RFC 6890)",
    "192.0.2.0/24": "of documentation (RFC 5737)",
    "192.168.0.0/16": "private (RFC 1918)",
    "198.18.0.0/15": "of benchmarks (RFC 2544)",
    "198.51.100.0/24": "of documentation (RFC 5737)",
    "203.0.113.0/24": "of documentation (RFC 5737)",
    "224.0.0.0/4": "multicast (RFC 5771)",
    "240.0.0.0/4": "reserved (RFC 1112)",
}
"""Space that no source on the Internet can have: IANA's special-purpose registry without what is globally
reachable, and multicast."""


class Outside:
    """What one configuration keeps of a capture."""

    def __init__(self, config: CapturesConfig) -> None:
        self._reserved = _networks(tuple(RESERVED)) if config.reserved == "reject" else None
        self._telescope = _networks(config.telescope) if config.telescope else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch without what did not come from outside to inside, and a reject for each reason."""
        src = batch.flows["src"].to_numpy()
        lost = np.zeros(len(src), np.bool_)
        reasons: list[Reject] = []
        if self._reserved is not None:
            place = self._reserved.longest(src)
            lost |= place >= 0
            counts = np.bincount(place[lost], minlength=len(RESERVED))
            reasons += [
                Reject(f"source in {network}, {what}", None, int(count), "left out")
                for (network, what), count in zip(RESERVED.items(), counts, strict=True)
                if count
            ]
        if self._telescope is not None:
            dst = batch.flows["dst"].fill_null(MISSING).to_numpy()
            inside = self._telescope.longest(src) >= 0
            elsewhere = (dst != MISSING) & (self._telescope.longest(np.maximum(dst, 0)) < 0)
            for reason, rows in (
                ("source in the telescope itself", inside),
                ("destination outside the telescope", elsewhere),
            ):
                new = rows & ~lost
                reasons += [Reject(reason, None, int(new.sum()), "left out")] if new.any() else []
                lost |= new
        if not lost.any():
            return batch
        return batch._replace(flows=batch.flows.filter(pa.array(~lost)), rejects=[*batch.rejects, *reasons])


def _networks(texts: tuple[str, ...]) -> Networks:
    parsed = parse(pa.array(texts, pa.string()))
    return Networks(parsed.network, parsed.length)
